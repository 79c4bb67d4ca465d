// What Director's training asks of the classifier on the CPU: one logit per row, which is a dot with a row
// of the weight and not a product, and the norm that keeps the other logits near probability 1/2.
#include "blocks.h"

namespace sukhops {

template <class A>
struct NormRows {
  A* tile;  // [count, width]
  int64_t row0, v0, width;
  const A *bias, *affine;
  const int64_t* target;
  const A* grad;        // [rows], or null in the forward
  double* sum;          // [rows]
  double* grad_affine;  // [rows, 2]
};

}  // namespace sukhops

#define SUKHOPS_BODY "director_train_rows.h"
#include "isa.h"

namespace sukhops {
namespace {

// ---------------------------------------------------------------- training: one logit per row

// checks targets and labels, and lists the rows that train the classifier
std::vector<int64_t> classifier_rows(const Tensor& target, const Tensor& label, int64_t v) {
  const int64_t *t = data<int64_t>(target), *l = data<int64_t>(label);
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < target.size(0); ++i) {
    if (t[i] == -100) continue;
    STD_TORCH_CHECK(t[i] >= 0 && t[i] < v, "target: expected values in [0, ", v, ") or -100, got ", t[i], " at row ", i);
    STD_TORCH_CHECK(l[i] >= -1 && l[i] <= 1, "label: expected 1, 0 or -1, got ", l[i], " at row ", i);
    if (l[i] >= 0) rows.push_back(i);
  }
  return rows;
}

template <class A>
Tensor dot(const Tensor& hidden, const Tensor& weight, const Tensor& target, const Tensor& label,
           const std::optional<Tensor>& bias) {
  const int64_t d = weight.size(1);
  const std::vector<int64_t> rows = classifier_rows(target, label, weight.size(0));
  const Tensor out = zeros({hidden.size(0)}, acc_dtype(hidden.scalar_type()), hidden);
  with_type(hidden.scalar_type(), [&](auto s) {
    using S = decltype(s);
    const int64_t hs = hidden.stride(0), hc = hidden.stride(1), ws = weight.stride(0), wc = weight.stride(1);
    parallel_rows(rows.size(), grain(d), [&](int64_t i) {
      const int64_t r = rows[i], entry = data<int64_t>(target)[r];
      const S *h = data<S>(hidden) + r * hs, *w = data<S>(weight) + entry * ws;
      A part[8] = {};
      for (int64_t j = 0; j < d; ++j) part[j % 8] += static_cast<A>(h[j * hc]) * static_cast<A>(w[j * wc]);
      A sum = bias ? static_cast<A>(data<S>(*bias)[entry * bias->stride(0)]) : A(0);
      for (const A p : part) sum += p;
      data<A>(out)[r] = sum;
    });
  });
  return out;
}

template <class A>
std::tuple<Tensor, Tensor, Tensor> dot_backward(
    const Tensor& grad, const Tensor& hidden, const Tensor& weight, const Tensor& target, const Tensor& label,
    bool need_hidden, bool need_weight, bool need_bias) {
  const int64_t n = hidden.size(0), v = weight.size(0), d = weight.size(1);
  const ScalarType dtype = hidden.scalar_type(), acc = acc_dtype(dtype);
  std::vector<Pick<A>> picks;
  for (const int64_t r : classifier_rows(target, label, v)) {
    const A g = data<A>(grad)[r];
    if (g != 0) picks.push_back({data<int64_t>(target)[r], r, g});
  }
  const Tensor dh = need_hidden ? zeros({n, d}, dtype, hidden) : empty({0}, dtype, hidden);
  const Tensor dw = need_weight ? zeros({v, d}, dtype, hidden) : empty({0}, dtype, hidden);
  Tensor db = zeros({need_bias ? v : 0}, acc, hidden);
  const auto row = [](const Pick<A>& p) { return p.row; };
  const auto entry = [](const Pick<A>& p) { return p.entry; };
  with_type(dtype, [&](auto s) {
    using S = decltype(s);
    if (need_hidden) add_runs<A, S>(picks, weight, dh, row, entry);
    std::stable_sort(picks.begin(), picks.end(),
                     [](const Pick<A>& p, const Pick<A>& q) { return p.entry < q.entry; });
    if (need_weight) add_runs<A, S>(picks, hidden, dw, entry, row);
    for (const Pick<A>& p : picks)
      if (need_bias) data<A>(db)[p.entry] += p.grad;
  });
  return {dh, dw, torch::stable::to(db, dtype)};
}

// ---------------------------------------------------------------- training: the norm of the other logits

template <class A>
void run_norm(const NormRows<A>& g, bool bfloat16, int64_t lo, int64_t hi) {
  if constexpr (std::is_same_v<A, float>) {
    if (bfloat16) return SUKHOPS_BEST(norm_rows<uint16_t, float>)(g, lo, hi);
  }
  SUKHOPS_BEST(norm_rows<A, A>)(g, lo, hi);
}

// the forward when `grad` is not given: [N]; else the gradients of hidden, weight, bias and affine
template <class A>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm(
    const std::optional<Tensor>& grad, const Tensor& hidden, const Tensor& weight, const Tensor& target,
    const Tensor& label, const std::optional<Tensor>& bias, const std::optional<Tensor>& affine,
    bool need_hidden, bool need_weight, bool need_bias) {
  const int64_t all = hidden.size(0), v = weight.size(0), d = weight.size(1);
  const ScalarType dtype = hidden.scalar_type(), acc = acc_dtype(dtype), product = product_dtype(dtype);
  const A others = static_cast<A>(std::max<int64_t>(1, v - 1));
  std::vector<int64_t> rows;
  std::vector<A> upstream;
  for (const int64_t r : classifier_rows(target, label, v)) {
    if (grad && data<A>(*grad)[r] == 0) continue;
    rows.push_back(r);
    if (grad) upstream.push_back(data<A>(*grad)[r] / others);
  }
  const int64_t n = rows.size();
  std::vector<int64_t> picked(n);
  for (int64_t i = 0; i < n; ++i) picked[i] = data<int64_t>(target)[rows[i]];
  const Tensor h = gather_rows(hidden, rows, product), b = as_acc(bias, acc, hidden);
  std::vector<double> sum(n), grad_affine(grad ? 2 * n : 0);
  std::vector<A> shared;
  if (affine) shared = {data<A>(*affine)[0], data<A>(*affine)[affine->stride(0)]};

  const Tiling tiling(n, v, d, sizeof(A));
  const Tile tile(tiling, acc, product, hidden);
  WeightBlocks blocks(weight, product, tiling.width);
  Tensor dw_all = need_weight ? zeros({v, d}, dtype, hidden) : Tensor();
  WeightGradient dw(dw_all, product, acc, tiling.width, tiling.rows >= n);
  const Tensor dh = zeros({need_hidden ? n : 0, d}, acc, hidden), db = zeros({need_bias ? v : 0}, acc, hidden);
  Tensor scratch;
  NormRows<A> g{data<A>(tile.buffer), 0, 0, 0, nullptr, affine ? shared.data() : nullptr, picked.data(),
                grad ? upstream.data() : nullptr, sum.data(), grad_affine.data()};
  for (g.v0 = 0; g.v0 < v && n > 0; g.v0 += tiling.width) {
    g.width = std::min(tiling.width, v - g.v0);
    g.bias = bias ? data<A>(b) + g.v0 : nullptr;
    const Tensor block = blocks.rows(g.v0, g.width);
    for (g.row0 = 0; g.row0 < n; g.row0 += tiling.rows) {
      const int64_t count = std::min(tiling.rows, n - g.row0);
      const Tensor z = tile.gradients(count, g.width), part = rows_of(h, g.row0, count);
      mm_out(tile.products(count, g.width), part, transposed(block));
      torch::stable::parallel_for(0, count, grain(g.width), [&](int64_t lo, int64_t hi) {
        run_norm(g, product == ScalarType::BFloat16, lo, hi);
      });
      if (need_hidden) accumulate(rows_of(dh, g.row0, count), z, block, g.v0 == 0, scratch);
      if (need_weight) dw.add(z, part, g.v0, g.row0 == 0);
      if (need_bias) add_columns(data<A>(db) + g.v0, z);
    }
    if (need_weight) dw.finish(g.v0, g.width);
  }

  const Tensor value = zeros({grad ? 0 : all}, acc, hidden);
  const Tensor dh_all = zeros({need_hidden ? all : 0, d}, dtype, hidden);
  with_type(dtype, [&](auto s) {
    using S = decltype(s);
    parallel_rows(n, grain(d), [&](int64_t i) {
      if (!grad) data<A>(value)[rows[i]] = static_cast<A>(sum[i] / others);
      for (int64_t j = 0; need_hidden && j < d; ++j)
        data<S>(dh_all)[rows[i] * d + j] = static_cast<S>(data<A>(dh)[i * d + j]);
    });
  });
  return {value, need_hidden ? dh_all : empty({0}, dtype, hidden),
          need_weight ? dw_all : empty({0}, dtype, hidden), torch::stable::to(db, dtype),
          grad && affine ? sum_of_rows(grad_affine, n, acc, hidden) : empty({0}, acc, hidden)};
}

// ---------------------------------------------------------------- registration

Tensor director_dot(const Tensor& hidden, const Tensor& weight, const Tensor& target, const Tensor& label,
                    const std::optional<Tensor>& bias) {
  const Tensor t = torch::stable::contiguous(target), l = torch::stable::contiguous(label);
  return in_acc(hidden, [&](auto a) { return dot<decltype(a)>(hidden, weight, t, l, bias); });
}

std::tuple<Tensor, Tensor, Tensor> director_dot_backward(
    const Tensor& grad, const Tensor& hidden, const Tensor& weight, const Tensor& target, const Tensor& label,
    bool need_hidden, bool need_weight, bool need_bias) {
  const Tensor t = torch::stable::contiguous(target), l = torch::stable::contiguous(label);
  const Tensor g = torch::stable::contiguous(grad);
  return in_acc(hidden, [&](auto a) {
    return dot_backward<decltype(a)>(g, hidden, weight, t, l, need_hidden, need_weight, need_bias);
  });
}

Tensor director_norm(const Tensor& hidden, const Tensor& weight, const Tensor& target, const Tensor& label,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& affine) {
  const Tensor t = torch::stable::contiguous(target), l = torch::stable::contiguous(label);
  return in_acc(hidden, [&](auto a) {
    return std::get<0>(
        norm<decltype(a)>(std::nullopt, hidden, weight, t, l, bias, affine, false, false, false));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> director_norm_backward(
    const Tensor& grad, const Tensor& hidden, const Tensor& weight, const Tensor& target, const Tensor& label,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& affine, bool need_hidden, bool need_weight,
    bool need_bias) {
  const Tensor t = torch::stable::contiguous(target), l = torch::stable::contiguous(label);
  return in_acc(hidden, [&](auto a) {
    auto [_, dh, dw, db, da] = norm<decltype(a)>(torch::stable::contiguous(grad), hidden, weight, t, l, bias, affine,
                                                 need_hidden, need_weight, need_bias);
    return std::tuple(dh, dw, db, da);
  });
}

}  // namespace
}  // namespace sukhops

STABLE_TORCH_LIBRARY_IMPL(sukhops, CPU, m) {
  m.impl("director_dot", TORCH_BOX(&sukhops::director_dot));
  m.impl("director_dot_backward", TORCH_BOX(&sukhops::director_dot_backward));
  m.impl("director_norm", TORCH_BOX(&sukhops::director_norm));
  m.impl("director_norm_backward", TORCH_BOX(&sukhops::director_norm_backward));
}
