// Arguments and constants of the matrix product kernels. No torch headers: tests compile the kernels alone.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

namespace sukhops {

struct HalfBits {  // a float16 as its bits
  uint16_t bits;
};

// "Depth" is the inner dimension of a product. A unit of it is defined in product_kernels.h.
constexpr int64_t kBlockBytes = 512 << 10;  // size of a packed block of b, to stay in L2; twice that for float64
constexpr int64_t kProductRun = 256;        // units that are summed in a register before they are added to the output
constexpr int64_t kDepth = 512;             // most units in a packed block, so that a few rows of a stay in L1
constexpr int64_t kThin = 32;               // units in a block if b is not packed
constexpr int64_t kStreamRows = 32;         // most rows of a for which the weight is streamed; half without AVX-512
constexpr int64_t kThinRows = 14;           // most rows of a for which b is not packed

// out [m, n] (+)= a [m, k] @ b [k, n], with the strides of a and b in elements
struct Factors {
  const void* a;
  int64_t a_row, a_col;
  const void* b;
  int64_t b_row, b_col, m, n, k;
  void* out;
  int64_t stride;  // between rows of out
  bool add, thin;  // add: accumulate into out; thin: do not pack b, because a has too few rows to pay for it
  void* scratch;
};

}  // namespace sukhops
