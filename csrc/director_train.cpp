// Training of Director's classifier on the CPU. director_dot computes one logit per row, as a dot product with one row
// of the weight. director_norm computes the regularizer that keeps the other classifier logits near probability 1/2,
// and the same logit on the way, so that one backward pass makes one gradient of the weight.
#include "blocks.h"

namespace sukhops {

template <class A>
struct NormRows {
  A* tile;                  // [rows, width]
  int64_t stride;           // between rows of the tile
  const A* kept;            // [kept, vocab] products that the forward stored, or null if they are in the tile
  const int64_t* kept_row;  // [rows] row of `kept`
  int64_t vocab, row0, v0, width;
  const A *bias, *affine;
  const int64_t* target;
  const A* grad;                  // [rows], or null in the forward
  double* sum = nullptr;          // [rows], of one part, in the forward
  A* logit = nullptr;             // [rows], in the forward
  double* grad_affine = nullptr;  // [rows, 2], of one part, in the backward
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
    STD_TORCH_CHECK(t[i] >= 0 && t[i] < v, "target: expected values in [0, ", v, ") or -100, got ", t[i], " at row ",
                    i);
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

// Adds the gradients of the picked logits to dh (of type T), dw and db; those without rows are not needed.
template <class A, class S, class T>
void add_picks(std::vector<Pick<A>> picks, const Tensor& hidden, const Tensor& weight, const Tensor& dh,
               const Tensor& dw, const Tensor& db) {
  const auto row = [](const Pick<A>& p) { return p.row; };
  const auto entry = [](const Pick<A>& p) { return p.entry; };
  if (dh.size(0)) scatter_add<A, S, T>(picks, weight, dh, row, entry);
  std::stable_sort(picks.begin(), picks.end(), [](const Pick<A>& p, const Pick<A>& q) { return p.entry < q.entry; });
  if (dw.size(0)) scatter_add<A, S, S>(picks, hidden, dw, entry, row);
  if (db.size(0))
    for (const Pick<A>& p : picks) data<A>(db)[p.entry] += p.grad;
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
  const Tensor db = zeros({need_bias ? v : 0}, acc, hidden);
  with_type(dtype, [&](auto s) { add_picks<A, decltype(s), decltype(s)>(picks, hidden, weight, dh, dw, db); });
  return {dh, dw, torch::stable::to(db, dtype)};
}

// ---------------------------------------------------------------- training: the norm of the other logits

// Shared by forward and backward: the gathered rows that train the classifier. The backward drops rows whose upstream
// gradients are 0.
template <class A>
struct Norm {
  std::vector<int64_t> rows, picked;  // [n] rows of hidden, and their targets
  std::vector<int64_t> kept_row;      // [n] index among the rows of the forward
  std::vector<A> upstream, shared;    // [n] gradient of the sum over the vocabulary; affine [2] of a shared head
  std::vector<Pick<A>> logits;        // gradients of the targets' logits
  int64_t n, v, d;
  A others;  // number of vocabulary entries besides the target
  ScalarType acc;
  Tensor h, b;

  Norm(const Tensor* grad, const Tensor* grad_logit, const Tensor& hidden, const Tensor& weight, const Tensor& target,
       const Tensor& label, const std::optional<Tensor>& bias, const std::optional<Tensor>& affine)
      : v(weight.size(0)), d(weight.size(1)), others(static_cast<A>(std::max<int64_t>(1, v - 1))),
        acc(acc_dtype(hidden.scalar_type())) {
    int64_t index = 0;
    for (const int64_t r : classifier_rows(target, label, v)) {
      const int64_t at = index++;
      if (grad && data<A>(*grad)[r] == 0 && data<A>(*grad_logit)[r] == 0) continue;
      rows.push_back(r);
      kept_row.push_back(at);
      picked.push_back(data<int64_t>(target)[r]);
      if (!grad) continue;
      upstream.push_back(data<A>(*grad)[r] / others);
      const A of_logit = data<A>(*grad_logit)[r];
      if (of_logit != 0) logits.push_back({picked.back(), static_cast<int64_t>(rows.size()) - 1, of_logit});
    }
    n = rows.size();
    h = gather_rows(hidden, rows);
    b = as_acc(bias, acc, hidden);
    if (affine) shared = {data<A>(*affine)[0], data<A>(*affine)[affine->stride(0)]};
  }

