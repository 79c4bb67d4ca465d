// The row pass of director_norm over a tile of products. Included by isa.h once per instruction set.
#include "rows.h"

// t = tanh(c / 2) = 2 sigmoid(c) - 1
static inline void half_tanh(const float* c, float* t, int64_t width) {
  for (int64_t j = 0; j < width; j += kLanes) store(t + j, vtanh(0.5f * load(c + j)));
}

static inline void half_tanh(const double* c, double* t, int64_t width) {
  for (int64_t j = 0; j < width; ++j) t[j] = std::tanh(0.5 * c[j]);
}

// Processes rows [lo, hi) of a tile. Forward: adds the sum of (sigmoid(c) - 1/2)^2 over the tile, without the target,
// to `sum`, and stores the target's logit. Backward (with `grad`): writes dloss/dproduct to the tile. The
// products are those in the tile, or those that the forward stored.
template <class A>
static void norm_rows(const NormRows<A>& g, int64_t lo, int64_t hi) {
  alignas(64) A c[kMaxWidth], t[kMaxWidth];
  for (int64_t i = lo; i < hi; ++i) {
    A* z = g.tile + i * g.stride;
    const int64_t n = g.row0 + i, target = g.target[n] - g.v0;
    load_row(g.kept ? g.kept + g.kept_row[n] * g.vocab + g.v0 : z, c, g.width, g.bias);
    const bool has_target = target >= 0 && target < g.width;
    if (has_target && !g.grad) g.logit[n] = c[target];
    alignas(64) A u[kMaxWidth];
    if (g.affine) {
      for (int64_t j = 0; j < g.width; ++j) u[j] = c[j];
      shift_row(u, c, g.width, g.affine[0], g.affine[1]);
    }
    half_tanh(c, t, g.width);
    if (has_target) t[target] = 0;
    if (!g.grad) {
      A sum = 0;
      for (int64_t j = 0; j < g.width; ++j) sum += t[j] * t[j];
      g.sum[n] += sum / 4;
      continue;
    }
    const A by = g.grad[n] / 4;
    for (int64_t j = 0; j < g.width; ++j) c[j] = by * t[j] * (1 - t[j] * t[j]);
    if (g.affine) {
      for (int64_t j = 0; j < g.width; ++j) {
        g.grad_affine[2 * n] += c[j] == 0 ? A(0) : c[j] * u[j];
        g.grad_affine[2 * n + 1] += c[j];
        c[j] *= g.affine[0];
      }
    }
    store_row(z, c, g.width);
  }
}
