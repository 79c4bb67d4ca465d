// The recursions of segmentation.cpp. Included by isa.h once per instruction set. S is the storage type of a score, A
// the type of the computation.
//
// Boundary t lies before position t. Segment (t, k) covers positions t .. t + k, from boundary t to boundary t + k + 1.
// alpha[t] is the sum over all segmentations of the first t positions; boundary t is reached if it is not 0. Before row
// t, the window holds the sums of boundaries t .. t + k - 1, of which only the first is complete. The share of a
// segment is its term in alpha of the boundary where it ends, divided by that alpha. The mass of a boundary is its
// posterior probability.
//
// A number is stored as a * 2^n. The exponent n is an integer in A, relative to a base in double, so sums do not
// overflow and a logarithm is needed only at the end. Exponents below Format::kExact are exact. A number with an
// inexact exponent is marked: its mantissa is NaN, and its exponent is an upper bound. It is dropped from a sum with a
// much larger number, and makes any other sum NaN, so a result is right or NaN. The result of a sequence depends only
// on its own scores: not one bit depends on the number of threads or on the other sequences.
//
// Rows are processed in tiles of kTile. Each tile is first computed without per-element exponents (a plain tile); if
// the result is out of range, the tile is recomputed with them (a wide tile).

#include "segmentation_numbers.h"

// prefetches n elements for reading or writing; p may be any address
template <int write, class S>
SUKHOPS_INLINE void prefetch(const S* p, int64_t n) {
#pragma GCC unroll 4
  for (int64_t i = 0; i < n; i += 64 / sizeof(S)) __builtin_prefetch(p + i, write);
}

// Row t of the scores, with -inf for segments that run past the end: in place if it needs no padding, else a copy in
// row_buffer.
template <int W, class S, class A>
SUKHOPS_INLINE const A* score_row(const Chain<S, A>& c, int64_t t) {
  const S* x = c.scores + t * c.k;
  const int64_t valid = c.k < c.length - t ? c.k : c.length - t, size = padded(c.k, W);
  if constexpr (sizeof(S) == sizeof(A)) {
    if (valid == size) return x;
  }
  for (int64_t k = 0; k < valid; ++k) c.row_buffer[k] = x[k];
  for (int64_t k = valid; k < size; ++k) c.row_buffer[k] = -__builtin_inf();
  return c.row_buffer;
}

// whether `rows` rows from t on can be read in place
template <int W, class S, class A>
SUKHOPS_INLINE bool whole_rows(const Chain<S, A>& c, int64_t t, int64_t rows) {
  return sizeof(S) == sizeof(A) && c.k == padded(c.k, W) && t + rows - 1 + c.k <= c.length;
}

// normalizes the window: mantissas in [1, 2), largest exponent 0
template <int W, class S, class A>
SUKHOPS_INLINE void normalize(Chain<S, A>& c) {
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

// stores alpha and exponent of `rows` boundaries from t0 on; their sums are found * 2^base, all finite
template <class S, class A, class V>
SUKHOPS_INLINE void store_boundaries(Chain<S, A>& c, int64_t t0, int64_t rows, V found, double base) {
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

// marks row t: its exponentials are not stored
template <class S, class A>
SUKHOPS_INLINE void mark_not_stored(const Chain<S, A>& c, int64_t t) {
  if (c.kept && c.k > 0) c.kept[t * c.k] = -1;
}

// whether the exponentials of all `rows` rows from t on are stored
template <class A>
SUKHOPS_INLINE bool all_stored(const Chain<A, A>& c, int64_t t, int64_t rows) {
  if (!c.kept) return false;
  bool marked = false;
  for (int64_t i = 0; i < rows; ++i) marked |= c.kept[(t + i) * c.k] < 0;
  return !marked;
}

// Advances the window c.a * 2^c.n, which is normalized, over plain tiles from row t on. Stops if a tile is not plain or
// if a sum comes near a bound; returns the first row that is left. Stores the exponentials of rows that are read in
// place.
template <int W, int N, class S, class A>
SUKHOPS_INLINE int64_t forward_plain(Chain<S, A>& c, int64_t t) {
  typedef typename Wide<A, W>::f V;
  typedef typename Wide<A, W>::i I;
  typedef typename Wide<A, kTile>::f Tile;
  constexpr Plain plain = Format<A>::kPlain;
  const Tile low = power<A>(Tile{} - A(plain.low)), high = power<A>(Tile{} + A(plain.high));
  const Tile near_low = power<A>(Tile{} - A(plain.low / 2)), near_high = power<A>(Tile{} + A(plain.high * 4 / 5));
  const int64_t n = N ? N : padded(c.k, W) / W;
  V window[N + 1];  // the window, in registers if its size is known at compile time
  const auto at = [&](int64_t k) { return N ? window[k] : get<V>(c.tile + k * W); };
  const auto move = [&](int64_t k, V x) { N ? void(window[k] = x) : set(c.tile + k * W, x); };
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
  for (bool far_from_bounds = true; far_from_bounds && t < c.length;) {
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
        prefetch<0>(x + 2 * kTile * n * W, n * W);
        step(i, x, kept);
        if (kept) prefetch<1>(kept + 2 * kTile * n * W, n * W), kept += n * W;
      }
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        A* const kept = c.kept && whole_rows<W>(c, t + i, 1) ? c.kept + (t + i) * c.k : nullptr;
        if (!kept) mark_not_stored(c, t + i);
        step(i, score_row<W>(c, t + i), kept);
      }
    }
    const Tile sums = get<Tile>(found);
    if (!all_lanes<W>((outside & -plain.scores) == 0)) break;
    far_from_bounds = all_lanes<kTile>((sums == A(0)) | ((sums >= near_low) & (sums <= near_high)));
    if (!far_from_bounds && !all_lanes<kTile>((sums == A(0)) | ((sums >= low) & (sums <= high)))) break;
#pragma GCC unroll 4
    for (int64_t k = 0; k < n; ++k) set(c.a + k * W, at(k));
    store_boundaries(c, t, rows, sums, c.base - plain.top);
    t += rows;
  }
  if (t == first) return t;
  for (int64_t k = 0; k < n; ++k) set(c.n + k * W, V{});
  c.base -= plain.top;
  return t;
}

