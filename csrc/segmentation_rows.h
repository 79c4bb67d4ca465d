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

// lanes for a window of k: what a register of this instruction set holds, or fewer
constexpr int kRegisterBytes = kRegisters == 32 ? 64 : kRegisters == 8 ? 32 : 16;

template <int W>
struct Lanes {
  static constexpr int value = W;
};

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

// row t with -inf where a segment is too long: in place if it is whole, else in `room`
template <int W, class S, class A>
SUKHOPS_INLINE const A* row(const Chain<S, A>& c, int64_t t, A* room) {
  const S* x = c.scores + t * c.stride;
  const int64_t valid = c.k < c.length - t ? c.k : c.length - t, padded = (c.k + W - 1) / W * W;
  if constexpr (sizeof(S) == sizeof(A)) {
    if (valid == padded) return x;
  }
  for (int64_t k = 0; k < valid; ++k) room[k] = x[k];
  for (int64_t k = valid; k < padded; ++k) room[k] = -__builtin_inf();
  return room;
}

// brings the mantissas of the window at t into [1, 2) and its exponents near 0
template <int W, class S, class A>
static void rebase(Chain<S, A>& c, int64_t t) {
  typedef typename Wide<A, W>::f V;
  typedef typename Wide<A, W>::i I;
  using F = Format<A>;
  A most = -__builtin_inf();
  for (int64_t k = 0; k < c.k; k += W) {
    const V a = read<V>(c.a + t + k);
    const V e = __builtin_convertvector((((I)a >> F::kMantissa) & (2 * F::kBias + 1)) - F::kBias, V);
    const V n = read<V>(c.n + t + k) + e;
    write(c.a + t + k, a * power<A>(-e));
    write(c.n + t + k, n);
    for (int l = 0; l < W; ++l) most = n[l] > most ? n[l] : most;
  }
  if (!(most > -__builtin_inf())) return;
  for (int64_t k = 0; k < c.k; k += W) write(c.n + t + k, read<V>(c.n + t + k) - most);
  c.base += most;
}

// alpha[t] * 2^exponent[t], the sum over segmentations of the first t positions, for t in [0, length]
template <int W, class S, class A>
static void forward_chains(Chain<S, A>* chains, int count) {
  typedef typename Wide<A, W>::f V;
  int64_t longest = 0;
  for (int i = 0; i < count; ++i) {
    Chain<S, A>& c = chains[i];
    for (int64_t j = 0; j <= c.length + c.k + W; ++j) c.a[j] = 0, c.n[j] = -__builtin_inf();
    c.a[0] = 1, c.n[0] = 0, c.base = 0;
    longest = c.length > longest ? c.length : longest;
  }
  for (int64_t t = 0; t < longest; ++t) {
    for (int i = 0; i < count; ++i) {  // chains side by side: each waits for its own last step only
      Chain<S, A>& c = chains[i];
      if (t >= c.length) continue;
      if (t % kRebase == 0) rebase<W>(c, t);
      const A* x = row<W>(c, t, c.room);
      const A a = c.a[t], n = c.n[t];
      c.alpha[t] = a;
      c.exponent[t] = c.base + n;
      for (int64_t k = 0; k < c.k; k += W) {
        V m, e;
        split<A>(read<V>(x + k), m, e);
        const V old = read<V>(c.n + t + 1 + k), add = e + n;
        const V most = add > old ? add : old;
        write(c.n + t + 1 + k, most);
        write(c.a + t + 1 + k,
              read<V>(c.a + t + 1 + k) * power<A>(old - most) + (m * power<A>(add - most)) * a);
      }
    }
  }
  for (int i = 0; i < count; ++i) {
    Chain<S, A>& c = chains[i];
    c.alpha[c.length] = c.a[c.length];
    c.exponent[c.length] = c.base + c.n[c.length];
  }
}

