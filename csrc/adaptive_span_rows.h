// The blocks of adaptive_span. Included by isa.h once per instruction set, after vec.h. S is the storage type of the
// tensors (float, double, or the bits of a half precision), A the type of the computation.
//
// The lanes of a vector are queries. The queries of a block are stored in panels of two registers, a tile of scores as
// [panel][key][lane]. So one kernel computes every product: it multiplies each number of a column, broadcast, with a
// row of two registers. Its operands stay in L1.

// x in every lane; x - 0 is exactly x, but -0 + 0 is not -0
template <class A>
SUKHOPS_INLINE typename Register<A>::type fill(A x) {
  return x - typename Register<A>::type{};
}

template <class A>
constexpr int64_t kPanel = 2 * Register<A>::lanes;

// The left operand of a product: element (row, k) is at[row * row_stride + k / run * part + k % run * step].
template <class A>
struct Left {
  const A* at;
  int64_t row_stride, step, run, part;
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
        V x = fill(a[r * left.row_stride]);
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

// C [rows][width] (+)= left [rows][depth] @ B [depth][width]; width is a multiple of a register
template <class A>
static void product(Left<A> left, int64_t rows, const A* b, int64_t bs, int64_t width, int64_t depth, A* c,
                    int64_t cs, bool add) {
  constexpr int R = kRegisterBytes == 64 ? 12 : 6;
  const auto next = [&](int64_t n) { left.at += n * left.row_stride, c += n * cs, rows -= n; };
  for (; rows >= R && rows != 8; next(R)) product_rows<R>(left, b, bs, width, depth, c, cs, add);  // 8: two blocks of 4
  for (; rows >= 4; next(4)) product_rows<4>(left, b, bs, width, depth, c, cs, add);
  for (; rows > 0; next(1)) product_rows<1>(left, b, bs, width, depth, c, cs, add);
}

// a matrix with contiguous rows as a left operand, and its transpose
template <class A>
static Left<A> as_rows(const A* at, int64_t stride) {
  return {at, stride, 1, kRun, kRun};
}
template <class A>
static Left<A> as_columns(const A* at, int64_t stride) {
  return {at, 1, stride, kRun, kRun * stride};
}

// Copies rows of a tensor, times `factor`, to panels [panel][d][lane] and, unless `rows` is null, to rows
// [lanes][wide]. Rows from `count` on are zeros.
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

// contiguous rows of keys or values as A: the rows of the tensor if possible, else a copy in `buffer`
template <class S, class A>
static const A* gather(const S* from, int64_t stride, int64_t rows, int64_t d, A* buffer) {
  if constexpr (sizeof(S) == sizeof(A))
    if (stride == d) return from;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < d; ++j) buffer[i * d + j] = to_float(from[i * stride + j]);
  return buffer;
}

// The keys that a block sees: all are within [first, last). Every query sees every key within [from, to] with weight 1.
template <class A>
struct KeyRange {
  int64_t first, last;
  A from, to;
};

// Finds the keys that the block sees, and fills lo, hi and span of each query. A query sees key j if lo <= j <= hi,
// with weight 1 if past > 0 and (ramp + past) / ramp otherwise, where past = span - (hi - j). The subtraction is exact
// where it decides between the cases.
template <class A>
static KeyRange<A> find_keys(const SpanCall<A>& c, int64_t b, int64_t h, int64_t i0, int64_t count, int64_t lanes,
                     const SpanWork<A>& w) {
  KeyRange<A> r = {c.n, 0, -kBeyondPositions<A>, kBeyondPositions<A>};
  for (int64_t i = 0; i < lanes; ++i) {
    w.lo[i] = kBeyondPositions<A>, w.hi[i] = -kBeyondPositions<A>, w.span[i] = 0;
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
    const A whole = (A)hi - span + 1;        // keys from here on have weight 1; one token of safety
    if (!(whole <= r.from)) r.from = whole;  // NaN: no key has weight 1 for certain
    const A reach = c.ramp + span + 1;       // one token of safety
    int64_t first = reach < 0 ? c.n : reach < (A)(hi - lo) ? hi - (int64_t)reach : lo;  // NaN: all keys
    if (first < lo) first = lo;
    if (first > hi) continue;
    if (first < r.first) r.first = first;
    if (hi + 1 > r.last) r.last = hi + 1;
  }
  return r;
}

// moves lane t of each register of [panel][row][lane] from row r + t to row r, or back, in log2(lanes) steps
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

// Scores of a block by relative distance: row r of [panel][row][lane] belongs to distance nearest + r. After `shear`,
// the scores of a key are in the same row for all lanes of a register: row_of(key) + the first lane of the register.
template <class A>
struct Distances {
  const A* table;  // relative position table of the head, or null
  int64_t rows, nearest, last;
  int64_t lo, hi;  // rows whose distance is in the table

