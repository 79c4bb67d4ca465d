// Products of a few rows of hidden with rows of a weight that is read once, straight from memory.
// Included once per instruction set, after vec.h. The lanes run along the depth for up to four rows of
// hidden, along eight rows and two neighbours of the depth up to eight, and along the rows above.

constexpr int64_t kAcc = kRegisters * 3 / 4;  // accumulators of a block of products

// terms that one accumulator sums in turn before it is added to the total: as accurate as lanes along the depth
constexpr int64_t kRun = 128;

// a row in float32, zeros up to whole vectors
template <class T>
static inline void widen(const T* w, float* x, int64_t d) {
  int64_t j = 0;
  for (; j + kLanes <= d; j += kLanes) store(x + j, load(w + j));
  if (j == d) return;
  T last[kLanes] = {};
  for (int64_t i = j; i < d; ++i) last[i - j] = w[i];
  store(x + j, load(last));
}

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

// out[n][r] = w[r] . h[n] for R rows of the weight and N of hidden
template <int R, int N>
static inline void few_block(
    const float* w, int64_t ws, const float* h, int64_t d, float* out, int64_t os) {
  vf acc[R][N] = {};
  int64_t j = 0;
  for (; j + kLanes <= d; j += kLanes, h += N * kLanes) {
    vf x[R];
    for (int r = 0; r < R; ++r) x[r] = load(w + r * ws + j);
    for (int r = 0; r < R; ++r) fetch(w + (2 * R + r) * ws + j);
    for (int n = 0; n < N; ++n) {
      vf y = load(h + n * 16);
      hold(y);
      for (int r = 0; r < R; ++r) acc[r][n] += x[r] * y;
    }
  }
  if (j < d) {
    for (int r = 0; r < R; ++r) {
      float last[kLanes] = {};
      for (int64_t i = j; i < d; ++i) last[i - j] = w[r * ws + i];
      for (int n = 0; n < N; ++n) acc[r][n] += load(last) * load(h + n * 16);
    }
  }
  for (int r = 0; r < R; ++r) reduce_each<N>(acc[r], out + r, os);
}

// h [whole d / 16][N][16]; out [N][os]
template <int N>
static inline void few_rows(
    const float* w, int64_t ws, int64_t rows, const float* h, int64_t d, float* out, int64_t os) {
  constexpr int R = kAcc / N < 1 ? 1 : kAcc / N > 8 ? 8 : kAcc / N;
  int64_t r = 0;
  for (; r + R <= rows; r += R) few_block<R, N>(w + r * ws, ws, h, d, out + r, os);
  for (; r < rows; ++r) few_block<1, N>(w + r * ws, ws, h, d, out + r, os);
}

// lanes are 8 rows of hidden times two neighbours of the depth: h [whole d / 2][8][2]; out[n][r], n < count
template <int R>
static inline void eight_block(
    const float* w, int64_t ws, const float* h, int64_t d, float* out, int64_t os, int64_t count) {
  typedef double vd __attribute__((vector_size(64)));
  vf total[R] = {};
  int64_t j = 0;
  while (j + 2 <= d) {
    vf acc[R] = {};
    for (const int64_t end = j + kRun < d ? j + kRun : d; j + 2 <= end; j += 2, h += kLanes) {
      if (j % kLanes == 0)
        for (int r = 0; r < R; ++r) fetch(w + (R + r) * ws + j);
      vf y = load(h);
      hold(y);
      for (int r = 0; r < R; ++r) {
        double two;
        __builtin_memcpy(&two, w + r * ws + j, 8);
        acc[r] += (vf)vd{two, two, two, two, two, two, two, two} * y;
      }
    }
    for (int r = 0; r < R; ++r) total[r] += acc[r];
  }
  for (int r = 0; r < R && j < d; ++r) total[r] += splat(w[r * ws + j]) * load(h);
  for (int r = 0; r < R; ++r)
    for (int64_t n = 0; n < count; ++n) out[n * os + r] = total[r][2 * n] + total[r][2 * n + 1];
}

static inline void eight_rows(
    const float* w, int64_t ws, int64_t rows, const float* h, int64_t d, float* out, int64_t os, int64_t count) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) eight_block<8>(w + r * ws, ws, h, d, out + r, os, count);
  for (; r < rows; ++r) eight_block<1>(w + r * ws, ws, h, d, out + r, os, count);
}

