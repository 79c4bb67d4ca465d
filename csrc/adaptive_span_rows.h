// The blocks of adaptive_span. Included once per instruction set, after vec.h. S is how tensors are stored
// (float, double, the bits of a half), A what is computed in. The lanes of a vector are queries: a block holds
// `lanes` of them, and tiles of keys pass by, [keys][lanes]. Every product is one kernel, a row of numbers
// broadcast against rows of vectors.

template <class A>
SUKHOPS_INLINE typename Register<A>::type get(const A* p) {
  typename Register<A>::type x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

template <class A, class V>
SUKHOPS_INLINE void set(A* p, V x) {
  __builtin_memcpy(p, &x, sizeof x);
}

// every lane x: x - 0 is x, which x + 0 is not
template <class A>
SUKHOPS_INLINE typename Register<A>::type fill(A x) {
  return x - typename Register<A>::type{};
}

// C[r] (+)= sum_k a[r * ars + k * aks] * B[k], R rows of W registers
template <int R, int W, class A>
static inline void product_block(
    const A* a, int64_t ars, int64_t aks, const A* b, int64_t bs, int64_t depth, A* c, int64_t cs, bool add) {
  typedef typename Register<A>::type V;
  constexpr int64_t n = Register<A>::lanes;
  V acc[R][W] = {};
  for (int64_t k = 0; k < depth; ++k) {
    V y[W];
    for (int w = 0; w < W; ++w) {
      y[w] = get(b + k * bs + w * n);
      hold(y[w]);
    }
    for (int r = 0; r < R; ++r) {
      V x = fill(a[r * ars + k * aks]);
      hold(x);
      for (int w = 0; w < W; ++w) acc[r][w] += x * y[w];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) {
      A* to = c + r * cs + w * n;
      set(to, add ? get(to) + acc[r][w] : acc[r][w]);
    }
}

template <int R, class A>
static inline void product_rows(const A* a, int64_t ars, int64_t aks, const A* b, int64_t bs, int64_t width,
                                int64_t depth, A* c, int64_t cs, bool add) {
  constexpr int64_t n = Register<A>::lanes;
  int64_t at = 0;
  if constexpr (kRegisterBytes == 64)
    for (; at + 4 * n <= width; at += 4 * n)
      product_block<R, 4>(a, ars, aks, b + at, bs, depth, c + at, cs, add);
  for (; at + 2 * n <= width; at += 2 * n)
    product_block<R, 2>(a, ars, aks, b + at, bs, depth, c + at, cs, add);
  for (; at < width; at += n) product_block<R, 1>(a, ars, aks, b + at, bs, depth, c + at, cs, add);
}

// C [rows][width] (+)= a @ B [depth][width], a[row * ars + k * aks]; width in whole vectors of 16
template <class A>
static void product(const A* a, int64_t ars, int64_t aks, int64_t rows, const A* b, int64_t bs, int64_t width,
                    int64_t depth, A* c, int64_t cs, bool add) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6)
    product_rows<6>(a + r * ars, ars, aks, b, bs, width, depth, c + r * cs, cs, add);
  for (; r + 2 <= rows; r += 2)
    product_rows<2>(a + r * ars, ars, aks, b, bs, width, depth, c + r * cs, cs, add);
  if (r < rows) product_rows<1>(a + r * ars, ars, aks, b, bs, width, depth, c + r * cs, cs, add);
}

// rows of a tensor, times `factor`, as lanes [d][lanes] and, if asked, as rows [lanes][wide]; zeros beyond `count`
template <class S, class A>
static void pack(const S* from, int64_t stride, int64_t count, int64_t lanes, int64_t d, A factor, A* by_lane,
                 A* by_row, int64_t wide) {
  for (int64_t i = 0; i < lanes; ++i)
    for (int64_t j = 0; j < wide; ++j) {
      const A x = i < count && j < d ? factor * to_float(from[i * stride + j]) : A(0);
      if (j < d) by_lane[j * lanes + i] = x;
      if (by_row) by_row[i * wide + j] = x;
    }
}

