// The kernels of product.cpp for one thread. Included by isa.h once per instruction set, with kPairs = true if the
// target multiplies pairs of bfloat16. Depth is the inner dimension of a product. A unit is the content of one lane:
// one number or, with kPairs, two bfloat16 that are consecutive in depth and whose products are summed in float32. A is
// the accumulation type; S and T are the element types of a and b.

constexpr int64_t kPerUnit = kPairs ? 2 : 1;  // elements per unit

// ---------------------------------------------------------------- units

template <class A>
using Reg = typename Register<A>::type;

template <class A>
constexpr int64_t kRegisterLanes = Register<A>::lanes;

template <class V>
SUKHOPS_INLINE V multiply_add(V sum, V x, V y) {
#ifdef SUKHOPS_X86
  if constexpr (kPairs) return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#endif
  return sum + x * y;
}

// Loads a register of bfloat16 bits, one number per lane. Rounds float32, which occurs only with kPairs.
template <class S>
SUKHOPS_INLINE Register<float>::ints bits_of(const S* p) {
  typedef Register<float>::halves H;
  if constexpr (sizeof(S) == 2) {
    return __builtin_convertvector(get<H>(p), Register<float>::ints);
  } else {
#ifdef SUKHOPS_X86
    return __builtin_convertvector((H)_mm512_cvtneps_pbh((__m512)get(p)), Register<float>::ints);
#endif
  }
}

// loads a register of units that are consecutive in depth
template <class A, class S>
SUKHOPS_INLINE Reg<A> units_along(const S* p) {
  if constexpr (!kPairs) {
    return widened(p);
  } else if constexpr (sizeof(S) == 2) {
    return get((const float*)p);
  } else {
#ifdef SUKHOPS_X86
    return (Reg<A>)_mm512_cvtne2ps_pbh((__m512)get(p + kRegisterLanes<A>), (__m512)get(p));
#endif
  }
}

// loads a register of units at the same depth; `next` is the stride of the depth
template <class A, class S>
SUKHOPS_INLINE Reg<A> units_across(const S* p, int64_t next) {
  if constexpr (kPairs)
    return (Reg<A>)(bits_of(p) | bits_of(p + next) << 16);
  else
    return widened(p);
}

// loads one unit; only `elements` elements exist, the others are 0
template <class A, class S>
SUKHOPS_INLINE A unit(const S* p, int64_t next, int64_t elements) {
  if constexpr (kPairs) {
    uint16_t two[2] = {};
    for (int64_t i = 0; i < 2 && i < elements; ++i) {
      if constexpr (sizeof(S) == 2) two[i] = p[i * next];
      else put(&two[i], p[i * next]);
    }
    float x;
    __builtin_memcpy(&x, two, sizeof x);
    return x;
  } else {
    return to_float(*p);
  }
}

// one step of a transposition: swaps the lanes of x whose number has bit s with the lanes of y whose number has not
template <int s, class F, int... l>
SUKHOPS_INLINE void swap_lanes(F& x, F& y, std::integer_sequence<int, l...>) {
  constexpr int n = sizeof...(l);
  const F first = shuffle<((l & s) ? n + l - s : l)...>(x, y);
  y = shuffle<((l & s) ? n + l : l + s)...>(x, y);
  x = first;
}

// transposes a square of registers; each step swaps blocks of half the size
template <class A, int s = kRegisterLanes<A> / 2>
SUKHOPS_INLINE void transpose(Reg<A>* r) {
  if constexpr (s > 0) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < kRegisterLanes<A>; ++i)
      if (!(i & s)) swap_lanes<s>(r[i], r[i + s], std::make_integer_sequence<int, kRegisterLanes<A>>());
    transpose<A, s / 2>(r);
  }
}

