// director on the CPU: log-softmax of lm + sum_a gamma_a * logsigmoid(cls_a), its top k and its gradients.
//
// The time of decoding is the time to read the weights. A thread takes one part of the vocabulary, computes a tile of
// each head, and applies the gates while the tiles are in cache. The results of the parts are merged in a fixed order,
// so they do not depend on which thread computed which part.
#include "blocks.h"

namespace sukhops {

template <class A>
struct GateRows {
  const A* const* tile;     // per head [count, stride]: the LM head, then the classifiers
  const A* const* bias;     // per head [vocab], or null
  int64_t heads, rows, row0, v0, width, stride, vocab, k;
  const A* gamma;    // [heads - 1, rows], or [1, rows] for a shared head
  const A* affine;   // [2] scale and shift of a shared head, or null
  A* out;            // [rows, vocab] or null
  A* top_value;      // [rows, k]; this field and those below belong to one part
  int64_t* top_index;
  A* maximum;        // [rows]
  double* sum;       // [rows]
};

template <class A>
struct GateBackwardRows {
  A* const* tile;
  const A* const* bias;
  int64_t heads, rows, row0, v0, width, stride, vocab;
  const A *gamma, *affine;
  const A *grad, *logp;  // [rows, vocab]
  const A* total;        // [rows] sum of each row of grad
  double* grad_gamma;    // shape of gamma; this field and the next belong to one part
  double* grad_affine;   // [rows, 2]
};

}  // namespace sukhops

#define SUKHOPS_BODY "director_rows.h"
#include "isa.h"

namespace sukhops {
namespace {

// the weights, and the other arguments of the heads in the accumulation type
template <class A>
struct Heads {
  std::vector<Matrix> weight;     // the LM head, then the classifiers
  std::vector<Tensor> bias_kept;  // own the memory of `bias`
  std::vector<const A*> bias;
  std::vector<A> gamma;  // [gates, n]
  std::vector<A> affine_kept;
  const A* affine = nullptr;
  int64_t n, v, d, gates;