  NormRows<A> pass(A* tile, int64_t stride, const A* kept, int64_t row0, int64_t v0, int64_t width) const {
    return {tile, stride, kept, kept_row.data(), v, row0, v0, width, b.numel() ? data<A>(b) + v0 : nullptr,
            shared.empty() ? nullptr : shared.data(), picked.data(), upstream.empty() ? nullptr : upstream.data()};
  }
};

template <class A>
std::tuple<Tensor, Tensor, Tensor> norm(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const Tensor& label,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& affine, int64_t logits_budget) {
  const Norm<A> g(nullptr, nullptr, hidden, weight, target, label, bias, affine);
  const PartPlan plan(g.n, g.v, sizeof(A));
  std::vector<double> sum(g.n * plan.parts);
  std::vector<A> logit(g.n);
  const int64_t fit = logits_budget / (g.v * sizeof(A));
  const Tensor logits = empty({std::min(hidden.size(0), fit), g.v}, g.acc, hidden);
  count_products(g.n > 0);
  each_product(plan, Matrix(g.h), Matrix(weight), g.acc, std::min(g.n, fit), data<A>(logits),
               [&](A* tile, int64_t stride, int64_t row0, int64_t count, int64_t part, int64_t v0, int64_t width) {
    NormRows<A> pass = g.pass(tile, stride, nullptr, row0, v0, width);
    pass.sum = &sum[part * g.n];
    pass.logit = logit.data();
    SUKHOPS_BEST(norm_rows<A>)(pass, 0, count);
  });
  const Tensor value = zeros({hidden.size(0)}, g.acc, hidden), picked = zeros({hidden.size(0)}, g.acc, hidden);
  for (int64_t i = 0; i < g.n; ++i) {
    for (int64_t part = 1; part < plan.parts; ++part) sum[i] += sum[part * g.n + i];
    data<A>(value)[g.rows[i]] = static_cast<A>(sum[i] / g.others);
    data<A>(picked)[g.rows[i]] = logit[i];
  }
  return {value, picked, logits};
}

// the gradients of hidden, weight, bias and affine
template <class A>
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(
    const Tensor& grad, const Tensor& grad_logit, const Tensor& hidden, const Tensor& weight, const Tensor& target,
    const Tensor& label, const std::optional<Tensor>& bias, const std::optional<Tensor>& affine, const Tensor& logits,
    bool need_hidden, bool need_weight, bool need_bias) {
  const Norm<A> g(&grad, &grad_logit, hidden, weight, target, label, bias, affine);
  const int64_t all = hidden.size(0), n = g.n, v = g.v, d = g.d;
  const ScalarType dtype = hidden.scalar_type();
  const TilePlan tiling(n, v, sizeof(A));
  const Tensor tile = empty({n * tiling.width}, g.acc, hidden);
  const Tensor dw = zeros({need_weight ? v : 0, d}, dtype, hidden), dh = zeros({need_hidden ? n : 0, d}, g.acc, hidden);
  const Tensor db = zeros({need_bias ? v : 0}, g.acc, hidden);
  std::vector<double> grad_affine(2 * n * tiling.parts());
  const Matrix x(g.h), w(weight);
  const int64_t kept = std::lower_bound(g.kept_row.begin(), g.kept_row.end(), logits.size(0)) - g.kept_row.begin();
  count_products(n > 0 ? (kept < n) + need_hidden + need_weight : 0);
  for (int64_t v0 = 0, width; v0 < v && n > 0; v0 += width) {
    width = std::min(tiling.width, v - v0);
    const Matrix z(tile.data_ptr(), g.acc, n, width, width), block = w.submatrix(v0, 0, width, d);
    tiling.each(width, kept, [&](int64_t row0, int64_t count, int64_t part, int64_t col, int64_t cols) {
      const Matrix cell = z.submatrix(row0, col, count, cols);
      if (row0 >= kept) multiply({cell, x.submatrix(row0, 0, count, d), block.submatrix(col, 0, cols, d).transposed()});
      const A* const stored = row0 < kept ? data<A>(logits) : nullptr;
      NormRows<A> pass = g.pass(static_cast<A*>(cell.data), width, stored, row0, v0 + col, cols);
      pass.grad_affine = &grad_affine[2 * part * n];
      SUKHOPS_BEST(norm_rows<A>)(pass, 0, count);
    });
    std::vector<Product> products;
    if (need_weight) products.push_back({Matrix(dw).submatrix(v0, 0, width, d), z.transposed(), x});
    if (need_hidden) products.push_back({Matrix(dh), z, block, v0 > 0});
    multiply_all(products);
    if (need_bias) add_columns(data<A>(db) + v0, matrix(tile, n, width));
  }
  const Tensor dh_all = zeros({need_hidden ? all : 0, d}, dtype, hidden);
  with_type(dtype, [&](auto s) {
    using S = decltype(s);
    add_picks<A, S, A>(g.logits, g.h, weight, dh, dw, db);
    parallel_rows(need_hidden ? n : 0, grain(d), [&](int64_t i) {
      for (int64_t j = 0; j < d; ++j) data<S>(dh_all)[g.rows[i] * d + j] = static_cast<S>(data<A>(dh)[i * d + j]);
    });
  });
  return {need_hidden ? dh_all : empty({0}, dtype, hidden), need_weight ? dw : empty({0}, dtype, hidden),
          torch::stable::to(db, dtype),
          affine ? sum_of_rows(grad_affine, n * tiling.parts(), g.acc, hidden) : empty({0}, g.acc, hidden)};
}

// ---------------------------------------------------------------- registration

Tensor director_dot(const Tensor& hidden, const Tensor& weight, const Tensor& target, const Tensor& label,
                    const std::optional<Tensor>& bias) {
  const Tensor t = torch::stable::contiguous(target), l = torch::stable::contiguous(label);
  return with_acc_type(hidden, [&](auto a) { return dot<decltype(a)>(hidden, weight, t, l, bias); });
}

std::tuple<Tensor, Tensor, Tensor> director_dot_backward(
    const Tensor& grad, const Tensor& hidden, const Tensor& weight, const Tensor& target, const Tensor& label,
    bool need_hidden, bool need_weight, bool need_bias) {
  const Tensor t = torch::stable::contiguous(target), l = torch::stable::contiguous(label);
  const Tensor g = torch::stable::contiguous(grad);
  return with_acc_type(hidden, [&](auto a) {
    return dot_backward<decltype(a)>(g, hidden, weight, t, l, need_hidden, need_weight, need_bias);
  });
}

std::tuple<Tensor, Tensor, Tensor> director_norm(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const Tensor& label,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& affine, int64_t logits_budget) {
  const Tensor t = torch::stable::contiguous(target), l = torch::stable::contiguous(label);
  return with_acc_type(hidden, [&](auto a) {
    return norm<decltype(a)>(hidden, weight, t, l, bias, affine, logits_budget);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> director_norm_backward(
    const Tensor& grad, const Tensor& grad_logit, const Tensor& hidden, const Tensor& weight, const Tensor& target,
    const Tensor& label, const std::optional<Tensor>& bias, const std::optional<Tensor>& affine, const Tensor& logits,
    bool need_hidden, bool need_weight, bool need_bias) {
  const Tensor t = torch::stable::contiguous(target), l = torch::stable::contiguous(label);
  const Tensor g = torch::stable::contiguous(grad), gl = torch::stable::contiguous(grad_logit);
  return with_acc_type(hidden, [&](auto a) {
    return norm_backward<decltype(a)>(g, gl, hidden, weight, t, l, bias, affine, logits, need_hidden, need_weight,
                                      need_bias);
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