// Packs `width` rows of a matrix as [units][width]. Rows from `count` on are zeros. If width is not a multiple of a
// register, stores run past the end, so `out` needs one more register.
template <int64_t width, class A, class S>
static void pack(const S* from, int64_t row, int64_t col, int64_t count, int64_t depth, A* out) {
  constexpr int64_t L = kRegisterLanes<A>;
  const int64_t units = (depth + kPerUnit - 1) / kPerUnit, n = count < width ? count : width;
  int64_t p = 0;
  for (; col == 1 && (p + L) * kPerUnit <= depth; p += L) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < width; i += L) {
      Reg<A> block[L];
#pragma GCC unroll 16
      for (int64_t r = 0; r < L; ++r)
        block[r] = i + r < n ? units_along<A>(from + (i + r) * row + p * kPerUnit) : Reg<A>{};
      transpose<A>(block);
#pragma GCC unroll 16
      for (int64_t q = 0; q < L; ++q) {
        A* const to = out + (p + q) * width + i;
        if (i + L <= width || width < L) set(to, block[q]);
        else __builtin_memcpy(to, &block[q], width % L * sizeof(A));
      }
    }
  }
  for (; p < units; ++p) {
    const S* at = from + p * kPerUnit * col;
    A* const to = out + p * width;
    const int64_t left = depth - p * kPerUnit;
    int64_t i = 0;
    if (row == 1 && left >= kPerUnit)
      for (; i < width && i + L <= count; i += L) set(to + i, units_across<A>(at + i, col));
    for (; i < n; ++i) to[i] = unit<A>(at + i * row, col, left);
    for (; i < width; ++i) to[i] = 0;
  }
}

// Packs all `count` rows in groups of `width`. If neighboring rows are adjacent in memory (row == 1), packs 32 units of
// every group before the next 32, so that memory is read in order.
template <int64_t width, class A, class S>
static void pack_all(const S* from, int64_t row, int64_t col, int64_t count, int64_t depth, A* out) {
  const int64_t units = (depth + kPerUnit - 1) / kPerUnit, most = row == 1 ? 32 : units;
  for (int64_t p = 0; p < units; p += most)
    for (int64_t i = 0; i < count; i += width) {
      const int64_t left = depth - p * kPerUnit;
      pack<width>(from + i * row + p * kPerUnit * col, row, col, count - i,
                  left < most * kPerUnit ? left : most * kPerUnit, out + i * units + p * width);
    }
}

// ---------------------------------------------------------------- many rows: blocks of packed a and b

// kRows x kCols is the tile of sums that is kept in registers
template <class A>
constexpr int64_t kCols = 2 * kRegisterLanes<A>;
constexpr int64_t kRows = kRegisters == 32 ? 14 : 6;

// c [R, kCols] (+)= a @ b. a is packed as [units, kRows], of which the first R are used. b is packed as [units, kCols],
// or it is a matrix in memory whose rows are `next` elements apart.
template <int R, class A, class T>
static void multiply_rows(const A* a, const T* b, int64_t next, int64_t units, A* c, int64_t stride, bool add) {
  typedef Reg<A> F;
  constexpr int64_t L = kRegisterLanes<A>;
  for (; units > 0; units -= kProductRun, add = true) {
    F sum[R][2];
    for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = F{};
    for (int64_t p = units < kProductRun ? units : kProductRun; p > 0; --p) {
      F b0, b1;
      if constexpr (std::is_same_v<A, T>) {
        b0 = get(b), b1 = get(b + L);
        b += next;
      } else {
        b0 = units_across<A>(b, next), b1 = units_across<A>(b + L, next);
        b += kPerUnit * next;
      }
#pragma GCC unroll 14
      for (int i = 0; i < R; ++i) {
        const F x = a[i] - F{};  // broadcasts; the compiler omits the subtraction
        sum[i][0] = multiply_add(sum[i][0], x, b0);
        sum[i][1] = multiply_add(sum[i][1], x, b1);
      }
      a += kRows;
    }
#pragma GCC unroll 14
    for (int i = 0; i < R; ++i) {
      A* row = c + i * stride;
      if (add) {
        sum[i][0] += get(row);
        sum[i][1] += get(row + L);
      }
      set(row, sum[i][0]);
      set(row + L, sum[i][1]);
    }
  }
}

