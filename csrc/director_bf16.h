// Products in bfloat16 with the CPU's own pair dot product: two neighbours of the depth per lane.
// Included where the target has AVX512-BF16, after vec.h. The same two layouts as director_dots.h.
typedef uint32_t pairs __attribute__((vector_size(64)));

SUKHOPS_INLINE vf dot_pairs(vf acc, pairs x, pairs y) {
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)y);
}

SUKHOPS_INLINE pairs load_pairs(const uint16_t* p) {
  pairs x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

constexpr int kRegisters = 32;

// out[i * os] = the sum of the lanes of x[i]; eight at a time by halving pairs of vectors
template <int N>
SUKHOPS_INLINE void reduce_each(vf* x, float* out, int64_t os) {
  if constexpr (kRegisters == 32 && N == 8) {
    vf a[4], b[2];
    for (int i = 0; i < 4; ++i)
      a[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], vi{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}) +
             __builtin_shuffle(x[2 * i], x[2 * i + 1], vi{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
    for (int i = 0; i < 2; ++i)
      b[i] = __builtin_shuffle(a[2 * i], a[2 * i + 1], vi{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}) +
             __builtin_shuffle(a[2 * i], a[2 * i + 1], vi{4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31});
    vf c = __builtin_shuffle(b[0], b[1], vi{0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29}) +
           __builtin_shuffle(b[0], b[1], vi{2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31});
    c += __builtin_shuffle(c, vi{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
    for (int i = 0; i < 8; ++i) out[i * os] = c[2 * i];
  } else {
    for (int i = 0; i < N; ++i) out[i * os] = reduce_add(x[i]);
  }
}

// the rows that come next, into the second cache: no prefetcher of the CPU's own follows to a new page
SUKHOPS_INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

template <int R, int N>
static inline void few_block(
    const uint16_t* w, int64_t ws, const uint16_t* h, int64_t d, float* out, int64_t os) {
  vf acc[R][N] = {};
  int64_t j = 0;
  for (; j + 32 <= d; j += 32, h += N * 32) {
    pairs x[R];
    for (int r = 0; r < R; ++r) x[r] = load_pairs(w + r * ws + j);
    for (int r = 0; r < R; ++r) fetch(w + (2 * R + r) * ws + j);
    for (int n = 0; n < N; ++n) {
      pairs y = load_pairs(h + n * 32);
      asm("" : "+v"(y));  // one load, not one per product
      for (int r = 0; r < R; ++r) acc[r][n] = dot_pairs(acc[r][n], x[r], y);
    }
  }
  if (j < d) {
    for (int r = 0; r < R; ++r) {
      uint16_t last[32] = {};
      for (int64_t i = j; i < d; ++i) last[i - j] = w[r * ws + i];
      for (int n = 0; n < N; ++n) acc[r][n] = dot_pairs(acc[r][n], load_pairs(last), load_pairs(h + n * 32));
    }
  }
  for (int r = 0; r < R; ++r) reduce_each<N>(acc[r], out + r, os);
}

template <int N>
static inline void few_rows(const uint16_t* w, int64_t ws, int64_t rows, const uint16_t* h, int64_t d, float* out, int64_t os) {
  constexpr int R = 24 / N > 8 ? 8 : 24 / N;
  int64_t r = 0;
  for (; r + R <= rows; r += R) few_block<R, N>(w + r * ws, ws, h, d, out + r, os);
  for (; r < rows; ++r) few_block<1, N>(w + r * ws, ws, h, d, out + r, os);
}

static inline void few_any(const uint16_t* w, int64_t ws, int64_t rows, const uint16_t* h, int64_t count,
                           int64_t d, float* out, int64_t os) {
  switch (count) {
    case 1: return few_rows<1>(w, ws, rows, h, d, out, os);
    case 2: return few_rows<2>(w, ws, rows, h, d, out, os);
    case 3: return few_rows<3>(w, ws, rows, h, d, out, os);
    case 4: return few_rows<4>(w, ws, rows, h, d, out, os);
    case 5: return few_rows<5>(w, ws, rows, h, d, out, os);
    case 6: return few_rows<6>(w, ws, rows, h, d, out, os);
    case 7: return few_rows<7>(w, ws, rows, h, d, out, os);
    case 8: return few_rows<8>(w, ws, rows, h, d, out, os);
  }
}

// h [d / 2][16 * M] pairs, an odd last neighbour 0
template <int M, int R>
static inline void panel_block(
    const uint16_t* w, int64_t ws, const uint16_t* h, int64_t d, float* out, int64_t os, int64_t count) {
  vf acc[R][M] = {};
  for (int64_t j = 0; j < d; j += 2, h += M * 32) {
    pairs y[M];
    for (int m = 0; m < M; ++m) y[m] = load_pairs(h + m * 32);
    if (j % 32 == 0)
      for (int r = 0; r < R; ++r) fetch(w + (2 * R + r) * ws + j);
    for (int r = 0; r < R; ++r) {
      uint32_t two = w[r * ws + j];
      if (j + 1 < d) __builtin_memcpy(&two, w + r * ws + j, 4);
      const pairs x = (pairs)_mm512_set1_epi32((int)two);
      for (int m = 0; m < M; ++m) acc[r][m] = dot_pairs(acc[r][m], x, y[m]);
    }
  }
  for (int r = 0; r < R; ++r) {
    alignas(64) float column[M * kLanes];
    for (int m = 0; m < M; ++m) store(column + m * kLanes, acc[r][m]);
    for (int64_t n = 0; n < count; ++n) out[n * os + r] = column[n];
  }
}

template <int M>
static inline void panel_rows(const uint16_t* w, int64_t ws, int64_t rows, const uint16_t* h, int64_t d,
                              float* out, int64_t os, int64_t count) {
  constexpr int R = 24 / M > 8 ? 8 : 24 / M;
  int64_t r = 0;
  for (; r + R <= rows; r += R) panel_block<M, R>(w + r * ws, ws, h, d, out + r, os, count);
  for (; r < rows; ++r) panel_block<M, 1>(w + r * ws, ws, h, d, out + r, os, count);
}

static void dots_bfloat16(const Dots& p, const void* weight, int64_t rows, float* out, int64_t os, float*) {
  const uint16_t *w = (const uint16_t*)weight, *h = (const uint16_t*)p.hidden;
  const int64_t ws = p.stride, d = p.depth;
  int64_t count = p.count;
  if (p.packed) {
    const int64_t size = (d + 1) / 2 * 2 * 64;
    for (; count > 0; count -= 64, h += size, out += 64 * os) {
      if (count > 48) panel_rows<4>(w, ws, rows, h, d, out, os, count < 64 ? count : 64);
      else if (count > 32) panel_rows<3>(w, ws, rows, h, d, out, os, count);
      else if (count > 16) panel_rows<2>(w, ws, rows, h, d, out, os, count);
      else panel_rows<1>(w, ws, rows, h, d, out, os, count);
    }
    return;
  }
  few_any(w, ws, rows, h, count, d, out, os);
}