// Stores alpha and exponent of boundary t, whose sum is a * 2^(base + n). A marked sum is stored as not reached: if it
// mattered, the sum over all segmentations is NaN anyway.
template <class S, class A>
SUKHOPS_INLINE void store_boundary(Chain<S, A>& c, int64_t t, A a, A n) {
  typedef typename Wide<A, kRegisterBytes / sizeof(A)>::f V;
  const V whole = exponent_of<kRegisterBytes / sizeof(A), A>(V{} + a);
  c.alpha[t] = a == a ? a * power<A>(-whole)[0] : A(0);
  c.exponent[t] = a == a ? c.base + n + whole[0] : -__builtin_inf();
}

// advances the window over a wide tile: every number has its own exponent
template <int W, int N, class S, class A>
SUKHOPS_INLINE void forward_wide(Chain<S, A>& c, int64_t t0, int64_t rows) {
  typedef typename Wide<A, W>::f V;
  const int64_t size = N ? N * W : padded(c.k, W);
  for (int64_t i = 0; i < rows; ++i) {
    mark_not_stored(c, t0 + i);
    const A* x = score_row<W>(c, t0 + i);
    const A a = c.a[0], n = c.n[0];
    store_boundary(c, t0 + i, a, n);
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
      // The sum has the larger exponent. The other number is scaled to it before rounding, as in a plain tile, or
      // dropped if it is too small.
      const auto larger = add > old;
      const V shift = power<A>(ahead > A(0) ? -ahead : ahead), one = V{} + A(1);
      const V sum = rounded(have * (larger ? shift : one)) + m * (a * (larger ? one : shift));
      set(c.n + k, larger ? add : old);
      set(c.a + k, shift != A(0) ? sum : larger ? m * a : have);
    }
    c.bad |= !all_lanes<W>(finite);
  }
}

// Computes alpha[t] * 2^exponent[t] for t in [0, length]. Lane i of the window belongs to boundary t + i.
template <int W, int N, class S, class A>
static void forward_chain(Chain<S, A> c) {  // by value: the copy stays in registers
  const int64_t size = padded(c.k, W);
  for (int64_t i = 0; i < size + W; ++i) c.a[i] = 0, c.n[i] = -__builtin_inf();
  c.a[0] = 1, c.n[0] = 0, c.base = 0, c.bad = false;
  for (int64_t t = 0; t < c.length;) {
    normalize<W>(c);
    const int64_t from = t;
    if ((t = forward_plain<W, N>(c, from)) > from) continue;
    t = from + kTile < c.length ? from + kTile : c.length;
    forward_wide<W, N>(c, from, t - from);
  }
  normalize<W>(c);
  store_boundary(c, c.length, c.a[0], c.n[0]);
  if (c.bad || c.a[0] != c.a[0]) c.alpha[c.length] = __builtin_nan("");
}

