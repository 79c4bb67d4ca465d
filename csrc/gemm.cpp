// float32 results of float32 and bfloat16 products, for CPUs with AVX-512. float32: MKL leaves half of AVX-512 unused
// on AMD. bfloat16, where the CPU multiplies it: the library would round the result to bfloat16. Anything else goes to
// the library (common.h).
//
// The usual scheme: b and a are packed, and a kernel keeps 14 x 32 sums in registers. Many rows of a: b is packed once
// and each thread packs blocks of its own rows. Few rows: a is packed once, and each thread packs panels of its own
// columns of b, which stay in its L2 cache. A result has one owner: it does not depend on how threads are timed.
#include "common.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#endif

namespace sukhops {

static std::atomic<int64_t> products{0};

void count_product() { products.fetch_add(1, std::memory_order_relaxed); }

int64_t product_count() { return products.load(std::memory_order_relaxed); }

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

namespace {

constexpr int64_t kRows = 14, kCols = 32;  // of the sums in registers
constexpr int64_t kDepth = 704;            // units of a packed panel: kCols * kDepth floats stay in the L2 cache
constexpr int64_t kRun = 128;              // units summed in a register before they join the result
constexpr int64_t kBlock = 8 * kRows;      // rows of a that are packed at once
// Measured crossovers (GFLOP/s on 2 cores of an AMD EPYC, D = 512, blocks of 4,096 columns). Logits, whose b is a weight
// transposed: 155 with shared columns, 139 by the library and 69 with shared rows at 64 rows; 187, 128 and 182 at 1,024;
// 205, 172 and 168 at 2,048. Below 16 rows packing does not pay. The gradient of hidden, whose b is not transposed: the
// library is ahead up to 512 rows (137 and 91 at 64).
constexpr int64_t kLeastRows = 16, kFewRows = 2048, kManyRows = 1024;

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace floats {
constexpr int64_t kRegisterBytes = 64;
constexpr bool kPairs = false;
#include "vec.h"

#include "gemm_kernel.h"
}  // namespace floats
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
namespace pairs {
constexpr int64_t kRegisterBytes = 64;
constexpr bool kPairs = true;
#include "vec.h"

#include "gemm_kernel.h"
}  // namespace pairs
#pragma GCC pop_options

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// a matrix of S, or its transpose
template <class S>
struct Strided {
  const S* data;
  int64_t row, col;

  explicit Strided(const Tensor& t) : data(static_cast<const S*>(t.data_ptr())), row(t.stride(0)), col(t.stride(1)) {}
  Strided(const S* data, int64_t row, int64_t col) : data(data), row(row), col(col) {}
  Strided at(int64_t i, int64_t j) const { return {data + i * row + j * col, row, col}; }
  Strided transposed() const { return {data, col, row}; }

  template <int64_t width>
  void pack(int64_t count, int64_t depth, float* out) const {
    if constexpr (sizeof(S) == 4)
      floats::pack<width>(data, row, col, count, depth, out);
    else
      pairs::pack<width>(data, row, col, count, depth, out);
  }
};

// out [m, n] (+)= a [m, k] @ b [k, n]
template <class S>
struct Product {
  static constexpr int64_t kPer = sizeof(S) == 4 ? 1 : 2;  // elements of a unit
  Strided<S> a, b;                                         // b transposed, [n, k]
  int64_t m, n, k;
  float* out;
  int64_t stride;
  bool add;

  // rows and columns of packed panels x and y, `units` deep, into out from (i, j) on
  void multiply(const float* x, const float* y, int64_t units, int64_t i, int64_t j, bool sum) const {
    constexpr auto kernel = sizeof(S) == 4 ? &floats::multiply : &pairs::multiply;
    const int64_t h = std::min(kRows, m - i), w = std::min(kCols, n - j);
    float* const to = out + i * stride + j;
    if (h == kRows && w == kCols) return kernel(h, x, y, units, to, stride, sum);
    float edge[kRows * kCols];
    kernel(h, x, y, units, edge, kCols, false);
    for (int64_t r = 0; r < h; ++r)
      for (int64_t s = 0; s < w; ++s) to[r * stride + s] = edge[r * kCols + s] + (sum ? to[r * stride + s] : 0.0f);
  }