// the same for h <= kRows rows and w <= kCols columns
template <class A, class T, int R = kRows>
static void multiply_part(int64_t h, int64_t w, const A* a, const T* b, int64_t next, int64_t units, A* c,
                          int64_t stride, bool add) {
  if constexpr (R > 2) {
    if (h <= R - 2) return multiply_part<A, T, R - 2>(h, w, a, b, next, units, c, stride, add);
  }
  if (h == R && w == kCols<A>) return multiply_rows<R>(a, b, next, units, c, stride, add);
  A edge[R * kCols<A>];
  for (int64_t r = 0; add && r < h; ++r)
    for (int64_t s = 0; s < w; ++s) edge[r * kCols<A> + s] = c[r * stride + s];
  multiply_rows<R>(a, b, next, units, edge, kCols<A>, add);
  for (int64_t r = 0; r < h; ++r)
    for (int64_t s = 0; s < w; ++s) c[r * stride + s] = edge[r * kCols<A> + s];
}

template <class A, class S, class T>
static void blocked(const Factors& f) {
  A* const bs = (A*)f.scratch;
  const int64_t wide = (f.n + kCols<A> - 1) / kCols<A> * kCols<A>;
  // a multiple of kProductRun, so that the order of sums does not depend on n
  const int64_t fits = kBlockBytes / (wide * (int64_t)sizeof(A)) / kProductRun * kProductRun;
  const bool thin = f.thin && f.b_col == 1;
  const int64_t deep = (thin ? kThin : fits < kProductRun ? kProductRun : fits > kDepth ? kDepth : fits) * kPerUnit;
  A* const as = bs + wide * ((deep < f.k ? deep : f.k + 1) / kPerUnit);
  const S* a = (const S*)f.a;
  const T* b = (const T*)f.b;
  A* const out = (A*)f.out;
  const int64_t times = (f.m + kRows - 1) / kRows, high = (f.m + times - 1) / times;  // rows of a in a register tile
  for (int64_t i = 0; i < f.m && f.k == 0 && !f.add; ++i)
    for (int64_t j = 0; j < f.n; ++j) out[i * f.stride + j] = 0;
  for (int64_t p = 0; p < f.k; p += deep) {
    const int64_t depth = f.k - p < deep ? f.k - p : deep, units = (depth + kPerUnit - 1) / kPerUnit;
    // Columns [0, first) of b are read in place. The others are packed, because they do not fill a register tile or
    // because the depth ends inside a unit.
    const int64_t first = thin && depth % kPerUnit == 0 ? f.n / kCols<A> * kCols<A> : 0;
    const T* const bp = b + p * f.b_row;
    pack_all<kCols<A>>(bp + first * f.b_col, f.b_col, f.b_row, f.n - first, depth, bs);
    for (int64_t i = 0; i < f.m; i += high) {
      const int64_t h = f.m - i < high ? f.m - i : high;
      pack<kRows>(a + i * f.a_row + p * f.a_col, f.a_row, f.a_col, f.m - i, depth, as);
      A* const c = out + i * f.stride;
      const bool add = f.add || p > 0;
      for (int64_t j = 0; j < first; j += kCols<A>)
        multiply_part(h, kCols<A>, (const A*)as, bp + j, f.b_row, units, c + j, f.stride, add);
      for (int64_t j = first; j < f.n; j += kCols<A>)
        multiply_part(h, f.n - j < kCols<A> ? f.n - j : kCols<A>, (const A*)as, (const A*)bs + (j - first) * units,
                      kCols<A>, units, c + j, f.stride, add);
    }
  }
}

// rounds the sums to the dtype of the output
template <class N>
static void round_rows(const float* from, int64_t m, int64_t n, N* to, int64_t stride) {
  for (int64_t i = 0; i < m; ++i, from += n, to += stride) {
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) store(to + j, load(from + j));
    for (; j < n; ++j) put(to + j, from[j]);
  }
}

// ---------------------------------------------------------------- few rows of a: b, a transposed weight, is streamed

