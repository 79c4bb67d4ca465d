// vocab_head on the CPU: a few numbers per row of logits = cap(scale * (hidden @ weight.T + bias)) / temperature,
// and their exact gradients. Logits are computed in tiles.
//
// Forward: in one parallel region, each thread takes cells (see blocks.h) and reduces each tile of products while it is
// in cache. Backward, one tile of all rows at a time: one parallel region recomputes the tile and replaces it by its
// gradient, the next multiplies it with hidden and with the weight. Each output has one owner, so results do not depend
// on timing.
//
// The forward stores the products of the first rows, up to logits_budget bytes. For these rows the backward reads the
// products instead of recomputing them.
#include <bit>

#include "blocks.h"

namespace sukhops {

// The logit of raw = hidden . weight + bias: scale * raw, or bound * tanh(scale * raw) if capped. `slope` is its
// derivative at raw = 0.
template <class A>
struct LogitCurve {
  A scale, bound, slope;
  bool capped;

  LogitCurve(std::optional<double> softcap, double by, double temperature)
      : scale(softcap ? by / *softcap : by / temperature), bound(softcap ? *softcap / temperature : 0),
        slope(by / temperature), capped(softcap.has_value()) {}
};

template <class A>
struct ForwardRows {
  A* tile;         // [rows, width]
  int64_t stride;  // between rows of the tile
  int64_t row0, v0, width, targets, k, depth;
  const A* bias;  // of the tile's columns, or null
  LogitCurve<A> curve;
  const int64_t* target;  // [N, targets]
  A* target_logit;        // [N, targets]
  A* top_value;           // [N, k]; this field and those below belong to one part
  int64_t* top_index;     // [N, k]
  A* maximum;             // [N]
  double* sum;            // [N]
  double* moments;        // [N, 3] or null
  A* mean;                // [N, depth] or null
  A mean_scale;           // factor of `mean` against overflow: a power of two
};

template <class A>
struct BackwardRows {
  A* tile;                  // [rows, width]
  int64_t stride;           // between rows of the tile
  const A* kept;            // [., vocab] products that the forward stored, or null if they are in the tile
  const int64_t* kept_row;  // [N] row of `kept`
  int64_t vocab, row0, v0, width, picks;
  const A* bias;
  LogitCurve<A> curve;
  const A *maximum, *log_sum, *entropy, *grad_log_sum, *grad_entropy;  // [N]
  const int64_t* pick;  // [N, picks] vocabulary entries: targets, then top k
  const A* grad_pick;   // [N, picks]
};

}  // namespace sukhops

#define SUKHOPS_BODY "vocab_head_rows.h"
#include "isa.h"

