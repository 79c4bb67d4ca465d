// The recursions of segmentation.cu, written for an owner P of one sequence: a warp, whose lanes hold the slots of
// a window between them, or a host thread that holds them all, on which tests run the same arithmetic.
// As on the CPU (segmentation_rows.h) a number is a * 2^n and the window a ring: boundary j stays in slot j % k.
// Mantissas are double: a posterior is alpha * beta / z of long products, and float ones would drift apart. What a
// score's exponential is rounded to, E, cancels there: all three have the same one.
// A number whose exponent is inexact is marked: its mantissa is negative, its exponent a bound from above. It vanishes
// beside a much larger number and marks every sum in which it counts; a result that is marked is NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SUKHOPS_BOTH __host__ __device__ __forceinline__
#define SUKHOPS_UNROLL _Pragma("unroll")  // what a lane owns stays in registers
#else
#define SUKHOPS_BOTH inline
#define SUKHOPS_UNROLL
#endif

namespace sukhops::warp {

constexpr int kRebase = 16;  // steps between two alignments of the window's exponents

SUKHOPS_BOTH double infinity() { return HUGE_VAL; }

template <class A>
struct Number {
  A m, n;
};

// the exponent of a marked number, kept finite
template <class A>
SUKHOPS_BOTH A within_bounds(A n) {
  return n < A(-0x1p100) ? A(-0x1p100) : n > A(0x1p100) ? A(0x1p100) : n;
}

// m * 2^n = exp(x), n an integer; m is NaN for NaN and +inf, n is -inf for -inf. Marked beyond 2^22 exponents (float64:
// 2^51), where y loses bits.
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

// 2^d for an integer d, 0 below the smallest exponent or where d is NaN, at most 2^(half of the largest)
SUKHOPS_BOTH double power(double d) {
  if (!(d >= -1022.0)) return 0.0;
  const int64_t bits = (static_cast<int64_t>(d > 511.0 ? 511.0 : d) + 1023) << 52;
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// marks a * 2^n where n may have been rounded
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

// a * 2^n += (a0 * 2^n0) * exp(x); a slot that its boundary has left starts from nothing
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

// the mantissa into [1/2, 1)
template <class E>
SUKHOPS_BOTH void normalise(double& a, E& n) {
  int e = 0;
  if (a != 0 && fabs(a) < infinity()) a = frexp(a, &e);
  n += E(e);
}

// what all recursions of a sequence share: segment (t, i) covers t .. t + i and has score[t * k + i]
template <class S>
struct Sequence {
  const S* score;
  int64_t length, k;
};

// the i-th segment that leaves boundary u towards u + 1 + i, boundaries counted from the side that a sweep starts at
struct Direction {
  bool backwards;
  int64_t length;
  SUKHOPS_BOTH int64_t boundary(int64_t u) const { return backwards ? length - u : u; }
  SUKHOPS_BOTH int64_t row(int64_t u, int64_t i) const { return backwards ? length - u - 1 - i : u; }
  // rows, counted from the same side, that steps before u have read
  SUKHOPS_BOTH int64_t rows(int64_t u, int64_t k) const {
    const int64_t n = backwards ? u + k - 1 : u;
    return n < length ? n : length;
  }
};

// sums a * 2^(base + n) of the boundaries u .. u + k - 1 as far as segments that start before u lead there, u counted
// from the side of the sweep: boundary j in slot j % k
template <class E, class P>
struct Window {
  double a[P::kOwn];
  E n[P::kOwn];
  double base;
};

// the offset from u of the boundary in a slot
SUKHOPS_BOTH int64_t offset(int64_t slot, int64_t u, int64_t k) {
  const int64_t o = slot - u % k;
  return o < 0 ? o + k : o;
}

// the window at u with a sum of 1 at u + i and nothing else
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

// takes the window from u = from, a multiple of P::kAhead, to u = to; each(u, a, n) gets the sum of every boundary that
// it leaves. Rows come through P's store, P::kAhead steps ahead of their use.
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
      for (int i = 0; i < P::kOwn; ++i) normalise(w.a[i], w.n[i]);
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

// value[j] * 2^exponent[j], the sum over what lies between boundary j and the side that the sweep starts at: alpha
// forwards, beta backwards; for the boundaries from `from` up to `to`, or with it where that is the end. A marked sum is
// NaN at the end; before it, it counts as not reached: if it counted, so would the mark at the end.
template <class E, class P, class S>
SUKHOPS_BOTH void sweep(P& p, const Sequence<S>& q, bool backwards, int64_t from, int64_t to, Window<E, P>& w,
                        double* value, double* exponent) {
  const Direction d{backwards, q.length};
  const auto each = [&](int64_t u, double a, double n) {
    mark_inexact(a, n);
    const bool marked = a < 0, end = u == q.length;
    if (p.lead()) value[d.boundary(u)] = !marked ? a : end ? NAN : 0, exponent[d.boundary(u)] = marked ? -infinity() : n;
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

// A chunk maps the window at its start to the one at its end, and the map is linear: k windows, one from each unit
// window, are its matrix. Chunks find theirs at the same time; then the windows between chunks follow from each other;
// then chunks sweep from those at the same time. That is k + 1 times the work in steps / chunks of the time.

// out[o], o < k: what the unit window i at `from` has become at `to`
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
    normalise(sum.m, sum.n);
    out[o] = sum;
  }
}

// the window at u of which given[o] is the sum at u + o
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

// The steps of a chunk for b sequences of t steps, t where they stay whole. `room` warps run at a time as fast as one.
// Counted in steps: the k transfers of every chunk, taking turns, its own sweep, and 4 + k / 8 for the window between two
// chunks. A matrix takes no more memory than the scores of its chunk.
inline int64_t chunk_steps(int64_t b, int64_t t, int64_t k, int64_t room) {
  int64_t best = t, least = t / 2;  // for less than twice the speed it is not worth the work
  for (int64_t steps = 128; steps <= t / 2; steps *= 2) {
    if (steps < 8 * k) continue;
    const int64_t chunks = (t + steps - 1) / steps, turns = (2 * b * (chunks - 1) * k + room - 1) / room;
    const int64_t time = steps * (turns + 1) + chunks * (4 + k / 8);
    if (time < least) best = steps, least = time;
  }
  return best;
}

// the share of segment x, from a boundary with sum (a0, n0), in a boundary's sum (a1, n1): at most 1
template <class E>
SUKHOPS_BOTH double share(E x, double a0, double n0, double a1, double n1) {
  const Number<E> e = split(x);
  const double d = n1 > -infinity() && n0 > -infinity() ? e.n + (n0 - n1) : -infinity();
  const double r = (e.m * a0) * power(d) / (a1 == 0 ? 1 : a1);
  return r > 1 ? 1 : r;
}

// the posterior of a segment between boundaries with alpha (a0, n0) and beta (b1, m1); logz is (z, nz)
template <class E>
SUKHOPS_BOTH double posterior(E x, double a0, double n0, double b1, double m1, double z, double nz) {
  return share(x, a0 * b1, n0 + m1, z, nz);
}

// best[j], the largest sum of scores of the first j positions, in double; false where a score is NaN or +inf
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

// sum + lost += x, where lost is what sum has been rounded by (Neumaier's summation)
SUKHOPS_BOTH void add_exactly(double& sum, double& lost, double x) {
  const double before = sum;
  sum += x;
  lost += fabs(before) < fabs(x) ? (x - sum) + before : (before - sum) + x;
}

// follows the best sums back from the end, the shorter segment first among equals
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

SUKHOPS_BOTH uint64_t mixed(uint64_t z) {  // the finaliser of SplitMix64
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// walks one segmentation back from the end; `stream` is seed + step * (sample * sequences + sequence + 1)
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

// what a segment is worth: the upstream gradient, or without one its surprise, -log of its share
template <class S>
SUKHOPS_BOTH double worth(const S* upstream, int64_t at, double share) {
  if (!(share != 0.0)) return 0.0;
  return upstream ? static_cast<double>(upstream[at]) : -log(share);
}

// mean[j], the expected worth of all segments before boundary j
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
      if (s != 0.0) sum[i] += s * (before + worth(upstream, t * q.k + to, s));
    }
  }
  const double end = q.k > 0 ? p.broadcast(sum, at) : 0.0;
  if (p.lead()) mean[q.length] = end;
}

// grad times the covariance of each segment's presence and the worth of all; `after` is mass times mean behind
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
      const double v = worth(upstream, at_out, s);
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
