// vocab_head on the CPU: a few numbers per row of logits = cap(scale * (hidden @ weight.T + bias)),
// and their exact gradients, from tiles of logits that are never kept.
//
// The vocabulary is walked in blocks. Each block is one product into a reused tile, then one pass per row while the tile
// is in cache. The backward recomputes the tile, turns it into the gradient in place and finishes that block of
// grad_weight: one owner per output, so deterministic. The products of the first rows, as many as a budget holds, go to
// memory that the backward reads in place of the recomputation.
#include "blocks.h"

namespace sukhops {

template <class A>
struct ForwardRows {
  A* tile;         // [rows, width]
  int64_t stride;  // of its rows
  int64_t row0, v0, width, targets, k, depth;
  const A* bias;  // of this block, or null
  A scale, softcap;
  const int64_t* target;  // [N, targets]
  A* target_logit;        // [N, targets]
  A* top_value;           // [N, k]
  int64_t* top_index;     // [N, k]
  A* maximum;             // [N]
  double* sum;            // [N]
  A* mean;                // [N, depth] or null
};

template <class A>
struct BackwardRows {
  A* tile;                  // [rows, width]
  const A* kept;            // [., vocab], or null: the products are in the tile
  const int64_t* kept_row;  // [N], which of them
  int64_t vocab, row0, v0, width, picks;
  const A* bias;
  A scale, softcap;
  const A* lse;         // [N]
  const A* grad_lse;    // [N]
  const int64_t* pick;  // [N, picks]: targets, then top k
  const A* grad_pick;   // [N, picks]
};

}  // namespace sukhops

#define SUKHOPS_BODY "vocab_head_rows.h"
#include "isa.h"