// per boundary j of the window behind row t: the exponent relative to row t0's tile, and 1 / alpha
template <int W, class S, class A>
static void prepare(Chain<S, A>& c, int64_t t0, int64_t rows) {
  double from = 0;
  bool found = false;
  for (int64_t i = 0; i <= rows + c.k + W; ++i) {
    const int64_t j = t0 + i;
    const double e = j <= c.length ? c.exponent[j] : -__builtin_inf();
    if (!found && e > -__builtin_inf()) found = true, from = e;
    // nothing flows into a boundary that is not reached: its exponent counts as +inf there
    c.n[i] = e > -__builtin_inf() ? A(e - from) : A(__builtin_inf());
    c.a[i] = j <= c.length && c.alpha[j] != 0 ? 1 / c.alpha[j] : A(0);
  }
}

// row t, the i-th of its tile, as its Inflow is computed from it
template <class A>
struct Source {
  A alpha, n;
  const A *x, *exponent, *inverse;
};

template <int W, class S, class A>
SUKHOPS_INLINE Source<A> source(const Chain<S, A>& c, int64_t t, int64_t i) {
  const A n = c.n[i] < A(__builtin_inf()) ? c.n[i] : -A(__builtin_inf());
  return {c.alpha[t], n, row<W>(c, t, c.room), c.n + i + 1, c.a + i + 1};
}

// the share of boundary t + 1 + k's weight that comes through segment (t, k), in [0, 1]
template <class V, class A>
SUKHOPS_INLINE V inflow(const Source<A>& s, int64_t k) {
  V m, e;
  split<A>(read<V>(s.x + k), m, e);
  const V d = (e + s.n) - read<V>(s.exponent + k), cap = V{} + A(Format<A>::kBias / 2), one = V{} + A(1);
  const V share = m * (read<V>(s.inverse + k) * s.alpha) * power<A>(d > cap ? cap : d);
  return share > one ? one : share;
}

template <int W, class S, class A, class V>
SUKHOPS_INLINE void write_row(S* p, V x, int64_t valid) {
  if constexpr (sizeof(S) == sizeof(A)) {
    if (valid >= W) return write(p, x);
  }
  for (int64_t l = 0; l < W && l < valid; ++l) p[l] = S(x[l]);
}

// the rows of a chain from its last one, a tile at a time; f(c, t, i) takes row t, the i-th of its tile
template <int W, class S, class A, class F>
SUKHOPS_INLINE void walk_back(Chain<S, A>* chains, int count, F f) {
  int64_t longest = 0;
  for (int i = 0; i < count; ++i) longest = chains[i].length > longest ? chains[i].length : longest;
  for (int64_t u = 0; u < longest; ++u) {
    for (int i = 0; i < count; ++i) {
      Chain<S, A>& c = chains[i];
      const int64_t t = c.length - 1 - u;
      if (t < 0) continue;
      if (u % kRebase == 0) {
        c.tile = t - kRebase + 1 > 0 ? t - kRebase + 1 : 0;
        prepare<W>(c, c.tile, t - c.tile + 1);
      }
      f(c, t, t - c.tile);
    }
  }
}

// c.grad times the posterior of every segment. The mass w of a boundary is the share of the segmentations that
// have it; it flows back through the segments that end there.
template <int W, class S, class A>
static void marginal_chains(Chain<S, A>* chains, int count) {
  typedef typename Wide<A, W>::f V;
  for (int i = 0; i < count; ++i) {
    Chain<S, A>& c = chains[i];
    for (int64_t j = 0; j <= c.length + c.k + W; ++j) c.w[j] = 0;
    c.w[c.length] = c.alpha[c.length] != 0 ? c.grad : A(0);
    for (int64_t j = c.length * c.k; j < c.stored * c.k; ++j) c.out[j] = 0;
  }
  walk_back<W>(chains, count, [](Chain<S, A>& c, int64_t t, int64_t i) {
    const Source<A> from = source<W>(c, t, i);
    V sum{};
    for (int64_t k = 0; k < c.k; k += W) {
      const V mass = inflow<V>(from, k) * read<V>(c.w + t + 1 + k);
      write_row<W, S, A>(c.out + t * c.k + k, mass, c.k - k);
      sum += mass;
    }
    c.w[t] = sum_lanes<W>(sum);
  });
}

