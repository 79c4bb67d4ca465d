// The recursions of segmentation.cpp. Included by isa.h once per instruction set. S is how a score is
// stored, A what is computed with.
//
// A number is a * 2^n: the exponent n is an integer kept in A, relative to a double, so that scores are added
// without overflow, and without a logarithm before the end. Exponents below Format::kExact are exact. A number whose
// exponent is not has a NaN for its mantissa and a bound of its exponent, so that it is dropped beside a much larger
// number and spreads where it counts: the result is right or NaN. Sums of a sequence's own numbers depend on nothing
// else, so neither the number of threads nor the other sequences change a bit.
//
// Rows are taken kTile at a time. In most tiles all numbers are within reach of one exponent: such a tile is
// `plain`, and its exponents are left out. A tile finds out by itself, and is done again if it was not.

#include "segmentation_numbers.h"

// brings n numbers to the cache, to be read or written; any address will do
template <int write, class S>
SUKHOPS_INLINE void fetch(const S* p, int64_t n) {
#pragma GCC unroll 4
  for (int64_t i = 0; i < n; i += 64 / sizeof(S)) __builtin_prefetch(p + i, write);
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

// whether `rows` rows from t on can be read where they are
template <int W, class S, class A>
SUKHOPS_INLINE bool whole_rows(const Chain<S, A>& c, int64_t t, int64_t rows) {
  return sizeof(S) == sizeof(A) && c.k == padded(c.k, W) && t + rows - 1 + c.k <= c.length;
}

// brings the mantissas of the window into [1, 2), the largest exponent to 0
template <int W, class S, class A>
SUKHOPS_INLINE void normalise(Chain<S, A>& c) {
  typedef typename Wide<A, W>::f V;
  const int64_t size = padded(c.k, W);
  const V none = V{} - A(__builtin_inf());  // the exponent of 0
  V most = none;
  for (int64_t k = 0; k < size; k += W) {
    const V x = get<V>(c.a + k);
    const V e = exponent_of<W, A>(x);
    const V m = x == A(0) ? none : get<V>(c.n + k) + e;
    set(c.a + k, x * power<A>(-e));
    set(c.n + k, m);
    most = m > most ? m : most;
  }
  A top = most[0];
  for (int l = 1; l < W; ++l) top = most[l] > top ? most[l] : top;
  if (!(top > -__builtin_inf())) return;
  for (int64_t k = 0; k < size; k += W) {
    V x = get<V>(c.a + k), n = get<V>(c.n + k) - top;
    if (!all_lanes<W>((n > -Format<A>::kExact) | (x == A(0)))) {
      mark_inexact<A>(x, n);
      set(c.a + k, x);
    }
    set(c.n + k, n);
  }
  c.base += top;
  c.bad |= !(std::fabs(c.base) < Format<double>::kExact / 2);
}

// alpha and exponent of `rows` boundaries from t0 on, found * 2^base, all finite
template <class S, class A, class V>
SUKHOPS_INLINE void keep(Chain<S, A>& c, int64_t t0, int64_t rows, V found, double base) {
  using F = Format<A>;
  typedef typename Wide<A, kTile>::i I;
  constexpr int kPart = kRegisterBytes / sizeof(double);
  typedef typename Wide<double, kPart>::f D;
  const I zero = found == A(0), one = (I)(V{} + A(1));
  A alpha[kTile], n[kTile];
  double exponent[kTile];
  set(alpha, (V)(~zero & (((I)found & ((typename F::Int(1) << F::kMantissa) - 1)) | one)));
  set(n, zero ? V{} - A(__builtin_inf()) : exponent_of<kTile, A>(found));
  for (int64_t i = 0; i < kTile; i += kPart)
    set(exponent + i, __builtin_convertvector(get<typename Wide<A, kPart>::f>(n + i), D) + base);
  if (rows == kTile) {
    __builtin_memcpy(c.alpha + t0, alpha, sizeof alpha), __builtin_memcpy(c.exponent + t0, exponent, sizeof exponent);
    return;
  }
  for (int64_t i = 0; i < rows; ++i) c.alpha[t0 + i] = alpha[i], c.exponent[t0 + i] = exponent[i];
}

// marks row t as one whose exponentials are not kept
template <class S, class A>
SUKHOPS_INLINE void mark(const Chain<S, A>& c, int64_t t) {
  if (c.kept && c.k > 0) c.kept[t * c.k] = -1;
}

// whether those of `rows` rows from t on are kept
template <class A>
SUKHOPS_INLINE bool all_kept(const Chain<A, A>& c, int64_t t, int64_t rows) {
  if (!c.kept) return false;
  bool marked = false;
  for (int64_t i = 0; i < rows; ++i) marked |= c.kept[(t + i) * c.k] < 0;
  return !marked;
}

// takes tiles from row t on to the window c.a * 2^c.n, which is normalised, until one is not plain or numbers have
// come near a bound; returns the first row that is left. Exponentials are kept of rows that are whole.
template <int W, int N, class S, class A>
SUKHOPS_INLINE int64_t forward_plain(Chain<S, A>& c, int64_t t) {
  typedef typename Wide<A, W>::f V;
  typedef typename Wide<A, W>::i I;
  typedef typename Wide<A, kTile>::f Tile;
  constexpr Plain plain = Format<A>::kPlain;
  const Tile low = power<A>(Tile{} - A(plain.low)), high = power<A>(Tile{} + A(plain.high));
  const Tile near_low = power<A>(Tile{} - A(plain.low / 2)), near_high = power<A>(Tile{} + A(plain.high * 4 / 5));
  const int64_t n = N ? N : padded(c.k, W) / W;
  V own[N + 1];  // the window: in registers where its size is known
  const auto at = [&](int64_t k) { return N ? own[k] : get<V>(c.tile + k * W); };
  const auto move = [&](int64_t k, V x) { N ? void(own[k] = x) : set(c.tile + k * W, x); };
  I within = ~I{};
#pragma GCC unroll 4
  for (int64_t k = 0; k < n; ++k) {
    const V a = get<V>(c.a + k * W), e = get<V>(c.n + k * W) + A(plain.top);
    within &= (a == A(0)) | (e >= A(-plain.least));
    move(k, a * power<A>(e));
  }
  move(n, V{});
  if (!all_lanes<W>(within)) return t;
  const int64_t first = t;
  for (bool far = true; far && t < c.length;) {
    const int64_t rows = kTile < c.length - t ? kTile : c.length - t;
    A found[kTile] = {};
    I outside{};
    const auto step = [&](int64_t i, const A* x, A* kept) {
      V now = at(0);
      const V sum = (found[i] = now[0]) - V{};
#pragma GCC unroll 4
      for (int64_t k = 0; k < n; ++k) {
        const V next = at(k + 1), weight = plain_exp<A>(get<V>(x + k * W), outside);
        move(k, next_lane(now, next, Lanes<W>()) + weight * sum);
        if (kept) set(kept + k * W, weight);
        now = next;
      }
    };
    if (rows == kTile && whole_rows<W>(c, t, rows)) {
      const A* x = (const A*)c.scores + t * c.k;
      A* kept = c.kept ? c.kept + t * c.k : nullptr;
#pragma GCC unroll 4
      for (int64_t i = 0; i < kTile; ++i, x += n * W) {
        fetch<0>(x + 2 * kTile * n * W, n * W);
        step(i, x, kept);
        if (kept) fetch<1>(kept + 2 * kTile * n * W, n * W), kept += n * W;
      }
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        A* const kept = c.kept && whole_rows<W>(c, t + i, 1) ? c.kept + (t + i) * c.k : nullptr;
        if (!kept) mark(c, t + i);
        step(i, row<W>(c, t + i), kept);
      }
    }
    const Tile sums = get<Tile>(found);
    if (!all_lanes<W>((outside & -plain.scores) == 0)) break;
    far = all_lanes<kTile>((sums == A(0)) | ((sums >= near_low) & (sums <= near_high)));
    if (!far && !all_lanes<kTile>((sums == A(0)) | ((sums >= low) & (sums <= high)))) break;
#pragma GCC unroll 4
    for (int64_t k = 0; k < n; ++k) set(c.a + k * W, at(k));
    keep(c, t, rows, sums, c.base - plain.top);
    t += rows;
  }
  if (t == first) return t;
  for (int64_t k = 0; k < n; ++k) set(c.n + k * W, V{});
  c.base -= plain.top;
  return t;
}