template <class A>
struct Rows {
  const A* at;
  int64_t stride;
};

// rows of keys or values in A: themselves, or converted into `buffer`
template <class S, class A>
static inline Rows<A> in_acc(const S* from, int64_t stride, int64_t rows, int64_t d, A* buffer) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < d; ++j) buffer[i * d + j] = to_float(from[i * stride + j]);
  return {buffer, d};
}
template <class A>
static inline Rows<A> in_acc(const A* from, int64_t stride, int64_t, int64_t, A*) {
  return {from, stride};
}

// which keys a block sees: all within [first, last), and within [from, to] each row sees each at full weight
template <class A>
struct Reach {
  int64_t first, last;
  A from, to;
};

// fills lo, hi and reach of each query: it sees key j if lo <= j <= hi, at weight (reach - (hi - j)) / ramp
template <class A>
static Reach<A> look(const SpanCall<A>& c, int64_t b, int64_t h, int64_t i0, int64_t count, int64_t lanes,
                     const SpanWork<A>& w) {
  Reach<A> r = {c.n, 0, -kFar<A>, kFar<A>};
  for (int64_t i = 0; i < lanes; ++i) {
    w.lo[i] = kFar<A>, w.hi[i] = -kFar<A>, w.reach[i] = 0;
    if (i >= count) continue;
    const int64_t hi = c.n - c.m + i0 + i - c.skip;
    int64_t lo = hi - c.limit + 1;
    if (lo < 0) lo = 0;
    if (c.key_start) {
      const int64_t start = c.key_start[b * c.start_stride[0] + (i0 + i) * c.start_stride[1]];
      if (start > lo) lo = start;
    }
    const A reach = c.ramp + c.span[b * c.span_stride[0] + h * c.span_stride[1] + (i0 + i) * c.span_stride[2]];
    w.reach[i] = reach;
    w.lo[i] = (A)lo, w.hi[i] = (A)hi;
    if ((A)lo > r.from) r.from = (A)lo;
    if ((A)hi < r.to) r.to = (A)hi;
    const A whole = (A)hi - (reach - c.ramp) + 1;  // from here on the weight is 1, a token to be safe
    if (!(whole <= r.from)) r.from = whole;        // NaN: nowhere
    const int64_t near = hi - c.limit < 0 ? 0 : hi - c.limit;
    int64_t first = reach < 0 ? c.n : reach < (A)(hi - near) ? hi - (int64_t)reach : near;
    if (first < lo) first = lo;
    if (first > hi) continue;
    if (first < r.first) r.first = first;
    if (hi + 1 > r.last) r.last = hi + 1;
  }
  return r;
}

// out[r] lane t = in[r + t] lane t (forward) or the other way round, in each vector
template <class A>
static void shear(A* x, int64_t rows, int64_t lanes, bool forward) {
  typedef typename Register<A>::type V;
  constexpr int64_t n = Register<A>::lanes;
  typename Register<A>::ints lane;
  for (int64_t t = 0; t < n; ++t) lane[t] = t;
  for (int64_t column = 0; column < lanes; column += n)
    for (int64_t step = 1; step < n; step *= 2) {
      const auto moves = (lane & (int)step) != 0;
      for (int64_t at = 0; at < rows; ++at) {
        const int64_t r = forward ? at : rows - 1 - at, other = forward ? r + step : r - step;
        A* to = x + r * lanes + column;
        const V there = other >= 0 && other < rows ? get(x + other * lanes + column) : V{};
        set(to, moves ? there : get(to));
      }
    }
}