  Heads(const Tensor& hidden, const Tensor& lm_weight, const std::vector<Tensor>& cls_weight, const Tensor& g,
        const std::optional<Tensor>& lm_bias, const std::vector<Tensor>& cls_bias,
        const std::optional<Tensor>& cls_affine)
      : n(hidden.size(0)), v(lm_weight.size(0)), d(lm_weight.size(1)), gates(g.size(0)) {
    const ScalarType acc = acc_dtype(hidden.scalar_type());
    weight.emplace_back(lm_weight);
    for (const Tensor& w : cls_weight) weight.emplace_back(w);
    for (size_t h = 0; h < weight.size(); ++h) {
      const bool has = h == 0 ? lm_bias.has_value() : cls_bias[h - 1].numel() > 0;
      bias_kept.push_back(as_acc(has ? std::optional(h == 0 ? *lm_bias : cls_bias[h - 1]) : std::nullopt, acc, hidden));
      bias.push_back(has ? data<A>(bias_kept.back()) : nullptr);
    }
    const int64_t s0 = g.stride(0), s1 = g.stride(1);
    gamma.resize(gates * n);
    for (int64_t i = 0; i < gates * n; ++i) {
      gamma[i] = data<A>(g)[i / n * s0 + i % n * s1];
      STD_TORCH_CHECK(gamma[i] >= 0 && gamma[i] < INFINITY, "gamma: expected finite numbers >= 0, got ", gamma[i],
                      " at row ", i % n);
    }
    if (cls_affine) {
      affine_kept = {data<A>(*cls_affine)[0], data<A>(*cls_affine)[cls_affine->stride(0)]};
      affine = affine_kept.data();
    }
  }
  int64_t count() const { return weight.size(); }
};

// Computes the gated scores of every row and writes them to `out`, unless it is null. Returns the results of each part,
// which are not merged yet.
template <class A>
RowStats<A> gated_scores(const Tensor& hidden, const Heads<A>& heads, int64_t k, A* out) {
  const int64_t n = heads.n, d = heads.d, count = heads.count();
  const PartPlan plan(n, heads.v, sizeof(A), count, k);
  RowStats<A> stats(n, k, plan.parts);
  const Matrix x(hidden);
  count_products(n > 0 ? count : 0);
  plan.each([&](int64_t row0, int64_t rows, int64_t part, int64_t v0, int64_t end) {
    const int64_t size = plan.rows * plan.width, from = part * n;
    A* const memory = part_tile<A>(count * size);
    std::vector<const A*> tile(count);
    for (int64_t i = 0; i < count; ++i) tile[i] = memory + i * size;
    for (int64_t width; v0 < end; v0 += width) {
      width = std::min(plan.width, end - v0);
      for (int64_t i = 0; i < count; ++i)
        multiply({Matrix(memory + i * size, acc_dtype(x.dtype), rows, width, width), x.submatrix(row0, 0, rows, d),
                  heads.weight[i].submatrix(v0, 0, width, d).transposed()});
      const GateRows<A> g{tile.data(), heads.bias.data(), count, n, row0, v0, width, width, heads.v, k,
                          heads.gamma.data(), heads.affine, out, stats.value.data() + from * k,
                          stats.index.data() + from * k, stats.maximum.data() + from, stats.sum.data() + from};
      SUKHOPS_BEST(gate_rows<A>)(g, 0, rows);
    }
  });
  return stats;
}

template <class A>
std::tuple<Tensor, Tensor, Tensor> logp(const Tensor& hidden, const Heads<A>& heads) {
  const ScalarType acc = acc_dtype(hidden.scalar_type());
  const Tensor out = empty({heads.n, heads.v}, acc, hidden);
  const Tensor maxima = empty({heads.n}, acc, hidden), log_sums = empty({heads.n}, acc, hidden);
  A *maximum = data<A>(maxima), *log_sum = data<A>(log_sums);
  RowStats<A> stats = gated_scores<A>(hidden, heads, 0, data<A>(out));
  for (int64_t i = 0; i < heads.n; ++i) {
    log_sum[i] = stats.merge_parts(i);
    maximum[i] = stats.maximum[i];
  }
  const auto to_logp = SUKHOPS_BEST(normalize<A>);
  const int64_t width = 16384, per_row = (heads.v + width - 1) / width;
  parallel_rows(heads.n * per_row, 1, [&](int64_t i) {
    const int64_t row = i / per_row, v0 = i % per_row * width;
    to_logp(data<A>(out) + row * heads.v + v0, std::min(width, heads.v - v0), maximum[row], log_sum[row]);
  });
  return {out, maxima, log_sums};
}

template <class A>
std::tuple<Tensor, Tensor, Tensor, Tensor> topk(const Tensor& hidden, const Heads<A>& heads, int64_t k) {
  const int64_t n = heads.n, v = heads.v;
  const Tensor values = empty({n, k}, acc_dtype(hidden.scalar_type()), hidden);
  const Tensor indices = empty({n, k}, ScalarType::Long, hidden);
  A* value = data<A>(values);
  int64_t* index = data<int64_t>(indices);
  if (k > 1024 && 16 * k > v) {  // for a large k, a partial sort is cheaper than keep_top
    const auto [all, maxima, log_sums] = logp<A>(hidden, heads);
    const A* whole = data<A>(all);
    parallel_rows(n, 1, [&](int64_t i) {
      const A* row = whole + i * v;
      std::vector<int64_t> order(v);
      for (int64_t j = 0; j < v; ++j) order[j] = j;
      const bool nan = row[0] != row[0];  // a NaN in the row makes log_sum NaN, and so every entry
      if (!nan)
        std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int64_t a, int64_t b) {
          return row[a] > row[b] || (row[a] == row[b] && a < b);
        });
      for (int64_t j = 0; j < k; ++j) {
        index[i * k + j] = order[j];
        value[i * k + j] = nan ? A(NAN) : row[order[j]];
      }
    });
    return {values, indices, maxima, log_sums};
  }
  const Tensor maxima = empty({n}, values.scalar_type(), hidden), log_sums = empty({n}, values.scalar_type(), hidden);
  RowStats<A> stats = gated_scores<A>(hidden, heads, k, nullptr);
  parallel_rows(n, 64, [&](int64_t i) {
    const A log_sum = data<A>(log_sums)[i] = stats.merge_parts(i);
    data<A>(maxima)[i] = stats.maximum[i];
    finish_top(&stats.value[i * k], &stats.index[i * k], k, log_sum != log_sum);
    for (int64_t j = 0; j < k; ++j) {
      value[i * k + j] = (stats.value[i * k + j] - stats.maximum[i]) - log_sum;
      index[i * k + j] = stats.index[i * k + j];
    }
  });
  return {values, indices, maxima, log_sums};
}