  // f(first element, elements, units) for each part of the depth
  template <class F>
  void each_depth(const F& f) const {
    for (int64_t p = 0; p < k; p += kDepth * kPer) {
      const int64_t depth = std::min(kDepth * kPer, k - p);
      f(p, depth, (depth + kPer - 1) / kPer);
    }
  }

  void share_rows(const Tensor& like) const {
    const int64_t panel = std::min((k + kPer - 1) / kPer, kDepth);
    const Tensor panels = empty({padded(n, kCols) * panel + kCols}, ScalarType::Float, like);
    float* const packed = data<float>(panels);
    each_depth([&](int64_t p, int64_t depth, int64_t units) {
      torch::stable::parallel_for(0, padded(n, kCols) / kCols, 4, [&](int64_t lo, int64_t hi) {
        b.at(lo * kCols, p).template pack<kCols>(std::min(n, hi * kCols) - lo * kCols, depth,
                                                 packed + lo * kCols * units);
      });
      torch::stable::parallel_for(0, padded(m, kBlock) / kBlock, 1, [&](int64_t lo, int64_t hi) {
        std::vector<float> block(kBlock * units + kCols);
        for (int64_t i0 = lo * kBlock; i0 < std::min(m, hi * kBlock); i0 += kBlock) {
          const int64_t rows = std::min(kBlock, m - i0);
          a.at(i0, p).template pack<kRows>(rows, depth, block.data());
          for (int64_t j = 0; j < n; j += kCols)
            for (int64_t i = 0; i < rows; i += kRows)
              multiply(block.data() + i * units, packed + j * units, units, i0 + i, j, add || p > 0);
        }
      });
    });
  }

  void share_columns(const Tensor& like) const {
    const int64_t all = padded(m, kRows);
    const Tensor rows = empty({all * ((k + kPer - 1) / kPer) + kCols}, ScalarType::Float, like);
    float* const packed = data<float>(rows);
    torch::stable::parallel_for(0, all / kRows, std::max<int64_t>(1, 65536 / (kRows * k)), [&](int64_t lo, int64_t hi) {
      std::vector<float> block(kRows * kDepth + kCols);
      each_depth([&](int64_t p, int64_t depth, int64_t units) {
        for (int64_t i = lo * kRows; i < std::min(m, hi * kRows); i += kRows) {
          a.at(i, p).template pack<kRows>(std::min(kRows, m - i), depth, block.data());
          std::copy_n(block.data(), kRows * units, packed + all * (p / kPer) + i * units);
        }
      });
    });
    torch::stable::parallel_for(0, padded(n, kCols) / kCols, 1, [&](int64_t lo, int64_t hi) {
      std::vector<float> panel(kCols * kDepth + kCols);
      for (int64_t j = lo * kCols; j < std::min(n, hi * kCols); j += kCols)
        each_depth([&](int64_t p, int64_t depth, int64_t units) {
          b.at(j, p).template pack<kCols>(std::min(kCols, n - j), depth, panel.data());
          for (int64_t i = 0; i < m; i += kRows)
            multiply(packed + all * (p / kPer) + i * units, panel.data(), units, i, j, add || p > 0);
        });
    });
  }
};

template <class S>
void run(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  const Product<S> p{Strided<S>(a), Strided<S>(b).transposed(), a.size(0), b.size(1), a.size(1), data<float>(out),
                     out.stride(0), add};
  b.stride(0) == 1 && p.m <= kFewRows ? p.share_columns(a) : p.share_rows(a);
}

}  // namespace

bool own_product(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  const bool narrow = a.scalar_type() == ScalarType::BFloat16;
  if (out.scalar_type() != ScalarType::Float || out.stride(1) != 1 || a.size(1) == 0) return false;
  if (narrow && fast_bfloat16()) {
    run<uint16_t>(out, a, b, add);
    return true;
  }
  const int64_t least = b.stride(0) == 1 ? kLeastRows : kManyRows;
  const bool pays = cpu_isa() == Isa::avx512 && __builtin_cpu_is("amd") && a.size(0) >= least && b.size(1) >= kCols;
  if (!narrow && pays) run<float>(out, a, b, add);
  return !narrow && pays;
}

#else

bool own_product(const Tensor&, const Tensor&, const Tensor&, bool) { return false; }

#endif

}  // namespace sukhops

STABLE_TORCH_LIBRARY_IMPL(sukhops, CompositeExplicitAutograd, m) {
  m.impl("product_count", TORCH_BOX(&sukhops::product_count));
}