namespace sukhops {
namespace {

// checks every target and lists the active rows: those with at least one target that is not ignored; all rows if K is 0
std::vector<int64_t> active_rows(const Tensor& target, int64_t v, int64_t ignore_index) {
  const int64_t n = target.size(0), k = target.size(1);
  const int64_t* t = data<int64_t>(target);
  std::vector<int64_t> rows;
  rows.reserve(n);
  for (int64_t i = 0; i < n; ++i) {
    bool any = k == 0;
    for (int64_t j = 0; j < k; ++j) {
      const int64_t y = t[i * k + j];
      if (y == ignore_index) continue;
      STD_TORCH_CHECK(
          y >= 0 && y < v, "target: expected values in [0, ", v, ") or ignore_index (", ignore_index,
          "), got ", y, " at row ", i);
      any = true;
    }
    if (any) rows.push_back(i);
  }
  return rows;
}

// ---------------------------------------------------------------- forward

// mean [N, D] = tiles @ weight, summed over the vocabulary. pass(v0, width, tile, lo, hi) first replaces the products
// in rows [lo, hi) of a tile by the factors of the weight, and rescales mean to the new maximum. So tiles are processed
// one after the other.
template <class A, class F>
void accumulate_mean(const Matrix& hidden, const Matrix& weight, const F& pass, A* mean, ScalarType acc) {
  const int64_t n = hidden.rows, v = weight.rows, d = weight.cols;
  const TilePlan tiling(n, v, sizeof(A));
  const int64_t most = std::min(tiling.width, kMaxWidth);
  std::vector<A> tile(n * most);
  for (int64_t v0 = 0, width; v0 < v && n > 0; v0 += width) {
    width = std::min(most, v - v0);
    const Matrix z(tile.data(), acc, n, width, width), w = weight.submatrix(v0, 0, width, d);
    multiply_all({{z, hidden, w.transposed()}});
    torch::stable::parallel_for(0, n, grain(width),
                                [&](int64_t lo, int64_t hi) { pass(v0, width, tile.data(), lo, hi); });
    multiply_all({{Matrix(mean, acc, n, d, d), z, w, v0 > 0}});
  }
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class A>
Outputs forward(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const std::optional<Tensor>& bias, int64_t k,
    bool statistics, LogitCurve<A> curve, int64_t ignore_index, int64_t logits_budget, bool keep_mean) {
  const int64_t v = weight.size(0), d = weight.size(1), targets = target.size(1);
  const ScalarType acc = acc_dtype(hidden.scalar_type());
  const std::vector<int64_t> rows = active_rows(target, v, ignore_index);
  const int64_t n = rows.size(), all = hidden.size(0);

  const Tensor h = gather_rows(hidden, rows), b = as_acc(bias, acc, hidden);
  std::vector<int64_t> picked(n * targets);
  std::vector<A> logit(n * targets);
  for (int64_t i = 0; i < n; ++i)
    std::copy_n(data<int64_t>(target) + rows[i] * targets, targets, picked.data() + i * targets);
  const Tensor mean = empty({keep_mean ? n : 0, d}, acc, hidden);
  const A mean_scale = A(1) / std::bit_ceil<uint64_t>(v);  // sums over the vocabulary do not exceed max |weight|
  const Tensor logits = empty({std::min<int64_t>(all, logits_budget / (v * sizeof(A))), v}, acc, hidden);
  const int64_t kept = std::min(n, logits.size(0));
  const PartPlan plan(n, v, sizeof(A), 1, k + 3 * statistics);
  RowStats<A> stats(n, k, keep_mean ? 1 : plan.parts, statistics);
  const Matrix x(h), w(weight);
  const auto pass = [&](int64_t part, int64_t v0, int64_t width, A* tile, int64_t stride, int64_t row0) {
    const int64_t from = part * n;
    return ForwardRows<A>{tile, stride, row0, v0, width, targets, k, d, bias ? data<A>(b) + v0 : nullptr, curve,
                          picked.data(), logit.data(), stats.value.data() + from * k, stats.index.data() + from * k,
                          stats.maximum.data() + from, stats.sum.data() + from,
                          statistics ? stats.moments.data() + 3 * from : nullptr, keep_mean ? data<A>(mean) : nullptr,
                          mean_scale};
  };
  count_products(n == 0 ? 0 : 1 + keep_mean);
  if (keep_mean) {
    accumulate_mean(x, w, [&](int64_t v0, int64_t width, A* tile, int64_t lo, int64_t hi) {
      SUKHOPS_BEST(forward_rows<A>)(pass(0, v0, width, tile, width, 0), lo, hi);
    }, data<A>(mean), acc);
  } else {
    each_product(plan, x, w, acc, kept, data<A>(logits), [&](A* tile, int64_t stride, int64_t row0, int64_t count,
                                                             int64_t part, int64_t v0, int64_t width) {
      SUKHOPS_BEST(forward_rows<A>)(pass(part, v0, width, tile, stride, row0), 0, count);
    });
  }

  const Tensor maximum = zeros({all}, acc, hidden), log_sum = zeros({all}, acc, hidden);
  const Tensor target_logit = zeros({all, targets}, acc, hidden);
  const Tensor top_value = zeros({all, k}, acc, hidden);
  const Tensor top_index = zeros({all, k}, ScalarType::Long, hidden);
  const auto wanted = [&] { return statistics ? zeros({all}, acc, hidden) : empty({0}, acc, hidden); };
  const Tensor entropy = wanted(), log_sum_sq = wanted(), mean_logit = wanted();
  const Tensor mean_weight = keep_mean ? zeros({all, d}, acc, hidden) : empty({0}, acc, hidden);
  parallel_rows(n, grain(d), [&](int64_t i) {
    const int64_t r = rows[i];
    const A log = data<A>(log_sum)[r] = stats.merge_parts(i);
    data<A>(maximum)[r] = stats.maximum[i];
    std::copy_n(logit.data() + i * targets, targets, data<A>(target_logit) + r * targets);
    finish_top(stats.value.data() + i * k, stats.index.data() + i * k, k, log != log);
    std::copy_n(stats.value.data() + i * k, k, data<A>(top_value) + r * k);
    std::copy_n(stats.index.data() + i * k, k, data<int64_t>(top_index) + r * k);
    for (int64_t j = 0; keep_mean && j < d; ++j)
      data<A>(mean_weight)[r * d + j] = static_cast<A>(data<A>(mean)[i * d + j] / (mean_scale * stats.sum[i]));
    if (!statistics) return;
    const double* m = &stats.moments[3 * i];
    const double log_of_sum = std::log(stats.sum[i]);
    data<A>(entropy)[r] = static_cast<A>(log_of_sum - m[0] / stats.sum[i]);
    data<A>(log_sum_sq)[r] = static_cast<A>(std::log(m[1]) - 2 * log_of_sum);
    data<A>(mean_logit)[r] = static_cast<A>(m[2] / v);
  });
  return {maximum, log_sum, target_logit, top_value, top_index, entropy, log_sum_sq, mean_logit, mean_weight, logits};
}

// ---------------------------------------------------------------- backward

// The upstream gradients, grouped by cost. A row whose log-sum-exp or entropy has a nonzero gradient needs its whole
// softmax (dense). Any other row needs only the weight rows of its picks, that is its targets and its top k (sparse).
template <class A>
struct Upstream {
  int64_t picks;               // picks per row: targets, then top k
  std::vector<int64_t> dense;  // rows of hidden
  std::vector<int64_t> active_index;  // [dense] index among the active rows
  std::vector<A> grad_log_sum, grad_entropy;  // [dense]
  std::vector<int64_t> pick;                  // [dense, picks]
  std::vector<A> grad_pick;                   // [dense, picks]
  std::vector<Pick<A>> sparse;

  Upstream(const std::vector<int64_t>& rows, const Tensor& target, const Tensor& top_index,
           const std::optional<Tensor>& g_log_sum, const std::optional<Tensor>& g_target,
           const std::optional<Tensor>& g_top, const std::optional<Tensor>& g_entropy, int64_t ignore_index,
           bool all_sparse) {
    const int64_t targets = target.size(1), k = top_index.size(1);
    picks = targets + k;
    for (size_t i = 0; i < rows.size(); ++i) {
      const int64_t r = rows[i];
      const A of_sum = g_log_sum ? data<A>(*g_log_sum)[r] : A(0);
      const A of_entropy = g_entropy ? data<A>(*g_entropy)[r] : A(0);
      const bool whole = of_sum != 0 || of_entropy != 0;  // true for NaN
      if (whole) {
        dense.push_back(r);
        active_index.push_back(i);
        grad_log_sum.push_back(of_sum);
        grad_entropy.push_back(of_entropy);
      }
      for (int64_t p = 0; p < picks; ++p) {
        const bool is_target = p < targets;
        const int64_t at = is_target ? r * targets + p : r * k + p - targets;
        const int64_t entry = data<int64_t>(is_target ? target : top_index)[at];
        const auto& upstream = is_target ? g_target : g_top;
        const bool counts = upstream && !(is_target && entry == ignore_index);
        const A grad = counts ? data<A>(*upstream)[at] : A(0);
        if (all_sparse || !whole) {
          if (grad != 0) sparse.push_back({entry, r, grad});
        } else {
          pick.push_back(counts ? entry : -1);
          grad_pick.push_back(grad);
        }
      }
    }
  }
};

// turns the gradient of each picked logit into the gradient of its product hidden . weight
template <class A, class S>
void backprop_curve(
    std::vector<Pick<A>>& picks, const Tensor& hidden, const Tensor& weight, const A* bias, LogitCurve<A> curve) {
  const int64_t d = weight.size(1), hs = hidden.stride(0), hc = hidden.stride(1);
  const int64_t ws = weight.stride(0), wc = weight.stride(1);
  parallel_rows(picks.size(), grain(d), [&](int64_t i) {
    Pick<A>& p = picks[i];
    p.grad *= curve.slope;
    if (!curve.capped) return;
    const S *h = data<S>(hidden) + p.row * hs, *w = data<S>(weight) + p.entry * ws;
    A raw = bias ? bias[p.entry] : A(0);
    for (int64_t j = 0; j < d; ++j) raw += static_cast<A>(h[j * hc]) * static_cast<A>(w[j * wc]);
    const A y = std::tanh(curve.scale * raw);
    p.grad *= 1 - y * y;
  });
}

// The gradients of the dense rows: recomputes or reads the products of each tile, replaces them by their gradient, and
// multiplies it with hidden and with the weight. grad_hidden [dense, D] and grad_bias [V] have the accumulation dtype,
// grad_weight has the dtype of the weight. An undefined tensor is not computed.
template <class A>
void backward_dense(
    const Upstream<A>& up, const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Tensor& maximum,
    const Tensor& log_sum, const Tensor& entropy, const Tensor& logits, LogitCurve<A> curve, const Tensor& grad_hidden,
    const Tensor& grad_weight, const Tensor& grad_bias) {
  const int64_t n = up.dense.size(), v = weight.size(0), d = weight.size(1);
  const ScalarType acc = acc_dtype(hidden.scalar_type());
  const Tensor h = gather_rows(hidden, up.dense);
  std::vector<A> row_maximum(n), row_log_sum(n), row_entropy(n);
  for (int64_t i = 0; i < n; ++i) {
    row_maximum[i] = data<A>(maximum)[up.dense[i]];
    row_log_sum[i] = data<A>(log_sum)[up.dense[i]];
    if (entropy.numel()) row_entropy[i] = data<A>(entropy)[up.dense[i]];
  }

  const int64_t kept =
      std::lower_bound(up.active_index.begin(), up.active_index.end(), logits.size(0)) - up.active_index.begin();
  const TilePlan tiling(n, v, sizeof(A));
  const Tensor tile = empty({n * tiling.width}, acc, hidden);
  const Matrix x(h), w(weight);
  count_products((kept < n) + grad_hidden.defined() + grad_weight.defined());
  for (int64_t v0 = 0, width; v0 < v; v0 += width) {
    width = std::min(tiling.width, v - v0);
    const Matrix z(tile.data_ptr(), acc, n, width, width), block = w.submatrix(v0, 0, width, d);
    tiling.each(width, kept, [&](int64_t row0, int64_t count, int64_t, int64_t col, int64_t cols) {
      const Matrix cell = z.submatrix(row0, col, count, cols);
      if (row0 >= kept) multiply({cell, x.submatrix(row0, 0, count, d), block.submatrix(col, 0, cols, d).transposed()});
      const BackwardRows<A> b{
          static_cast<A*>(cell.data), width, row0 < kept ? data<A>(logits) : nullptr, up.active_index.data(), v, row0,
          v0 + col, cols, up.picks, bias.numel() ? data<A>(bias) + v0 + col : nullptr, curve, row_maximum.data(),
          row_log_sum.data(), row_entropy.data(), up.grad_log_sum.data(), up.grad_entropy.data(), up.pick.data(),
          up.grad_pick.data()};
      SUKHOPS_BEST(backward_rows<A>)(b, 0, count);
    });
    std::vector<Product> products;
    if (grad_weight.defined()) products.push_back({Matrix(grad_weight).submatrix(v0, 0, width, d), z.transposed(), x});
    if (grad_hidden.defined()) products.push_back({Matrix(grad_hidden), z, block, v0 > 0});
    multiply_all(products);
    if (grad_bias.defined()) add_columns(data<A>(grad_bias) + v0, matrix(tile, n, width));
  }
}

template <class A>
std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const std::optional<Tensor>& bias,
    const Tensor& top_index, const Tensor& maximum, const Tensor& log_sum, const Tensor& entropy,
    const Tensor& mean_weight, const Tensor& logits, const std::optional<Tensor>& g_log_sum,
    const std::optional<Tensor>& g_target, const std::optional<Tensor>& g_top, const std::optional<Tensor>& g_entropy,
    LogitCurve<A> curve, int64_t ignore_index, bool need_hidden, bool need_weight, bool need_bias) {
  const int64_t all = hidden.size(0), v = weight.size(0), d = weight.size(1);
  const ScalarType dtype = hidden.scalar_type(), acc = acc_dtype(dtype);
  const A* of_entropy = g_entropy ? data<A>(*g_entropy) : nullptr;
  const bool any_entropy_grad = of_entropy && std::any_of(of_entropy, of_entropy + all, [](A g) { return g != 0; });
  const bool use_mean = mean_weight.dim() == 2 && !need_weight && !need_bias && !any_entropy_grad;
  Upstream<A> up(active_rows(target, v, ignore_index), target, top_index, g_log_sum, g_target, g_top, g_entropy,
                 ignore_index, use_mean);
  const int64_t n = up.dense.size();
  const Tensor b = as_acc(bias, acc, hidden);
  const bool dense = n > 0 && !use_mean;

  Tensor dh, dw, db, dh_dense;
  if (need_hidden) {
    const bool direct = dense && n == all && dtype == acc;
    const ScalarType summed = use_mean ? acc : dtype;  // two gradients are added to dh then: only their sum is rounded
    dh = direct ? empty({all, d}, summed, hidden) : zeros({all, d}, summed, hidden);
    if (dense) dh_dense = direct ? dh : empty({n, d}, acc, hidden);
  }
  if (need_weight) dw = dense ? empty({v, d}, dtype, hidden) : zeros({v, d}, dtype, hidden);
  if (need_bias) db = zeros({v}, acc, hidden);
  if (dense) backward_dense<A>(up, hidden, weight, b, maximum, log_sum, entropy, logits, curve, dh_dense, dw, db);

  with_type(dtype, [&](auto s) {
    using S = decltype(s);
    if (need_hidden && dense && (n < all || dtype != acc)) {
      parallel_rows(n, grain(d), [&](int64_t i) {
        std::copy_n(data<A>(dh_dense) + i * d, d, data<S>(dh) + up.dense[i] * d);
      });
    }
    if (need_hidden && use_mean) {
      parallel_rows(n, grain(d), [&](int64_t i) {
        const int64_t r = up.dense[i];
        const A by = up.grad_log_sum[i] * curve.slope;
        for (int64_t j = 0; j < d; ++j) data<A>(dh)[r * d + j] = by * data<A>(mean_weight)[r * d + j];
      });
    }
    if (up.sparse.empty()) return;
    const auto row = [](const Pick<A>& p) { return p.row; };
    const auto entry = [](const Pick<A>& p) { return p.entry; };
    backprop_curve<A, S>(up.sparse, hidden, weight, bias ? data<A>(b) : nullptr, curve);
    if (need_hidden && use_mean) scatter_add<A, S, A>(up.sparse, weight, dh, row, entry);
    if (need_hidden && !use_mean) scatter_add<A, S, S>(up.sparse, weight, dh, row, entry);
    if (!need_weight && !need_bias) return;
    std::stable_sort(up.sparse.begin(), up.sparse.end(),
                     [](const Pick<A>& p, const Pick<A>& q) { return p.entry < q.entry; });
    if (need_weight) scatter_add<A, S, S>(up.sparse, hidden, dw, entry, row);
    for (const Pick<A>& p : up.sparse)
      if (need_bias) data<A>(db)[p.entry] += p.grad;
  });
  if (need_hidden && dtype != acc) dh = torch::stable::to(dh, dtype);
  if (need_bias && dtype != acc) db = torch::stable::to(db, dtype);
  const auto or_none = [&](const Tensor& t) { return t.defined() ? t : empty({0}, dtype, hidden); };
  return {or_none(dh), or_none(dw), or_none(db)};
}

// ---------------------------------------------------------------- registration

Outputs vocab_head(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const std::optional<Tensor>& bias,
    int64_t k, bool statistics, std::optional<double> softcap, double scale, double temperature, int64_t ignore_index,
    int64_t logits_budget, bool need_hidden, bool need_weight, bool need_bias) {
  const bool keep_mean = need_hidden && !need_weight && !need_bias;
  const auto run = [&](auto a) {
    using A = decltype(a);
    return forward<A>(hidden, weight, torch::stable::contiguous(target), bias, k, statistics,
                      LogitCurve<A>(softcap, scale, temperature), ignore_index,
                      need_weight || need_bias ? logits_budget : 0, keep_mean);
  };
  return hidden.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

std::tuple<Tensor, Tensor, Tensor> vocab_head_backward(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const std::optional<Tensor>& bias,
    const Tensor& topk_index, const Tensor& maximum, const Tensor& log_sum, const Tensor& entropy,
    const Tensor& mean_weight, const Tensor& logits, const std::optional<Tensor>& grad_log_sum,
    const std::optional<Tensor>& grad_target, const std::optional<Tensor>& grad_topk,
    const std::optional<Tensor>& grad_entropy, std::optional<double> softcap, double scale, double temperature,
    int64_t ignore_index, bool need_hidden, bool need_weight, bool need_bias) {
  const auto contiguous = [](const std::optional<Tensor>& t) {
    return t ? std::optional(torch::stable::contiguous(*t)) : t;
  };
  const auto run = [&](auto a) {
    using A = decltype(a);
    return backward<A>(hidden, weight, torch::stable::contiguous(target), bias, topk_index, maximum, log_sum, entropy,
                       mean_weight, logits, contiguous(grad_log_sum), contiguous(grad_target), contiguous(grad_topk),
                       contiguous(grad_entropy), LogitCurve<A>(softcap, scale, temperature), ignore_index, need_hidden,
                       need_weight, need_bias);
  };
  return hidden.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

}  // namespace
}  // namespace sukhops

STABLE_TORCH_LIBRARY_IMPL(sukhops, CPU, m) {
  m.impl("vocab_head", TORCH_BOX(&sukhops::vocab_head));
  m.impl("vocab_head_backward", TORCH_BOX(&sukhops::vocab_head_backward));
}
