// The row passes of vocab_head over one tile of raw products hidden @ weight.T. Included by isa.h once per instruction
// set. A is the type of products (float or double). A row is read once into `x`, which is padded to whole vectors.
#include "rows.h"

// logit = softcap * tanh(raw / softcap), raw = scale * (product + bias); -inf in the padding
static inline void load_logits(
    const float* z, float* x, int64_t width, const float* bias, float scale, float softcap) {
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
  if (scale != 1.0f) {
    for (j = 0; j < width; ++j) x[j] *= scale;
  }
  if (softcap != 0.0f) {
    const float inverse = 1.0f / softcap;
    for (j = 0; j < whole; j += kLanes) store(x + j, softcap * vtanh(load(x + j) * inverse));
    for (j = width; j < whole; ++j) x[j] = -__builtin_inff();
  }
}

static inline void load_logits(
    const double* z, double* x, int64_t width, const double* bias, double scale, double softcap) {
  for (int64_t j = 0; j < width; ++j) {
    const double raw = scale * (z[j] + (bias ? bias[j] : 0.0));
    x[j] = softcap != 0.0 ? softcap * std::tanh(raw / softcap) : raw;
  }
}

// rows [lo, hi) of a tile: updates the running maximum and sum, picks targets and the top k, and with
// `mean` leaves in the tile exp(logit - maximum) * dlogit/draw and scales the row of `mean` to the new maximum
template <class A>
static void forward_rows(const ForwardRows<A>& f, int64_t lo, int64_t hi) {
  alignas(64) A x[kMaxWidth], cap[kMaxWidth];
  for (int64_t i = lo; i < hi; ++i) {
    A* z = f.tile + i * f.stride;
    load_logits(z, x, f.width, f.bias, f.scale, f.softcap);
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
    if (f.mean && f.softcap != 0) {
      for (int64_t j = 0; j < f.width; ++j) {
        const A y = x[j] / f.softcap;
        cap[j] = 1 - y * y;
      }
    }
    const A sum = exp_row(x, f.width, shift);
    const A decay = std::exp(old - shift);
    f.maximum[n] = top;
    f.sum[n] = f.sum[n] * decay + sum;
    if (!f.mean) continue;
    if (f.softcap != 0) {
      for (int64_t j = 0; j < f.width; ++j) x[j] *= cap[j];
    }
    store_row(z, x, f.width);
    if (f.v0 != 0 && decay != 1) {
      A* mean = f.mean + n * f.depth;
      for (int64_t d = 0; d < f.depth; ++d) mean[d] *= decay;
    }
  }
}

// rows [lo, hi) of a tile: writes dloss/dproduct of each product, of the tile or of the rows that were kept
template <class A>
static void backward_rows(const BackwardRows<A>& b, int64_t lo, int64_t hi) {
  alignas(64) A x[kMaxWidth], g[kMaxWidth];
  for (int64_t i = lo; i < hi; ++i) {
    const int64_t n = b.row0 + i;
    A* z = b.tile + i * b.stride;
    load_logits(b.kept ? b.kept + b.kept_row[n] * b.vocab + b.v0 : z, x, b.width, b.bias, b.scale, b.softcap);
    const int64_t whole = (b.width + kLanes - 1) / kLanes * kLanes;
    for (int64_t j = 0; j < whole; ++j) g[j] = x[j];
    exp_row(g, b.width, b.lse[n]);
    const A upstream = b.grad_lse[n] * b.scale;
    for (int64_t j = 0; j < b.width; ++j) g[j] *= upstream;
    for (int64_t p = 0; p < b.picks; ++p) {
      const int64_t t = b.pick[n * b.picks + p] - b.v0;
      if (t >= 0 && t < b.width) g[t] += b.grad_pick[n * b.picks + p] * b.scale;
    }
    if (b.softcap != 0) {
      for (int64_t j = 0; j < b.width; ++j) {
        const A y = x[j] / b.softcap;
        g[j] *= 1 - y * y;
      }
    }
    store_row(z, g, b.width);
  }
}
