// The recursions of segmentation.cpp. Included by isa.h once per instruction set. S is how a score is
// stored, A what is computed with.
//
// A number is a * 2^n: the exponent n is an integer kept in A, relative to a double, so that scores of any
// size are added without overflow, and without a logarithm before the end. Sums of a sequence's own numbers
// depend on nothing else, so neither the number of threads nor the other sequences change a bit.
//
// Rows are taken kTile at a time. In most tiles all numbers are within reach of one exponent: such a tile is
// `plain`, and its exponents are left out. A tile finds out by itself, and is done again if it was not.

// powers of two that bound the numbers of a plain tile: no product of theirs overflows or loses a bit
struct Plain {
  int lowest, scores;  // a score's exponential has one of this many exponents from -lowest on, or is 0
  int low, high;       // sums over all ways to a boundary are in [2^-low, 2^high], or 0
  int top;             // where the largest sum of the window starts
  int least;           // a sum that ways are still missing from is at least 2^-least, or 0
};

template <class A>
struct Format;
template <>
struct Format<float> {
  typedef int32_t Int;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr Int kMagicBits = 0x4b400000;
  static constexpr Plain kPlain{48, 64, 54, 104, 70, 100};
};
template <>
struct Format<double> {
  typedef int64_t Int;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kMagic = 6755399441055744.0;
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr Int kMagicBits = 0x4338000000000000;
  static constexpr Plain kPlain{384, 512, 580, 800, 400, 960};
};

template <class A, int W>
struct Wide {
  typedef A f __attribute__((vector_size(W * sizeof(A))));
  typedef typename Format<A>::Int i __attribute__((vector_size(W * sizeof(A))));
};

// how a window of k is held: W lanes a vector, N vectors, N = 0 for any number of them
template <int W, int N>
struct Shape {
  static constexpr int lanes = W, vectors = N;
};

template <class A, class F>
SUKHOPS_INLINE void with_shape(int64_t k, const F& f) {
  constexpr int most = kRegisterBytes / sizeof(A);  // lanes of a register
  if constexpr (most > 4) {
    if (k <= 4) return f(Shape<4, 1>());
  }
  if constexpr (most > 8) {
    if (k <= 8) return f(Shape<8, 1>());
  }
  switch ((k + most - 1) / most) {
    case 1: return f(Shape<most, 1>());
    case 2: return f(Shape<most, 2>());
    case 4: return f(Shape<most, 4>());
    default: return f(Shape<most, 0>());
  }
}