// alpha and exponent of boundary t, found a * 2^(base + n). One whose exponent is inexact is left as not reached: where
// it counts, the sum over all is NaN.
template <class S, class A>
SUKHOPS_INLINE void leave(Chain<S, A>& c, int64_t t, A a, A n) {
  typedef typename Wide<A, kRegisterBytes / sizeof(A)>::f V;
  const V whole = exponent_of<kRegisterBytes / sizeof(A), A>(V{} + a);
  c.alpha[t] = a == a ? a * power<A>(-whole)[0] : A(0);
  c.exponent[t] = a == a ? c.base + n + whole[0] : -__builtin_inf();
}

// the same for any tile: every number keeps its exponent
template <int W, int N, class S, class A>
SUKHOPS_INLINE void forward_wide(Chain<S, A>& c, int64_t t0, int64_t rows) {
  typedef typename Wide<A, W>::f V;
  const int64_t size = N ? N * W : padded(c.k, W);
  for (int64_t i = 0; i < rows; ++i) {
    mark(c, t0 + i);
    const A* x = row<W>(c, t0 + i);
    const A a = c.a[0], n = c.n[0];
    leave(c, t0 + i, a, n);
    const V lost = V{} + (a == a ? A(0) : a);
    typename Wide<A, W>::i finite = ~typename Wide<A, W>::i{};
    for (int64_t k = 0; k < size; k += W) {  // the window is padded with a vector of zeros
      V m, e;
      split<A>(get<V>(x + k), m, e);
      finite &= e < A(__builtin_inf());
      V add = e + n;
      m += lost;
      mark_inexact<A>(m, add);
      const V have = next_lane(get<V>(c.a + k), get<V>(c.a + k + W), Lanes<W>());
      const V old = next_lane(get<V>(c.n + k), get<V>(c.n + k + W), Lanes<W>()), ahead = add - old;
      // the larger exponent stays, the other number is shifted to it before it is rounded, as in a plain tile, or is
      // dropped
      const auto larger = add > old;
      const V shift = power<A>(ahead > A(0) ? -ahead : ahead), one = V{} + A(1);
      const V sum = rounded(have * (larger ? shift : one)) + m * (a * (larger ? one : shift));
      set(c.n + k, larger ? add : old);
      set(c.a + k, shift != A(0) ? sum : larger ? m * a : have);
    }
    c.bad |= !all_lanes<W>(finite);
  }
}

