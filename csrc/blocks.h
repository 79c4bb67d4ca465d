// What kernels share that walk the vocabulary: parts of it that threads take, tiles of products, what each part found,
// gathered rows, and sums over rows.
#pragma once

#include "product.h"

namespace sukhops {

constexpr int64_t kMaxWidth = 1024;                // columns of a tile that a thread computes at a time
constexpr int64_t kPartBytes = 512 << 10;          // bytes of it, which stay in the second cache
constexpr int64_t kPartRows = 252;                 // rows of it
constexpr int64_t kTileBytes = 8ll << 20;          // bytes of a tile that all threads share, if it has 64 columns then

// rows of a parallel loop worth one thread's while
inline int64_t grain(int64_t width) { return std::max<int64_t>(1, 16384 / (width + 1)); }

// A pass over the vocabulary [0, v) for n rows of hidden, of which nothing is summed over the vocabulary but numbers of a
// row: each cell, some rows and a part of the vocabulary, is a thread's own, and walked in tiles of up to `width` columns.
// `heads` tiles of `size` bytes an element belong together, and `k` numbers of a row and a part.
struct Walk {
  int64_t n, v, rows, width, part, parts;

  Walk(int64_t n, int64_t v, int64_t size, int64_t heads = 1, int64_t k = 1) : n(n), v(v) {
    rows = std::max<int64_t>(1, even(n, kPartRows));
    const int64_t fits = kPartBytes / (size * rows * heads) / 64 * 64;
    width = std::min(v, std::min(kMaxWidth, std::max<int64_t>(128, fits)));
    const int64_t cells = std::max<int64_t>(1, divide_up(n, rows)), wanted = divide_up(64, cells);
    const int64_t most = std::max<int64_t>(1, (1 << 20) / (std::max<int64_t>(1, n) * std::max<int64_t>(1, k)));
    part = divide_up(divide_up(v, std::min(wanted, most)), width) * width;
    parts = divide_up(v, part);
  }

  // f(row, rows, part, v0, v1) for each cell; rows of the same part come after each other
  template <class F>
  void each(const F& f) const {
    const int64_t down = divide_up(n, rows);
    each_cell(down * parts, [&](int64_t cell) {
      const int64_t row = cell % down * rows, p = cell / down;
      f(row, std::min(rows, n - row), p, p * part, std::min(v, (p + 1) * part));
    });
  }
};

// A pass whose gradients are summed over the vocabulary: a tile of all rows at a time, of `size` bytes an element in each
// of `heads`. Within it cells are a thread's own, as in Walk.
struct Tiling {
  int64_t n, width, rows, cols;

  Tiling(int64_t n, int64_t v, int64_t size, int64_t heads = 1) : n(n) {
    width = std::max<int64_t>(64, kTileBytes / (size * heads * std::max<int64_t>(1, n)) / 64 * 64);
    width = std::min(v, width);
    rows = std::max<int64_t>(1, even(n, kPartRows));
    const int64_t fits = kPartBytes / (size * rows * heads) / 64 * 64;
    cols = std::min(kMaxWidth, std::max<int64_t>(128, fits));
    cols = std::min(cols, std::max<int64_t>(64, divide_up(width, 16 * 64) * 64));
  }

  int64_t parts() const { return divide_up(width, cols); }

  // f(row, rows, part, col, cols) for each cell of a tile that is `width` wide; the last rows of the first `kept` end a cell
  template <class F>
  void each(int64_t width, int64_t kept, const F& f) const {
    const int64_t across = divide_up(width, cols), above = divide_up(kept, rows), down = above + divide_up(n - kept, rows);
    each_cell(down * across, [&](int64_t cell) {
      const int64_t i = cell / across, p = cell % across;
      const int64_t row = i < above ? i * rows : kept + (i - above) * rows;
      f(row, std::min(rows, (i < above ? kept : n) - row), p, p * cols, std::min(cols, width - p * cols));
    });
  }
};

constexpr float kFar = -800;  // t of exp(t) * t is cut there, so that exp(-inf) * -inf is 0, not NaN

// Sums over a row of e * t, e * e and x, where t = x - shift and e = exp(t); `sum` is that of e. Changes the shift from
// `from` to `to`, which is not below it.
static inline void move_moments(double* moments, double sum, double from, double to) {
  const double decay = std::exp(from - to);
  moments[0] = decay * (moments[0] + std::max<double>(from - to, kFar) * sum);
  moments[1] *= decay * decay;
}

struct PartTile {};

// a thread's tile
template <class A>
A* part_tile(int64_t elements) {
  return thread_memory<A, PartTile>(elements);
}

// What the parts of the vocabulary found of each row: the maximum, the sum of exp(x - maximum), if wanted the three sums of
// move_moments, and the k largest, descending, the lower index first among equals. A part's first row is at part * n.
template <class A>
struct Found {
  int64_t n, k, parts;
  std::vector<A> maximum;
  std::vector<double> sum, moments;
  std::vector<A> value;
  std::vector<int64_t> index;

  Found(int64_t n, int64_t k, int64_t parts, bool with_moments = false)
      : n(n), k(k), parts(parts), maximum(n * parts, -INFINITY), sum(n * parts), moments(with_moments ? 3 * n * parts : 0),
        value(n * parts * k, -INFINITY), index(n * parts * k, -1) {}