// The products of a block with rel_pos, where the scores want them: key j of lane i at row (last - 1 - j) +
// the first lane of its vector. `first` is the distance of row 0.
template <class A>
static void distances(const SpanCall<A>& c, const A* rel, const A* q_lanes, int64_t rows, int64_t first,
                      int64_t lanes, A* out) {
  const int64_t lo = first < 0 ? -first : 0;
  int64_t hi = c.limit - first;
  hi = hi > rows ? rows : hi;
  for (int64_t r = 0; r < rows; ++r)
    if (r < lo || r >= hi)
      for (int64_t i = 0; i < lanes; ++i) out[r * lanes + i] = 0;
  if (lo < hi)
    product(rel + (first + lo) * c.wide, c.wide, (int64_t)1, hi - lo, q_lanes, lanes, lanes, c.d, out + lo * lanes,
            lanes, false);
  shear(out, rows, lanes, true);
}

// scores [keys][lanes] of keys j0 .. j0 + count
template <class A>
static void scores(const SpanCall<A>& c, Rows<A> keys, int64_t j0, int64_t count, int64_t last, const A* q_lanes,
                   int64_t lanes, const A* rel, A* out) {
  for (int64_t j = 0; rel && j < count; ++j)
    for (int64_t i = 0; i < lanes; i += Register<A>::lanes)
      set(out + j * lanes + i, get(rel + (last - 1 - j0 - j + i) * lanes + i));
  product(keys.at, keys.stride, (int64_t)1, count, q_lanes, lanes, lanes, c.d, out, lanes, rel != nullptr);
}

template <class S>
static const S* row(const void* base, const int64_t* stride, int64_t b, int64_t h, int64_t i) {
  return (const S*)base + b * stride[0] + h * stride[1] + i * stride[2];
}

// One block of queries: out and lse.
template <class S, class A>
static int64_t span_forward(const SpanCall<A>& c, int64_t b, int64_t h, int64_t i0, int64_t count, int64_t lanes,
                            A* base) {
  typedef typename Register<A>::type V;
  constexpr int64_t n = Register<A>::lanes;
  const SpanWork<A> w(base, c, lanes);
  const Reach<A> r = look(c, b, h, i0, count, lanes, w);
  pack(row<S>(c.q, c.q_stride, b, h, i0), c.q_stride[2], count, lanes, c.d, c.scale, w.q_lanes, (A*)nullptr, c.d);
  for (int64_t i = 0; i < lanes; ++i) w.top[i] = -__builtin_inf(), w.total[i] = 0;
  for (int64_t i = 0; i < c.d * lanes; ++i) w.sum[i] = 0;
  const int64_t kv = h / c.group, keys = r.last > r.first ? r.last - r.first : 0;
  if (c.rel && keys)
    distances(c, c.rel + h * c.rel_stride, w.q_lanes, keys + lanes - 1, c.n - c.m + i0 - c.skip - (r.last - 1), lanes,
              w.rel);
  for (int64_t j0 = r.first; j0 < r.last; j0 += kTile) {
    const int64_t tile = r.last - j0 < kTile ? r.last - j0 : kTile;
    const Rows<A> k = in_acc(row<S>(c.k, c.k_stride, b, kv, j0), c.k_stride[2], tile, c.d, w.keys);
    scores(c, k, j0, tile, r.last, w.q_lanes, lanes, c.rel ? w.rel : nullptr, w.score);
    const bool plain = (A)j0 >= r.from && (A)(j0 + tile - 1) <= r.to;
    bool moved = false;
    for (int64_t i = 0; i < lanes; i += n) {
      const V lo = get(w.lo + i), hi = get(w.hi + i), reach = get(w.reach + i), before = get(w.top + i);
      V top = before;
      for (int64_t j = 0; j < tile; ++j) {
        V s = get(w.score + j * lanes + i);
        if (!plain) {
          const V at = fill((A)(j0 + j)), a = reach - (hi - at);
          s = (at >= lo) & (at <= hi) & ~(a <= 0) ? s : fill(-(A)__builtin_inf());
          set(w.score + j * lanes + i, s);
        }
        top = s > top ? s : top;
      }
      const V shift = top == -(A)__builtin_inf() ? V{} : top;
      V sum = {};
      for (int64_t j = 0; j < tile; ++j) {
        V p = register_exp(get(w.score + j * lanes + i) - shift);
        if (!plain) {
          const V a = reach - (hi - (fill((A)(j0 + j))));
          p *= a > c.ramp ? fill(A(1)) : a * c.inverse_ramp;
          p = get(w.score + j * lanes + i) == -(A)__builtin_inf() ? V{} : p;
        }
        set(w.score + j * lanes + i, p);
        sum += p;
      }
      const V fade = register_exp(before - shift);
      set(w.fade + i, fade);
      set(w.total + i, get(w.total + i) * fade + sum);
      set(w.top + i, top);
      for (int64_t t = 0; t < n; ++t) moved |= !(before[t] == top[t]);
    }
    if (moved && j0 > r.first)
      for (int64_t j = 0; j < c.d; ++j)
        for (int64_t i = 0; i < lanes; i += n) {
          A* at = w.sum + j * lanes + i;
          set(at, get(at) * get(w.fade + i));
        }
    const Rows<A> v = in_acc(row<S>(c.v, c.v_stride, b, kv, j0), c.v_stride[2], tile, c.d, w.values);
    product(v.at, (int64_t)1, v.stride, c.d, w.score, lanes, lanes, tile, w.sum, lanes, true);
  }
  for (int64_t i = 0; i < count; ++i) {
    const A total = w.total[i], inverse = total == 0 ? A(0) : 1 / total;
    const int64_t at = (b * c.heads + h) * c.m + i0 + i;
    c.lse[at] = total == 0 ? (A)__builtin_inf() : w.top[i] + std::log(total);
    for (int64_t j = 0; j < c.d; ++j) put((S*)c.out + at * c.d + j, w.sum[j * lanes + i] * inverse);
  }
  return keys * lanes;
}

