// What the kernels of products take, without torch: tests build them alone.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

namespace sukhops {

struct HalfBits {  // of a float16, for kernels that keep it as its bits
  uint16_t bits;
};

constexpr int64_t kBlockBytes = 512 << 10;  // of a packed block of b, which stays in the second cache; float64: twice
constexpr int64_t kProductRun = 256;        // units of the depth that a register sums before they join the result
constexpr int64_t kDepth = 512;             // units of it, at most: a few rows of a stay in the first cache
constexpr int64_t kThin = 32;               // units at a time, where b is left in its rows
constexpr int64_t kStreamRows = 32;         // rows of a up to which a weight is streamed, half of it without AVX-512
constexpr int64_t kThinRows = 14;           // rows of a up to which b is left in its rows

struct Factors {
  const void* a;
  int64_t a_row, a_col;
  const void* b;
  int64_t b_row, b_col, m, n, k;
  void* out;
  int64_t stride;  // of its rows
  bool add, thin;  // thin: a has so few rows that packing b would cost more than it saves
  void* scratch;
};

}  // namespace sukhops