// alpha[t] * 2^exponent[t], the sum over segmentations of the first t positions, for t in [0, length]. Lane i of the
// window is boundary t + i.
template <int W, int N, class S, class A>
static void forward_chain(Chain<S, A> c) {  // a copy stays in registers
  const int64_t size = padded(c.k, W);
  for (int64_t i = 0; i < size + W; ++i) c.a[i] = 0, c.n[i] = -__builtin_inf();
  c.a[0] = 1, c.n[0] = 0, c.base = 0, c.bad = false;
  for (int64_t t = 0; t < c.length;) {
    normalise<W>(c);
    const int64_t from = t;
    if ((t = forward_plain<W, N>(c, from)) > from) continue;
    t = from + kTile < c.length ? from + kTile : c.length;
    forward_wide<W, N>(c, from, t - from);
  }
  normalise<W>(c);
  leave(c, c.length, c.a[0], c.n[0]);
  if (c.bad || c.a[0] != c.a[0]) c.alpha[c.length] = __builtin_nan("");
}

// for the boundaries of a tile and of its segments: the exponent, relative to the last one, and alpha; false where
// exponents are too far apart to be exact
template <int W, class S, class A>
SUKHOPS_INLINE bool prepare(Chain<S, A>& c, int64_t t0, int64_t rows) {
  const int64_t size = rows + padded(c.k, W) + W, left = c.length - t0 + 1;
  const int64_t inside = rows + c.k < left ? rows + c.k : left;
  const double* exponent = c.exponent + t0;
  const A* alpha = c.alpha + t0;
  int64_t reached = inside - 1;
  while (reached > 0 && !(exponent[reached] > -__builtin_inf())) --reached;
  const double from = exponent[reached] > -__builtin_inf() ? exponent[reached] : 0.0;
  bool exact = true;
  // nothing flows into a boundary that is not reached: its exponent counts as +inf there
  for (int64_t i = 0; i < inside; ++i) {
    const double n = exponent[i] - from;
    exact &= n == -__builtin_inf() || std::fabs(n) < Format<A>::kExact;
    c.n[i] = n > -__builtin_inf() ? A(n) : A(__builtin_inf());
  }
  for (int64_t i = 0; i < inside; ++i) c.a[i] = alpha[i] != 0 ? alpha[i] : A(1);
  for (int64_t i = inside; i < size; ++i) c.n[i] = __builtin_inf(), c.a[i] = 1;
  return exact;
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
  split<A>(get<V>(s.x + k), m, e);
  const V d = e + (s.n - get<V>(s.exponents + k)), cap = V{} + A(Format<A>::kBias / 2), one = V{} + A(1);
  const V scale = power<A>(d > cap ? cap : d), share = (m * s.alpha) * scale / get<V>(s.alphas + k);
  return scale == A(0) ? V{} : share > one ? one : share;
}