// ---------------------------------------------------------------- gradients of logp

struct Gradients {
  Tensor hidden, lm_weight;
  std::vector<Tensor> cls_weight;
  Tensor gamma, lm_bias;
  std::vector<Tensor> cls_bias;
  Tensor affine;
};

template <class A>
Gradients logp_backward(const Tensor& grad, const std::optional<Tensor>& elsewhere, const Tensor& logp,
                        const Tensor& hidden, const Heads<A>& heads, bool need_hidden, bool need_lm, bool need_cls,
                        bool need_bias) {
  const int64_t n = heads.n, v = heads.v, d = heads.d, count = heads.count();
  const ScalarType dtype = hidden.scalar_type(), acc = acc_dtype(dtype);
  std::vector<Tensor> weight_grad, bias_grad;
  for (int64_t i = 0; i < count; ++i) {
    weight_grad.push_back((i == 0 ? need_lm : need_cls) ? zeros({v, d}, dtype, hidden) : Tensor());
    bias_grad.push_back(zeros({need_bias && heads.bias[i] ? v : 0}, acc, hidden));
  }
  const Tensor dh = zeros({need_hidden ? n : 0, d}, acc, hidden);
  std::vector<A> total(n);
  parallel_rows(n, grain(v), [&](int64_t i) {
    double sum = elsewhere ? data<A>(*elsewhere)[i] : 0;
    for (int64_t j = 0; j < v; ++j) sum += data<A>(grad)[i * v + j];
    total[i] = static_cast<A>(sum);
  });
  const TilePlan tiling(n, v, sizeof(A), count);
  const int64_t size = n * tiling.width, gammas = heads.gamma.size(), parts = tiling.parts();
  const Tensor tile = empty({count * size}, acc, hidden);
  std::vector<double> grad_gamma(gammas * parts), grad_affine(heads.affine ? 2 * n * parts : 0);
  const Matrix x(hidden);
  for (int64_t v0 = 0, width; v0 < v && n > 0; v0 += width) {
    width = std::min(tiling.width, v - v0);
    std::vector<Matrix> z, block;
    for (int64_t i = 0; i < count; ++i) {
      z.emplace_back(data<A>(tile) + i * size, acc, n, width, width);
      block.push_back(heads.weight[i].submatrix(v0, 0, width, d));
    }
    tiling.each(width, 0, [&](int64_t row0, int64_t rows, int64_t part, int64_t col, int64_t cols) {
      std::vector<A*> at;
      for (int64_t i = 0; i < count; ++i) {
        const Matrix cell = z[i].submatrix(row0, col, rows, cols);
        at.push_back(static_cast<A*>(cell.data));
        if (i == 0 && !heads.affine) continue;  // the gradient of the LM logits does not need the logits
        multiply({cell, x.submatrix(row0, 0, rows, d), block[i].submatrix(col, 0, cols, d).transposed()});
      }
      const GateBackwardRows<A> g{at.data(), heads.bias.data(), count, n, row0, v0 + col, cols, width, v,
                                  heads.gamma.data(), heads.affine, data<A>(grad), data<A>(logp), total.data(),
                                  grad_gamma.data() + part * gammas, grad_affine.data() + part * 2 * n};
      SUKHOPS_BEST(gate_backward_rows<A>)(g, 0, rows);
    });
    std::vector<Product> products;
    for (int64_t i = 0; i < count; ++i) {
      if (weight_grad[i].defined())
        products.push_back({Matrix(weight_grad[i]).submatrix(v0, 0, width, d), z[i].transposed(), x});
      if (bias_grad[i].numel())
        add_columns(data<A>(bias_grad[i]) + v0, matrix_at(z[i].data, n, width, width, acc, tile));
    }
    for (int64_t i = 0; i < count && need_hidden; ++i) {  // one product at a time: all accumulate into dh
      products.push_back({Matrix(dh), z[i], block[i], v0 > 0 || i > 0});
      multiply_all(std::exchange(products, {}));
    }
    multiply_all(products);
  }
  const int64_t recomputed = heads.affine ? count : count - 1;
  count_products(n > 0 ? recomputed + count * need_hidden + need_lm + (count - 1) * need_cls : 0);
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < gammas; ++i) grad_gamma[i] += grad_gamma[part * gammas + i];
  const auto or_none = [&](const Tensor& t) { return t.defined() ? t : empty({0}, dtype, hidden); };
  Gradients out{need_hidden ? torch::stable::to(dh, dtype) : or_none(Tensor()), or_none(weight_grad[0]), {},
                empty({heads.gates, n}, acc, hidden),
                torch::stable::to(bias_grad[0], dtype), {}, empty({0}, acc, hidden)};
  for (int64_t i = 1; i < count; ++i) {
    out.cls_weight.push_back(or_none(weight_grad[i]));
    out.cls_bias.push_back(torch::stable::to(bias_grad[i], dtype));
  }
  for (int64_t i = 0; i < gammas; ++i) data<A>(out.gamma)[i] = static_cast<A>(grad_gamma[i]);
  if (heads.affine) out.affine = sum_of_rows(grad_affine, n * parts, acc, hidden);
  return out;
}

