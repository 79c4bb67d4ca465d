// The recursions of segmentation.cpp. Included by isa.h once per instruction set. S is how a score is
// stored, A what is computed with.
//
// A number is a * 2^n: the exponent n is an integer kept in A, relative to a double, so that scores of any
// size are added without overflow, and without a logarithm before the end. Sums of a sequence's own numbers
// depend on nothing else, so neither the number of threads nor the other sequences change a bit.

template <class A>
struct Format;
template <>
struct Format<float> {
  typedef int32_t Int;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
};
template <>
struct Format<double> {
  typedef int64_t Int;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kMagic = 6755399441055744.0;
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
};

template <class A, int W>
struct Wide {
  typedef A f __attribute__((vector_size(W * sizeof(A))));
  typedef typename Format<A>::Int i __attribute__((vector_size(W * sizeof(A))));
};

template <int W>
struct Lanes {
  static constexpr int value = W;
};

// lanes for a window of k: what a register of this instruction set holds, or fewer
template <class A, class F>
SUKHOPS_INLINE void with_lanes(int64_t k, const F& f) {
  constexpr int most = kRegisterBytes / sizeof(A);
  if constexpr (most > 8) {
    if (k > 8) return f(Lanes<16>());
  }
  if constexpr (most > 4) {
    if (k > 4) return f(Lanes<8>());
  }
  f(Lanes<(most < 4 ? most : 4)>());
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

template <class V>
SUKHOPS_INLINE V exp_near_zero(V r, float) {
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r + 1.0f;
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

SUKHOPS_INLINE int64_t padded(int64_t k, int64_t w) { return (k + w - 1) / w * w; }

// row t with -inf where a segment is too long: in place if it is whole, else in the middle of `room`
template <int W, class S, class A>
SUKHOPS_INLINE const A* row(const Chain<S, A>& c, int64_t t) {
  const S* x = c.scores + t * c.k;
  const int64_t valid = c.k < c.length - t ? c.k : c.length - t, size = padded(c.k, W);
  if constexpr (sizeof(S) == sizeof(A)) {
    if (valid == size && t > 0) return x;  // row 0 has no row before it, which a rotated read runs into
  }
  A* room = c.room + size;
  for (int64_t k = 0; k < valid; ++k) room[k] = x[k];
  for (int64_t k = valid; k < size; ++k) room[k] = -__builtin_inf();
  return room;
}

// brings the mantissas of the window into [1, 2) and its exponents near 0
template <int W, class S, class A>
static void rebase(Chain<S, A>& c) {
  typedef typename Wide<A, W>::f V;
  typedef typename Wide<A, W>::i I;
  using F = Format<A>;
  V most = V{} - A(__builtin_inf());
  for (int64_t k = 0; k < c.k; k += W) {
    const V a = read<V>(c.a + k);
    const V e = __builtin_convertvector((((I)a >> F::kMantissa) & (2 * F::kBias + 1)) - F::kBias, V);
    const V n = read<V>(c.n + k) + e;
    write(c.a + k, a * power<A>(-e));
    write(c.n + k, n);
    most = n > most ? n : most;
  }
  A top = most[0];
  for (int l = 1; l < W; ++l) top = most[l] > top ? most[l] : top;
  if (!(top > -__builtin_inf())) return;
  for (int64_t k = 0; k < c.k; k += W) write(c.n + k, read<V>(c.n + k) - top);
  c.base += top;
}

// alpha[t] * 2^exponent[t], the sum over segmentations of the first t positions, for t in [0, length]. The window
// of boundaries t .. t + k is a ring: boundary j stays at j % size, and rows are read rotated instead.
template <int W, class S, class A>
static void forward_chain(Chain<S, A>& c) {
  typedef typename Wide<A, W>::f V;
  typedef typename Wide<A, W>::i I;
  const int64_t size = padded(c.k, W);
  I lane{};
  for (int l = 0; l < W; ++l) lane[l] = l;
  for (int64_t i = 0; i < size; ++i) c.a[i] = 0, c.n[i] = -__builtin_inf();
  c.base = 0;
  if (size > 0) c.a[0] = 1, c.n[0] = 0;
  for (int64_t t = 0, at = 0; t < c.length; ++t, at = at + 1 < size ? at + 1 : 0) {
    if (size == 0) {
      c.alpha[t] = t == 0, c.exponent[t] = t == 0 ? 0 : -__builtin_inf();
      continue;
    }
    if (t % kTile == 0) rebase<W>(c);
    const A* x = row<W>(c, t) - at - 1;  // lane i > at is segment i - at - 1, lane i <= at that plus size
    const A a = c.a[at], n = c.n[at];
    c.alpha[t] = a;
    c.exponent[t] = c.base + n;
    for (int64_t i = 0; i < size; i += W) {
      V m, e;
      const I place = lane + (typename Format<A>::Int)(i - at);
      split<A>(place > 0 ? read<V>(x + i) : read<V>(x + i + size), m, e);
      const V gone = V{} - A(__builtin_inf());
      const V old = place == 0 ? gone : read<V>(c.n + i), add = e + n, ahead = add - old;
      const V have = place == 0 ? V{} : read<V>(c.a + i), more = m * a;
      // the larger exponent stays, the other number is shifted to it
      const auto larger = add > old;
      write(c.n + i, larger ? add : old);
      write(c.a + i, (larger ? more : have) + (larger ? have : more) * power<A>(ahead > A(0) ? -ahead : ahead));
    }
  }
  const int64_t at = size ? c.length % size : 0;
  c.alpha[c.length] = size ? c.a[at] : A(c.length == 0);
  c.exponent[c.length] = size ? c.base + c.n[at] : c.length == 0 ? 0 : -__builtin_inf();
}

// for boundaries from t0 on: the exponent, relative to that tile, and alpha
template <int W, class S, class A>
static void prepare(Chain<S, A>& c, int64_t t0, int64_t rows) {
  const int64_t size = rows + padded(c.k, W) + 1, inside = size < c.length - t0 + 1 ? size : c.length - t0 + 1;
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

// c.grad times the posterior of every segment. The mass w of a boundary is the share of the segmentations that
// have it; it flows back through the segments that end there. Behind a tile masses are known and taken whole
// vectors at a time; inside it, where each row waits for the next, one by one.
template <int W, class A>
static void marginal_chain(Chain<A, A>& c) {
  typedef typename Wide<A, W>::f V;
  const int64_t size = padded(c.k, W), stride = size > kTile ? size : kTile;
  for (int64_t j = 0; j <= c.length + size; ++j) c.w[j] = 0;
  for (int64_t i = 0; i < kTile * stride; ++i) c.tile[i] = 0;
  c.w[c.length] = c.alpha[c.length] != 0 ? c.grad : A(0);
  for (int64_t j = c.length * c.k; j < c.stored * c.k; ++j) c.out[j] = 0;
  for (int64_t end = c.length; end > 0; end -= kTile) {
    const int64_t t0 = end > kTile ? end - kTile : 0, rows = end - t0;
    A* w = c.w + t0;
    A mass[kTile];
    prepare<W>(c, t0, rows);
    for (int64_t i = 0; i < rows; ++i) {
      const Source<A> from = source<W>(c, t0 + i, i);
      V sum{};
      for (int64_t k = 0; k < size; k += W) {
        const V share = inflow<V>(from, k);
        write(c.tile + i * stride + k, share);
        sum += share * read<V>(w + i + 1 + k);
      }
      mass[i] = sum_lanes<W>(sum);
    }
    if (rows == kTile) {  // a whole tile, unrolled
#pragma GCC unroll 8
      for (int j = kTile - 1; j > 0; --j)
#pragma GCC unroll 8
        for (int i = 0; i < j; ++i) mass[i] += c.tile[i * stride + j - i - 1] * mass[j];
    } else {
      for (int64_t j = rows - 1; j > 0; --j)
        for (int64_t i = 0; i < j; ++i) mass[i] += c.tile[i * stride + j - i - 1] * mass[j];
    }
    for (int64_t i = 0; i < rows; ++i) w[i] = mass[i];
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < c.k; k += W)
        write_row<W, A, A>(c.out + (t0 + i) * c.k + k,
                           read<V>(c.tile + i * stride + k) * read<V>(w + i + 1 + k), c.k - k);
  }
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

// Walks `samples` segmentations back from the end; at each boundary a segment is drawn from its inflow. The
// number drawn depends on the seed, the sample, the sequence and the boundary, on nothing else.
template <int W, class A>
static void draw(Chain<A, A>& c, const Draw<A>& d) {
  typedef typename Wide<A, W>::f V;
  typedef typename Wide<A, W>::i I;
  constexpr uint64_t kStep = 0x9e3779b97f4a7c15u;
  const int64_t size = padded(c.k, W);
  for (int64_t s = 0; s < d.samples; ++s) {
    d.position[s] = c.length;
    int64_t* out = d.segments + s * d.sequences * c.stored;
    for (int64_t t = c.length; t < c.stored; ++t) out[t] = 0;
    d.stream[s] = mixed(d.seed + kStep * uint64_t(s * d.sequences + d.sequence + 1));
  }
  for (int64_t end = c.length; end > 0; end -= kDrawTile) {
    const int64_t first = end - kDrawTile > 0 ? end - kDrawTile : 0;  // boundaries (first, end]
    for (int64_t i = 0; i < (end - first) * size; ++i) d.table[i] = 0;
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
    for (int64_t j = 0; j < end - first; ++j) {  // the running sums, of which the last is 1
      A* p = d.table + j * size;
      A total = 0;
      for (int64_t k = 0; k < size; ++k) p[k] = total += p[k];
      for (int64_t k = 0; k < size; ++k) p[k] /= total;
    }
    for (int64_t s = 0; s < d.samples; s += kTogether) {  // several walks at a time: each waits for its own step only
      const int64_t count = d.samples - s < kTogether ? d.samples - s : kTogether;
      int64_t found[kTogether][kDrawTile] = {}, at[kTogether];
      for (int64_t i = 0; i < count; ++i) {
        at[i] = d.position[s + i];
        if (at[i] >= first && at[i] < end) found[i][at[i] - first] = d.segment[s + i];  // which starts here, ends behind
      }
      for (bool more = true; more;) {
        more = false;
        for (int64_t i = 0; i < count; ++i) {
          const int64_t j = at[i];
          if (j <= first) continue;
          const uint64_t bits = mixed(d.stream[s + i] + kStep * uint64_t(j)) >> (63 - Format<A>::kMantissa);
          const A u = A(int64_t(bits)) * (A(0.5) / A(int64_t(1) << Format<A>::kMantissa));
          const A* p = d.table + (j - first - 1) * size;
          I below{};
          for (int64_t k = 0; k < size; k += W) below -= (I)(read<V>(p + k) <= u);
          const int64_t length = 1 + sum_lanes<W>(below);
          at[i] = j - length;
          d.segment[s + i] = length;
          if (at[i] >= first) found[i][at[i] - first] = length;
          more = true;
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        d.position[s + i] = at[i];
        __builtin_memcpy(d.segments + (s + i) * d.sequences * c.stored + first, found[i], (end - first) * 8);
      }
    }
  }
}

// ---------------------------------------------------------------- what segmentation.cpp calls

template <class S, class A>
static void forward(Chain<S, A>& c) {
  with_lanes<A>(c.k, [&](auto w) { forward_chain<decltype(w)::value>(c); });
}

template <class A>
static void marginals(Chain<A, A>& c) {
  with_lanes<A>(c.k, [&](auto w) { marginal_chain<decltype(w)::value>(c); });
}

template <class S>
static void moments(Chain<S, double>& c, bool gradient) {
  with_lanes<double>(c.k, [&](auto w) {
    expect<decltype(w)::value>(c);
    if (gradient) covariance<decltype(w)::value>(c);
  });
}

template <class A>
static void samples(Chain<A, A>& c, const Draw<A>& d) {
  with_lanes<A>(c.k, [&](auto w) { draw<decltype(w)::value>(c, d); });
}