namespace sukhops {
namespace {

// rows [lo, hi) of a tile whose gradients are stored as A, or as bfloat16 where A is float
template <class A>
void run_rows(const ForwardRows<A>& f, bool bfloat16, int64_t lo, int64_t hi) {
  if constexpr (std::is_same_v<A, float>) {
    if (bfloat16) return SUKHOPS_BEST(forward_rows<uint16_t, A>)(f, lo, hi);
  }
  SUKHOPS_BEST(forward_rows<A, A>)(f, lo, hi);
}

template <class A>
void run_rows(const BackwardRows<A>& b, bool bfloat16, int64_t lo, int64_t hi) {
  if constexpr (std::is_same_v<A, float>) {
    if (bfloat16) return SUKHOPS_BEST(backward_rows<uint16_t, A>)(b, lo, hi);
  }
  SUKHOPS_BEST(backward_rows<A, A>)(b, lo, hi);
}

// checks every target and lists the rows with at least one that is not ignored; all rows if K is 0
std::vector<int64_t> kept_rows(const Tensor& target, int64_t v, int64_t ignore_index) {
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

// f(row, count) for tiles of up to `most` of n rows, none of which has both kept and other rows
template <class F>
void each_row_tile(int64_t n, int64_t kept, int64_t most, const F& f) {
  for (int64_t row = 0, count; row < n; row += count) {
    count = std::min(most, (row < kept ? kept : n) - row);
    f(row, count);
  }
}

// ---------------------------------------------------------------- forward

template <class A>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const std::optional<Tensor>& bias,
    int64_t k, A softcap, A scale, int64_t ignore_index, int64_t logits_budget, bool keep_mean) {
  const int64_t v = weight.size(0), d = weight.size(1), targets = target.size(1);
  const ScalarType acc = acc_dtype(hidden.scalar_type());
  const ScalarType product = product_dtype(hidden.scalar_type());
  const std::vector<int64_t> rows = kept_rows(target, v, ignore_index);
  const int64_t n = rows.size(), all = hidden.size(0);

  const Tensor h = gather_rows(hidden, rows, product);
  const Tensor b = as_acc(bias, acc, hidden);
  std::vector<int64_t> picked(n * targets), index(n * k, -1);
  std::vector<A> logit(n * targets), value(n * k, -INFINITY), maximum(n, -INFINITY);
  std::vector<double> sum(n);
  for (int64_t i = 0; i < n; ++i)
    std::copy_n(data<int64_t>(target) + rows[i] * targets, targets, &picked[i * targets]);
  const Tensor mean = empty({keep_mean ? n : 0, d}, acc, hidden);
  const Tensor logits = empty({std::min<int64_t>(all, logits_budget / (v * sizeof(A))), v}, acc, hidden);
  const int64_t kept = std::min(n, logits.size(0));

  const Tiling tiling(n, v, d, sizeof(A));
  const Tile tile(tiling, acc, product, hidden);
  WeightBlocks blocks(weight, product, tiling.width);
  Tensor scratch;
  ForwardRows<A> f{nullptr, 0, 0, 0, 0, targets, k, d, nullptr, scale, softcap,
                   picked.data(), logit.data(), value.data(), index.data(), maximum.data(),
                   sum.data(), keep_mean ? data<A>(mean) : nullptr};
  for (f.v0 = 0; f.v0 < v && n > 0; f.v0 += tiling.width) {
    f.width = std::min(tiling.width, v - f.v0);
    f.bias = bias ? data<A>(b) + f.v0 : nullptr;
    const Tensor block = blocks.rows(f.v0, f.width);
    each_row_tile(n, kept, tiling.rows, [&](int64_t row0, int64_t count) {
      f.row0 = row0;
      f.tile = row0 < kept ? data<A>(logits) + row0 * v + f.v0 : data<A>(tile.buffer);
      f.stride = row0 < kept ? v : f.width;
      mm_out(matrix_at(f.tile, count, f.width, f.stride, acc, hidden), rows_of(h, row0, count), transposed(block));
      torch::stable::parallel_for(0, count, grain(f.width), [&](int64_t lo, int64_t hi) {
        run_rows(f, product == ScalarType::BFloat16, lo, hi);
      });
      if (keep_mean)
        accumulate(rows_of(mean, row0, count), tile.gradients(count, f.width), block, f.v0 == 0, scratch);
    });
  }

  const Tensor lse = zeros({all}, acc, hidden), target_logit = zeros({all, targets}, acc, hidden);
  const Tensor top_value = zeros({all, k}, acc, hidden);
  const Tensor top_index = zeros({all, k}, ScalarType::Long, hidden);
  const Tensor mean_weight = keep_mean ? zeros({all, d}, acc, hidden) : zeros({0}, acc, hidden);
  parallel_rows(n, grain(d), [&](int64_t i) {
    const int64_t r = rows[i];
    const A z = data<A>(lse)[r] = static_cast<A>(maximum[i] + std::log(sum[i]));
    std::copy_n(&logit[i * targets], targets, data<A>(target_logit) + r * targets);
    finish_top(&value[i * k], &index[i * k], k, z != z);
    std::copy_n(&value[i * k], k, data<A>(top_value) + r * k);
    std::copy_n(&index[i * k], k, data<int64_t>(top_index) + r * k);
    for (int64_t j = 0; keep_mean && j < d; ++j)
      data<A>(mean_weight)[r * d + j] = static_cast<A>(data<A>(mean)[i * d + j] / sum[i]);
  });
  return {lse, target_logit, top_value, top_index, mean_weight, logits};
}

// ---------------------------------------------------------------- backward

// The upstream gradients, sorted by what they cost. A row whose lse has a gradient needs its whole
// softmax (dense); any other row only the few weight rows it picked (sparse).
template <class A>
struct Upstream {
  int64_t picks;               // targets, then top k, of a row
  std::vector<int64_t> dense;  // rows of hidden
  std::vector<int64_t> place;  // [dense], among the rows that count
  std::vector<A> grad_lse;     // [dense]
  std::vector<int64_t> pick;   // [dense, picks]
  std::vector<A> grad_pick;    // [dense, picks]
  std::vector<Pick<A>> sparse;

