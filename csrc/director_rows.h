// The row passes of director. Included by isa.h once per instruction set. A is the type of the products (float or
// double). Each head has a tile, with one row of products per row of hidden; rows are `stride` elements apart.
#include "rows.h"

// log(sigmoid(c)) with an error of a few ulp, without cancellation: log1p(e) = 2 atanh(e / (2 + e)); keeps NaN
SUKHOPS_INLINE vf vlogsig(vf c) {
  const vf e = vexp(c < 0.0f ? c : -c);
  const vf z = e / (2.0f + e), s = z * z;
  vf p = splat(6.66666667e-2f);
  p = p * s + 7.69230769e-2f;
  p = p * s + 9.09090909e-2f;
  p = p * s + 1.11111111e-1f;
  p = p * s + 1.42857143e-1f;
  p = p * s + 2.00000000e-1f;
  p = p * s + 3.33333333e-1f;
  const vf l = 2.0f * (z + z * s * p);
  return (c < 0.0f ? c : vf{}) - l;
}

// sigmoid(-c)
SUKHOPS_INLINE vf vsigneg(vf c) {
  const vf e = vexp(c < 0.0f ? c : -c);
  const vf r = 1.0f / (1.0f + e);
  return c < 0.0f ? r : e * r;
}

SUKHOPS_INLINE double slogsig(double c) {
  return (c < 0 ? c : c == c ? 0.0 : c) - std::log1p(std::exp(c < 0 ? c : -c));
}

SUKHOPS_INLINE double ssigneg(double c) {
  const double e = std::exp(c < 0 ? c : -c);
  return c < 0 ? 1 / (1 + e) : e / (1 + e);
}

template <class A>
constexpr A kLowest = sizeof(A) == 4 ? A(-3.4028234e38) : A(-1.7976931348623157e308);

// x += gamma * logsigmoid(c); if gamma is 0, a logsigmoid of -inf counts as 0, to avoid 0 * inf
static inline void add_gate(float* x, const float* c, int64_t width, float gamma) {
  const vf floor = splat(gamma == 0.0f ? kLowest<float> : -__builtin_inff());
  for (int64_t j = 0; j < width; j += kLanes) {
    vf t = vlogsig(load(c + j));
    t = t < floor ? vf{} : t;
    store(x + j, load(x + j) + gamma * t);
  }
}

static inline void add_gate(double* x, const double* c, int64_t width, double gamma) {
  const double floor = gamma == 0 ? kLowest<double> : -__builtin_inf();
  for (int64_t j = 0; j < width; ++j) {
    const double t = slogsig(c[j]);
    x[j] += gamma * (t < floor ? 0.0 : t);
  }
}

// Processes rows [lo, hi) of a tile: computes the gated scores, writes them to `out` unless it is null, and updates the
// running maximum, sum of exponentials and top k.
template <class A>
static void gate_rows(const GateRows<A>& g, int64_t lo, int64_t hi) {
  alignas(64) A x[kMaxWidth], c[kMaxWidth];
  const int64_t whole = (g.width + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = lo; i < hi; ++i) {
    const int64_t n = g.row0 + i;
    load_row(g.tile[0] + i * g.stride, x, g.width, g.bias[0] ? g.bias[0] + g.v0 : nullptr);
    if (g.affine) {
      for (int64_t j = g.width; j < whole; ++j) x[j] = 0;
      shift_row(x, c, whole, g.affine[0], g.affine[1]);
      add_gate(x, c, g.width, g.gamma[n]);
    }
    for (int64_t h = 1; h < g.heads; ++h) {
      load_row(g.tile[h] + i * g.stride, c, g.width, g.bias[h] ? g.bias[h] + g.v0 : nullptr);
      add_gate(x, c, g.width, g.gamma[(h - 1) * g.rows + n]);
    }
    for (int64_t j = g.width; j < whole; ++j) x[j] = -(A)__builtin_inf();
    if (g.out) store_row(g.out + n * g.vocab + g.v0, x, g.width);
    const A old = g.maximum[n], here = row_max(x, g.width);
    if (g.k && here > g.top_value[n * g.k + g.k - 1])
      keep_top(x, g.width, g.v0, g.top_value + n * g.k, g.top_index + n * g.k, g.k);
    const A top = here > old ? here : old;
    const A shift = top == -(A)__builtin_inf() ? A(0) : top;
    const A sum = exp_row(x, g.width, shift);
    g.maximum[n] = top;
    g.sum[n] = g.sum[n] * std::exp(old - shift) + sum;
  }
}

