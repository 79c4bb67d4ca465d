// Sampling of segmentations. Included only by segmentation_rows.h, which defines shares.

SUKHOPS_INLINE uint64_t mixed(uint64_t z) {  // the finalizer of SplitMix64
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Samples segmentations backward from the end: at each boundary, draws one of the segments that end there by their
// shares. A random number depends only on the seed, the sample, the sequence and the boundary. Returns false if
// exponents are inexact.
template <int W, int N, class A>
static bool draw(Chain<A, A> c, Draw<A> d) {
  typedef typename Wide<A, W>::f V;
  using F = Format<A>;
  using Int = typename F::Int;
  constexpr int kNumbers = F::kMantissa < 32 ? 2 : 1;  // random numbers per hash
  constexpr uint64_t kStep = 0x9e3779b97f4a7c15u;
  const int64_t size = N ? N * W : padded(c.k, W);
  for (int64_t s = 0; s < d.samples; ++s) {
    d.position[s] = c.length;
    int64_t* out = d.segments + s * d.sequences * c.stored;
    for (int64_t t = c.length; t < c.stored; ++t) out[t] = 0;
    d.stream[s] = mixed(d.seed + kStep * uint64_t(s * d.sequences + d.sequence + 1));
  }
  for (int64_t end = c.length; end > 0; end -= kDrawTile) {
    const int64_t first = end - kDrawTile > 0 ? end - kDrawTile : 0, rows = end - first;  // boundaries (first, end]
    for (int64_t i = 0; i < rows * size; ++i) d.table[i] = 0;
    for (int64_t t = first + 1 - c.k > 0 ? first + 1 - c.k : 0, tile = t; t < end; ++t) {
      if ((t - tile) % kTile == 0 && !prepare<W>(c, tile = t, kTile < end - t ? kTile : end - t)) return false;
      const ShareInputs<A> from = share_inputs<W>(c, t, t - tile);
      for (int64_t k = 0; k < c.k; k += W) {
        const V share = segment_share<V>(from, k);
        for (int64_t l = 0; l < W; ++l) {
          const int64_t j = t + 1 + k + l;
          if (j > first && j <= end && k + l < c.k) d.table[(j - first - 1) * size + k + l] = share[l];
        }
      }
    }
    for (int64_t j = 0; j < rows; ++j) {  // running sums of the shares, scaled to end at 1
      A* p = d.table + j * size;
      A total = 0;
      for (int64_t k = 0; k < size; ++k) p[k] = total += p[k];
      for (int64_t k = 0; k < size; ++k) p[k] /= total;
    }
    // several samples at a time: the steps of one sample wait for each other, those of different samples do not
    for (int64_t s = 0; s < d.samples; s += kTogether) {
      const int64_t count = d.samples - s < kTogether ? d.samples - s : kTogether;
      int64_t at[kTogether] = {}, *out[kTogether];
      A drawn[kTogether][kDrawTile + kNumbers];  // the number of boundary first + 1 + j is at j + skipped
      const int64_t skipped = (first + 1) % kNumbers;
      for (int64_t i = 0; i < count; ++i) {
        at[i] = d.position[s + i] - first;
        out[i] = d.segments + (s + i) * d.sequences * c.stored + first;
        for (int64_t j = 0; j < rows; ++j) out[i][j] = 0;
        if (at[i] >= 0 && at[i] < rows) out[i][at[i]] = d.segment[s + i];  // starts in this tile, ends after it
        for (int64_t j = 0; j < rows + skipped; j += kNumbers) {
          const uint64_t bits = mixed(d.stream[s + i] + kStep * uint64_t((first + 1 + j) / kNumbers));
          for (int64_t l = 0; l < kNumbers; ++l)
            drawn[i][j + l] = A(Int(bits << 32 * l >> (63 - F::kMantissa))) * (A(0.5) / A(int64_t(1) << F::kMantissa));
        }
      }
      for (bool more = true; more;) {
        more = false;
#pragma GCC unroll 4
        for (int64_t i = 0; i < kTogether; ++i) {
          if (at[i] <= 0) continue;
          const V u = drawn[i][at[i] - 1 + skipped] - V{};
          const A* p = d.table + (at[i] - 1) * size;
          int64_t length = 1;
#pragma GCC unroll 4
          for (int64_t k = 0; k < size; k += W) length += count_lanes<W>(get<V>(p + k) <= u);
          at[i] -= length;
          d.segment[s + i] = length;
          if (at[i] >= 0) out[i][at[i]] = length;
          more = true;
        }
      }
      for (int64_t i = 0; i < count; ++i) d.position[s + i] = first + at[i];
    }
  }
  return true;
}