// mean[t], the expected sum over the segments before boundary t of what `value` gives a segment: the upstream
// gradient, or with none its surprise, -log of its inflow, whose sum over a segmentation is -log of its probability
template <int W, class S>
SUKHOPS_INLINE typename Wide<double, W>::f value(const Chain<S, double>& c, const double* x, int64_t t, int64_t k) {
  typedef typename Wide<double, W>::f V;
  if (!c.upstream) return (read<V>(c.log_alpha + t + 1 + k) - c.log_alpha[t]) - read<V>(x + k);
  V g{};
  const S* from = c.upstream + t * c.stride;
  for (int64_t l = 0; l < W && k + l < c.k; ++l) g[l] = from[k + l];
  return g;
}

template <int W, class S>
static void expect(Chain<S, double>& c) {
  typedef typename Wide<double, W>::f V;
  const int64_t size = c.length + c.k + W;
  for (int64_t j = 0; j <= size; ++j) c.mean[j] = 0, c.log_alpha[j] = 0;
  for (int64_t j = 0; j <= c.length; ++j)
    if (c.alpha[j] != 0) c.log_alpha[j] = std::log(c.alpha[j]) + c.exponent[j] * 0.693147180559945309;
  for (int64_t t = 0; t < c.length; ++t) {
    if (t % kRebase == 0) prepare<W>(c, t, kRebase < c.length - t ? kRebase : c.length - t);
    const Source<double> from = source<W>(c, t, t % kRebase);
    const double before = c.mean[t];
    for (int64_t k = 0; k < c.k; k += W) {
      const V share = inflow<V>(from, k), sum = before + value<W>(c, from.x, t, k);
      write(c.mean + t + 1 + k, read<V>(c.mean + t + 1 + k) + (share != 0.0 ? share * sum : V{}));
    }
  }
}

// c.grad times the covariance, over segmentations, of every segment's presence with the sum that `expect` took
// the mean of: posterior * (mean before + value + mean after - mean)
template <int W, class S>
static void covariance(Chain<S, double>* chain) {
  typedef typename Wide<double, W>::f V;
  Chain<S, double>& c = *chain;
  const int64_t size = c.length + c.k + W;
  for (int64_t j = 0; j <= size; ++j) c.w[j] = 0, c.after[j] = 0;
  c.w[c.length] = c.alpha[c.length] != 0;
  for (int64_t j = c.length * c.k; j < c.stored * c.k; ++j) c.out[j] = 0;
  walk_back<W>(chain, 1, [](Chain<S, double>& c, int64_t t, int64_t i) {
    const Source<double> from = source<W>(c, t, i);
    const double before = c.mean[t] - c.mean[c.length];
    V mass{}, after{};
    for (int64_t k = 0; k < c.k; k += W) {
      const V share = inflow<V>(from, k), v = value<W>(c, from.x, t, k);
      const V w = read<V>(c.w + t + 1 + k), f = read<V>(c.after + t + 1 + k);
      mass += share * w;
      after += share != 0.0 ? share * (w * v + f) : V{};
      const V out = share != 0.0 ? share * (w * (before + v) + f) * c.grad : V{};
      write_row<W, S, double>(c.out + t * c.k + k, out, c.k - k);
    }
    c.w[t] = sum_lanes<W>(mass);
    c.after[t] = sum_lanes<W>(after);
  });
}