// ---------------------------------------------------------------- registration

std::tuple<Tensor, Tensor, Tensor> director(
    const Tensor& hidden, const Tensor& lm_weight, const std::vector<Tensor>& cls_weight, const Tensor& gamma,
    const std::optional<Tensor>& lm_bias, const std::vector<Tensor>& cls_bias,
    const std::optional<Tensor>& cls_affine) {
  return with_acc_type(hidden, [&](auto a) {
    using A = decltype(a);
    return logp<A>(hidden, Heads<A>(hidden, lm_weight, cls_weight, gamma, lm_bias, cls_bias, cls_affine));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> director_topk(
    const Tensor& hidden, const Tensor& lm_weight, const std::vector<Tensor>& cls_weight, const Tensor& gamma,
    const std::optional<Tensor>& lm_bias, const std::vector<Tensor>& cls_bias,
    const std::optional<Tensor>& cls_affine, int64_t k) {
  return with_acc_type(hidden, [&](auto a) {
    using A = decltype(a);
    return topk<A>(hidden, Heads<A>(hidden, lm_weight, cls_weight, gamma, lm_bias, cls_bias, cls_affine), k);
  });
}

std::tuple<Tensor, Tensor, std::vector<Tensor>, Tensor, Tensor, std::vector<Tensor>, Tensor> director_backward(
    const Tensor& grad, const std::optional<Tensor>& grad_elsewhere, const Tensor& logp, const Tensor& hidden,
    const Tensor& lm_weight, const std::vector<Tensor>& cls_weight, const Tensor& gamma,
    const std::optional<Tensor>& lm_bias, const std::vector<Tensor>& cls_bias, const std::optional<Tensor>& cls_affine,
    bool need_hidden, bool need_lm, bool need_cls, bool need_bias) {
  return with_acc_type(hidden, [&](auto a) {
    using A = decltype(a);
    const Heads<A> heads(hidden, lm_weight, cls_weight, gamma, lm_bias, cls_bias, cls_affine);
    Gradients g = logp_backward<A>(torch::stable::contiguous(grad), grad_elsewhere, torch::stable::contiguous(logp),
                                   hidden, heads, need_hidden, need_lm, need_cls, need_bias);
    return std::tuple(g.hidden, g.lm_weight, g.cls_weight, g.gamma, g.lm_bias, g.cls_bias, g.affine);
  });
}

}  // namespace
}  // namespace sukhops

STABLE_TORCH_LIBRARY_IMPL(sukhops, CPU, m) {
  m.impl("director", TORCH_BOX(&sukhops::director));
  m.impl("director_topk", TORCH_BOX(&sukhops::director_topk));
  m.impl("director_backward", TORCH_BOX(&sukhops::director_backward));
}