// out[i * os] = the sum of the lanes of x[i]
template <int N>
SUKHOPS_INLINE void reduce_each(const Reg<float>* x, float* out, int64_t os) {
  if constexpr (kRegisterBytes == 64 && N == 8) {
    Reg<float> a[4], b[2];
    for (int i = 0; i < 4; ++i)
      a[i] = shuffle<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>(x[2 * i], x[2 * i + 1]) +
             shuffle<8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>(x[2 * i], x[2 * i + 1]);
    for (int i = 0; i < 2; ++i)
      b[i] = shuffle<0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27>(a[2 * i], a[2 * i + 1]) +
             shuffle<4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31>(a[2 * i], a[2 * i + 1]);
    Reg<float> c = shuffle<0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29>(b[0], b[1]) +
                   shuffle<2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31>(b[0], b[1]);
    c += shuffle<1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14>(c, c);
    for (int i = 0; i < 8; ++i) out[i * os] = c[2 * i];
  } else if constexpr (kRegisterBytes == 32 && N == 4) {
    Reg<float> a[2];
    for (int i = 0; i < 2; ++i)
      a[i] = shuffle<0, 1, 2, 3, 8, 9, 10, 11>(x[i], x[i + 2]) + shuffle<4, 5, 6, 7, 12, 13, 14, 15>(x[i], x[i + 2]);
    Reg<float> b = shuffle<0, 1, 8, 9, 4, 5, 12, 13>(a[0], a[1]) + shuffle<2, 3, 10, 11, 6, 7, 14, 15>(a[0], a[1]);
    b += shuffle<1, 0, 3, 2, 5, 4, 7, 6>(b, b);
    for (int i = 0; i < 4; ++i) out[i * os] = b[2 * i];
  } else {
    for (int i = 0; i < N; ++i) out[i * os] = reduce_add(x[i]);
  }
}

// Without kPairs, a register of bfloat16 is used in two turns, because each lane holds two numbers: a shift extracts
// the even ones, then a mask the odd ones. Where no register is free for the mask, two shifts do the same.
template <class T>
constexpr int64_t kTurns = !kPairs && std::is_same_v<T, uint16_t> ? 2 : 1;

template <bool mask, class T>
SUKHOPS_INLINE Reg<float> units_in_turn(const T* p, int turn) {
  if constexpr (kTurns<T> == 1) return units_along<float>(p);
  auto two = get<Register<float>::ints>(p);
  if (turn == 0) return (Reg<float>)(two << 16);
  if constexpr (mask) return (Reg<float>)(two & -65536);
  two >>= 16;
  hold(two);  // otherwise the compiler replaces the shifts by a mask
  return (Reg<float>)(two << 16);
}

// What a product prefetches into L2 while it computes; the prefetchers of the CPU stop at the end of a page. Beside row
// r of the weight and its column j it prefetches row r + `rows` and column first + j / share. `rows` = 0 stands for the
// rows of two blocks.
struct Ahead {
  int64_t rows, first, share;
};

// out[n][r] = w[r] . h[n] for R rows of the weight and N rows of h, vectorized along the depth. h is packed as
// [steps][turns][N][lanes].
template <int R, int N, class T>
static inline void few_block(const T* w, int64_t ws, const float* h, int64_t d, float* out, int64_t os, Ahead ahead) {
  constexpr int64_t L = kRegisterLanes<float>, turns = kTurns<T>, step = L * kPerUnit * turns;
  // A prefetch per cache line. One or two rows of h wait for memory; for them two prefetches per line measure faster.
  constexpr int64_t line = 64 / sizeof(T) > step && N > 2 ? 64 / sizeof(T) : step;
  const T* next = w + ahead.rows * ws + ahead.first;
  Reg<float> acc[R][N] = {};
  int64_t j = 0, wait = 1;
  for (; j + line <= d; j += line) {
    if (--wait == 0) {
      for (int r = 0; r < R; ++r) __builtin_prefetch(next + r * ws, 0, 2);
      next += line, wait = ahead.share;
    }
#pragma GCC unroll 4
    for (int64_t turn = 0; turn < line / step * turns; ++turn, h += N * L) {
      Reg<float> x[R];
      for (int r = 0; r < R; ++r) {
        x[r] = units_in_turn<N <= 2>(w + r * ws + j + turn / turns * step, turn % turns);
        if constexpr (R * N + R < kRegisters) hold(x[r]);
      }
      for (int n = 0; n < N; ++n) {
        Reg<float> y = get(h + n * L);
        hold(y);
        for (int r = 0; r < R; ++r) acc[r][n] = multiply_add(acc[r][n], x[r], y);
      }
    }
  }
  for (; j < d; j += step, h += turns * N * L) {
    for (int r = 0; r < R; ++r) {
      T last[step] = {};
      for (int64_t i = j; i < d && i < j + step; ++i) last[i - j] = w[r * ws + i];
      for (int turn = 0; turn < turns; ++turn)
        for (int n = 0; n < N; ++n)
          acc[r][n] = multiply_add(acc[r][n], units_in_turn<true>((const T*)last, turn), get(h + (turn * N + n) * L));
    }
  }
  for (int r = 0; r < R; ++r) reduce_each<N>(acc[r], out + r, os);
}

