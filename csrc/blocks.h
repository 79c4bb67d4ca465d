// Shared by the kernels that pass over the vocabulary: the division of the work between threads, partial results and
// how they are merged, gathering of rows, sums over rows.
//
// A row is a row of hidden, that is one token position. A part is a contiguous range of vocabulary entries. A cell is
// some rows and some columns (vocabulary entries) that one thread computes alone, in tiles that stay in its cache.
#pragma once

#include "product.h"

namespace sukhops {

constexpr int64_t kMaxWidth = 1024;        // most columns of a tile that one thread computes
constexpr int64_t kPartBytes = 512 << 10;  // size of such a tile, to stay in L2
constexpr int64_t kPartRows = 252;         // most rows of such a tile
constexpr int64_t kTileBytes = 8ll << 20;  // size of a tile that all threads share; larger if 64 columns do not fit

// the least number of rows of `width` elements that are worth a thread of their own
inline int64_t grain(int64_t width) { return std::max<int64_t>(1, 16384 / (width + 1)); }

// Divides n rows and the vocabulary [0, v) into cells, for a pass that reduces each row to a few numbers. A cell is up
// to `rows` rows and one part. A thread computes it in tiles of up to `width` columns. `heads` tiles are in use at the
// same time, with `size` bytes per element. Each part stores `k` numbers per row.
struct PartPlan {
  int64_t n, v, rows, width, part, parts;

  PartPlan(int64_t n, int64_t v, int64_t size, int64_t heads = 1, int64_t k = 1) : n(n), v(v) {
    rows = std::max<int64_t>(1, balanced_size(n, kPartRows));
    const int64_t fits = kPartBytes / (size * rows * heads) / 64 * 64;
    width = std::min(v, std::min(kMaxWidth, std::max<int64_t>(128, fits)));
    const int64_t cells = std::max<int64_t>(1, divide_up(n, rows)), wanted = divide_up(64, cells);
    const int64_t most = std::max<int64_t>(1, (1 << 20) / (std::max<int64_t>(1, n) * std::max<int64_t>(1, k)));
    part = divide_up(divide_up(v, std::min(wanted, most)), width) * width;
    parts = divide_up(v, part);
  }

  // calls f(row, rows, part, v0, v1) for each cell; cells of the same part are consecutive
  template <class F>
  void each(const F& f) const {
    const int64_t down = divide_up(n, rows);
    parallel_dynamic(down * parts, [&](int64_t cell) {
      const int64_t row = cell % down * rows, p = cell / down;
      f(row, std::min(rows, n - row), p, p * part, std::min(v, (p + 1) * part));
    });
  }
};

struct PartTile {};

// the tile of the calling thread
template <class A>
A* part_tile(int64_t elements) {
  return thread_memory<A, PartTile>(elements);
}

// Computes the products hidden @ weight^T of each cell of a plan, and calls f(tile, stride, row, rows, part, v0, width)
// for each tile of them. The products of the first `kept` rows are stored in `logits` [kept, V], the others in the tile
// of the thread.
template <class A, class F>
void each_product(const PartPlan& plan, const Matrix& hidden, const Matrix& weight, ScalarType acc, int64_t kept,
                  A* logits, const F& f) {
  plan.each([&](int64_t row0, int64_t count, int64_t part, int64_t v0, int64_t end) {
    const int64_t above = std::max<int64_t>(0, std::min(kept - row0, count));
    for (int64_t width; v0 < end; v0 += width) {
      width = std::min(plan.width, end - v0);
      const auto rows_at = [&](int64_t row, int64_t rows, A* tile, int64_t stride) {
        if (rows == 0) return;
        multiply({Matrix(tile, acc, rows, width, stride), hidden.submatrix(row, 0, rows, hidden.cols),
                  weight.submatrix(v0, 0, width, weight.cols).transposed()});
        f(tile, stride, row, rows, part, v0, width);
      };
      rows_at(row0, above, logits + row0 * plan.v + v0, plan.v);
      rows_at(row0 + above, count - above, part_tile<A>(plan.rows * plan.width), width);
    }
  });
}

// Divides n rows and the vocabulary [0, v) into tiles of all rows, for a pass whose results are sums over the
// vocabulary. All threads work on one tile of up to `width` columns at a time; within it a thread computes cells of up
// to `rows` x `cols`. Each of `heads` heads has a tile, with `size` bytes per element.
struct TilePlan {
  int64_t n, width, rows, cols;