  Distances(const SpanCall<A>& c, int64_t b, int64_t h, int64_t i0, int64_t lanes, const KeyRange<A>& r) {
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

// the products of the queries with the relative position table, sheared
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

// copies a tile [panel][key][lane] to the sheared buffer `kept`, which is ordered by distance, or back if TO is false
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

// tile (+)= rows [keys][d] @ panels [panel][d][lane]
template <class A>
static void tile_product(const A* rows, int64_t keys, const A* panels, int64_t lanes, int64_t d, A* tile, bool add) {
  for (int64_t p = 0; p < lanes / kPanel<A>; ++p)
    product(as_rows(rows, d), keys, panels + p * d * kPanel<A>, kPanel<A>, kPanel<A>, d, tile + p * kTile * kPanel<A>,
            kPanel<A>, add);
}

// panels [panel][d][lane] += rows [keys][d] transposed @ tile
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
  bool plain;  // every query sees every key with weight 1
};

// loads the keys from j0 on and their values, and computes their scores with the queries of the block in w.score
template <class S, class A>
static Tile<A> tile(const SpanCall<A>& c, int64_t b, int64_t kv, int64_t j0, int64_t lanes, const KeyRange<A>& r,
                    const Distances<A>& x, const SpanWork<A>& w) {
  const int64_t keys = r.last - j0 < kTile ? r.last - j0 : kTile;
  const A* k = gather(row<S>(c.k, c.k_stride, b, kv, j0), c.k_stride[2], keys, c.d, w.keys);
  const A* v = gather(row<S>(c.v, c.v_stride, b, kv, j0), c.v_stride[2], keys, c.d, w.values);
  if (x.table) skew<false>(x, j0, keys, lanes, w.score, w.rel);
  tile_product(k, keys, w.q_panels, lanes, c.d, w.score, x.table);
  return {keys, k, v, (A)j0 >= r.from && (A)(j0 + keys - 1) <= r.to};
}

// Computes out, maximum and sum of one block of queries, or those of one split of the keys. Returns the number of
// query-key pairs that it multiplied.
template <class S, class A>
static int64_t span_forward(const SpanCall<A>& c, int64_t b, int64_t h, int64_t i0, int64_t count, int64_t lanes,
                            int64_t split, A* base) {
  typedef typename Register<A>::type V;
  constexpr int64_t n = Register<A>::lanes;
  const SpanWork<A> w(base, c, lanes);
  KeyRange<A> r = find_keys(c, b, h, i0, count, lanes, w);
  if (c.splits > 1) {
    if (r.first < split * kSplitKeys) r.first = split * kSplitKeys;
    if (r.last > (split + 1) * kSplitKeys) r.last = (split + 1) * kSplitKeys;
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
    const int64_t at = ((b * c.heads + h) * c.m + i0 + i) * c.splits + split;
    (c.splits > 1 ? c.part_maximum : c.maximum)[at] = total == 0 ? A(0) : w.top[i];
    (c.splits > 1 ? c.part_sum : c.sum)[at] = total;
    for (int64_t j = 0; j < c.d; ++j) {
      const A mean = out[j * kPanel<A>] * inverse;
      if (c.splits > 1) c.part_out[at * c.d + j] = mean;
      else put((S*)c.out + at * c.d + j, mean);
    }
  }
  return r.last > r.first ? (r.last - r.first) * lanes : 0;
}

// computes out, maximum and sum of a row from those of its splits
template <class S, class A>
static void span_merge(const SpanCall<A>& c, int64_t row) {
  const A* out = c.part_out + row * c.splits * c.d;
  const A* maximum = c.part_maximum + row * c.splits;
  A* split = c.part_sum + row * c.splits;  // sum of each split, then its weight
  A top = -__builtin_inf(), total = 0;
  for (int64_t s = 0; s < c.splits; ++s)
    if (split[s] != 0 && maximum[s] > top) top = maximum[s];
  for (int64_t s = 0; s < c.splits; ++s)
    total += split[s] = split[s] == 0 ? A(0) : split[s] * std::exp(maximum[s] - top);
  c.maximum[row] = total == 0 ? A(0) : top;
  c.sum[row] = total;
  for (int64_t j = 0; j < c.d; ++j) {
    A sum = 0;
    for (int64_t s = 0; s < c.splits; ++s) sum += split[s] == 0 ? A(0) : split[s] * out[s * c.d + j];
    put((S*)c.out + row * c.d + j, total == 0 ? A(0) : sum / total);
  }
}

// Computes dq and the gradients of the spans of one block of queries, and adds to dk, dv and the gradient of the table.
// Returns the number of query-key pairs that it multiplied.
template <class S, class A>
static int64_t span_backward(const SpanCall<A>& c, int64_t b, int64_t h, int64_t i0, int64_t count, int64_t lanes,
                             A* base, A* grad_table) {
  typedef typename Register<A>::type V;
  constexpr int64_t n = Register<A>::lanes;
  const SpanWork<A> w(base, c, lanes);
  const KeyRange<A> r = find_keys(c, b, h, i0, count, lanes, w);
  const Distances<A> x(c, b, h, i0, lanes, r);
  const int64_t at = (b * c.heads + h) * c.m + i0, kv = h / c.group;
  pack(row<S>(c.q, c.q_stride, b, h, i0), c.q_stride[2], count, lanes, c.d, c.scale, w.q_panels, w.q_rows, c.wide);
  pack(row<S>(c.grad, c.grad_stride, b, h, i0), c.grad_stride[2], count, lanes, c.d, A(1), w.g_panels, w.g_rows,
       c.wide);
  // The gradient of the softmax subtracts grad . out from grad . v. Both are summed in the same order: where a query
  // sees one key, they are equal to the bit.
  pack((const S*)c.out + at * c.d, c.d, count, lanes, c.d, A(1), w.sum, (A*)nullptr, c.d);
  for (int64_t i = 0; i < lanes; i += n) {
    const int64_t first = i / kPanel<A> * c.d * kPanel<A> + i % kPanel<A>, last = first + c.d * kPanel<A>;
    V dot = {};
    for (int64_t j = first; j < last; j += kPanel<A>) dot += get(w.g_panels + j) * get(w.sum + j);
    set(w.total + i, dot);
  }
  for (int64_t i = 0; i < lanes; ++i) {
    w.top[i] = i < count ? c.maximum[at + i] : A(0);
    const A sum = i < count ? c.sum[at + i] : A(0);
    w.log_sum[i] = sum == 0 ? (A)__builtin_inf() : std::log(sum);  // a query that sees no key: all weights are 0
    w.grad_span[i] = 0;
  }
  for (int64_t i = 0; i < c.d * lanes; ++i) w.sum[i] = 0;
  const bool skewed = x.table && (c.need_q || grad_table);
  if (x.table) by_distance(c, x, w.q_panels, lanes, w.rel);
  for (int64_t i = 0; skewed && i < x.rows * lanes; ++i) w.grad_rel[i] = 0;

  for (int64_t j0 = r.first; j0 < r.last; j0 += kTile) {
    const auto [keys, k, v, plain] = tile<S>(c, b, kv, j0, lanes, r, x, w);
    tile_product(v, keys, w.g_panels, lanes, c.d, w.grad_score, false);
    for (int64_t i = 0; i < lanes; i += n) {
      A* score = w.score + i / kPanel<A> * kTile * kPanel<A> + i % kPanel<A>;
      A* slope = w.grad_score + (score - w.score);
      const V lo = get(w.lo + i), hi = get(w.hi + i), span = get(w.span + i);
      const V top = get(w.top + i), log_sum = get(w.log_sum + i), delta = get(w.total + i);
      V grad_span = {};
      for (int64_t j = 0; j < keys; ++j, score += kPanel<A>, slope += kPanel<A>) {
        V s = get(score) - top;
        s = (s > 80 ? fill(A(80)) : s) - log_sum;  // in two steps, because top + log_sum would be rounded
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
      set(w.grad_span + i, get(w.grad_span + i) + grad_span);
    }
    if (c.need_kv) {
      const int64_t to = ((b * c.heads / c.group + kv) * c.n + j0) * c.wide, part = kTile * kPanel<A>;
      product({w.score, kPanel<A>, 1, kPanel<A>, part}, keys, w.g_rows, c.wide, c.wide, lanes, c.grad_v + to, c.wide,
              true);
      product({w.grad_score, kPanel<A>, 1, kPanel<A>, part}, keys, w.q_rows, c.wide, c.wide, lanes, c.grad_k + to,
              c.wide, true);
    }
    if (c.need_q) panel_product(k, c.d, keys, w.grad_score, kTile * kPanel<A>, lanes, c.d, w.sum);
    if (skewed) skew<true>(x, j0, keys, lanes, w.grad_score, w.grad_rel);
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
    c.grad_span[at + i] = w.grad_span[i] * c.inverse_ramp;
    for (int64_t j = 0; c.need_q && j < c.d; ++j) put((S*)c.grad_q + (at + i) * c.d + j, dq[j * kPanel<A>] * c.scale);
  }
  return r.last > r.first ? (r.last - r.first) * lanes : 0;
}
