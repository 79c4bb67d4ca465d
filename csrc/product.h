// Matrix products on the CPU: the one room where a product's kernel is chosen (product.cpp).
#pragma once

#include "common.h"

namespace sukhops {

// float32, float64, bfloat16 or float16 in memory; rows and columns any number of elements apart
struct Matrix {
  void* data;
  ScalarType dtype;
  int64_t rows, cols, row, col;

  Matrix(void* data, ScalarType dtype, int64_t rows, int64_t cols, int64_t row, int64_t col = 1)
      : data(data), dtype(dtype), rows(rows), cols(cols), row(row), col(col) {}
  explicit Matrix(const Tensor& t)
      : Matrix(t.data_ptr(), t.scalar_type(), t.size(0), t.size(1), t.stride(0), t.stride(1)) {}

  // rows x cols elements from (i, j) on
  Matrix part(int64_t i, int64_t j, int64_t rows, int64_t cols) const {
    return {static_cast<char*>(data) + (i * row + j * col) * item_size(dtype), dtype, rows, cols, row, col};
  }
  Matrix transposed() const { return {data, dtype, cols, rows, col, row}; }
};

// out (+)= a @ b. Sums are float32, or float64 for float64 factors. `out` has contiguous rows; where it is bfloat16 or
// float16 the sums are rounded to it at the end, and nothing can be added. The factors have the same dtype, or a is
// float32 and b a half precision: then a is rounded to bfloat16 where the CPU multiplies pairs of those.
struct Product {
  Matrix out, a, b;
  bool add = false;
};

// by the calling thread inside a parallel region
void multiply(const Product& p);

// by all threads: those of our kernels in one parallel region, each of the library's in one of its own. No two products
// may write the same element.
void multiply_all(const std::vector<Product>& products);

// adds to the count of products of all rows of hidden with a weight, which tests of what a pass costs read
void count_products(int64_t count);

}  // namespace sukhops