  // joins the parts of a row, in their order, in the first of them; returns the log of its sum
  A join(int64_t i) {
    for (int64_t part = 1; part < parts; ++part) {
      const int64_t from = part * n + i;
      const A top = maximum[from] > maximum[i] ? maximum[from] : maximum[i], shift = top == -INFINITY ? A(0) : top;
      if (!moments.empty()) {
        for (const int64_t at : {i, from}) move_moments(&moments[3 * at], sum[at], maximum[at], shift);
        for (int64_t j = 0; j < 3; ++j) moments[3 * i + j] += moments[3 * from + j];
      }
      sum[i] = sum[i] * std::exp(maximum[i] - shift) + sum[from] * std::exp(maximum[from] - shift);
      maximum[i] = top;
      for (int64_t j = from * k; j < (from + 1) * k && index[j] >= 0; ++j) {
        const auto before = [&](int64_t p) { return value[j] > value[p] || index[p] < 0; };  // later parts lose ties
        int64_t p = (i + 1) * k - 1;
        if (!before(p)) break;
        for (; p > i * k && before(p - 1); --p) {
          value[p] = value[p - 1];
          index[p] = index[p - 1];
        }
        value[p] = value[j];
        index[p] = index[j];
      }
    }
    return static_cast<A>(std::log(sum[i]));
  }
};

// rows of `from`, contiguous; `from` itself when those are all
inline Tensor gather_rows(const Tensor& from, const std::vector<int64_t>& rows) {
  const int64_t n = rows.size(), d = from.size(1);
  if (n == from.size(0)) return from;
  Tensor out = empty({n, d}, from.scalar_type(), from);
  with_type(from.scalar_type(), [&](auto s) {
    using S = decltype(s);
    const S* src = data<S>(from);
    S* dst = data<S>(out);
    const int64_t row_stride = from.stride(0), stride = from.stride(1);
    parallel_rows(n, 65536 / (d + 1), [&](int64_t i) {
      for (int64_t j = 0; j < d; ++j) dst[i * d + j] = src[rows[i] * row_stride + j * stride];
    });
  });
  return out;
}

// a converted copy of a vector in the accumulation dtype, or an empty tensor
inline Tensor as_acc(const std::optional<Tensor>& t, ScalarType acc, const Tensor& like) {
  return t ? torch::stable::contiguous(torch::stable::to(*t, acc)) : empty({0}, acc, like);
}

// acc[j] += the sum of column j of a matrix
template <class A>
void add_columns(A* acc, const Tensor& m) {
  const int64_t rows = m.size(0), stride = m.stride(0);
  with_type(m.scalar_type(), [&](auto t) {
    const auto* from = data<decltype(t)>(m);
    torch::stable::parallel_for(0, m.size(1), 64, [&](int64_t lo, int64_t hi) {
      std::vector<double> sum(hi - lo);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = lo; j < hi; ++j) sum[j - lo] += static_cast<A>(from[i * stride + j]);
      for (int64_t j = lo; j < hi; ++j) acc[j] += static_cast<A>(sum[j - lo]);
    });
  });
}

// -inf entries that never entered the top k get the lowest unused indices; a NaN row shows NaN
template <class A>
void finish_top(A* value, int64_t* index, int64_t k, bool nan) {
  for (int64_t j = 0; j < k; ++j) {
    for (int64_t free = 0; index[j] < 0; ++free)
      if (std::find(index, index + k, free) == index + k) index[j] = free;
    if (nan) value[j] = NAN;
  }
}

// one upstream gradient of one logit: of row `row` (in hidden) and vocabulary entry `entry`
template <class A>
struct Pick {
  int64_t entry, row;
  A grad;  // of the product hidden[row] . weight[entry]
};

// adds, for each run of picks with the same `key`, sum grad * from[other] to row `key` of `to`
template <class A, class S, class T, class Key, class Other>
void add_runs(
    const std::vector<Pick<A>>& picks, const Tensor& from, const Tensor& to, Key key, Other other) {
  std::vector<int64_t> starts;
  for (size_t i = 0; i < picks.size(); ++i)
    if (i == 0 || key(picks[i]) != key(picks[i - 1])) starts.push_back(i);
  starts.push_back(picks.size());
  const int64_t d = from.size(1), fs = from.stride(0), fc = from.stride(1);
  torch::stable::parallel_for(0, starts.size() - 1, grain(d), [&](int64_t lo, int64_t hi) {
    std::vector<A> sum(d);
    for (int64_t run = lo; run < hi; ++run) {
      T* out = data<T>(to) + key(picks[starts[run]]) * d;
      for (int64_t j = 0; j < d; ++j) sum[j] = static_cast<A>(out[j]);
      for (int64_t i = starts[run]; i < starts[run + 1]; ++i) {
        const S* row = data<S>(from) + other(picks[i]) * fs;
        for (int64_t j = 0; j < d; ++j) sum[j] += picks[i].grad * static_cast<A>(row[j * fc]);
      }
      for (int64_t j = 0; j < d; ++j) out[j] = static_cast<T>(sum[j]);
    }
  });
}

// the sums over n rows of two columns
inline Tensor sum_of_rows(const std::vector<double>& rows, int64_t n, ScalarType dtype, const Tensor& like) {
  const Tensor out = empty({2}, dtype, like);
  for (int j = 0; j < 2; ++j) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += rows[2 * i + j];
    with_type(dtype, [&](auto t) { data<decltype(t)>(out)[j] = static_cast<decltype(t)>(total); });
  }
  return out;
}

// calls f with a value of the type that sums over hidden are kept in
template <class F>
auto in_acc(const Tensor& hidden, F&& f) {
  return hidden.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

}  // namespace sukhops
