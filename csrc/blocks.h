// What kernels share that walk the vocabulary in blocks of library products: the tile's size, a block
// of weight rows in the product's dtype, gathered rows, and the sums over tiles.
#pragma once

#include "common.h"

namespace sukhops {

constexpr int64_t kMaxWidth = 4096;         // vocabulary entries in a tile
constexpr int64_t kTileBytes = 16ll << 20;  // bytes in a tile

// the dtype of the factors of a product: float16, and bfloat16 where the CPU has no instruction for it, are many times
// faster converted block by block
inline ScalarType product_dtype(ScalarType dtype) {
  if (dtype == ScalarType::Half) return ScalarType::Float;
  if (dtype == ScalarType::BFloat16 && !fast_bfloat16()) return ScalarType::Float;
  return dtype;
}

inline int64_t item_size(ScalarType dtype) {
  int64_t size = 0;
  with_type(dtype, [&](auto t) { size = sizeof t; });
  return size;
}

inline Tensor rows_of(Tensor t, int64_t start, int64_t length) {
  return torch::stable::narrow(t, 0, start, length);
}

inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// rows of a parallel loop worth one thread's while
inline int64_t grain(int64_t width) { return std::max<int64_t>(1, 16384 / (width + 1)); }

// tiles of at most kTileBytes, as many rows as still leave 256 columns
struct Tiling {
  int64_t rows, width;
  Tiling(int64_t n, int64_t v, int64_t d, int64_t size) {
    width = kTileBytes / (size * std::max<int64_t>(1, std::max(n, d)));
    width = std::min(kMaxWidth, std::max<int64_t>(256, width / 64 * 64));
    width = std::min(width, v);
    rows = std::min(n, std::max<int64_t>(1, kTileBytes / (size * width)));
  }
};

// Products of a block of the vocabulary in the accumulation dtype, and their gradients in the dtype that products are
// taken in: a row pass reads a row of the one and writes the row of the other over it.
struct Tile {
  Tensor buffer;
  ScalarType factor;

  Tile(const Tiling& tiling, ScalarType acc, ScalarType factor, const Tensor& like)
      : buffer(empty({tiling.rows * tiling.width}, acc, like)), factor(factor) {}
  int64_t gradient_stride(int64_t width) const { return width * item_size(buffer.scalar_type()) / item_size(factor); }
  Tensor products(int64_t rows, int64_t width) const { return matrix(buffer, rows, width); }
  Tensor gradients(int64_t rows, int64_t width) const {
    return matrix_at(buffer.data_ptr(), rows, width, gradient_stride(width), factor, buffer);
  }
};

// The weight, a block of rows at a time in the product's dtype.
class WeightBlocks {
 public:
  WeightBlocks(const Tensor& weight, ScalarType dtype, int64_t width)
      : weight_(weight), convert_(weight.scalar_type() != dtype) {
    if (convert_) buffer_ = empty({width, weight.size(1)}, dtype, weight);
  }
  Tensor rows(int64_t v0, int64_t width) {
    Tensor block = rows_of(weight_, v0, width);
    if (!convert_) return block;
    Tensor converted = matrix(buffer_, width, weight_.size(1));
    torch::stable::copy_(converted, block);
    return converted;
  }

 private:
  const Tensor& weight_;
  bool convert_;
  Tensor buffer_;
};

// rows of `from` as a contiguous matrix in `dtype`; `from` itself when that is what it is
inline Tensor gather_rows(const Tensor& from, const std::vector<int64_t>& rows, ScalarType dtype) {
  const int64_t n = rows.size(), d = from.size(1);
  if (n == from.size(0) && from.scalar_type() == dtype && from.is_contiguous()) return from;
  Tensor out = empty({n, d}, dtype, from);
  with_type(from.scalar_type(), [&](auto s) {
    using S = decltype(s);
    with_type(dtype, [&](auto t) {
      using T = decltype(t);
      const S* src = data<S>(from);
      T* dst = data<T>(out);
      const int64_t row_stride = from.stride(0), stride = from.stride(1);
      parallel_rows(n, 65536 / (d + 1), [&](int64_t i) {
        for (int64_t j = 0; j < d; ++j)
          dst[i * d + j] = static_cast<T>(src[rows[i] * row_stride + j * stride]);
      });
    });
  });
  return out;
}

// a converted copy of a vector in the accumulation dtype, or an empty tensor
inline Tensor as_acc(const std::optional<Tensor>& t, ScalarType acc, const Tensor& like) {
  return t ? torch::stable::contiguous(torch::stable::to(*t, acc)) : empty({0}, acc, like);
}

// acc (+)= a @ b, where acc may be wider than the product's dtype: then by way of `scratch`
inline void accumulate(const Tensor& acc, const Tensor& a, const Tensor& b, bool first, Tensor& scratch) {
  if (acc.scalar_type() == a.scalar_type()) return first ? mm_out(acc, a, b) : addmm_out(acc, a, b);
  const int64_t rows = acc.size(0), cols = acc.size(1);
  if (!scratch.defined() || scratch.numel() < rows * cols)
    scratch = empty({rows, cols}, a.scalar_type(), a);
  mm_out(matrix(scratch, rows, cols), a, b);
  const BFloat16* src = data<BFloat16>(scratch);
  float* dst = data<float>(acc);
  torch::stable::parallel_for(0, rows * cols, 16384, [&](int64_t lo, int64_t hi) {
    if (first) {
      for (int64_t i = lo; i < hi; ++i) dst[i] = static_cast<float>(src[i]);
    } else {
      for (int64_t i = lo; i < hi; ++i) dst[i] += static_cast<float>(src[i]);
    }
  });
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
template <class A, class S, class Key, class Other>
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
      S* out = data<S>(to) + key(picks[starts[run]]) * d;
      for (int64_t j = 0; j < d; ++j) sum[j] = static_cast<A>(out[j]);
      for (int64_t i = starts[run]; i < starts[run + 1]; ++i) {
        const S* row = data<S>(from) + other(picks[i]) * fs;
        for (int64_t j = 0; j < d; ++j) sum[j] += picks[i].grad * static_cast<A>(row[j * fc]);
      }
      for (int64_t j = 0; j < d; ++j) out[j] = static_cast<S>(sum[j]);
    }
  });
}

// A gradient [V, D] that is finished block by block, in the product's or in a wider type.
class WeightGradient {
 public:
  WeightGradient(const Tensor& out, ScalarType product, ScalarType acc, int64_t width, bool one_tile)
      : out_(out), direct_(out.defined() && out.scalar_type() == product), one_tile_(one_tile) {
    if (!out.defined()) return;
    in_place_ = direct_ && (product == acc || one_tile);
    if (!in_place_) block_ = empty({width, out.size(1)}, acc, out);
  }
  void add(const Tensor& tile, const Tensor& rows, int64_t v0, bool first) {
    if (!out_.defined()) return;
    const int64_t width = tile.size(1);
    Tensor to = in_place_ ? rows_of(out_, v0, width) : matrix(block_, width, out_.size(1));
    if (in_place_ && one_tile_) return mm_out(to, transposed(tile), rows);
    accumulate(to, transposed(tile), rows, first, scratch_);
  }
  void finish(int64_t v0, int64_t width) {
    if (!out_.defined() || in_place_) return;
    Tensor to = rows_of(out_, v0, width);
    torch::stable::copy_(to, matrix(block_, width, out_.size(1)));
  }

 private:
  Tensor out_, block_, scratch_;
  bool direct_, one_tile_, in_place_ = false;
};

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