template <class V, class A>
SUKHOPS_INLINE V read(const A* p) {
  V x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

template <class V, class A>
SUKHOPS_INLINE void write(A* p, V x) {
  __builtin_memcpy(p, &x, sizeof x);
}

// exp(r) for |r| <= log(2) / 2; the minimax polynomial of its degree, error 5e-9
template <class V>
SUKHOPS_INLINE V exp_near_zero(V r, float) {
  const V square = r * r;
  const V low = r * 0.166665181517601f + 0.4999999403953552f;
  const V high = (square * 1.381416223011911e-3f + 4.166840761899948e-2f) + r * 8.36892705410719e-3f;
  return (high * square + low) * square + r + 1.0f;
}

template <class V>
SUKHOPS_INLINE V exp_near_zero(V r, double) {
  V p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  return p * (r * r) + r + 1.0;
}

// m * 2^n = exp(x); m is NaN for NaN and +inf, n is -inf for -inf
template <class A, class V>
SUKHOPS_INLINE void split(V x, V& m, V& n) {
  using F = Format<A>;
  const V y = x * A(1.44269504088896341);
  const V k = (y + F::kMagic) - F::kMagic;
  const V p = exp_near_zero((x - k * F::kLn2High) - k * F::kLn2Low, A());
  // where a score has no fraction left that counts, it is its own exponent
  const V one = V{} + A(1), size = y < A(0) ? -y : y;
  const auto coarse = size >= F::kMagic / 3;
  m = coarse ? (x < A(__builtin_inf()) ? one : one * A(__builtin_nan(""))) : p;
  n = coarse ? y : k;
}

// exp(x), to the bit what split has; `outside` gets bits above Plain::scores for a score that a plain tile cannot have
template <class A, class V, class I>
SUKHOPS_INLINE V plain_exp(V x, I& outside) {
  using F = Format<A>;
  constexpr A magic = F::kMagic + F::kBias;
  const I impossible = x == -A(__builtin_inf());
  const V shifted = x * A(1.44269504088896341) + magic, k = shifted - magic;
  outside |= ~impossible & ((I)shifted - (F::kMagicBits + F::kBias - F::kPlain.lowest));
  const V p = exp_near_zero((x - k * F::kLn2High) - k * F::kLn2Low, A());
  return impossible ? V{} : p * (V)((I)shifted << F::kMantissa);
}

// 2^d for an integer d <= the largest exponent, 0 where d is below the smallest one or NaN
template <class A, class V>
SUKHOPS_INLINE V power(V d) {
  using F = Format<A>;
  typedef decltype(d < d) I;
  const V shifted = d + (F::kMagic + F::kBias);
  return d >= A(1 - F::kBias) ? (V)((I)shifted << F::kMantissa) : V{};
}

template <int W, class V>
SUKHOPS_INLINE auto sum_lanes(V x) {
  if constexpr (W == 1) {
    return x[0];
  } else {
    typedef __typeof__(x[0] + 0) E;
    typedef E Half __attribute__((vector_size(W / 2 * sizeof(E))));
    Half low, high;
    __builtin_memcpy(&low, &x, sizeof low);
    __builtin_memcpy(&high, (const char*)&x + sizeof low, sizeof high);
    return sum_lanes<W / 2>(Half(low + high));
  }
}

SUKHOPS_INLINE int64_t padded(int64_t k, int64_t w) { return k > 0 ? (k + w - 1) / w * w : w; }

// the lanes of x from the second one on, then the first one of y
template <int W, class V>
SUKHOPS_INLINE V next_lane(V x, V y) {
  if constexpr (W == 2) return __builtin_shufflevector(x, y, 1, 2);
  if constexpr (W == 4) return __builtin_shufflevector(x, y, 1, 2, 3, 4);
  if constexpr (W == 8) return __builtin_shufflevector(x, y, 1, 2, 3, 4, 5, 6, 7, 8);
  if constexpr (W == 16)
    return __builtin_shufflevector(x, y, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
}

// brings a row to the cache, to be read or written; any address will do
template <int write, class S>
SUKHOPS_INLINE void fetch(const S* p, int64_t k) {
  for (int64_t i = 0; i < k; i += 64 / sizeof(S)) __builtin_prefetch(p + i, write);
}

// row t with -inf where a segment is too long: in place if it is whole, else in `room`
template <int W, class S, class A>
SUKHOPS_INLINE const A* row(const Chain<S, A>& c, int64_t t) {
  const S* x = c.scores + t * c.k;
  const int64_t valid = c.k < c.length - t ? c.k : c.length - t, size = padded(c.k, W);
  if constexpr (sizeof(S) == sizeof(A)) {
    if (valid == size) return x;
  }
  for (int64_t k = 0; k < valid; ++k) c.room[k] = x[k];
  for (int64_t k = valid; k < size; ++k) c.room[k] = -__builtin_inf();
  return c.room;
}

// brings mantissas into [1, 2), the largest exponent to 0; returns what the exponents have lost
template <int W, class A>
SUKHOPS_INLINE A normalise(A* a, A* n, int64_t size) {
  typedef typename Wide<A, W>::f V;
  typedef typename Wide<A, W>::i I;
  using F = Format<A>;
  V most = V{} - A(__builtin_inf());
  for (int64_t k = 0; k < size; k += W) {
    const V x = read<V>(a + k);
    const V e = __builtin_convertvector((((I)x >> F::kMantissa) & (2 * F::kBias + 1)) - F::kBias, V);
    const V m = read<V>(n + k) + e;
    write(a + k, x * power<A>(-e));
    write(n + k, m);
    most = m > most ? m : most;
  }
  A top = most[0];
  for (int l = 1; l < W; ++l) top = most[l] > top ? most[l] : top;
  if (!(top > -__builtin_inf())) return 0;
  for (int64_t k = 0; k < size; k += W) write(n + k, read<V>(n + k) - top);
  return top;
}

// alpha and exponent of `rows` boundaries from t0 on, found[i] * 2^base
template <int W, int64_t size, class S, class A>
SUKHOPS_INLINE void keep(Chain<S, A>& c, int64_t t0, int64_t rows, A (&found)[size], double base) {
  A exponents[size] = {};
  base += normalise<W>(found, exponents, size);
  for (int64_t i = 0; i < rows; ++i) c.alpha[t0 + i] = found[i];
  for (int64_t i = 0; i < rows; ++i) c.exponent[t0 + i] = found[i] != 0 ? base + exponents[i] : -__builtin_inf();
}

// takes rows t0 .. t0 + rows to the window c.a * 2^c.n, which is normalised; false, with nothing done, where the
// tile is not plain
template <int W, int N, class S, class A>
SUKHOPS_INLINE bool forward_plain(Chain<S, A>& c, int64_t t0, int64_t rows) {
  typedef typename Wide<A, W>::f V;
  typedef typename Wide<A, W>::i I;
  constexpr Plain plain = Format<A>::kPlain;
  const V low = power<A>(V{} - A(plain.low)), high = power<A>(V{} + A(plain.high));
  const int64_t n = N ? N : padded(c.k, W) / W;
  V own[N + 1];  // the window: in registers where its size is known
  const auto get = [&](int64_t k) { return N ? own[k] : read<V>(c.tile + k * W); };
  const auto set = [&](int64_t k, V x) { N ? void(own[k] = x) : write(c.tile + k * W, x); };
  I within = ~I{}, outside{};
#pragma GCC unroll 4
  for (int64_t k = 0; k < n; ++k) {
    const V a = read<V>(c.a + k * W), e = read<V>(c.n + k * W) + A(plain.top);
    within &= (a == A(0)) | (e >= A(-plain.least));
    set(k, a * power<A>(e));
  }
  set(n, V{});
  A found[W > kTile ? W : kTile] = {};
  for (int64_t i = 0; i < rows; ++i) {
    const A* x = row<W>(c, t0 + i);
    fetch<0>(c.scores + (t0 + i + 2 * kTile) * c.k, c.k);
    V now = get(0);
    const V sum = V{} + (found[i] = now[0]);
    within &= (sum == A(0)) | ((sum >= low) & (sum <= high));
#pragma GCC unroll 4
    for (int64_t k = 0; k < n; ++k) {
      const V next = get(k + 1);
      const V more = __builtin_assoc_barrier(plain_exp<A>(read<V>(x + k * W), outside) * sum);  // rounded, as there
      set(k, next_lane<W>(now, next) + more);
      now = next;
    }
  }
  within &= (outside & -plain.scores) == 0;
  if (sum_lanes<W>(within) != -W) return false;
#pragma GCC unroll 4
  for (int64_t k = 0; k < n; ++k) write(c.a + k * W, get(k)), write(c.n + k * W, V{});
  c.base -= plain.top;
  keep<W>(c, t0, rows, found, c.base);
  return true;
}

// the same for any tile: every number keeps its exponent
template <int W, int N, class S, class A>
SUKHOPS_INLINE void forward_wide(Chain<S, A>& c, int64_t t0, int64_t rows) {
  typedef typename Wide<A, W>::f V;
  const int64_t size = N ? N * W : padded(c.k, W);
  for (int64_t i = 0; i < rows; ++i) {
    const A* x = row<W>(c, t0 + i);
    const A a = c.a[0], n = c.n[0];
    c.alpha[t0 + i] = a;
    c.exponent[t0 + i] = c.base + n;
    for (int64_t k = 0; k < size; k += W) {  // behind the window there is always a vector of nothing
      V m, e;
      split<A>(read<V>(x + k), m, e);
      const V have = next_lane<W>(read<V>(c.a + k), read<V>(c.a + k + W)), more = m * a;
      const V old = next_lane<W>(read<V>(c.n + k), read<V>(c.n + k + W)), add = e + n, ahead = add - old;
      // the larger exponent stays, the other number is shifted to it
      const auto larger = add > old;
      write(c.n + k, larger ? add : old);
      write(c.a + k, (larger ? more : have) + (larger ? have : more) * power<A>(ahead > A(0) ? -ahead : ahead));
    }
  }
}

// alpha[t] * 2^exponent[t], the sum over segmentations of the first t positions, for t in [0, length]. Lane i of the
// window is boundary t + i.
template <int W, int N, class S, class A>
static void forward_chain(Chain<S, A> c) {  // a copy stays in registers
  const int64_t size = padded(c.k, W);
  for (int64_t i = 0; i < size + W; ++i) c.a[i] = 0, c.n[i] = -__builtin_inf();
  c.a[0] = 1, c.n[0] = 0, c.base = 0;
  for (int64_t t = 0; t < c.length; t += kTile) {
    const int64_t rows = kTile < c.length - t ? kTile : c.length - t;
    c.base += normalise<W>(c.a, c.n, size);
    if (!forward_plain<W, N>(c, t, rows)) forward_wide<W, N>(c, t, rows);
  }
  c.base += normalise<W>(c.a, c.n, size);
  c.alpha[c.length] = c.a[0], c.exponent[c.length] = c.base + c.n[0];
}

// for boundaries from t0 on: the exponent, relative to that tile, and alpha
template <int W, class S, class A>
SUKHOPS_INLINE void prepare(Chain<S, A>& c, int64_t t0, int64_t rows) {
  const int64_t size = rows + padded(c.k, W) + W, inside = size < c.length - t0 + 1 ? size : c.length - t0 + 1;
  const double* exponent = c.exponent + t0;
  const A* alpha = c.alpha + t0;
  int64_t reached = inside - 1;
  while (reached > 0 && !(exponent[reached] > -__builtin_inf())) --reached;
  const double from = exponent[reached] > -__builtin_inf() ? exponent[reached] : 0.0;
  // nothing flows into a boundary that is not reached: its exponent counts as +inf there
  for (int64_t i = 0; i < inside; ++i)
    c.n[i] = exponent[i] > -__builtin_inf() ? A(exponent[i] - from) : A(__builtin_inf());
  for (int64_t i = 0; i < inside; ++i) c.a[i] = alpha[i] != 0 ? alpha[i] : A(1);
  for (int64_t i = inside; i < size; ++i) c.n[i] = __builtin_inf(), c.a[i] = 1;
}

// row t, the i-th of its tile, as its inflow is computed from it
template <class A>
struct Source {
  A alpha, n;
  const A *x, *exponents, *alphas;
};

template <int W, class S, class A>
SUKHOPS_INLINE Source<A> source(const Chain<S, A>& c, int64_t t, int64_t i) {
  const A n = c.n[i] < A(__builtin_inf()) ? c.n[i] : -A(__builtin_inf());
  return {c.alpha[t], n, row<W>(c, t), c.n + i + 1, c.a + i + 1};
}

// the share of boundary t + 1 + k's weight that comes through segment (t, k), in [0, 1]: the very term of the
// forward sum over that sum, so that an only way has share 1 exactly and shares do not drift from a sum of 1
template <class V, class A>
SUKHOPS_INLINE V inflow(const Source<A>& s, int64_t k) {
  V m, e;
  split<A>(read<V>(s.x + k), m, e);
  const V d = (e + s.n) - read<V>(s.exponents + k), cap = V{} + A(Format<A>::kBias / 2), one = V{} + A(1);
  const V share = (m * s.alpha) * power<A>(d > cap ? cap : d) / read<V>(s.alphas + k);
  return share > one ? one : share;
}

template <int W, class S, class A, class V>
SUKHOPS_INLINE void write_row(S* p, V x, int64_t valid) {
  if constexpr (sizeof(S) == sizeof(A)) {
    if (valid >= W) return write(p, x);
  }
  for (int64_t l = 0; l < W && l < valid; ++l) p[l] = S(x[l]);
}

template <class A>
struct Tile {
  int64_t first, rows;
  A* shares;  // [rows, stride], the inflow of its rows
};

// of a tile that has been prepared
template <int W, int N, class A>
SUKHOPS_INLINE void shares_wide(const Chain<A, A>& c, const Tile<A>& tile, int64_t stride) {
  typedef typename Wide<A, W>::f V;
  const int64_t size = N ? N * W : padded(c.k, W);
  for (int64_t i = 0; i < tile.rows; ++i) {
    const Source<A> from = source<W>(c, tile.first + i, i);
    for (int64_t k = 0; k < size; k += W) write(tile.shares + i * stride + k, inflow<V>(from, k));
  }
}

// likewise, or false where numbers are not within reach of the smallest alpha of the tile's rows
template <int W, int N, class A>
SUKHOPS_INLINE bool shares_plain(const Chain<A, A>& c, const Tile<A>& tile, int64_t stride) {
  typedef typename Wide<A, W>::f V;
  typedef typename Wide<A, W>::i I;
  constexpr Plain plain = Format<A>::kPlain;
  const V high = power<A>(V{} + A(plain.high));
  const int64_t size = N ? N * W : padded(c.k, W);
  I within = ~I{}, outside{};
  for (int64_t i = tile.rows - 1; i >= 0; --i) {
    const A* x = row<W>(c, tile.first + i);
    fetch<0>(c.scores + (tile.first + i - 2 * kTile) * c.k, c.k);
    fetch<1>(c.out + (tile.first + i) * c.k, c.k);
    const V from = V{} + (c.n[i] < A(__builtin_inf()) ? c.sum[i] : A(0));
    within &= from <= high;
#pragma GCC unroll 4
    for (int64_t k = 0; k < size; k += W) {
      const V sum = read<V>(c.sum + i + 1 + k), inverse = read<V>(c.inverse + i + 1 + k);
      const V part = plain_exp<A>(read<V>(x + k), outside) * from, near = part * inverse;
      write(tile.shares + i * stride + k, near + (part - near * sum) * inverse);  // the quotient to the last bit
    }
  }
  within &= (outside & -plain.scores) == 0;
  return c.plain && sum_lanes<W>(within) == -W;
}

// for a tile that has been prepared: alpha relative to the smallest one of its rows, and its inverse
template <int W, class A>
SUKHOPS_INLINE void prepare_plain(Chain<A, A>& c, int64_t rows) {
  typedef typename Wide<A, W>::f V;
  typedef typename Wide<A, W>::i I;
  constexpr Plain plain = Format<A>::kPlain;
  const int64_t size = padded(c.k, W);
  const A most = plain.least;
  A least = __builtin_inf();
  for (int64_t i = 0; i < rows; ++i) least = c.n[i] < least ? c.n[i] : least;
  I within = ~I{};
  for (int64_t i = 0; i < rows + size; i += W) {
    V d = read<V>(c.n + i) - (least + A(plain.low));
    within &= (d <= most) | (d == A(__builtin_inf()));
    d = d < -most ? V{} - most : d > most ? V{} + most : d;
    const V sum = read<V>(c.a + i) * power<A>(d);
    write(c.sum + i, sum);
    write(c.inverse + i, A(1) / sum);
  }
  c.plain = sum_lanes<W>(within) == -W;
}

// the mass of the tile's boundaries. Behind the tile masses are known and taken whole vectors at a time; inside it,
// where each row waits for the next, one by one.
template <int W, int N, class A>
SUKHOPS_INLINE void settle(const Chain<A, A>& c, const Tile<A>& tile, int64_t stride) {
  typedef typename Wide<A, W>::f V;
  const int64_t size = N ? N * W : padded(c.k, W), rows = tile.rows;
  const A* shares = tile.shares;
  A* w = c.w + tile.first;
  A mass[kTile];
  for (int64_t i = 0; i < rows; ++i) {
    V sum{};
#pragma GCC unroll 4
    for (int64_t k = 0; k < size; k += W) sum += read<V>(shares + i * stride + k) * read<V>(w + i + 1 + k);
    mass[i] = sum_lanes<W>(sum);
  }
  if (rows == kTile) {  // a whole tile, unrolled
#pragma GCC unroll 8
    for (int j = kTile - 1; j > 0; --j)
#pragma GCC unroll 8
      for (int i = 0; i < j; ++i) mass[i] += shares[i * stride + j - i - 1] * mass[j];
  } else {
    for (int64_t j = rows - 1; j > 0; --j)
      for (int64_t i = 0; i < j; ++i) mass[i] += shares[i * stride + j - i - 1] * mass[j];
  }
  for (int64_t i = 0; i < rows; ++i) w[i] = mass[i];
}

// c.grad times the posterior of every segment. The mass w of a boundary is the share of the segmentations that
// have it; it flows back through the segments that end there. The shares of the tile before do not wait for it.
template <int W, int N, class A>
static void marginal_chain(Chain<A, A> c) {
  typedef typename Wide<A, W>::f V;
  const int64_t size = N ? N * W : padded(c.k, W), stride = size > kTile ? size : kTile;
  for (int64_t j = 0; j <= c.length + size; ++j) c.w[j] = 0;
  for (int64_t i = 0; i < 2 * kTile * stride; ++i) c.tile[i] = 0;
  c.w[c.length] = c.alpha[c.length] != 0 ? c.grad : A(0);
  for (int64_t j = c.length * c.k; j < c.stored * c.k; ++j) c.out[j] = 0;
  Tile<A> now{c.length, 0, c.tile}, next{0, 0, c.tile + kTile * stride};
  do {
    next.rows = now.first < kTile ? now.first : kTile;
    next.first = now.first - next.rows;
    prepare<W>(c, next.first, next.rows);
    prepare_plain<W>(c, next.rows);
    settle<W, N>(c, now, stride);
    if (!shares_plain<W, N>(c, next, stride)) shares_wide<W, N>(c, next, stride);
    for (int64_t i = 0; i < now.rows; ++i)
#pragma GCC unroll 4
      for (int64_t k = 0; k < size; k += W)
        write_row<W, A, A>(c.out + (now.first + i) * c.k + k,
                           read<V>(now.shares + i * stride + k) * read<V>(c.w + now.first + i + 1 + k), c.k - k);
    const Tile<A> done = now;
    now = next, next = done;
  } while (now.rows > 0);
}

// what a segment is worth: the upstream gradient or, without one, its surprise, -log of its share, whose sum over
// a segmentation is -log of its probability
template <int W, class S, class V>
SUKHOPS_INLINE V worth(const Chain<S, double>& c, V share, int64_t t, int64_t k) {
  V g{};
  for (int64_t l = 0; l < W && k + l < c.k; ++l) {
    if (c.upstream)
      g[l] = share[l] != 0 ? c.upstream[t * c.k + k + l] : 0;
    else
      g[l] = share[l] != 0 ? -std::log(share[l]) : 0;
  }
  return g;
}

// mean[t], the expected worth of all segments before boundary t
template <int W, class S>
static void expect(Chain<S, double>& c) {
  typedef typename Wide<double, W>::f V;
  const int64_t size = padded(c.k, W);
  for (int64_t j = 0; j <= c.length + size; ++j) c.mean[j] = 0;
  for (int64_t t = 0; t < c.length; ++t) {
    if (t % kTile == 0) prepare<W>(c, t, kTile < c.length - t ? kTile : c.length - t);
    const Source<double> from = source<W>(c, t, t % kTile);
    for (int64_t k = 0; k < size; k += W) {
      const V share = inflow<V>(from, k);
      const V add = share * (c.mean[t] + worth<W>(c, share, t, k));
      write(c.mean + t + 1 + k, read<V>(c.mean + t + 1 + k) + (share != 0.0 ? add : V{}));
    }
  }
}

// c.grad times the covariance, over segmentations, of the presence of each segment and the worth of all:
// posterior * (mean before it + worth + mean behind it - mean), where `after` is mass times mean behind
template <int W, class S>
static void covariance(Chain<S, double>& c) {
  typedef typename Wide<double, W>::f V;
  const int64_t size = padded(c.k, W);
  for (int64_t j = 0; j <= c.length + size; ++j) c.w[j] = 0, c.after[j] = 0;
  c.w[c.length] = c.alpha[c.length] != 0;
  for (int64_t j = c.length * c.k; j < c.stored * c.k; ++j) c.out[j] = 0;
  for (int64_t t = c.length, t0 = t; t-- > 0;) {
    if (t < t0) {
      t0 = t + 1 > kTile ? t + 1 - kTile : 0;
      prepare<W>(c, t0, t + 1 - t0);
    }
    const Source<double> from = source<W>(c, t, t - t0);
    const double before = c.mean[t] - c.mean[c.length];
    V mass{}, after{};
    for (int64_t k = 0; k < size; k += W) {
      const V share = inflow<V>(from, k), worth_ = worth<W>(c, share, t, k);
      const V w = read<V>(c.w + t + 1 + k), f = read<V>(c.after + t + 1 + k);
      mass += share * w;
      after += share * (w * worth_ + f);
      const V out = share * (w * (before + worth_) + f) * c.grad;
      write_row<W, S, double>(c.out + t * c.k + k, share != 0.0 ? out : V{}, c.k - k);
    }
    c.w[t] = sum_lanes<W>(mass);
    c.after[t] = sum_lanes<W>(after);
  }
}

// c.a[t], the largest sum of scores of the first t positions; c.bad where a score is NaN or +inf
template <class S>
static void best_sums(Chain<S, double>& c) {
  for (int64_t j = 0; j <= c.length + c.k; ++j) c.a[j] = -__builtin_inf();
  c.a[0] = 0, c.bad = 0;
  for (int64_t t = 0; t < c.length; ++t) {
    const int64_t valid = c.k < c.length - t ? c.k : c.length - t;
    const S* __restrict__ x = c.scores + t * c.k;
    const double before = c.a[t];
    double* __restrict__ to = c.a + t + 1;
    int seen = 0;
    for (int64_t k = 0; k < valid; ++k) {
      const double sum = before + x[k];
      to[k] = sum > to[k] ? sum : to[k];
      seen |= !(x[k] < S(__builtin_inf()));
    }
    c.bad |= seen;
  }
}

SUKHOPS_INLINE uint64_t mixed(uint64_t z) {  // the finaliser of SplitMix64
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// how many lanes of a comparison hold
template <int W, class I>
SUKHOPS_INLINE int64_t count_lanes(I holds) {
#ifdef SUKHOPS_X86
  if constexpr (sizeof(I) == 64) {
    typedef __typeof__(holds[0] + 0) E;
    typedef E Half __attribute__((vector_size(32)));
    Half half[2];
    __builtin_memcpy(half, &holds, sizeof holds);
    return count_lanes<W / 2>(half[0]) + count_lanes<W / 2>(half[1]);
  } else if constexpr (sizeof(I) == 32) {
    if constexpr (W == 8) return __builtin_popcount(__builtin_ia32_movmskps256((Wide<float, 8>::f)holds));
    if constexpr (W == 4) return __builtin_popcount(__builtin_ia32_movmskpd256((Wide<double, 4>::f)holds));
  } else {
    if constexpr (W == 4) return __builtin_popcount(__builtin_ia32_movmskps((Wide<float, 4>::f)holds));
    if constexpr (W == 2) return __builtin_popcount(__builtin_ia32_movmskpd((Wide<double, 2>::f)holds));
  }
#else
  return -sum_lanes<W>(holds);
#endif
}

// Walks `samples` segmentations back from the end; at each boundary a segment is drawn from its inflow. The
// number drawn depends on the seed, the sample, the sequence and the boundary, on nothing else.
template <int W, int N, class A>
static void draw(Chain<A, A> c, Draw<A> d) {
  typedef typename Wide<A, W>::f V;
  using Int = typename Format<A>::Int;
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
      if ((t - tile) % kTile == 0) prepare<W>(c, tile = t, kTile < end - t ? kTile : end - t);
      const Source<A> from = source<W>(c, t, t - tile);
      for (int64_t k = 0; k < c.k; k += W) {
        const V share = inflow<V>(from, k);
        for (int64_t l = 0; l < W; ++l) {
          const int64_t j = t + 1 + k + l;
          if (j > first && j <= end && k + l < c.k) d.table[(j - first - 1) * size + k + l] = share[l];
        }
      }
    }
    for (int64_t j = 0; j < rows; ++j) {  // the running sums, of which the last is 1
      A* p = d.table + j * size;
      A total = 0;
      for (int64_t k = 0; k < size; ++k) p[k] = total += p[k];
      for (int64_t k = 0; k < size; ++k) p[k] /= total;
    }
    for (int64_t s = 0; s < d.samples; s += kTogether) {  // several walks at a time: each waits for its own step only
      const int64_t count = d.samples - s < kTogether ? d.samples - s : kTogether;
      int64_t found[kTogether][kDrawTile] = {}, at[kTogether];
      A drawn[kTogether][kDrawTile];  // for boundary first + 1 + j
      for (int64_t i = 0; i < kTogether; ++i) {
        at[i] = i < count ? d.position[s + i] - first : 0;
        if (at[i] >= 0 && at[i] < rows && i < count) found[i][at[i]] = d.segment[s + i];  // starts here, ends behind
        if (i >= count) continue;
        for (int64_t j = 0; j < kDrawTile; ++j) {
          const uint64_t bits = mixed(d.stream[s + i] + kStep * uint64_t(first + 1 + j)) >> (63 - Format<A>::kMantissa);
          drawn[i][j] = A(Int(bits)) * (A(0.5) / A(int64_t(1) << Format<A>::kMantissa));
        }
      }
      for (bool more = true; more;) {
        more = false;
#pragma GCC unroll 4
        for (int64_t i = 0; i < kTogether; ++i) {
          if (at[i] <= 0) continue;
          const V u = V{} + drawn[i][at[i] - 1];
          const A* p = d.table + (at[i] - 1) * size;
          int64_t length = 1;
#pragma GCC unroll 4
          for (int64_t k = 0; k < size; k += W) length += count_lanes<W>(read<V>(p + k) <= u);
          at[i] -= length;
          d.segment[s + i] = length;
          if (at[i] >= 0) found[i][at[i]] = length;
          more = true;
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        d.position[s + i] = first + at[i];
        __builtin_memcpy(d.segments + (s + i) * d.sequences * c.stored + first, found[i], rows * 8);
      }
    }
  }
}

// ---------------------------------------------------------------- what segmentation.cpp calls

template <class S, class A>
static void forward(Chain<S, A>& c) {
  with_shape<A>(c.k, [&](auto s) { forward_chain<s.lanes, s.vectors>(c); });
}

template <class A>
static void marginals(Chain<A, A>& c) {
  with_shape<A>(c.k, [&](auto s) { marginal_chain<s.lanes, s.vectors>(c); });
}

template <class S>
static void moments(Chain<S, double>& c, bool gradient) {
  with_shape<double>(c.k, [&](auto s) {
    expect<s.lanes>(c);
    if (gradient) covariance<s.lanes>(c);
  });
}

template <class A>
static void samples(Chain<A, A>& c, const Draw<A>& d) {
  with_shape<A>(c.k, [&](auto s) { draw<s.lanes, s.vectors>(c, d); });
}