template <int W, class S, class A, class V>
SUKHOPS_INLINE void write_row(S* p, V x, int64_t valid) {
  if constexpr (sizeof(S) == sizeof(A)) {
    if (valid >= W) return set(p, x);
  }
  for (int64_t l = 0; l < W && l < valid; ++l) p[l] = S(x[l]);
}

template <class A>
struct Rows {
  int64_t first, rows;
  A* shares;  // [rows, stride], their inflow
};

// alpha of `rows` boundaries from t0 on and of those that their segments end at, relative to the smallest of the rows,
// and its inverse; false where a boundary is out of reach
template <int W, class A>
SUKHOPS_INLINE bool prepare_plain(Chain<A, A>& c, int64_t t0, int64_t rows) {
  typedef typename Wide<A, W>::f V;
  typedef typename Wide<A, W>::i I;
  using F = Format<A>;
  constexpr Plain plain = F::kPlain;
  // below the smaller bound nothing has come that counts
  const V most = V{} + A(plain.least), fewest = V{} - A(plain.lowest + plain.low + 1);
  const int64_t inside = c.length - t0 + 1;
  const double* exponent = c.exponent + t0;
  const A* alpha = c.alpha + t0;
  double least = smallest(exponent, rows);
  least = (least < __builtin_inf() ? least : 0) + plain.low;
  I within = ~I{};
  const auto set_boundaries = [&](int64_t i, V a, V d) {
    within &= (d <= most) & (a == a);
    d = d < most ? d : most;
    d = d > fewest ? d : fewest;
    const I scale = (I)(d + F::kMagic) << F::kMantissa, zero = a == A(0);
    const V sum = (V)((zero ? (I)(V{} + A(1)) : (I)a) + scale);
    set(c.sum + i, sum);
    set(c.inverse + i, A(1) / sum);
    set(c.from + i, (V)(~zero & (I)sum));
  };
  const int64_t end = rows + padded(c.k, W);
  int64_t i = 0;
  for (; i < end && i + W <= inside; i += W)
    set_boundaries(i, get<V>(alpha + i), difference<W, A>(exponent + i, least));
  for (; i < end; i += W) {
    V a{}, d = fewest;
    for (int64_t l = 0; i + l < inside; ++l) a[l] = alpha[i + l], d[l] = A(exponent[i + l] - least);
    set_boundaries(i, a, d);
  }
  return all_lanes<W>(within);
}

// the inflow of row i of a pair that has been prepared, where weight(k) is W exponentials of its scores
template <int W, int N, class A, class F>
SUKHOPS_INLINE void share_plain(const Chain<A, A>& c, const Rows<A>& pair, int64_t i, int64_t stride, const F& weight) {
  typedef typename Wide<A, W>::f V;
  const int64_t size = N ? N * W : padded(c.k, W);
  const V from = c.from[i] - V{};
#pragma GCC unroll 4
  for (int64_t k = 0; k < size; k += W) {
    const V sum = get<V>(c.sum + i + 1 + k), inverse = get<V>(c.inverse + i + 1 + k);
    const V part = weight(k) * from, near = part * inverse;
    // the quotient to the last bit, by the inverse where a product and a sum are rounded once
    set(pair.shares + i * stride + k, kRegisterBytes > 16 ? near + (part - near * sum) * inverse : part / sum);
  }
}

// The masses of the W boundaries behind a row: the last that was found, and those before it. Apart, since a row waits
// for the last one only, and needs the others a row earlier.
template <class V, class A>
struct Ends {
  A last;
  V older;  // 0 in its first lane
};

