// The arithmetic of segmentation_rows.h, the only file that includes this one: numbers a * 2^n, and vectors of them.

// Powers of two that bound the numbers of a plain tile (see segmentation_rows.h), so that no product of two of them
// overflows or loses a bit.
struct Plain {
  int lowest, scores;  // exponentials of scores have one of `scores` exponents, from -lowest on, or are 0
  int low, high;       // complete sums are in [2^-low, 2^high], or 0
  int top;             // exponent of the largest sum of the window at the start
  int least;           // sums that are not complete yet are at least 2^-least, or 0
};

template <class A>
struct Format;
template <>
struct Format<float> {
  typedef int32_t Int;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kLn2 = 0.693147180559945309f, kLn2Rest = 0.693147180559945309 - double(kLn2);
  static constexpr Int kMagicBits = 0x4b400000;
  static constexpr Plain kPlain{48, 64, 54, 104, 40, 100};
  static constexpr float kUpper = 0x1.8p35f;  // 1.5 * 2^35: adding it rounds to a multiple of 2^12
  static constexpr float kExact = 0x1p24f;    // exponents below this are exact
  // exponents of exp(score) are exact only below this, because score * log2(e) is rounded
  static constexpr float kScore = 0x1p22f;
};
template <>
struct Format<double> {
  typedef int64_t Int;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kMagic = 6755399441055744.0;
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr Int kMagicBits = 0x4338000000000000;
  static constexpr Plain kPlain{384, 512, 580, 800, 400, 960};
  static constexpr double kUpper = 0x1.8p84, kExact = 0x1p53, kScore = 0x1p51;
};

// whether `reduced` needs only one step: for float, on targets with fused multiply-add
template <class A>
constexpr bool kOneStep = sizeof(A) == 4 && kRegisterBytes > 16;

template <class A, int W>
struct Wide {
  typedef A f __attribute__((vector_size(W * sizeof(A))));
  typedef typename Format<A>::Int i __attribute__((vector_size(W * sizeof(A))));
};

template <int W, class V>
SUKHOPS_INLINE auto sum_lanes(V x) {
  if constexpr (sizeof(V) > 16) {
    typedef __typeof__(x[0] + 0) E;
    typedef E Half __attribute__((vector_size(sizeof(V) / 2)));
    Half low, high;
    __builtin_memcpy(&low, &x, sizeof low);
    __builtin_memcpy(&high, (const char*)&x + sizeof low, sizeof high);
    return sum_lanes<W / 2>(Half(low + high));
  } else if constexpr (W == 4) {
    const V pairs = x + shuffle<2, 3, 2, 3>(x, x);
    return (pairs + shuffle<1, 1, 1, 1>(pairs, pairs))[0];
  } else {
    return (x + shuffle<1, 1>(x, x))[0];
  }
}