  TilePlan(int64_t n, int64_t v, int64_t size, int64_t heads = 1) : n(n) {
    width = std::max<int64_t>(64, kTileBytes / (size * heads * std::max<int64_t>(1, n)) / 64 * 64);
    width = std::min(v, width);
    rows = std::max<int64_t>(1, balanced_size(n, kPartRows));
    const int64_t fits = kPartBytes / (size * rows * heads) / 64 * 64;
    cols = std::min(kMaxWidth, std::max<int64_t>(128, fits));
    cols = std::min(cols, std::max<int64_t>(64, divide_up(width, 16 * 64) * 64));
  }

  int64_t parts() const { return divide_up(width, cols); }

  // Calls f(row, rows, part, col, cols) for each cell of a tile that is `width` wide. A cell has either only rows below
  // `kept` or only rows from `kept` on.
  template <class F>
  void each(int64_t width, int64_t kept, const F& f) const {
    const int64_t across = divide_up(width, cols), above = divide_up(kept, rows);
    const int64_t down = above + divide_up(n - kept, rows);
    parallel_dynamic(down * across, [&](int64_t cell) {
      const int64_t i = cell / across, p = cell % across;
      const int64_t row = i < above ? i * rows : kept + (i - above) * rows;
      f(row, std::min(rows, (i < above ? kept : n) - row), p, p * cols, std::min(cols, width - p * cols));
    });
  }
};

// exp(t) * t is computed with max(t, kMinShifted), so that it is 0 for t = -inf, not NaN
constexpr float kMinShifted = -800;

// Changes the shift of three sums over a row from `from` to `to`, where to >= from. The sums are those of e * t, e * e
// and x, where t = x - shift and e = exp(t). `sum` is the sum of e.
static inline void move_moments(double* moments, double sum, double from, double to) {
  const double decay = std::exp(from - to);
  moments[0] = decay * (moments[0] + std::max<double>(from - to, kMinShifted) * sum);
  moments[1] *= decay * decay;
}

// Partial results of each row and part: the maximum, the sum of exp(x - maximum), optionally the three sums of
// move_moments, and the k largest logits in descending order (of equal ones, the lower index first). The results of row
// i and a part are at part * n + i.
template <class A>
struct RowStats {
  int64_t n, k, parts;
  std::vector<A> maximum;
  std::vector<double> sum, moments;
  std::vector<A> value;
  std::vector<int64_t> index;

  RowStats(int64_t n, int64_t k, int64_t parts, bool with_moments = false)
      : n(n), k(k), parts(parts), maximum(n * parts, -INFINITY), sum(n * parts),
        moments(with_moments ? 3 * n * parts : 0), value(n * parts * k, -INFINITY), index(n * parts * k, -1) {}

  // merges the parts of row i, in order, into part 0; returns the log of the merged sum
  A merge_parts(int64_t i) {
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
        // of equal logits, the one of the earlier part comes first
        const auto before = [&](int64_t p) { return value[j] > value[p] || index[p] < 0; };
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

// copies rows of `from` to a contiguous tensor; returns `from` itself if all rows are given
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

// a contiguous vector in the accumulation dtype, or an empty tensor if there is none
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

// Completes the top k of a row: an entry without an index (a logit of -inf) gets the lowest unused index. If the row
// contains NaN, all values become NaN.
template <class A>
void finish_top(A* value, int64_t* index, int64_t k, bool nan) {
  for (int64_t j = 0; j < k; ++j) {
    for (int64_t free = 0; index[j] < 0; ++free)
      if (std::find(index, index + k, free) == index + k) index[j] = free;
    if (nan) value[j] = NAN;
  }
}

// the upstream gradient of one logit: that of row `row` of hidden and vocabulary entry `entry`
template <class A>
struct Pick {
  int64_t entry, row;
  A grad;  // of the logit; later of the product hidden[row] . weight[entry]
};

// For each run of consecutive picks with the same `key`: adds sum grad * from[other] to row `key` of `to`. A run is
// summed by one thread.
template <class A, class S, class T, class Key, class Other>
void scatter_add(
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

// the sums of two columns over n rows
inline Tensor sum_of_rows(const std::vector<double>& rows, int64_t n, ScalarType dtype, const Tensor& like) {
  const Tensor out = empty({2}, dtype, like);
  for (int j = 0; j < 2; ++j) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += rows[2 * i + j];
    with_type(dtype, [&](auto t) { data<decltype(t)>(out)[j] = static_cast<decltype(t)>(total); });
  }
  return out;
}

// calls f(A{}), where A is the accumulation type of hidden
template <class F>
auto with_acc_type(const Tensor& hidden, F&& f) {
  return hidden.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

}  // namespace sukhops
