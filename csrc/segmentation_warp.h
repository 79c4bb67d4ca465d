// The recursions of segmentation.cu, written for an owner P of one sequence: a warp, whose lanes together hold the
// slots of the window, or a host thread that holds all of them. Tests run the same arithmetic on the host.
//
// The terms (boundary, window, share) are those of segmentation_rows.h. A number is stored as a * 2^n, and the window
// as a ring: boundary j is in slot j % k. Mantissas are double: a posterior is alpha * beta / z, and the rounding
// errors of these long products would be too large in float. The exponentials of the scores may be rounded to E,
// because alpha, beta and z use the same ones, so the error cancels.
//
// A number with an inexact exponent is marked: its mantissa is negative, and its exponent is an upper bound. It
// vanishes in a sum with a much larger number, and marks any other sum. A result that is marked is NaN.
#pragma once

#include <math.h>  // not <cmath>: this one has the overloads for float in the global namespace, as CUDA does
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SUKHOPS_BOTH __host__ __device__ __forceinline__
#define SUKHOPS_UNROLL _Pragma("unroll")  // keeps the slots of a lane in registers
#else
#define SUKHOPS_BOTH inline
#define SUKHOPS_UNROLL
#endif

namespace sukhops::warp {

constexpr int kRebase = 16;  // steps between two normalizations of the window

SUKHOPS_BOTH double infinity() { return HUGE_VAL; }

template <class A>
struct Number {
  A m, n;
};

// clamps the exponent of a marked number, to keep it finite
template <class A>
SUKHOPS_BOTH A within_bounds(A n) {
  return n < A(-0x1p100) ? A(-0x1p100) : n > A(0x1p100) ? A(0x1p100) : n;
}

// m * 2^n = exp(x), where n is an integer. m is NaN for NaN and +inf; n is -inf for -inf. The number is marked if the
// exponent is beyond 2^22 (float64: 2^51), because y loses bits there.
template <class A>
SUKHOPS_BOTH Number<A> split(A x) {
  constexpr bool narrow = sizeof(A) == 4;
  constexpr A coarse = narrow ? A(4194304) : A(2251799813685248);
  const A y = x * A(1.44269504088896341);
  if (!(y < coarse && y > -coarse)) {
    if (!(x < A(infinity()))) return {A(NAN), A(0)};
    if (x == -A(infinity())) return {A(1), x};
    return {A(-1), within_bounds(rint(y) + A(2))};
  }
  const A k = rint(y);
  A r = fma(k, narrow ? A(-0.693359375) : A(-6.93145751953125e-1), x);
  r = fma(k, narrow ? A(2.12194440e-4) : A(-1.42860682030941723212e-6), r);
  if constexpr (!narrow) return {exp(r), k};
  A p = fma(r, A(1.9875691500e-4), A(1.3981999507e-3));
  p = fma(p, r, A(8.3334519073e-3));
  p = fma(p, r, A(4.1665795894e-2));
  p = fma(p, r, A(1.6666665459e-1));
  p = fma(p, r, A(5.0000001201e-1));
  return {fma(p, r * r, r) + A(1), k};
}

// 2^min(d, 511) for an integer d; 0 if d is below the smallest exponent or NaN
SUKHOPS_BOTH double power(double d) {
  if (!(d >= -1022.0)) return 0.0;
  const int64_t bits = (static_cast<int64_t>(d > 511.0 ? 511.0 : d) + 1023) << 52;
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// marks a * 2^n if n may have been rounded
template <class E>
SUKHOPS_BOTH void mark_inexact(double& a, E& n) {
  constexpr E exact = sizeof(E) == 4 ? E(0x1p24) : E(0x1p52);
  const E size = n < E(0) ? -n : n;
  if (size < exact || n == -E(infinity())) return;
  a = -fabs(a);
  n = within_bounds(rint(n + size * E(0x1p-20)));
}

SUKHOPS_BOTH double marked_sum(double x, double y) { return x < 0 || y < 0 ? -(fabs(x) + fabs(y)) : x + y; }

SUKHOPS_BOTH double marked_product(double x, double y) { return x < 0 || y < 0 ? -fabs(x * y) : x * y; }

// a * 2^n += (a0 * 2^n0) * exp(x); `gone`: the boundary of the slot has left the window, so the sum starts at 0
template <class E>
SUKHOPS_BOTH void add(double& a, E& n, bool gone, double a0, E n0, E x) {
  const Number<E> e = split(x);
  double m = marked_product(e.m, a0);
  E sum = e.n + n0;
  mark_inexact(m, sum);
  const E old = gone ? -E(infinity()) : n, most = sum > old ? sum : old;
  a = marked_sum(a * power(old - most), m * power(sum - most));
  n = most;
}

// normalizes the mantissa to [1/2, 1)
template <class E>
SUKHOPS_BOTH void normalize(double& a, E& n) {
  int e = 0;
  if (a != 0 && fabs(a) < infinity()) a = frexp(a, &e);
  n += E(e);
}

// the input of all recursions: segment (t, i) covers positions t .. t + i and has score[t * k + i]
template <class S>
struct Sequence {
  const S* score;
  int64_t length, k;
};

// The direction of a sweep. Steps and boundaries u are counted from the end where the sweep starts. The i-th segment of
// step u leads from boundary u to boundary u + 1 + i.
struct Direction {
  bool backwards;
  int64_t length;
  SUKHOPS_BOTH int64_t boundary(int64_t u) const { return backwards ? length - u : u; }
  SUKHOPS_BOTH int64_t row(int64_t u, int64_t i) const { return backwards ? length - u - 1 - i : u; }
  // the number of rows, counted from the same end, that the steps before u read
  SUKHOPS_BOTH int64_t rows(int64_t u, int64_t k) const {
    const int64_t n = backwards ? u + k - 1 : u;
    return n < length ? n : length;
  }
};

// The sums a * 2^(base + n) of boundaries u .. u + k - 1 over the segments that start before boundary u. Boundary j is
// in slot j % k; boundaries are counted as in Direction.
template <class E, class P>
struct Window {
  double a[P::kOwn];
  E n[P::kOwn];
  double base;
};

// the distance from boundary u to the boundary in a slot
SUKHOPS_BOTH int64_t offset(int64_t slot, int64_t u, int64_t k) {
  const int64_t o = slot - u % k;
  return o < 0 ? o + k : o;
}

// the unit window i at u: the sum is 1 at boundary u + i and 0 at all others
template <class E, class P>
SUKHOPS_BOTH Window<E, P> unit(const P& p, int64_t u, int64_t k, int64_t i) {
  Window<E, P> w;
  SUKHOPS_UNROLL
  for (int l = 0; l < P::kOwn; ++l) {
    const bool there = p.slot(l) < k && offset(p.slot(l), u, k) == i;
    w.a[l] = there, w.n[l] = there ? E(0) : -E(infinity());
  }
  w.base = 0;
  return w;
}

// Advances the window from u = from, a multiple of P::kAhead, to u = to. Calls each(u, a, n) with the sum of every
// boundary that leaves the window. P loads the rows of scores P::kAhead steps before they are used.
template <class E, class P, class S, class F>
SUKHOPS_BOTH void advance(P& p, const Sequence<S>& q, const Direction& d, int64_t from, int64_t to, Window<E, P>& w,
                          const F& each) {
  if (q.k == 0) return;
  p.open(q, d, from);
  int at = static_cast<int>(from % q.k);
  for (int64_t u = from; u < to; ++u, at = at + 1 < q.k ? at + 1 : 0) {
    if (u % P::kAhead == 0) p.advance(q, d, u);
    if (u % kRebase == 0) {
      SUKHOPS_UNROLL
      for (int i = 0; i < P::kOwn; ++i) normalize(w.a[i], w.n[i]);
      const E top = p.max(w.n);
      if (top > -E(infinity())) {
        SUKHOPS_UNROLL
        for (int i = 0; i < P::kOwn; ++i) {
          w.n[i] -= top;
          mark_inexact(w.a[i], w.n[i]);
        }
        w.base += top;
      }
    }
    const double a0 = p.broadcast(w.a, at);
    const E n0 = p.broadcast(w.n, at);
    each(u, a0, w.base + n0);
    SUKHOPS_UNROLL
    for (int i = 0; i < P::kOwn; ++i) {
      const int slot = p.slot(i), to = slot > at ? slot - at - 1 : slot - at - 1 + static_cast<int>(q.k);
      const bool there = slot < q.k && u + 1 + to <= q.length;
      add(w.a[i], w.n[i], slot == at, a0, n0, there ? E(p.score(q, d, u, to)) : -E(infinity()));
    }
  }
}

// Computes value[j] * 2^exponent[j], the sum over all segmentations between boundary j and the end where the sweep
// starts: alpha if it runs forward, beta if backward. Covers boundaries [from, to), and `to` itself if the sequence
// ends there. At the last boundary a marked sum is stored as NaN. Any other marked sum is stored as not reached: if it
// mattered, the last sum is marked too.
template <class E, class P, class S>
SUKHOPS_BOTH void sweep(P& p, const Sequence<S>& q, bool backwards, int64_t from, int64_t to, Window<E, P>& w,
                        double* value, double* exponent) {
  const Direction d{backwards, q.length};
  const auto each = [&](int64_t u, double a, double n) {
    mark_inexact(a, n);
    const bool marked = a < 0, end = u == q.length;
    if (p.lead())
      value[d.boundary(u)] = !marked ? a : end ? NAN : 0, exponent[d.boundary(u)] = marked ? -infinity() : n;
  };
  advance(p, q, d, from, to, w, each);
  if (to < q.length) return;
  const int at = q.k > 0 ? static_cast<int>(to % q.k) : 0;
  const double a0 = q.k > 0 ? p.broadcast(w.a, at) : q.length == 0;
  const E n0 = q.k > 0 ? p.broadcast(w.n, at) : q.length == 0 ? E(0) : -E(infinity());
  each(q.length, a0, w.base + n0);
}

template <class E, class P, class S>
SUKHOPS_BOTH void sweep(P& p, const Sequence<S>& q, bool backwards, double* value, double* exponent) {
  auto w = unit<E>(p, 0, q.k > 0 ? q.k : 1, 0);
  sweep(p, q, backwards, 0, q.length, w, value, exponent);
}

// ------------------------------------------------------------------ a sequence in chunks of steps

// A chunk maps the window at its start to the window at its end. The map is linear; its matrix consists of k windows,
// the images of the unit windows. First all chunks compute their matrices in parallel. Then the windows between the
// chunks are computed one after the other. Then all chunks sweep in parallel, starting from these windows. The work is
// k + 1 times larger, but the sequential part is divided by about the number of chunks.

// out[o], o < k: the unit window i at `from`, advanced to `to`
template <class E, class P, class S>
SUKHOPS_BOTH void transfer(P& p, const Sequence<S>& q, bool backwards, int64_t from, int64_t to, int64_t i,
                           Number<double>* out) {
  auto w = unit<E>(p, from, q.k, i);
  advance(p, q, Direction{backwards, q.length}, from, to, w, [](int64_t, double, double) {});
  SUKHOPS_UNROLL
  for (int l = 0; l < P::kOwn; ++l)
    if (p.slot(l) < q.k) out[offset(p.slot(l), to, q.k)] = {w.a[l], w.base + w.n[l]};
}

// out[o] = the sum over i of window[i] * matrix[i * k + o]
template <class P>
SUKHOPS_BOTH void compose(const P& p, int64_t k, const Number<double>* window, const Number<double>* matrix,
                          Number<double>* out) {
  SUKHOPS_UNROLL
  for (int l = 0; l < P::kOwn; ++l) {
    const int64_t o = p.slot(l);
    if (o >= k) continue;
    Number<double> sum{0, -infinity()};
    for (int64_t i = 0; i < k; ++i) {
      const Number<double> x = window[i], y = matrix[i * k + o];
      double m = marked_product(x.m, y.m), n = x.n + y.n;
      mark_inexact(m, n);
      const double most = n > sum.n ? n : sum.n;
      sum = {marked_sum(sum.m * power(sum.n - most), m * power(n - most)), most};
    }
    normalize(sum.m, sum.n);
    out[o] = sum;
  }
}

// the window at u whose sum at boundary u + o is given[o]
template <class E, class P>
SUKHOPS_BOTH Window<E, P> window_of(P& p, int64_t u, int64_t k, const Number<double>* given) {
  Window<E, P> w;
  double n[P::kOwn];
  SUKHOPS_UNROLL
  for (int l = 0; l < P::kOwn; ++l) {
    const bool there = p.slot(l) < k;
    const Number<double> x = there ? given[offset(p.slot(l), u, k)] : Number<double>{0, -infinity()};
    w.a[l] = x.m, n[l] = x.n;
  }
  const double top = p.max(n);
  w.base = top > -infinity() ? top : 0;
  SUKHOPS_UNROLL
  for (int l = 0; l < P::kOwn; ++l) {
    w.n[l] = E(n[l] - w.base);
    mark_inexact(w.a[l], w.n[l]);
  }
  return w;
}

// The number of steps per chunk for b sequences of t steps; t if the sequences are not divided. The device runs `warps`
// warps at the same time as fast as one. The estimated time is in steps: the k transfers of every chunk, in turns of
// `warps` warps, then the sweep of a chunk, and 4 + k / 8 for each window between two chunks. Since a chunk has at
// least 8 * k steps, its matrix needs no more memory than its scores.
inline int64_t chunk_steps(int64_t b, int64_t t, int64_t k, int64_t warps) {
  int64_t best = t, least = t / 2;  // chunks must at least double the speed
  for (int64_t steps = 128; steps <= t / 2; steps *= 2) {
    if (steps < 8 * k) continue;
    const int64_t chunks = (t + steps - 1) / steps, turns = (2 * b * (chunks - 1) * k + warps - 1) / warps;
    const int64_t time = steps * (turns + 1) + chunks * (4 + k / 8);
    if (time < least) best = steps, least = time;
  }
  return best;
}

// the share of a segment with score x that leads from a boundary with sum (a0, n0) to one with sum (a1, n1); at most 1
template <class E>
SUKHOPS_BOTH double share(E x, double a0, double n0, double a1, double n1) {
  const Number<E> e = split(x);
  const double d = n1 > -infinity() && n0 > -infinity() ? e.n + (n0 - n1) : -infinity();
  const double r = (e.m * a0) * power(d) / (a1 == 0 ? 1 : a1);
  return r > 1 ? 1 : r;
}

// the posterior of a segment from a boundary with alpha (a0, n0) to one with beta (b1, m1); the sum over all is (z, nz)
template <class E>
SUKHOPS_BOTH double posterior(E x, double a0, double n0, double b1, double m1, double z, double nz) {
  return share(x, a0 * b1, n0 + m1, z, nz);
}

// computes best[j], the best score of the first j positions, in double; returns false if a score is NaN or +inf
template <class P, class S>
SUKHOPS_BOTH bool best_sums(P& p, const Sequence<S>& q, double* best) {
  const Direction d{false, q.length};
  double v[P::kOwn], bad[P::kOwn];
  SUKHOPS_UNROLL
  for (int i = 0; i < P::kOwn; ++i) v[i] = p.slot(i) == 0 ? 0.0 : -infinity(), bad[i] = 0;
  p.open(q, d, 0);
  int at = 0;
  for (int64_t u = 0; u < q.length; ++u, at = at + 1 < q.k ? at + 1 : 0) {
    if (u % P::kAhead == 0) p.advance(q, d, u);
    const double v0 = p.broadcast(v, at);
    if (p.lead()) best[u] = v0;
    SUKHOPS_UNROLL
    for (int i = 0; i < P::kOwn; ++i) {
      const int slot = p.slot(i), to = slot > at ? slot - at - 1 : slot - at - 1 + static_cast<int>(q.k);
      if (slot == at) v[i] = -infinity();
      if (slot >= q.k || u + 1 + to > q.length) continue;
      const double x = p.score(q, d, u, to), sum = v0 + x;
      if (!(x < infinity())) bad[i] = 1;
      if (sum > v[i]) v[i] = sum;
    }
  }
  const double end = q.k > 0 ? p.broadcast(v, at) : q.length == 0 ? 0.0 : -infinity();
  if (p.lead()) best[q.length] = end;
  return p.max(bad) == 0;
}

// adds x to sum + lost, where `lost` is the rounding error of the sum so far (Neumaier's compensated summation)
SUKHOPS_BOTH void add_exactly(double& sum, double& lost, double x) {
  const double before = sum;
  sum += x;
  lost += fabs(before) < fabs(x) ? (x - sum) + before : (before - sum) + x;
}

// Follows the best sums backward from the end; of equal ones it takes the shorter segment. Returns the score.
template <class P, class S>
SUKHOPS_BOTH double trace(P& p, const Sequence<S>& q, const double* best, int64_t* segments) {
  double score = 0, lost = 0;
  p.sync();
  for (int64_t j = q.length; j > 0;) {
    double sum[P::kOwn];
    SUKHOPS_UNROLL
    for (int i = 0; i < P::kOwn; ++i) {
      const int64_t s = p.slot(i), t = j - 1 - s;
      sum[i] = s < q.k && t >= 0 ? best[t] + static_cast<double>(q.score[t * q.k + s]) : -infinity();
    }
    const double top = p.max(sum);
    if (!(top > -infinity())) return -infinity();
    const int64_t length = 1 + p.first(sum, top);
    j -= length;
    if (p.lead()) segments[j] = length;
    add_exactly(score, lost, q.score[j * q.k + length - 1]);
  }
  return score + lost;
}

SUKHOPS_BOTH uint64_t mixed(uint64_t z) {  // the finalizer of SplitMix64
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// samples one segmentation backward from the end; `stream` is seed + kStep * (sample * sequences + sequence + 1)
template <class S>
SUKHOPS_BOTH void draw(const Sequence<S>& q, const double* alpha, const double* exponent, uint64_t stream,
                       int64_t* segments) {
  constexpr uint64_t kStep = 0x9e3779b97f4a7c15u;
  stream = mixed(stream);
  for (int64_t j = q.length; j > 0;) {
    const uint64_t number = mixed(stream + kStep * static_cast<uint64_t>(j)) >> 11;
    const double u = static_cast<double>(number) / 9007199254740992.0;
    double total = 0;
    const int64_t most = q.k < j ? q.k : j;
    for (int64_t i = 0; i < most; ++i)
      total += share(q.score[(j - 1 - i) * q.k + i], alpha[j - 1 - i], exponent[j - 1 - i], alpha[j], exponent[j]);
    double sum = 0;
    int64_t length = 0;
    for (int64_t i = 0; i < most; ++i) {
      const int64_t t = j - 1 - i;
      const double s = share(q.score[t * q.k + i], alpha[t], exponent[t], alpha[j], exponent[j]);
      sum += s;
      if (s > 0) length = i + 1;
      if (s > 0 && sum > u * total) break;
    }
    j -= length;
    segments[j] = length;
  }
}

// per-segment weight: the upstream gradient or, when computing the entropy, -log of the segment's share
template <class S>
SUKHOPS_BOTH double segment_weight(const S* upstream, int64_t at, double share) {
  if (!(share != 0.0)) return 0.0;
  return upstream ? static_cast<double>(upstream[at]) : -log(share);
}

// computes mean[j], the expected weight of all segments before boundary j
template <class P, class S>
SUKHOPS_BOTH void expect(P& p, const Sequence<S>& q, const double* alpha, const double* exponent, const S* upstream,
                         double* mean) {
  double sum[P::kOwn];
  SUKHOPS_UNROLL
  for (int i = 0; i < P::kOwn; ++i) sum[i] = 0;
  p.sync();
  int at = 0;
  for (int64_t t = 0; t < q.length; ++t, at = at + 1 < q.k ? at + 1 : 0) {
    const double before = p.broadcast(sum, at);
    if (p.lead()) mean[t] = before;
    SUKHOPS_UNROLL
    for (int i = 0; i < P::kOwn; ++i) {
      const int slot = p.slot(i), to = slot > at ? slot - at - 1 : slot - at - 1 + static_cast<int>(q.k);
      const int64_t j = t + 1 + to;
      if (slot == at) sum[i] = 0;
      if (slot >= q.k || j > q.length) continue;
      const double s = share<double>(q.score[t * q.k + to], alpha[t], exponent[t], alpha[j], exponent[j]);
      if (s != 0.0) sum[i] += s * (before + segment_weight(upstream, t * q.k + to, s));
    }
  }
  const double end = q.k > 0 ? p.broadcast(sum, at) : 0.0;
  if (p.lead()) mean[q.length] = end;
}

// writes grad times the covariance between the presence of a segment and the total weight, as in segmentation_rows.h
template <class P, class S>
SUKHOPS_BOTH void covariance(P& p, const Sequence<S>& q, const double* alpha, const double* exponent,
                             const S* upstream, const double* mean, double grad, S* out) {
  double w[P::kOwn], after[P::kOwn];
  p.sync();
  const double all = mean[q.length];
  int at = q.k > 0 ? static_cast<int>(q.length % q.k) : 0;
  SUKHOPS_UNROLL
  for (int i = 0; i < P::kOwn; ++i) w[i] = p.slot(i) == at && alpha[q.length] != 0.0, after[i] = 0;
  for (int64_t t = q.length; t-- > 0;) {
    at = at > 0 ? at - 1 : static_cast<int>(q.k) - 1;
    double mass[P::kOwn], behind[P::kOwn];
    SUKHOPS_UNROLL
    for (int i = 0; i < P::kOwn; ++i) {
      const int slot = p.slot(i), to = slot > at ? slot - at - 1 : slot - at - 1 + static_cast<int>(q.k);
      const int64_t j = t + 1 + to, at_out = t * q.k + to;
      mass[i] = behind[i] = 0;
      if (slot >= q.k) continue;
      const double s =
          j <= q.length ? share<double>(q.score[at_out], alpha[t], exponent[t], alpha[j], exponent[j]) : 0.0;
      const double v = segment_weight(upstream, at_out, s);
      if (s != 0.0) mass[i] = s * w[i], behind[i] = s * (w[i] * v + after[i]);
      out[at_out] = s != 0.0 ? static_cast<S>(s * (w[i] * (mean[t] - all + v) + after[i]) * grad) : S(0);
    }
    const double mass_here = p.sum(mass), after_here = p.sum(behind);
    SUKHOPS_UNROLL
    for (int i = 0; i < P::kOwn; ++i)
      if (p.slot(i) == at) w[i] = mass_here, after[i] = after_here;
  }
}

// a host thread as the owner of a window of up to N slots
template <int N>
struct Host {
  static constexpr int kOwn = N, kAhead = 8;
  int slot(int i) const { return i; }
  bool lead() const { return true; }
  void sync() const {}
  template <class A>
  A broadcast(const A* v, int slot) const {
    return v[slot];
  }
  template <class A>
  A max(const A* v) const {
    A m = v[0];
    for (int i = 1; i < N; ++i) m = v[i] > m ? v[i] : m;
    return m;
  }
  double sum(const double* v) const {
    double s = 0;
    for (int i = 0; i < N; ++i) s += v[i];
    return s;
  }
  int64_t first(const double* v, double top) const {
    for (int i = 0; i < N; ++i)
      if (v[i] == top) return i;
    return 0;
  }
  template <class Q>
  void open(const Q&, const Direction&, int64_t) const {}
  template <class Q>
  void advance(const Q&, const Direction&, int64_t) const {}
  template <class S>
  S score(const Sequence<S>& q, const Direction& d, int64_t u, int64_t i) const {
    return q.score[d.row(u, i) * q.k + i];
  }
};

}  // namespace sukhops::warp