static inline void few_any(const float* w, int64_t ws, int64_t rows, const float* h, int64_t count,
                           int64_t d, float* out, int64_t os) {
  switch (count) {
    case 1: return few_rows<1>(w, ws, rows, h, d, out, os);
    case 2: return few_rows<2>(w, ws, rows, h, d, out, os);
    case 3: return few_rows<3>(w, ws, rows, h, d, out, os);
    case 4: return few_rows<4>(w, ws, rows, h, d, out, os);
    default: return eight_rows(w, ws, rows, h, d, out, os, count);
  }
}

// rows of a panel are lanes: h [d][16 * M]; out[n][r], n < count
template <int M, int R>
static inline void panel_block(
    const float* w, int64_t ws, const float* h, int64_t d, float* out, int64_t os, int64_t count) {
  vf total[R][M] = {};
  for (int64_t j = 0; j < d;) {
    vf acc[R][M] = {};
    for (const int64_t end = j + kRun < d ? j + kRun : d; j < end; ++j, h += M * kLanes) {
      vf y[M];
      for (int m = 0; m < M; ++m) y[m] = load(h + m * kLanes);
      if (j % kLanes == 0)
        for (int r = 0; r < R; ++r) fetch(w + (2 * R + r) * ws + j);
      for (int r = 0; r < R; ++r) {
        const vf x = splat(w[r * ws + j]);
        for (int m = 0; m < M; ++m) acc[r][m] += x * y[m];
      }
    }
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) total[r][m] += acc[r][m];
  }
  for (int r = 0; r < R; ++r) {
    alignas(64) float column[M * kLanes];
    for (int m = 0; m < M; ++m) store(column + m * kLanes, total[r][m]);
    for (int64_t n = 0; n < count; ++n) out[n * os + r] = column[n];
  }
}

template <int M>
static inline void panel_rows(const float* w, int64_t ws, int64_t rows, const float* h, int64_t d, float* out,
                              int64_t os, int64_t count) {
  constexpr int R = kAcc / M < 1 ? 1 : kAcc / M > 8 ? 8 : kAcc / M;
  int64_t r = 0;
  for (; r + R <= rows; r += R) panel_block<M, R>(w + r * ws, ws, h, d, out + r, os, count);
  for (; r < rows; ++r) panel_block<M, 1>(w + r * ws, ws, h, d, out + r, os, count);
}

static inline void panel_any(const float* w, int64_t ws, int64_t rows, const float* h, int64_t count, int64_t d,
                             float* out, int64_t os) {
  for (; count > 0; count -= 64, h += 64 * d, out += 64 * os) {
    if (count > 48) panel_rows<4>(w, ws, rows, h, d, out, os, count < 64 ? count : 64);
    else if (count > 32) panel_rows<3>(w, ws, rows, h, d, out, os, count);
    else if (count > 16) panel_rows<2>(w, ws, rows, h, d, out, os, count);
    else panel_rows<1>(w, ws, rows, h, d, out, os, count);
  }
}

// The products of one head with `rows` rows of its weight, into a tile [count][os]. Weights that are
// not float32 are widened a few rows at a time, into `wide` [8][whole d].
template <class T>
static void dots(const Dots& p, const void* weight, int64_t rows, float* out, int64_t os, float* wide) {
  const T* w = (const T*)weight;
  const int64_t whole = (p.depth + kLanes - 1) / kLanes * kLanes;
  for (int64_t r = 0; r < rows;) {
    int64_t step = rows - r, ws = p.stride;
    const float* from;
    if constexpr (sizeof(T) == 4) {
      from = (const float*)w;
    } else {
      step = step < kWiden ? step : kWiden;
      for (int64_t i = 0; i < step; ++i) widen(w + (r + i) * p.stride, wide + i * whole, p.depth);
      from = wide;
      ws = whole;
    }
    if (p.packed) panel_any(from, ws, step, (const float*)p.hidden, p.count, p.depth, out + r, os);
    else few_any(from, ws, step, (const float*)p.hidden, p.count, p.depth, out + r, os);
    r += step;
  }
}