  Upstream(const std::vector<int64_t>& rows, const Tensor& target, const Tensor& top_index,
           const std::optional<Tensor>& g_lse, const std::optional<Tensor>& g_target,
           const std::optional<Tensor>& g_top, int64_t ignore_index, bool all_sparse) {
    const int64_t targets = target.size(1), k = top_index.size(1);
    picks = targets + k;
    for (size_t i = 0; i < rows.size(); ++i) {
      const int64_t r = rows[i];
      const A g = g_lse ? data<A>(*g_lse)[r] : A(0);
      const bool whole = g != 0;  // true for NaN
      if (whole) {
        dense.push_back(r);
        place.push_back(i);
        grad_lse.push_back(g);
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

// turns the gradient of each picked logit into that of its product hidden . weight
template <class A, class S>
void through_cap(
    std::vector<Pick<A>>& picks, const Tensor& hidden, const Tensor& weight, const A* bias, A softcap, A scale) {
  const int64_t d = weight.size(1), hs = hidden.stride(0), hc = hidden.stride(1);
  const int64_t ws = weight.stride(0), wc = weight.stride(1);
  parallel_rows(picks.size(), grain(d), [&](int64_t i) {
    Pick<A>& p = picks[i];
    p.grad *= scale;
    if (softcap == 0) return;
    const S *h = data<S>(hidden) + p.row * hs, *w = data<S>(weight) + p.entry * ws;
    A raw = bias ? bias[p.entry] : A(0);
    for (int64_t j = 0; j < d; ++j) raw += static_cast<A>(h[j * hc]) * static_cast<A>(w[j * wc]);
    const A y = std::tanh(scale * raw / softcap);
    p.grad *= 1 - y * y;
  });
}

// The dense rows: every tile recomputed or read, turned into its gradient, and used for all that is needed.
// grad_hidden [dense, D] and grad_bias [V] are in the accumulation dtype, grad_weight in the weight's.
template <class A>
void backward_dense(
    const Upstream<A>& up, const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Tensor& lse,
    const Tensor& logits, A softcap, A scale, const Tensor& grad_hidden, const Tensor& grad_weight,
    const Tensor& grad_bias) {
  const int64_t n = up.dense.size(), v = weight.size(0), d = weight.size(1);
  const ScalarType acc = acc_dtype(hidden.scalar_type());
  const ScalarType product = product_dtype(hidden.scalar_type());
  const Tensor h = gather_rows(hidden, up.dense, product);
  std::vector<A> row_lse(n);
  for (int64_t i = 0; i < n; ++i) row_lse[i] = data<A>(lse)[up.dense[i]];

  const int64_t kept = std::lower_bound(up.place.begin(), up.place.end(), logits.size(0)) - up.place.begin();
  const Tiling tiling(n, v, d, sizeof(A));
  const Tile tile(tiling, acc, product, hidden);
  WeightBlocks blocks(weight, product, tiling.width);
  WeightGradient dw(grad_weight, product, acc, tiling.width, tiling.rows >= n && (kept == 0 || kept == n));
  Tensor scratch;

  BackwardRows<A> b{data<A>(tile.buffer), nullptr, up.place.data(), v, 0, 0, 0, up.picks, nullptr, scale, softcap,
                    row_lse.data(), up.grad_lse.data(), up.pick.data(), up.grad_pick.data()};
  for (b.v0 = 0; b.v0 < v; b.v0 += tiling.width) {
    b.width = std::min(tiling.width, v - b.v0);
    b.bias = bias.numel() ? data<A>(bias) + b.v0 : nullptr;
    const Tensor block = blocks.rows(b.v0, b.width);
    each_row_tile(n, kept, tiling.rows, [&](int64_t row0, int64_t count) {
      const Tensor rows = rows_of(h, row0, count), z = tile.gradients(count, b.width);
      b.row0 = row0;
      b.kept = row0 < kept ? data<A>(logits) : nullptr;
      if (!b.kept) mm_out(tile.products(count, b.width), rows, transposed(block));
      torch::stable::parallel_for(0, count, grain(b.width), [&](int64_t lo, int64_t hi) {
        run_rows(b, product == ScalarType::BFloat16, lo, hi);
      });
      if (grad_hidden.defined()) accumulate(rows_of(grad_hidden, row0, count), z, block, b.v0 == 0, scratch);
      dw.add(z, rows, b.v0, row0 == 0);
      if (grad_bias.defined()) add_columns(data<A>(grad_bias) + b.v0, z);
    });
    dw.finish(b.v0, b.width);
  }
}

template <class A>
std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const std::optional<Tensor>& bias,
    const Tensor& top_index, const Tensor& lse, const Tensor& mean_weight, const Tensor& logits,
    const std::optional<Tensor>& g_lse, const std::optional<Tensor>& g_target, const std::optional<Tensor>& g_top,
    A softcap, A scale,
    int64_t ignore_index, bool need_hidden, bool need_weight, bool need_bias) {
  const int64_t all = hidden.size(0), v = weight.size(0), d = weight.size(1);
  const ScalarType dtype = hidden.scalar_type(), acc = acc_dtype(dtype);
  const bool use_mean = mean_weight.dim() == 2 && !need_weight && !need_bias;
  Upstream<A> up(kept_rows(target, v, ignore_index), target, top_index, g_lse, g_target, g_top,
                 ignore_index, use_mean);
  const int64_t n = up.dense.size();
  const Tensor b = as_acc(bias, acc, hidden);
  const bool dense = n > 0 && !use_mean;

  Tensor dh, dw, db, dh_dense;
  if (need_hidden) {
    const bool direct = dense && n == all && dtype == acc;
    dh = direct ? empty({all, d}, dtype, hidden) : zeros({all, d}, dtype, hidden);
    if (dense) dh_dense = direct ? dh : empty({n, d}, acc, hidden);
  }
  if (need_weight) dw = dense ? empty({v, d}, dtype, hidden) : zeros({v, d}, dtype, hidden);
  if (need_bias) db = zeros({v}, acc, hidden);
  if (dense) backward_dense<A>(up, hidden, weight, b, lse, logits, softcap, scale, dh_dense, dw, db);

  with_type(dtype, [&](auto s) {
    using S = decltype(s);
    if (need_hidden && n > 0 && (use_mean || n < all || dtype != acc)) {
      parallel_rows(n, grain(d), [&](int64_t i) {
        const int64_t r = up.dense[i];
        const A* from = use_mean ? data<A>(mean_weight) + r * d : data<A>(dh_dense) + i * d;
        const A by = use_mean ? up.grad_lse[i] * scale : A(1);
        for (int64_t j = 0; j < d; ++j) data<S>(dh)[r * d + j] = static_cast<S>(by * from[j]);
      });
    }
    if (up.sparse.empty()) return;
    const auto row = [](const Pick<A>& p) { return p.row; };
    const auto entry = [](const Pick<A>& p) { return p.entry; };
    through_cap<A, S>(up.sparse, hidden, weight, bias ? data<A>(b) : nullptr, softcap, scale);
    if (need_hidden) add_runs<A, S>(up.sparse, weight, dh, row, entry);
    if (!need_weight && !need_bias) return;
    std::stable_sort(up.sparse.begin(), up.sparse.end(),
                     [](const Pick<A>& p, const Pick<A>& q) { return p.entry < q.entry; });
    if (need_weight) add_runs<A, S>(up.sparse, hidden, dw, entry, row);
    for (const Pick<A>& p : up.sparse)
      if (need_bias) data<A>(db)[p.entry] += p.grad;
  });
  if (need_bias && dtype != acc) db = torch::stable::to(db, dtype);
  const auto or_none = [&](const Tensor& t) { return t.defined() ? t : empty({0}, dtype, hidden); };
  return {or_none(dh), or_none(dw), or_none(db)};
}

// ---------------------------------------------------------------- registration

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> vocab_head(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const std::optional<Tensor>& bias,
    int64_t k, std::optional<double> softcap, double scale, int64_t ignore_index, int64_t logits_budget,
    bool need_hidden, bool need_weight, bool need_bias) {
  const bool keep_mean = need_hidden && !need_weight && !need_bias;
  const auto run = [&](auto a) {
    using A = decltype(a);
    return forward<A>(hidden, weight, torch::stable::contiguous(target), bias, k, softcap.value_or(0.0), scale,
                      ignore_index, need_weight || need_bias ? logits_budget : 0, keep_mean);
  };
  return hidden.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

std::tuple<Tensor, Tensor, Tensor> vocab_head_backward(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const std::optional<Tensor>& bias,
    const Tensor& topk_index, const Tensor& lse, const Tensor& mean_weight, const Tensor& logits,
    const std::optional<Tensor>& grad_lse, const std::optional<Tensor>& grad_target,
    const std::optional<Tensor>& grad_topk, std::optional<double> softcap, double scale,
    int64_t ignore_index, bool need_hidden, bool need_weight, bool need_bias) {
  const auto contiguous = [](const std::optional<Tensor>& t) {
    return t ? std::optional(torch::stable::contiguous(*t)) : t;
  };
  const auto run = [&](auto a) {
    using A = decltype(a);
    return backward<A>(hidden, weight, torch::stable::contiguous(target), bias, topk_index, lse, mean_weight,
                       logits, contiguous(grad_lse), contiguous(grad_target), contiguous(grad_topk),
                       softcap.value_or(0.0), scale, ignore_index, need_hidden, need_weight, need_bias);
  };
  return hidden.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

}  // namespace
}  // namespace sukhops

STABLE_TORCH_LIBRARY_IMPL(sukhops, CPU, m) {
  m.impl("vocab_head", TORCH_BOX(&sukhops::vocab_head));
  m.impl("vocab_head_backward", TORCH_BOX(&sukhops::vocab_head_backward));
}