// the number of lanes in which a comparison is true
template <int W, class I>
SUKHOPS_INLINE int64_t count_lanes(I holds) {
#ifdef SUKHOPS_X86
  if constexpr (sizeof(I) == 64 || sizeof(I) > kRegisterBytes) {
    typedef __typeof__(holds[0] + 0) E;
    typedef E Half __attribute__((vector_size(sizeof(I) / 2)));
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

template <int W, class I>
SUKHOPS_INLINE bool all_lanes(I holds) {
  return count_lanes<W>(holds) == W;
}

// how a window is stored: N vectors of W lanes; N = 0 if the number of vectors is only known at run time
template <int W, int N>
struct Shape {
  static constexpr int lanes = W, vectors = N;
};

template <class A, class F>
SUKHOPS_INLINE auto with_shape(int64_t k, const F& f) {
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

// exp(r) for |r| <= log(2) / 2. The float version is a minimax polynomial with an error of 5e-9.
template <class V>
SUKHOPS_INLINE V exp_near_zero(V r, float) {
  V p = r * 1.381416223011911e-3f + 8.36892705410719e-3f;
  p = p * r + 4.166840761899948e-2f;
  p = p * r + 0.166665181517601f;
  p = p * r + 0.4999999403953552f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
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

// x - k * log(2). With fused multiply-add, one step is accurate enough for float if |k| <= 64.
template <class A, class V>
SUKHOPS_INLINE V reduced(V x, V k) {
  using F = Format<A>;
  if constexpr (kOneStep<A>) return x - k * F::kLn2;
  return (x - k * F::kLn2High) - k * F::kLn2Low;
}

// the same for |k| < kScore
template <class A, class V>
SUKHOPS_INLINE V reduced_far(V x, V k) {
  using F = Format<A>;
  if constexpr (kRegisterBytes > 16) {
    const V r = reduced<A>(x, k);
    if constexpr (kOneStep<A>) return r - (k * k > A(64 * 64) ? k : V{}) * F::kLn2Rest;
    return r;
  }
  // without fused multiply-add: the products of the upper and the lower half of k are exact
  const V upper = (k + F::kUpper) - F::kUpper;
  return ((x - upper * F::kLn2High) - (k - upper) * F::kLn2High) - k * F::kLn2Low;
}

// m * 2^n = exp(x), where n is an integer; exp(-inf) is 1 * 2^-inf. For NaN, for +inf and for exponents beyond kScore,
// m is NaN and n is at least the exponent minus 2.
template <class A, class V>
SUKHOPS_INLINE void split(V x, V& m, V& n) {
  using F = Format<A>;
  const V y = x * A(1.44269504088896341);
  const V k = (y + F::kMagic) - F::kMagic;
  m = exp_near_zero(reduced_far<A>(x, k), A());
  n = k;
  const auto exact = (y > -F::kScore) & (y < F::kScore);
  if (all_lanes<sizeof(V) / sizeof(A)>(exact)) return;
  const V none = V{} - A(__builtin_inf()), least = V{} - A(0x1p100);
  const V rounded = ((y * A(0.5) + F::kMagic) - F::kMagic) * A(2);
  m = exact ? m : x == none ? V{} + A(1) : V{} + A(__builtin_nan(""));
  n = exact ? n : x == none ? none : rounded < least ? least : rounded;
}

// Marks numbers m * 2^n whose exponent was rounded: m becomes NaN, and n an upper bound of the exponent. For numbers
// that are already marked, n grows by more than a sum over the window can grow, so it stays an upper bound.
template <class A, class V>
SUKHOPS_INLINE void mark_inexact(V& m, V& n) {
  using F = Format<A>;
  const V size = n < A(0) ? -n : n;
  const auto exact = size < F::kExact, none = n == V{} - A(__builtin_inf());
  m = exact | none ? m : V{} + A(__builtin_nan(""));
  n = (m == m) | none ? n : n + (exact ? V{} : size * A(0x1p-20)) + A(64);
}

// exp(x), bit for bit as `split` computes it. Sets bits above Plain::scores in `outside` if x is out of range for a
// plain tile.
template <class A, class V, class I>
SUKHOPS_INLINE V plain_exp(V x, I& outside) {
  using F = Format<A>;
  const I possible = x != -A(__builtin_inf());
  const V shifted = x * A(1.44269504088896341) + F::kMagic, k = shifted - F::kMagic;
  outside |= possible & ((I)shifted - (F::kMagicBits - F::kPlain.lowest));
  const V p = exp_near_zero(reduced<A>(x, k), A());
  return (V)(possible & ((I)p + ((I)shifted << F::kMantissa)));
}

// 2^d for an integer d <= the largest exponent; 0 if d is below the smallest exponent or NaN
template <class A, class V>
SUKHOPS_INLINE V power(V d) {
  using F = Format<A>;
  typedef decltype(d < d) I;
  const V shifted = d + (F::kMagic + F::kBias);
  return d >= A(1 - F::kBias) ? (V)((I)shifted << F::kMantissa) : V{};
}

// the exponent of x as a floating-point number: x * 2^-exponent_of(x) is in [1, 2)
template <int W, class A, class V>
SUKHOPS_INLINE V exponent_of(V x) {
  using F = Format<A>;
  typedef typename Wide<A, W>::i I;
  return __builtin_convertvector((((I)x >> F::kMantissa) & (2 * F::kBias + 1)) - F::kBias, V);
}

template <int W>
using Lanes = std::make_integer_sequence<int, W>;

// the lanes of x, followed by the lanes of y
template <class V, int... l>
SUKHOPS_INLINE auto joined(V x, V y, std::integer_sequence<int, l...>) {
  typedef __typeof__(x[0] + 0) E;
  typedef E Both __attribute__((vector_size(2 * sizeof(V))));
  Both z;
  __builtin_memcpy(&z, &x, sizeof x);
  __builtin_memcpy((char*)&z + sizeof x, &y, sizeof y);
  return z;
}

// the lanes of x without the first, followed by the first lane of y
template <class V, int... l>
SUKHOPS_INLINE V next_lane(V x, V y, std::integer_sequence<int, l...>) {
  return shuffle<(l + 1)...>(x, y);
}

// 0, followed by the lanes of x without the last
template <class V, int... l>
SUKHOPS_INLINE V zero_before(V x, std::integer_sequence<int, l...>) {
  return shuffle<(l ? l - 1 : int(sizeof...(l)))...>(x, V{});
}

// the first lane of x, followed by the lanes of y without the first
template <class V, int... l>
SUKHOPS_INLINE V first_of(V x, V y, std::integer_sequence<int, l...>) {
  return shuffle<(l ? l + int(sizeof...(l)) : 0)...>(x, y);
}

// p[l] - from, converted to A, for W lanes
template <int W, class A>
SUKHOPS_INLINE typename Wide<A, W>::f difference(const double* p, double from) {
  if constexpr (W * sizeof(double) <= kRegisterBytes)
    return __builtin_convertvector(get<typename Wide<double, W>::f>(p) - from, typename Wide<A, W>::f);
  else
    return joined(difference<W / 2, A>(p, from), difference<W / 2, A>(p + W / 2, from), Lanes<W>());
}

SUKHOPS_INLINE int64_t padded(int64_t k, int64_t w) { return k > 0 ? (k + w - 1) / w * w : w; }

// the smallest exponent of the boundaries that are reached, +inf if none is
SUKHOPS_INLINE double smallest(const double* exponent, int64_t rows) {
  constexpr int kPart = kRegisterBytes / sizeof(double);
  typedef typename Wide<double, kPart>::f D;
  const D none = D{} + __builtin_inf();
  D parts = none;
  int64_t i = 0;
  for (; i + kPart <= rows; i += kPart) {
    const D e = get<D>(exponent + i), reached = e > -none ? e : none;
    parts = reached < parts ? reached : parts;
  }
  double least = none[0];
  for (int l = 0; l < kPart; ++l) least = parts[l] < least ? parts[l] : least;
  for (; i < rows; ++i)
    if (exponent[i] > -__builtin_inf() && exponent[i] < least) least = exponent[i];
  return least;
}
