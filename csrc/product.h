// Matrix products on the CPU. product.cpp selects the kernel.
#pragma once

#include "common.h"

namespace sukhops {

// a view of a strided matrix of float32, float64, bfloat16 or float16; strides are in elements
struct Matrix {
  void* data;
  ScalarType dtype;
  int64_t rows, cols, row_stride, col_stride;

  Matrix(void* data, ScalarType dtype, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride = 1)
      : data(data), dtype(dtype), rows(rows), cols(cols), row_stride(row_stride), col_stride(col_stride) {}
  explicit Matrix(const Tensor& t)
      : Matrix(t.data_ptr(), t.scalar_type(), t.size(0), t.size(1), t.stride(0), t.stride(1)) {}

  // the rows x cols submatrix that starts at (i, j)
  Matrix submatrix(int64_t i, int64_t j, int64_t rows, int64_t cols) const {
    return {static_cast<char*>(data) + (i * row_stride + j * col_stride) * item_size(dtype), dtype, rows, cols,
            row_stride, col_stride};
  }
  Matrix transposed() const { return {data, dtype, cols, rows, col_stride, row_stride}; }
};

// out (+)= a @ b, accumulated in float32, or in float64 for float64 factors. The rows of `out` are contiguous. A
// bfloat16 or float16 `out` is rounded once, at the end, and does not support `add`. The factors have the same dtype,
// or a is float32 and b is bfloat16 or float16. In the mixed case with a bfloat16 b, a is rounded to bfloat16 on CPUs
// that multiply pairs of bfloat16.
struct Product {
  Matrix out, a, b;
  bool add = false;
};

// runs in the calling thread, inside a parallel region
void multiply(const Product& p);

// Uses all threads: one parallel region for the products of our kernels, and one for each product of the BLAS library.
// No two products may write the same element.
void multiply_all(const std::vector<Product>& products);

// Counts products of all rows of hidden with a weight. Tests read the count to check the cost of a pass.
void count_products(int64_t count);

}  // namespace sukhops