// One block of queries: its dq and the gradients of its spans, and what it adds to dk, dv and drel.
template <class S, class A>
static int64_t span_backward(const SpanCall<A>& c, int64_t b, int64_t h, int64_t i0, int64_t count, int64_t lanes,
                             A* base, A* grad_rel) {
  typedef typename Register<A>::type V;
  constexpr int64_t n = Register<A>::lanes;
  const SpanWork<A> w(base, c, lanes);
  const Reach<A> r = look(c, b, h, i0, count, lanes, w);
  const int64_t at = (b * c.heads + h) * c.m + i0, kv = h / c.group, keys = r.last > r.first ? r.last - r.first : 0;
  const int64_t rows = keys + lanes - 1, nearest = c.n - c.m + i0 - c.skip - (r.last - 1);
  const A* rel = c.rel ? c.rel + h * c.rel_stride : nullptr;
  pack(row<S>(c.q, c.q_stride, b, h, i0), c.q_stride[2], count, lanes, c.d, c.scale, w.q_lanes, w.q_rows, c.wide);
  pack(row<S>(c.grad, c.grad_stride, b, h, i0), c.grad_stride[2], count, lanes, c.d, A(1), w.g_lanes, w.g_rows,
       c.wide);
  for (int64_t i = 0; i < lanes; ++i) {
    A part[4] = {};
    for (int64_t j = 0; i < count && j < c.d; ++j)
      part[j % 4] += w.g_rows[i * c.wide + j] * to_float(((const S*)c.out)[(at + i) * c.d + j]);
    w.total[i] = (part[0] + part[1]) + (part[2] + part[3]);  // what softmax subtracts
    w.top[i] = i < count ? c.lse[at + i] : (A)__builtin_inf();
    w.fade[i] = 0;  // the gradient of the span
  }
  for (int64_t i = 0; i < c.d * lanes; ++i) w.sum[i] = 0;
  if (rel && keys) distances(c, rel, w.q_lanes, rows, nearest, lanes, w.rel);
  const bool skewed = rel && keys && (c.need_q || c.need_rel);
  if (skewed)
    for (int64_t i = 0; i < rows * lanes; ++i) w.grad_rel[i] = 0;

  for (int64_t j0 = r.first; j0 < r.last; j0 += kTile) {
    const int64_t tile = r.last - j0 < kTile ? r.last - j0 : kTile;
    const Rows<A> k = in_acc(row<S>(c.k, c.k_stride, b, kv, j0), c.k_stride[2], tile, c.d, w.keys);
    const Rows<A> v = in_acc(row<S>(c.v, c.v_stride, b, kv, j0), c.v_stride[2], tile, c.d, w.values);
    scores(c, k, j0, tile, r.last, w.q_lanes, lanes, rel ? w.rel : nullptr, w.score);
    product(v.at, v.stride, (int64_t)1, tile, w.g_lanes, lanes, lanes, c.d, w.slope, lanes, false);
    const bool plain = (A)j0 >= r.from && (A)(j0 + tile - 1) <= r.to;
    for (int64_t i = 0; i < lanes; i += n) {
      const V lo = get(w.lo + i), hi = get(w.hi + i), reach = get(w.reach + i), lse = get(w.top + i);
      const V delta = get(w.total + i);
      V span = {};
      for (int64_t j = 0; j < tile; ++j) {
        A *score = w.score + j * lanes + i, *slope = w.slope + j * lanes + i;
        V s = get(score) - lse;
        s = s > 80 ? fill(A(80)) : s;
        V p = register_exp(s), d = get(slope) - delta;
        if (!plain) {
          const V key = fill((A)(j0 + j)), a = reach - (hi - key);
          const auto seen = (key >= lo) & (key <= hi) & ~(a < 0);
          p = seen ? p : V{};
          span += seen & ~(a > c.ramp) ? p * d : V{};
          p = a > c.ramp ? p : p * (a * c.inverse_ramp);
          p = seen ? p : V{};
        }
        set(score, p);
        set(slope, p * d);
      }
      set(w.fade + i, get(w.fade + i) + span);
    }
    if (c.need_kv) {
      const int64_t to = ((b * c.heads / c.group + kv) * c.n + j0) * c.wide;
      product(w.score, lanes, (int64_t)1, tile, w.g_rows, c.wide, c.wide, lanes, c.grad_v + to, c.wide, true);
      product(w.slope, lanes, (int64_t)1, tile, w.q_rows, c.wide, c.wide, lanes, c.grad_k + to, c.wide, true);
    }
    if (c.need_q) product(k.at, (int64_t)1, k.stride, c.d, w.slope, lanes, lanes, tile, w.sum, lanes, true);
    if (skewed)
      for (int64_t j = 0; j < tile; ++j)
        for (int64_t i = 0; i < lanes; i += n)
          set(w.grad_rel + (r.last - 1 - j0 - j + i) * lanes + i, get(w.slope + j * lanes + i));
  }
  if (skewed) {
    shear(w.grad_rel, rows, lanes, false);
    const int64_t lo = nearest < 0 ? -nearest : 0, hi = c.limit - nearest < rows ? c.limit - nearest : rows;
    const int64_t x = nearest + lo;
    if (lo < hi && c.need_q)
      product(rel + x * c.wide, (int64_t)1, c.wide, c.d, w.grad_rel + lo * lanes, lanes, lanes, hi - lo, w.sum, lanes,
              true);
    if (lo < hi && c.need_rel)
      product(w.grad_rel + lo * lanes, lanes, (int64_t)1, hi - lo, w.q_rows, c.wide, c.wide, lanes,
              grad_rel + x * c.wide, c.wide, true);
  }
  for (int64_t i = 0; i < count; ++i) {
    c.grad_span[at + i] = w.fade[i] * c.inverse_ramp;
    for (int64_t j = 0; c.need_q && j < c.d; ++j)
      put((S*)c.grad_q + (at + i) * c.d + j, w.sum[j * lanes + i] * c.scale);
  }
  return keys * lanes;
}