// the posterior of row i: its shares times the mass of the boundaries where its segments end. Their sum is the mass of
// its own boundary.
template <int W, int N, class A, class V>
SUKHOPS_INLINE void settle(const Chain<A, A>& c, const Rows<A>& pair, int64_t i, int64_t stride, bool whole,
                           Ends<V, A>& ends) {
  const int64_t size = N ? N * W : padded(c.k, W), t = pair.first + i;
  const A* const shares = pair.shares + i * stride;
  A *const to = c.out + t * c.k, *const w = c.w + t;
  const auto write = [&](int64_t k, V x) { whole ? set(to + k, x) : write_row<W, A, A>(to + k, x, c.k - k); };
  const V first = get<V>(shares), all = first_of(ends.last - V{}, ends.older, Lanes<W>());
  write(0, first * all);
  V sum = size > W ? get<V>(shares + W) * get<V>(w + 1 + W) : V{};
  if (size > W) write(W, sum);
#pragma GCC unroll 4
  for (int64_t k = 2 * W; k < size; k += W) {
    const V x = get<V>(shares + k) * get<V>(w + 1 + k);
    write(k, x);
    sum += x;
  }
  ends.last = sum_lanes<W>(sum + first * ends.older) + first[0] * ends.last;
  ends.older = zero_before(all, Lanes<W>());
  w[0] = ends.last;
}