// Prepares the shares of a tile: fills c.a and c.n with alpha and exponent of the boundaries where its segments start
// and end; exponents are relative to the last boundary that is reached. Returns false if they are too far apart to be
// exact.
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
  // a boundary that is not reached gets exponent +inf, so that the shares of segments that end there are 0
  for (int64_t i = 0; i < inside; ++i) {
    const double n = exponent[i] - from;
    exact &= n == -__builtin_inf() || std::fabs(n) < Format<A>::kExact;
    c.n[i] = n > -__builtin_inf() ? A(n) : A(__builtin_inf());
  }
  for (int64_t i = 0; i < inside; ++i) c.a[i] = alpha[i] != 0 ? alpha[i] : A(1);
  for (int64_t i = inside; i < size; ++i) c.n[i] = __builtin_inf(), c.a[i] = 1;
  return exact;
}

// the inputs of the shares of row t: alpha and exponent of boundary t, the scores, and exponents and alphas of the
// boundaries where the segments end
template <class A>
struct ShareInputs {
  A alpha, n;
  const A *x, *exponents, *alphas;
};

template <int W, class S, class A>
SUKHOPS_INLINE ShareInputs<A> share_inputs(const Chain<S, A>& c, int64_t t, int64_t i) {
  const A n = c.n[i] < A(__builtin_inf()) ? c.n[i] : -A(__builtin_inf());
  return {c.alpha[t], n, score_row<W>(c, t), c.n + i + 1, c.a + i + 1};
}

// The share of segment (t, k), in [0, 1]. Its term is computed exactly as in the forward, so if only one segment ends
// at a boundary, its share is exactly 1, and the sum of shares does not drift from 1.
template <class V, class A>
SUKHOPS_INLINE V segment_share(const ShareInputs<A>& s, int64_t k) {
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
  A* shares;  // [rows, stride]
};

// Prepares the shares of `rows` plain rows from t0 on: fills c.sum, c.inverse and c.from for the boundaries where their
// segments start and end. Exponents are relative to the smallest one of the rows. Returns false if one is out of range.
template <int W, class A>
SUKHOPS_INLINE bool prepare_plain(Chain<A, A>& c, int64_t t0, int64_t rows) {
  typedef typename Wide<A, W>::f V;
  typedef typename Wide<A, W>::i I;
  using F = Format<A>;
  constexpr Plain plain = F::kPlain;
  // exponents below `fewest` are clamped: such sums are too small to matter
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

// the shares of row i of a pair of plain tiles; weight(k) returns W exponentials of its scores
template <int W, int N, class A, class F>
SUKHOPS_INLINE void plain_shares(const Chain<A, A>& c, const Rows<A>& pair, int64_t i, int64_t stride,
                                 const F& weight) {
  typedef typename Wide<A, W>::f V;
  const int64_t size = N ? N * W : padded(c.k, W);
  const V from = c.from[i] - V{};
#pragma GCC unroll 4
  for (int64_t k = 0; k < size; k += W) {
    const V sum = get<V>(c.sum + i + 1 + k), inverse = get<V>(c.inverse + i + 1 + k);
    const V part = weight(k) * from, near = part * inverse;
    // the quotient, accurate to the last bit; targets with fused multiply-add use the inverse instead of a division
    set(pair.shares + i * stride + k, kRegisterBytes > 16 ? near + (part - near * sum) * inverse : part / sum);
  }
}

// The masses of the W boundaries after a row. `last` is the nearest one, which was computed last. It is separate from
// the older ones because they are known earlier: only the operations with `last` wait for the previous row.
template <class V, class A>
struct EndMasses {
  A last;
  V older;  // 0 in its first lane
};

// Writes the posterior of row i: its shares times the masses of the boundaries where its segments end. The sum of the
// posterior is the mass of the row's own boundary.
template <int W, int N, class A, class V>
SUKHOPS_INLINE void write_posterior(const Chain<A, A>& c, const Rows<A>& pair, int64_t i, int64_t stride, bool whole,
                           EndMasses<V, A>& ends) {
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

// Writes c.grad times the posterior of every segment; returns false if exponents are inexact. The mass w of a boundary,
// here times c.grad, is divided among the segments that end there, by their shares. The
// shares of the preceding pair of tiles are computed in the same loop, because they do not wait for the masses.
template <int W, int N, class A>
static bool marginal_chain(Chain<A, A> c) {
  typedef typename Wide<A, W>::f V;
  typedef typename Wide<A, W>::i I;
  const int64_t size = N ? N * W : padded(c.k, W), stride = size;
  for (int64_t j = 0; j <= c.length + size; ++j) c.w[j] = 0;
  c.w[c.length] = c.alpha[c.length] != 0 ? c.grad : A(0);
  for (int64_t j = c.length * c.k; j < c.stored * c.k; ++j) c.out[j] = 0;
  EndMasses<V, A> ends{c.w[c.length], V{}};
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
        plain_shares<W, N>(c, next, i, stride, exponential(score_row<W>(c, next.first + i)));
      for (int64_t i = now.rows - 1; i >= 0; --i) write_posterior<W, N>(c, now, i, stride, false, ends);
    } else if (all_stored(c, next.first, kPair)) {
      for (int64_t i = kPair - 1; i >= 0; --i) {
        const A* const x = c.kept + (next.first + i) * size;
        prefetch<1>(x - kPair * size, size);
        plain_shares<W, N>(c, next, i, stride, [x](int64_t k) { return get<V>(x + k); });
        write_posterior<W, N>(c, now, i, stride, true, ends);
      }
    } else {
      for (int64_t i = kPair - 1; i >= 0; --i) {
        const A* const x = c.scores + (next.first + i) * size;
        prefetch<0>(x - kPair * size, size);
        prefetch<1>(c.out + (next.first + i) * size, size);
        plain_shares<W, N>(c, next, i, stride, exponential(x));
        write_posterior<W, N>(c, now, i, stride, true, ends);
      }
    }
    if (!within || !all_lanes<W>((outside & -Format<A>::kPlain.scores) == 0))
      for (int64_t i = 0; i < next.rows; ++i) {
        if (i % kTile == 0 && !prepare<W>(c, next.first + i, kTile < next.rows - i ? kTile : next.rows - i))
          return false;
        const ShareInputs<A> from = share_inputs<W>(c, next.first + i, i % kTile);
        for (int64_t k = 0; k < size; k += W) set(next.shares + i * stride + k, segment_share<V>(from, k));
      }
    const Rows<A> done = now;
    now = next, next = done;
  } while (now.rows > 0);
  return true;
}