// c.a[t], the largest sum of scores of the first t positions; c.bad where a score is NaN or +inf
template <class S>
static void best_sums(Chain<S, double>* chains, int count) {
  int64_t longest = 0;
  for (int i = 0; i < count; ++i) {
    Chain<S, double>& c = chains[i];
    for (int64_t j = 0; j <= c.length + c.k; ++j) c.a[j] = -__builtin_inf();
    c.a[0] = 0, c.bad = 0;
    longest = c.length > longest ? c.length : longest;
  }
  for (int64_t t = 0; t < longest; ++t) {
    for (int i = 0; i < count; ++i) {
      Chain<S, double>& c = chains[i];
      if (t >= c.length) continue;
      const int64_t valid = c.k < c.length - t ? c.k : c.length - t;
      const S* __restrict__ x = c.scores + t * c.stride;
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
  const int64_t padded = (c.k + W - 1) / W * W;
  for (int64_t s = 0; s < d.samples; ++s) d.position[s] = c.length;
  for (int64_t end = c.length; end > 0; end -= kDrawTile) {
    const int64_t first = end - kDrawTile > 0 ? end - kDrawTile : 0;  // boundaries (first, end]
    for (int64_t i = 0; i < (end - first) * padded; ++i) d.table[i] = 0;
    for (int64_t t = first + 1 - c.k > 0 ? first + 1 - c.k : 0, tile = t; t < end; ++t) {
      if ((t - tile) % kRebase == 0) prepare<W>(c, tile = t, kRebase < end - t ? kRebase : end - t);
      const Source<A> from = source<W>(c, t, t - tile);
      for (int64_t k = 0; k < c.k; k += W) {
        const V share = inflow<V>(from, k);
        for (int64_t l = 0; l < W; ++l) {
          const int64_t j = t + 1 + k + l;
          if (j > first && j <= end && k + l < c.k) d.table[(j - first - 1) * padded + k + l] = share[l];
        }
      }
    }
    for (int64_t j = 0; j < end - first; ++j) {  // the running sums, of which the last is 1
      A* p = d.table + j * padded;
      A total = 0;
      for (int64_t k = 0; k < padded; ++k) p[k] = total += p[k];
      for (int64_t k = 0; k < padded; ++k) p[k] /= total;
    }
    for (int64_t s = 0; s < d.samples; ++s) {
      const uint64_t stream = mixed(d.seed + kStep * uint64_t(s * d.sequences + d.sequence + 1));
      int64_t j = d.position[s], *out = d.segments + s * d.sequences * c.stored;
      while (j > first) {
        const uint64_t bits = mixed(stream + kStep * uint64_t(j)) >> (63 - Format<A>::kMantissa);
        const A u = A(bits) * (A(1) / A(uint64_t(2) << Format<A>::kMantissa));
        const A* p = d.table + (j - first - 1) * padded;
        I below{};
        for (int64_t k = 0; k < padded; k += W) below -= (I)(read<V>(p + k) <= u);
        const int64_t length = 1 + sum_lanes<W>(below);
        j -= length;
        out[j] = length;
      }
      d.position[s] = j;
    }
  }
}

// ---------------------------------------------------------------- what segmentation.cpp calls

template <class S, class A>
static void forward(Chain<S, A>* chains, int64_t count) {
  with_lanes<A>(chains->k, [=](auto w) { forward_chains<decltype(w)::value>(chains, count); });
}

template <class S>
static void marginals(Chain<S, S>* chains, int64_t count) {
  with_lanes<S>(chains->k, [=](auto w) { marginal_chains<decltype(w)::value>(chains, count); });
}

template <class S>
static void moments(Chain<S, double>* chain, bool gradient) {
  with_lanes<double>(chain->k, [=](auto w) {
    expect<decltype(w)::value>(*chain);
    if (gradient) covariance<decltype(w)::value>(chain);
  });
}

template <class A>
static void samples(Chain<A, A>* chain, const Draw<A>& d) {
  with_lanes<A>(chain->k, [&](auto w) { draw<decltype(w)::value>(*chain, d); });
}