// turns scores into log-probabilities
template <class A>
static void normalize(A* x, int64_t width, A maximum, A log_sum) {
  for (int64_t j = 0; j < width; ++j) x[j] = (x[j] - maximum) - log_sum;
}

// ---------------------------------------------------------------- gradients

// du = grad - exp(logp) * total
static inline void score_gradient(
    const float* grad, const float* logp, float* du, int64_t width, float total) {
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) store(du + j, load(grad + j) - vexp(load(logp + j)) * total);
  if (j == width) return;
  alignas(64) float last[kLanes] = {};
  for (int64_t i = j; i < width; ++i) last[i - j] = logp[i];
  store(last, vexp(load(last)));
  store(du + j, vf{});
  for (; j < width; ++j) du[j] = grad[j] - last[j % kLanes] * total;
}

static inline void score_gradient(
    const double* grad, const double* logp, double* du, int64_t width, double total) {
  for (int64_t j = 0; j < width; ++j) du[j] = grad[j] - std::exp(logp[j]) * total;
}

// replaces c by its gradient gamma * sigmoid(-c) * ds; returns sum ds * logsigmoid(c)
static inline double gate_gradient(const float* ds, float* c, int64_t width, float gamma) {
  vf sum{};
  const vf floor = splat(gamma == 0.0f ? kLowest<float> : -__builtin_inff());
  for (int64_t j = 0; j < width; j += kLanes) {
    const vf x = load(c + j), d = load(ds + j);
    vf t = vlogsig(x);
    t = t < floor ? vf{} : t;
    sum += d == 0.0f ? vf{} : d * t;
    store(c + j, gamma * vsigneg(x) * d);
  }
  return reduce_add(sum);
}

static inline double gate_gradient(const double* ds, double* c, int64_t width, double gamma) {
  double sum = 0;
  for (int64_t j = 0; j < width; ++j) {
    const double floor = gamma == 0 ? kLowest<double> : -__builtin_inf();
    const double t = slogsig(c[j]);
    if (ds[j] != 0) sum += ds[j] * (t < floor ? 0.0 : t);
    c[j] = gamma * ssigneg(c[j]) * ds[j];
  }
  return sum;
}

// Processes rows [lo, hi) of a tile: replaces each product by dloss/dproduct. The tile of the LM head is only written,
// unless the head is shared.
template <class A>
static void gate_backward_rows(const GateBackwardRows<A>& g, int64_t lo, int64_t hi) {
  alignas(64) A ds[kMaxWidth], c[kMaxWidth];
  const int64_t whole = (g.width + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = lo; i < hi; ++i) {
    const int64_t n = g.row0 + i, at = n * g.vocab + g.v0;
    A* first = g.tile[0] + i * g.stride;
    score_gradient(g.grad + at, g.logp + at, ds, g.width, g.total[n]);
    for (int64_t j = g.width; j < whole; ++j) ds[j] = 0;
    if (g.affine) {
      alignas(64) A u[kMaxWidth];
      load_row(first, u, g.width, g.bias[0] ? g.bias[0] + g.v0 : nullptr);
      for (int64_t j = g.width; j < whole; ++j) u[j] = 0;
      shift_row(u, c, whole, g.affine[0], g.affine[1]);
      g.grad_gamma[n] += gate_gradient(ds, c, g.width, g.gamma[n]);
      for (int64_t j = 0; j < g.width; ++j) {
        g.grad_affine[2 * n] += c[j] == 0 ? A(0) : c[j] * u[j];
        g.grad_affine[2 * n + 1] += c[j];
        ds[j] += g.affine[0] * c[j];
      }
    }
    store_row(first, ds, g.width);
    for (int64_t h = 1; h < g.heads; ++h) {
      A* tile = g.tile[h] + i * g.stride;
      load_row(tile, c, g.width, g.bias[h] ? g.bias[h] + g.v0 : nullptr);
      for (int64_t j = g.width; j < whole; ++j) c[j] = 0;
      const int64_t m = (h - 1) * g.rows + n;
      g.grad_gamma[m] += gate_gradient(ds, c, g.width, g.gamma[m]);
      store_row(tile, c, g.width);
    }
  }
}