constexpr int64_t kSumRegisters = kRegisters == 32 ? 24 : 12;  // registers that hold sums

template <int N, class T>
static inline void few_rows(const T* w, int64_t ws, int64_t rows, const float* h, int64_t d, float* out, int64_t os,
                            Ahead ahead) {
  constexpr int most = kRegisters == 32 ? 8 : 6, R = kSumRegisters / N < most ? kSumRegisters / N : most;
  if (ahead.rows == 0) ahead.rows = 2 * R;
  int64_t r = 0;
  for (; r + R <= rows; r += R) few_block<R, N>(w + r * ws, ws, h, d, out + r, os, ahead);
  for (; r < rows; ++r) few_block<1, N>(w + r * ws, ws, h, d, out + r, os, ahead);
}

constexpr int64_t kFew = kRegisters == 32 ? 8 : 4;  // most rows of h in one product

// few_rows for a number of rows of h that is known only at run time
template <class T, int N = kFew>
static inline void few_any(int64_t count, const T* w, int64_t ws, int64_t rows, const float* h, int64_t d, float* out,
                           int64_t os, Ahead ahead) {
  if constexpr (N > 1) {
    if (count < N) return few_any<T, N - 1>(count, w, ws, rows, h, d, out, os, ahead);
  }
  few_rows<N>(w, ws, rows, h, d, out, os, ahead);
}

// Multiplies groups of rows of the weight with kFew rows of a at a time. If that takes several passes, a group and the
// next one stay in L2, and each pass prefetches its share of the next group.
template <class S, class T>
static void streamed(const Factors& f) {
  constexpr int64_t L = kRegisterLanes<float>, turns = kTurns<T>, step = L * kPerUnit * turns;
  const int64_t whole = (f.k + step - 1) / step * L * turns;  // units, padded with zeros
  const int64_t passes = (f.m + kFew - 1) / kFew, few = passes > 0 ? (f.m + passes - 1) / passes : 0;
  const int64_t group = passes > 1 && f.k * (int64_t)sizeof(T) > 8192 ? 12 : 24;
  const S* a = (const S*)f.a;
  const T* w = (const T*)f.b;
  float *const h = (float*)f.scratch, *out = (float*)f.out;
  for (int64_t i = 0; i < f.m; i += few) {
    const int64_t n = f.m - i < few ? f.m - i : few;
    for (int64_t u = 0; u < whole; ++u) {
      const int64_t at = u / (L * turns) * turns + u % turns, lane = u / turns % L, left = f.k - u * kPerUnit;
      for (int64_t r = 0; r < n; ++r)
        h[i * whole + (at * n + r) * L + lane] =
            left > 0 ? unit<float>(a + (i + r) * f.a_row + u * kPerUnit * f.a_col, f.a_col, left) : 0.0f;
    }
  }
  for (int64_t r = 0; r < f.n; r += group, w += group * f.b_col, out += group) {
    const int64_t rows = f.n - r < group ? f.n - r : group;
    for (int64_t i = 0; i < f.m; i += few) {
      const bool next = passes > 1 && r + group < f.n;
      const Ahead ahead = {next ? group : 0, next ? i / few * (f.k / passes) : 0, next ? passes : 1};
      few_any(f.m - i < few ? f.m - i : few, w, f.b_col, rows, h + i * whole, f.k, out + i * f.stride, f.stride, ahead);
    }
  }
}