// Per-segment weights: the upstream gradient or, when computing the entropy, -log of the segment's share. The sum of
// the latter over the segments of a segmentation is -log of its probability.
template <int W, class S, class V>
SUKHOPS_INLINE V segment_weight(const Chain<S, double>& c, V share, int64_t t, int64_t k) {
  V g{};
  for (int64_t l = 0; l < W && k + l < c.k; ++l) {
    if (c.upstream)
      g[l] = share[l] != 0 ? c.upstream[t * c.k + k + l] : 0;
    else
      g[l] = share[l] != 0 ? -std::log(share[l]) : 0;
  }
  return g;
}

// computes mean[t], the expected weight of all segments before boundary t; returns false if exponents are inexact
template <int W, class S>
static bool expected_weight(Chain<S, double>& c) {
  typedef typename Wide<double, W>::f V;
  const int64_t size = padded(c.k, W);
  for (int64_t j = 0; j <= c.length + size; ++j) c.mean[j] = 0;
  for (int64_t t = 0; t < c.length; ++t) {
    if (t % kTile == 0 && !prepare<W>(c, t, kTile < c.length - t ? kTile : c.length - t)) return false;
    const ShareInputs<double> from = share_inputs<W>(c, t, t % kTile);
    for (int64_t k = 0; k < size; k += W) {
      const V share = segment_share<V>(from, k);
      const V add = share * (c.mean[t] + segment_weight<W>(c, share, t, k));
      set(c.mean + t + 1 + k, get<V>(c.mean + t + 1 + k) + (share != 0.0 ? add : V{}));
    }
  }
  return true;
}

// Writes c.grad times the covariance, over segmentations, between the presence of a segment and the total weight:
// posterior * (mean before the segment + its weight + mean after it - mean). `after` is mass times the mean after a
// boundary.
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
    const ShareInputs<double> from = share_inputs<W>(c, t, t - t0);
    const double before = c.mean[t] - c.mean[c.length];
    V mass{}, after{};
    for (int64_t k = 0; k < size; k += W) {
      const V share = segment_share<V>(from, k), weight_ = segment_weight<W>(c, share, t, k);
      const V w = get<V>(c.w + t + 1 + k), f = get<V>(c.after + t + 1 + k);
      mass += share * w;
      after += share * (w * weight_ + f);
      const V out = share * (w * (before + weight_) + f) * c.grad;
      write_row<W, S, double>(c.out + t * c.k + k, share != 0.0 ? out : V{}, c.k - k);
    }
    c.w[t] = sum_lanes<W>(mass);
    c.after[t] = sum_lanes<W>(after);
  }
  return true;
}

// computes c.a[t], the largest score of a segmentation of the first t positions; sets c.bad if a score is NaN or +inf
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

#include "segmentation_sampling.h"

// ---------------------------------------------------------------- the functions that segmentation.cpp calls

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
  return with_shape<double>(c.k, [&](auto s) {
    return expected_weight<s.lanes>(c) && (!gradient || covariance<s.lanes>(c));
  });
}

template <class A>
static bool samples(Chain<A, A>& c, const Draw<A>& d) {
  return with_shape<A>(c.k, [&](auto s) { return draw<s.lanes, s.vectors>(c, d); });
}
