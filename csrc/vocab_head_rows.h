// The row passes of vocab_head over one tile of products hidden @ weight.T. Included by isa.h once per instruction set.
// A is the type of the products (float or double). Each row is copied to a buffer that is padded to a multiple of
// kLanes.
#include "rows.h"

// x = the logits of the products z, padded with -inf
static inline void load_logits(
    const float* z, float* x, int64_t width, const float* bias, const LogitCurve<float>& curve) {
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) store(x + j, load(z + j));
  if (j < width) {
    store(x + j, splat(-__builtin_inff()));
    for (; j < width; ++j) x[j] = z[j];
  }
  const int64_t whole = (width + kLanes - 1) / kLanes * kLanes;
  if (bias) {
    for (j = 0; j < width; ++j) x[j] += bias[j];
  }
  if (curve.scale != 1.0f) {
    for (j = 0; j < width; ++j) x[j] *= curve.scale;
  }
  if (curve.capped) {
    for (j = 0; j < whole; j += kLanes) store(x + j, curve.bound * vtanh(load(x + j)));
    for (j = width; j < whole; ++j) x[j] = -__builtin_inff();
  }
}

static inline void load_logits(
    const double* z, double* x, int64_t width, const double* bias, const LogitCurve<double>& curve) {
  for (int64_t j = 0; j < width; ++j) {
    const double raw = curve.scale * (z[j] + (bias ? bias[j] : 0.0));
    x[j] = curve.capped ? curve.bound * std::tanh(raw) : raw;
  }
}

// the derivative of the curve at a logit, divided by the derivative at 0 (`slope`)
template <class A>
static inline A relative_slope(A logit, const LogitCurve<A>& curve) {
  if (!curve.capped) return 1;
  const A y = logit / curve.bound;
  return 1 - y * y;
}

// adds the sums over a row of e * t, e * e and x to `sums`, where t = x - shift and e = exp(t)
static inline void add_moments(const float* x, int64_t width, float shift, double* sums) {
  vf first{}, second{}, total{};
  int64_t j = 0;
  for (; j < width; j += kLanes) {
    const vf z = load(x + j), t = z - shift, e = vexp(t);
    first += e * (t < kMinShifted ? splat(kMinShifted) : t);
    second += e * e;
    if (j + kLanes <= width) total += z;
  }
  sums[0] += reduce_add(first);
  sums[1] += reduce_add(second);
  sums[2] += reduce_add(total);
  for (j = width / kLanes * kLanes; j < width; ++j) sums[2] += x[j];
}

static inline void add_moments(const double* x, int64_t width, double shift, double* sums) {
  for (int64_t j = 0; j < width; ++j) {
    const double t = x[j] - shift, e = std::exp(t);
    sums[0] += e * (t < kMinShifted ? kMinShifted : t);
    sums[1] += e * e;
    sums[2] += x[j];
  }
}

// replaces a row x of logits by p * (grad_log_sum - grad_entropy * (log p + entropy)), where p is the softmax of x
static inline void softmax_gradient(
    float* x, int64_t width, float maximum, float log_sum, float entropy, float grad_log_sum, float grad_entropy) {
  for (int64_t j = 0; j < width; j += kLanes) {
    const vf t = (load(x + j) - maximum) - log_sum;
    store(x + j, vexp(t) * (grad_log_sum - grad_entropy * ((t < kMinShifted ? splat(kMinShifted) : t) + entropy)));
  }
}

static inline void softmax_gradient(
    double* x, int64_t width, double maximum, double log_sum, double entropy, double grad_log_sum,
    double grad_entropy) {
  for (int64_t j = 0; j < width; ++j) {
    const double t = (x[j] - maximum) - log_sum;
    x[j] = std::exp(t) * (grad_log_sum - grad_entropy * ((t < kMinShifted ? kMinShifted : t) + entropy));
  }
}

// Processes rows [lo, hi) of a tile: updates the running maximum, the sums and the top k, and copies the logits of the
// targets. With `mean`, also replaces the tile by exp(logit - maximum) * (dlogit/draw) / slope * mean_scale, and
// rescales the rows of `mean` to the new maximum.
template <class A>
static void forward_rows(const ForwardRows<A>& f, int64_t lo, int64_t hi) {
  alignas(64) A x[kMaxWidth], flat[kMaxWidth];
  for (int64_t i = lo; i < hi; ++i) {
    A* z = f.tile + i * f.stride;
    load_logits(z, x, f.width, f.bias, f.curve);
    const int64_t n = f.row0 + i;
    for (int64_t k = 0; k < f.targets; ++k) {
      const int64_t t = f.target[n * f.targets + k] - f.v0;
      if (t >= 0 && t < f.width) f.target_logit[n * f.targets + k] = x[t];
    }
    const A old = f.maximum[n], here = row_max(x, f.width);
    if (f.k && here > f.top_value[n * f.k + f.k - 1])
      keep_top(x, f.width, f.v0, f.top_value + n * f.k, f.top_index + n * f.k, f.k);
    const A top = here > old ? here : old;
    const A shift = top == -__builtin_inf() ? A(0) : top;
    const A decay = std::exp(old - shift);
    if (f.moments) {
      double* const m = f.moments + 3 * n;
      move_moments(m, f.sum[n], old, shift);
      add_moments(x, f.width, shift, m);
    }
    if (f.mean) {
      for (int64_t j = 0; j < f.width; ++j) flat[j] = relative_slope(x[j], f.curve) * f.mean_scale;
    }
    const A sum = exp_row(x, f.width, shift);
    f.maximum[n] = top;
    f.sum[n] = f.sum[n] * decay + sum;
    if (!f.mean) continue;
    for (int64_t j = 0; j < f.width; ++j) x[j] *= flat[j];
    store_row(z, x, f.width);
    if (f.v0 != 0 && decay != 1) {
      A* mean = f.mean + n * f.depth;
      for (int64_t d = 0; d < f.depth; ++d) mean[d] *= decay;
    }
  }
}

// Processes rows [lo, hi) of a tile: writes dloss/dproduct to the tile. The products are those in the tile, or those
// that the forward stored.
template <class A>
static void backward_rows(const BackwardRows<A>& b, int64_t lo, int64_t hi) {
  alignas(64) A x[kMaxWidth], g[kMaxWidth];
  for (int64_t i = lo; i < hi; ++i) {
    const int64_t n = b.row0 + i;
    A* z = b.tile + i * b.stride;
    load_logits(b.kept ? b.kept + b.kept_row[n] * b.vocab + b.v0 : z, x, b.width, b.bias, b.curve);
    const int64_t whole = (b.width + kLanes - 1) / kLanes * kLanes;
    for (int64_t j = 0; j < whole; ++j) g[j] = x[j];
    softmax_gradient(g, b.width, b.maximum[n], b.log_sum[n], b.entropy[n], b.grad_log_sum[n] * b.curve.slope,
                     b.grad_entropy[n] * b.curve.slope);
    for (int64_t p = 0; p < b.picks; ++p) {
      const int64_t t = b.pick[n * b.picks + p] - b.v0;
      if (t >= 0 && t < b.width) g[t] += b.grad_pick[n * b.picks + p] * b.curve.slope;
    }
    for (int64_t j = 0; j < b.width && b.curve.capped; ++j) g[j] *= relative_slope(x[j], b.curve);
    store_row(z, g, b.width);
  }
}
