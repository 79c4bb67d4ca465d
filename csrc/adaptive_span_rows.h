// The blocks of adaptive_span. Included once per instruction set, after vec.h. S is how tensors are stored
// (float, double, the bits of a half), A what is computed in. The lanes of a vector are queries: a block's lanes
// lie in panels of two registers, a tile of keys as [panel][key][lane], so every product is one kernel whose
// operands stay in the first cache: a column of numbers, each broadcast against a row of two registers.

// every lane x: x - 0 is x, which x + 0 is not
template <class A>
SUKHOPS_INLINE typename Register<A>::type fill(A x) {
  return x - typename Register<A>::type{};
}

template <class A>
constexpr int64_t kPanel = 2 * Register<A>::lanes;

// The left side of a product: element (row, k) is at[row * rows + k], k counting on at the next part after
// `run` of them.
template <class A>
struct Left {
  const A* at;
  int64_t rows, step, run, part;
};

// C[r] (+)= sum_k left(r, k) * B[k] for R rows of W registers
template <int R, int W, class A>
static inline void product_block(
    const Left<A>& left, const A* b, int64_t bs, int64_t depth, A* c, int64_t cs, bool add) {
  typedef typename Register<A>::type V;
  constexpr int64_t n = Register<A>::lanes;
  V acc[R][W] = {};
  const A* part = left.at;
  for (; depth > 0; depth -= left.run, part += left.part) {
    const A* a = part;
    for (int64_t k = depth < left.run ? depth : left.run; k > 0; --k, a += left.step, b += bs) {
      V y[W];
      for (int w = 0; w < W; ++w) {
        y[w] = get(b + w * n);
        hold(y[w]);
      }
      for (int r = 0; r < R; ++r) {
        V x = fill(a[r * left.rows]);
        hold(x);
        for (int w = 0; w < W; ++w) acc[r][w] += x * y[w];
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) {
      A* to = c + r * cs + w * n;
      set(to, add ? get(to) + acc[r][w] : acc[r][w]);
    }
}

template <int R, class A>
static inline void product_rows(const Left<A>& left, const A* b, int64_t bs, int64_t width, int64_t depth, A* c,
                                int64_t cs, bool add) {
  constexpr int64_t n = Register<A>::lanes;
  int64_t at = 0;
  for (; at + 2 * n <= width; at += 2 * n) product_block<R, 2>(left, b + at, bs, depth, c + at, cs, add);
  for (; at < width; at += n) product_block<R, 1>(left, b + at, bs, depth, c + at, cs, add);
}

// C [rows][width] (+)= left [rows][depth] @ B [depth][width], width in whole registers
template <class A>
static void product(Left<A> left, int64_t rows, const A* b, int64_t bs, int64_t width, int64_t depth, A* c,
                    int64_t cs, bool add) {
  constexpr int R = kRegisterBytes == 64 ? 12 : 6;
  const auto next = [&](int64_t n) { left.at += n * left.rows, c += n * cs, rows -= n; };
  for (; rows >= R && rows != 8; next(R)) product_rows<R>(left, b, bs, width, depth, c, cs, add);  // 8: twice 4
  for (; rows >= 4; next(4)) product_rows<4>(left, b, bs, width, depth, c, cs, add);
  for (; rows > 0; next(1)) product_rows<1>(left, b, bs, width, depth, c, cs, add);
}

// rows [n][d] of a tensor on the left, and their transpose
template <class A>
static Left<A> as_rows(const A* at, int64_t stride) {
  return {at, stride, 1, kRun, kRun};
}
template <class A>
static Left<A> as_columns(const A* at, int64_t stride) {
  return {at, 1, stride, kRun, kRun * stride};
}

// rows of a tensor times `factor` as panels [panel][d][lane], and as rows [lanes][wide] if asked; zeros beyond `count`
template <class S, class A>
static void pack(const S* from, int64_t stride, int64_t count, int64_t lanes, int64_t d, A factor, A* panels,
                 A* rows, int64_t wide) {
  for (int64_t i = 0; i < lanes; ++i) {
    A* panel = panels + i / kPanel<A> * d * kPanel<A> + i % kPanel<A>;
    for (int64_t j = 0; j < d; ++j) {
      const A x = i < count ? factor * to_float(from[i * stride + j]) : A(0);
      panel[j * kPanel<A>] = x;
      if (rows) rows[i * wide + j] = x;
    }
    for (int64_t j = d; rows && j < wide; ++j) rows[i * wide + j] = 0;
  }
}

// rows of keys or values in A, close together: themselves, or copied into `buffer`
template <class S, class A>
static const A* gather(const S* from, int64_t stride, int64_t rows, int64_t d, A* buffer) {
  if constexpr (sizeof(S) == sizeof(A))
    if (stride == d) return from;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < d; ++j) buffer[i * d + j] = to_float(from[i * stride + j]);
  return buffer;
}

// which keys a block sees: all within [first, last), and within [from, to] each row sees each at full weight
template <class A>
struct Reach {
  int64_t first, last;
  A from, to;
};

// fills lo, hi and span of each query: it sees key j if lo <= j <= hi, at weight (ramp + past) / ramp
// with past = span - (hi - j), exact where it decides; where past > 0 it is 1
template <class A>
static Reach<A> look(const SpanCall<A>& c, int64_t b, int64_t h, int64_t i0, int64_t count, int64_t lanes,
                     const SpanWork<A>& w) {
  Reach<A> r = {c.n, 0, -kFar<A>, kFar<A>};
  for (int64_t i = 0; i < lanes; ++i) {
    w.lo[i] = kFar<A>, w.hi[i] = -kFar<A>, w.span[i] = 0;
    if (i >= count) continue;
    const int64_t hi = c.start(b) + (i0 + i) * c.step - c.skip;
    int64_t lo = hi - c.limit + 1;
    if (lo < 0) lo = 0;
    if (c.key_start) {
      const int64_t start = c.key_start[b * c.start_stride[0] + (i0 + i) * c.start_stride[1]];
      if (start > lo) lo = start;
    }
    const A span = c.span[b * c.span_stride[0] + h * c.span_stride[1] + (i0 + i) * c.span_stride[2]];
    w.span[i] = span;
    w.lo[i] = (A)lo, w.hi[i] = (A)hi;
    if ((A)lo > r.from) r.from = (A)lo;
    if ((A)hi < r.to) r.to = (A)hi;
    const A whole = (A)hi - span + 1;        // from here on the weight is 1, a token to be safe
    if (!(whole <= r.from)) r.from = whole;  // NaN: nowhere
    const A reach = c.ramp + span + 1;       // a token to be safe
    int64_t first = reach < 0 ? c.n : reach < (A)(hi - lo) ? hi - (int64_t)reach : lo;  // NaN: all of them
    if (first < lo) first = lo;
    if (first > hi) continue;
    if (first < r.first) r.first = first;
    if (hi + 1 > r.last) r.last = hi + 1;
  }
  return r;
}

// Moves lane t of each register of [panel][row][lane] from row r + t to row r, or back.
template <class A>
static void shear(A* x, int64_t rows, int64_t lanes, bool back) {
  typedef typename Register<A>::type V;
  constexpr int64_t n = Register<A>::lanes;
  typename Register<A>::ints lane;
  for (int64_t t = 0; t < n; ++t) lane[t] = t;
  for (A* panel = x; panel < x + rows * lanes; panel += rows * kPanel<A>)
    for (int64_t column = 0; column < kPanel<A>; column += n)
      for (int64_t step = 1; step < n; step *= 2) {
        const auto moves = (lane & (int)step) != 0;
        for (int64_t at = 0; at < rows; ++at) {
          const int64_t r = back ? rows - 1 - at : at, other = back ? r - step : r + step;
          A* to = panel + r * kPanel<A> + column;
          const V there = other >= 0 && other < rows ? get(panel + other * kPanel<A> + column) : V{};
          set(to, moves ? there : get(to));
        }
      }
}

// The queries of a block seen by distance: row r of [panel][row][lane] belongs to the distance nearest + r. Sheared,
// the entry of a key is in one row for all lanes of a register: row_of(key) + the register's first lane.
template <class A>
struct Distances {
  const A* table;  // rel_pos of the head, or null
  int64_t rows, nearest, last;
  int64_t lo, hi;  // rows whose distance is in the table

  Distances(const SpanCall<A>& c, int64_t b, int64_t h, int64_t i0, int64_t lanes, const Reach<A>& r) {
    table = c.rel && r.last > r.first ? c.rel + h * c.rel_stride : nullptr;
    last = r.last;
    rows = r.last - r.first + lanes - 1;
    nearest = c.start(b) + i0 - c.skip - (last - 1);
    lo = nearest < 0 ? -nearest : 0;
    hi = c.limit - nearest < rows ? c.limit - nearest : rows;
    if (hi < lo) hi = lo;
  }
  int64_t row_of(int64_t key) const { return last - 1 - key; }
};

// the products of the queries with the table, sheared
template <class A>
static void by_distance(const SpanCall<A>& c, const Distances<A>& x, const A* q_panels, int64_t lanes, A* out) {
  for (int64_t p = 0; p < lanes / kPanel<A>; ++p) {
    A* panel = out + p * x.rows * kPanel<A>;
    for (int64_t i = 0; i < x.lo * kPanel<A>; ++i) panel[i] = 0;
    for (int64_t i = x.hi * kPanel<A>; i < x.rows * kPanel<A>; ++i) panel[i] = 0;
    product(as_rows(x.table + (x.nearest + x.lo) * c.wide, c.wide), x.hi - x.lo, q_panels + p * c.d * kPanel<A>,
            kPanel<A>, kPanel<A>, c.d, panel + x.lo * kPanel<A>, kPanel<A>, false);
  }
  shear(out, x.rows, lanes, false);
}

// copies a tile [panel][key][lane] from, or to, what is kept by distance
template <bool TO, class A>
static void skew(const Distances<A>& x, int64_t j0, int64_t keys, int64_t lanes, A* tile, A* kept) {
  for (int64_t i = 0; i < lanes; i += Register<A>::lanes)
    for (int64_t j = 0; j < keys; ++j) {
      A* one = tile + (i / kPanel<A> * kTile + j) * kPanel<A> + i % kPanel<A>;
      A* other = kept + (i / kPanel<A> * x.rows + x.row_of(j0 + j) + i) * kPanel<A> + i % kPanel<A>;
      if (TO) set(other, get(one));
      else set(one, get(other));
    }
}

// a tile (+)= rows [keys][d] @ panels [panel][d][lane]
template <class A>
static void tile_product(const A* rows, int64_t keys, const A* panels, int64_t lanes, int64_t d, A* tile, bool add) {
  for (int64_t p = 0; p < lanes / kPanel<A>; ++p)
    product(as_rows(rows, d), keys, panels + p * d * kPanel<A>, kPanel<A>, kPanel<A>, d, tile + p * kTile * kPanel<A>,
            kPanel<A>, add);
}

// panels [panel][d][lane] += rows [keys][d] transposed @ a tile
template <class A>
static void panel_product(const A* rows, int64_t stride, int64_t keys, const A* tile, int64_t part, int64_t lanes,
                          int64_t d, A* panels) {
  for (int64_t p = 0; p < lanes / kPanel<A>; ++p)
    product(as_columns(rows, stride), d, tile + p * part, kPanel<A>, kPanel<A>, keys, panels + p * d * kPanel<A>,
            kPanel<A>, true);
}

template <class S>
static const S* row(const void* base, const int64_t* stride, int64_t b, int64_t h, int64_t i) {
  return (const S*)base + b * stride[0] + h * stride[1] + i * stride[2];
}

template <class A>
struct Tile {
  int64_t keys;
  const A *k, *v;
  bool plain;  // every query sees each key at full weight
};

// the keys from j0 on, their values, and in w.score their scores with the block's queries
template <class S, class A>
static Tile<A> tile(const SpanCall<A>& c, int64_t b, int64_t kv, int64_t j0, int64_t lanes, const Reach<A>& r,
                    const Distances<A>& x, const SpanWork<A>& w) {
  const int64_t keys = r.last - j0 < kTile ? r.last - j0 : kTile;
  const A* k = gather(row<S>(c.k, c.k_stride, b, kv, j0), c.k_stride[2], keys, c.d, w.keys);
  const A* v = gather(row<S>(c.v, c.v_stride, b, kv, j0), c.v_stride[2], keys, c.d, w.values);
  if (x.table) skew<false>(x, j0, keys, lanes, w.score, w.rel);
  tile_product(k, keys, w.q_panels, lanes, c.d, w.score, x.table);
  return {keys, k, v, (A)j0 >= r.from && (A)(j0 + keys - 1) <= r.to};
}

// One block of queries: out, maximum and sum, or those of a share of the keys. Returns the pairs that it multiplied.
template <class S, class A>
static int64_t span_forward(const SpanCall<A>& c, int64_t b, int64_t h, int64_t i0, int64_t count, int64_t lanes,
                            int64_t share, A* base) {
  typedef typename Register<A>::type V;
  constexpr int64_t n = Register<A>::lanes;
  const SpanWork<A> w(base, c, lanes);
  Reach<A> r = look(c, b, h, i0, count, lanes, w);
  if (c.shares > 1) {
    if (r.first < share * kShare) r.first = share * kShare;
    if (r.last > (share + 1) * kShare) r.last = (share + 1) * kShare;
  }
  const Distances<A> x(c, b, h, i0, lanes, r);
  pack(row<S>(c.q, c.q_stride, b, h, i0), c.q_stride[2], count, lanes, c.d, c.scale, w.q_panels, (A*)nullptr, c.d);
  if (x.table) by_distance(c, x, w.q_panels, lanes, w.rel);
  for (int64_t i = 0; i < lanes; ++i) w.top[i] = -__builtin_inf(), w.total[i] = 0;
  for (int64_t i = 0; i < c.d * lanes; ++i) w.sum[i] = 0;
  const int64_t kv = h / c.group;
  for (int64_t j0 = r.first; j0 < r.last; j0 += kTile) {
    const auto [keys, k, v, plain] = tile<S>(c, b, kv, j0, lanes, r, x, w);
    for (int64_t i = 0; i < lanes; i += n) {
      A* score = w.score + i / kPanel<A> * kTile * kPanel<A> + i % kPanel<A>;
      const V lo = get(w.lo + i), hi = get(w.hi + i), span = get(w.span + i), before = get(w.top + i);
      const V never = fill(-(A)__builtin_inf());
      V top = before;
      for (int64_t j = 0; j < keys; ++j) {
        V s = get(score + j * kPanel<A>);
        if (!plain) {
          const V key = fill((A)(j0 + j)), past = span - (hi - key);
          s = (key >= lo) & (key <= hi) & ~(past <= -c.ramp) ? s : never;
          set(score + j * kPanel<A>, s);
        }
        top = s > top ? s : top;
      }
      const V shift = top == never ? V{} : top, fade = register_exp(before - shift);
      V sum = {};
      for (int64_t j = 0; j < keys; ++j) {
        const V s = get(score + j * kPanel<A>);
        V p = register_exp(s - shift);
        if (!plain) {
          const V past = span - (hi - fill((A)(j0 + j)));
          p = s == never ? V{} : past > 0 ? p : p * ((c.ramp + past) * c.inverse_ramp);
        }
        set(score + j * kPanel<A>, p);
        sum += p;
      }
      set(w.total + i, get(w.total + i) * fade + sum);
      set(w.top + i, top);
      A* out = w.sum + i / kPanel<A> * c.d * kPanel<A> + i % kPanel<A>;
      bool moved = false;
      for (int64_t t = 0; t < n; ++t) moved |= !(before[t] == top[t]);
      for (int64_t j = 0; moved && j < c.d; ++j) set(out + j * kPanel<A>, get(out + j * kPanel<A>) * fade);
    }
    panel_product(v, c.d, keys, w.score, kTile * kPanel<A>, lanes, c.d, w.sum);
  }
  for (int64_t i = 0; i < count; ++i) {
    const A total = w.total[i], inverse = total == 0 ? A(0) : 1 / total;
    const A* out = w.sum + i / kPanel<A> * c.d * kPanel<A> + i % kPanel<A>;
    const int64_t at = ((b * c.heads + h) * c.m + i0 + i) * c.shares + share;
    (c.shares > 1 ? c.part_maximum : c.maximum)[at] = total == 0 ? A(0) : w.top[i];
    (c.shares > 1 ? c.part_sum : c.sum)[at] = total;
    for (int64_t j = 0; j < c.d; ++j) {
      const A mean = out[j * kPanel<A>] * inverse;
      if (c.shares > 1) c.part_out[at * c.d + j] = mean;
      else put((S*)c.out + at * c.d + j, mean);
    }
  }
  return r.last > r.first ? (r.last - r.first) * lanes : 0;
}

// a row's out, maximum and sum from those of its shares
template <class S, class A>
static void span_join(const SpanCall<A>& c, int64_t row) {
  const A* out = c.part_out + row * c.shares * c.d;
  const A* maximum = c.part_maximum + row * c.shares;
  A* share = c.part_sum + row * c.shares;  // its sum, then its weight
  A top = -__builtin_inf(), total = 0;
  for (int64_t s = 0; s < c.shares; ++s)
    if (share[s] != 0 && maximum[s] > top) top = maximum[s];
  for (int64_t s = 0; s < c.shares; ++s) total += share[s] = share[s] == 0 ? A(0) : share[s] * std::exp(maximum[s] - top);
  c.maximum[row] = total == 0 ? A(0) : top;
  c.sum[row] = total;
  for (int64_t j = 0; j < c.d; ++j) {
    A sum = 0;
    for (int64_t s = 0; s < c.shares; ++s) sum += share[s] == 0 ? A(0) : share[s] * out[s * c.d + j];
    put((S*)c.out + row * c.d + j, total == 0 ? A(0) : sum / total);
  }
}

// One block of queries: its dq and the gradients of its spans, and what it adds to dk, dv and the table's gradient.
template <class S, class A>
static int64_t span_backward(const SpanCall<A>& c, int64_t b, int64_t h, int64_t i0, int64_t count, int64_t lanes,
                             A* base, A* grad_table) {
  typedef typename Register<A>::type V;
  constexpr int64_t n = Register<A>::lanes;
  const SpanWork<A> w(base, c, lanes);
  const Reach<A> r = look(c, b, h, i0, count, lanes, w);
  const Distances<A> x(c, b, h, i0, lanes, r);
  const int64_t at = (b * c.heads + h) * c.m + i0, kv = h / c.group;
  pack(row<S>(c.q, c.q_stride, b, h, i0), c.q_stride[2], count, lanes, c.d, c.scale, w.q_panels, w.q_rows, c.wide);
  pack(row<S>(c.grad, c.grad_stride, b, h, i0), c.grad_stride[2], count, lanes, c.d, A(1), w.g_panels, w.g_rows,
       c.wide);
  for (int64_t i = 0; i < lanes; ++i) {
    A part[4] = {};
    for (int64_t j = 0; i < count && j < c.d; ++j)
      part[j % 4] += w.g_rows[i * c.wide + j] * to_float(((const S*)c.out)[(at + i) * c.d + j]);
    w.total[i] = (part[0] + part[1]) + (part[2] + part[3]);  // what the softmax subtracts
    w.top[i] = i < count ? c.maximum[at + i] : A(0);
    const A sum = i < count ? c.sum[at + i] : A(0);
    w.log_sum[i] = sum == 0 ? (A)__builtin_inf() : std::log(sum);  // no weight where there is nothing to see
    w.fade[i] = 0;  // the gradient of the span
  }
  for (int64_t i = 0; i < c.d * lanes; ++i) w.sum[i] = 0;
  const bool skewed = x.table && (c.need_q || grad_table);
  if (x.table) by_distance(c, x, w.q_panels, lanes, w.rel);
  for (int64_t i = 0; skewed && i < x.rows * lanes; ++i) w.grad_rel[i] = 0;

  for (int64_t j0 = r.first; j0 < r.last; j0 += kTile) {
    const auto [keys, k, v, plain] = tile<S>(c, b, kv, j0, lanes, r, x, w);
    tile_product(v, keys, w.g_panels, lanes, c.d, w.slope, false);
    for (int64_t i = 0; i < lanes; i += n) {
      A* score = w.score + i / kPanel<A> * kTile * kPanel<A> + i % kPanel<A>;
      A* slope = w.slope + (score - w.score);
      const V lo = get(w.lo + i), hi = get(w.hi + i), span = get(w.span + i);
      const V top = get(w.top + i), log_sum = get(w.log_sum + i), delta = get(w.total + i);
      V grad_span = {};
      for (int64_t j = 0; j < keys; ++j, score += kPanel<A>, slope += kPanel<A>) {
        V s = get(score) - top;
        s = (s > 80 ? fill(A(80)) : s) - log_sum;  // top + log_sum would be rounded
        V p = register_exp(s);
        const V d = get(slope) - delta;
        if (!plain) {
          const V key = fill((A)(j0 + j)), past = span - (hi - key);
          const auto seen = (key >= lo) & (key <= hi) & ~(past < -c.ramp);
          p = seen ? p : V{};
          grad_span += seen & ~(past > 0) ? p * d : V{};
          p = seen & ~(past > 0) ? p * ((c.ramp + past) * c.inverse_ramp) : p;
        }
        set(score, p);
        set(slope, p * d);
      }
      set(w.fade + i, get(w.fade + i) + grad_span);
    }
    if (c.need_kv) {
      const int64_t to = ((b * c.heads / c.group + kv) * c.n + j0) * c.wide, part = kTile * kPanel<A>;
      product({w.score, kPanel<A>, 1, kPanel<A>, part}, keys, w.g_rows, c.wide, c.wide, lanes, c.grad_v + to, c.wide,
              true);
      product({w.slope, kPanel<A>, 1, kPanel<A>, part}, keys, w.q_rows, c.wide, c.wide, lanes, c.grad_k + to, c.wide,
              true);
    }
    if (c.need_q) panel_product(k, c.d, keys, w.slope, kTile * kPanel<A>, lanes, c.d, w.sum);
    if (skewed) skew<true>(x, j0, keys, lanes, w.slope, w.grad_rel);
  }
  if (skewed) {
    shear(w.grad_rel, x.rows, lanes, true);
    const int64_t first = (x.nearest + x.lo) * c.wide, part = x.rows * kPanel<A>;
    const A* from = w.grad_rel + x.lo * kPanel<A>;
    if (c.need_q) panel_product(x.table + first, c.wide, x.hi - x.lo, from, part, lanes, c.d, w.sum);
    if (grad_table)
      product({from, kPanel<A>, 1, kPanel<A>, part}, x.hi - x.lo, w.q_rows, c.wide, c.wide, lanes, grad_table + first,
              c.wide, true);
  }
  for (int64_t i = 0; i < count; ++i) {
    const A* dq = w.sum + i / kPanel<A> * c.d * kPanel<A> + i % kPanel<A>;
    c.grad_span[at + i] = w.fade[i] * c.inverse_ramp;
    for (int64_t j = 0; c.need_q && j < c.d; ++j) put((S*)c.grad_q + (at + i) * c.d + j, dq[j * kPanel<A>] * c.scale);
  }
  return r.last > r.first ? (r.last - r.first) * lanes : 0;
}