// c.grad times the posterior of every segment; false where exponents are inexact. The mass w of a boundary is the share of the segmentations that
// have it; it flows back through the segments that end there. The shares of the pair before do not wait for it.
template <int W, int N, class A>
static bool marginal_chain(Chain<A, A> c) {
  typedef typename Wide<A, W>::f V;
  typedef typename Wide<A, W>::i I;
  const int64_t size = N ? N * W : padded(c.k, W), stride = size;
  for (int64_t j = 0; j <= c.length + size; ++j) c.w[j] = 0;
  c.w[c.length] = c.alpha[c.length] != 0 ? c.grad : A(0);
  for (int64_t j = c.length * c.k; j < c.stored * c.k; ++j) c.out[j] = 0;
  Ends<V, A> ends{c.w[c.length], V{}};
  Rows<A> now{c.length, 0, c.tile}, next{0, 0, c.tile + kPair * stride};
  do {
    next.rows = now.first < kPair ? now.first : kPair;
    next.first = now.first - next.rows;
    const bool within = prepare_plain<W>(c, next.first, next.rows), whole = whole_rows<W>(c, next.first, next.rows);
    I outside{};
    const auto exponential = [&outside](const A* x) {
      return [x, &outside](int64_t k) { return plain_exp<A>(get<V>(x + k), outside); };
    };
    if (!(within && whole && next.rows == kPair && now.rows == kPair)) {
      for (int64_t i = next.rows - 1; i >= 0 && within; --i)
        share_plain<W, N>(c, next, i, stride, exponential(row<W>(c, next.first + i)));
      for (int64_t i = now.rows - 1; i >= 0; --i) settle<W, N>(c, now, i, stride, false, ends);
    } else if (all_kept(c, next.first, kPair)) {
      for (int64_t i = kPair - 1; i >= 0; --i) {
        const A* const x = c.kept + (next.first + i) * size;
        fetch<1>(x - kPair * size, size);
        share_plain<W, N>(c, next, i, stride, [x](int64_t k) { return get<V>(x + k); });
        settle<W, N>(c, now, i, stride, true, ends);
      }
    } else {
      for (int64_t i = kPair - 1; i >= 0; --i) {
        const A* const x = c.scores + (next.first + i) * size;
        fetch<0>(x - kPair * size, size);
        fetch<1>(c.out + (next.first + i) * size, size);
        share_plain<W, N>(c, next, i, stride, exponential(x));
        settle<W, N>(c, now, i, stride, true, ends);
      }
    }
    if (!within || !all_lanes<W>((outside & -Format<A>::kPlain.scores) == 0))
      for (int64_t i = 0; i < next.rows; ++i) {
        if (i % kTile == 0 && !prepare<W>(c, next.first + i, kTile < next.rows - i ? kTile : next.rows - i))
          return false;
        const Source<A> from = source<W>(c, next.first + i, i % kTile);
        for (int64_t k = 0; k < size; k += W) set(next.shares + i * stride + k, inflow<V>(from, k));
      }
    const Rows<A> done = now;
    now = next, next = done;
  } while (now.rows > 0);
  return true;
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

// mean[t], the expected worth of all segments before boundary t; false where exponents are inexact
template <int W, class S>
static bool expect(Chain<S, double>& c) {
  typedef typename Wide<double, W>::f V;
  const int64_t size = padded(c.k, W);
  for (int64_t j = 0; j <= c.length + size; ++j) c.mean[j] = 0;
  for (int64_t t = 0; t < c.length; ++t) {
    if (t % kTile == 0 && !prepare<W>(c, t, kTile < c.length - t ? kTile : c.length - t)) return false;
    const Source<double> from = source<W>(c, t, t % kTile);
    for (int64_t k = 0; k < size; k += W) {
      const V share = inflow<V>(from, k);
      const V add = share * (c.mean[t] + worth<W>(c, share, t, k));
      set(c.mean + t + 1 + k, get<V>(c.mean + t + 1 + k) + (share != 0.0 ? add : V{}));
    }
  }
  return true;
}

// c.grad times the covariance, over segmentations, of the presence of each segment and the worth of all:
// posterior * (mean before it + worth + mean behind it - mean), where `after` is mass times mean behind
template <int W, class S>
static bool covariance(Chain<S, double>& c) {
  typedef typename Wide<double, W>::f V;
  const int64_t size = padded(c.k, W);
  for (int64_t j = 0; j <= c.length + size; ++j) c.w[j] = 0, c.after[j] = 0;
  c.w[c.length] = c.alpha[c.length] != 0;
  for (int64_t j = c.length * c.k; j < c.stored * c.k; ++j) c.out[j] = 0;
  for (int64_t t = c.length, t0 = t; t-- > 0;) {
    if (t < t0) {
      t0 = t + 1 > kTile ? t + 1 - kTile : 0;
      if (!prepare<W>(c, t0, t + 1 - t0)) return false;
    }
    const Source<double> from = source<W>(c, t, t - t0);
    const double before = c.mean[t] - c.mean[c.length];
    V mass{}, after{};
    for (int64_t k = 0; k < size; k += W) {
      const V share = inflow<V>(from, k), worth_ = worth<W>(c, share, t, k);
      const V w = get<V>(c.w + t + 1 + k), f = get<V>(c.after + t + 1 + k);
      mass += share * w;
      after += share * (w * worth_ + f);
      const V out = share * (w * (before + worth_) + f) * c.grad;
      write_row<W, S, double>(c.out + t * c.k + k, share != 0.0 ? out : V{}, c.k - k);
    }
    c.w[t] = sum_lanes<W>(mass);
    c.after[t] = sum_lanes<W>(after);
  }
  return true;
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
// number drawn depends on the seed, the sample, the sequence and the boundary, on nothing else. False where exponents
// are inexact.
template <int W, int N, class A>
static bool draw(Chain<A, A> c, Draw<A> d) {
  typedef typename Wide<A, W>::f V;
  using F = Format<A>;
  using Int = typename F::Int;
  constexpr int kNumbers = F::kMantissa < 32 ? 2 : 1;  // of a hash
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
      int64_t at[kTogether] = {}, *out[kTogether];
      A drawn[kTogether][kDrawTile + kNumbers];  // for boundary first + 1 + j at j + skipped
      const int64_t skipped = (first + 1) % kNumbers;
      for (int64_t i = 0; i < count; ++i) {
        at[i] = d.position[s + i] - first;
        out[i] = d.segments + (s + i) * d.sequences * c.stored + first;
        for (int64_t j = 0; j < rows; ++j) out[i][j] = 0;
        if (at[i] >= 0 && at[i] < rows) out[i][at[i]] = d.segment[s + i];  // starts here, ends behind
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

// ---------------------------------------------------------------- what segmentation.cpp calls

template <class S, class A>
static void forward(Chain<S, A>& c) {
  with_shape<A>(c.k, [&](auto s) { forward_chain<s.lanes, s.vectors>(c); });
}

template <class A>
static bool marginals(Chain<A, A>& c) {
  return with_shape<A>(c.k, [&](auto s) { return marginal_chain<s.lanes, s.vectors>(c); });
}

template <class S>
static bool moments(Chain<S, double>& c, bool gradient) {
  return with_shape<double>(c.k, [&](auto s) { return expect<s.lanes>(c) && (!gradient || covariance<s.lanes>(c)); });
}

template <class A>
static bool samples(Chain<A, A>& c, const Draw<A>& d) {
  return with_shape<A>(c.k, [&](auto s) { return draw<s.lanes, s.vectors>(c, d); });
}
