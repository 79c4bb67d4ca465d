// float32 products for CPUs on which torch's library leaves half of AVX-512 unused: MKL does so on
// AMD, where this takes 0.5 to 0.6 of its time. Anything else goes to the library (common.h).
//
// The usual scheme: panels of b and blocks of a are packed, and a kernel keeps 14 x 32 sums in
// registers. A thread owns rows of the result, so a result does not depend on how threads are timed.
#include "common.h"

namespace sukhops {

static std::atomic<int64_t> products{0};

void count_product() { products.fetch_add(1, std::memory_order_relaxed); }

int64_t product_count() { return products.load(std::memory_order_relaxed); }

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

namespace {

constexpr int64_t kRows = 14, kCols = 32;   // of the sums in registers
constexpr int64_t kDepth = 704;             // of a packed panel: kCols * kDepth floats stay in the L2 cache
constexpr int64_t kRun = 128;               // products summed in a register before they join the result
constexpr int64_t kBlock = 8 * kRows;       // rows of a that are packed at once

struct Strided {
  const float* data;
  int64_t row, col;
};

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512 {
constexpr int64_t kRegisterBytes = 64;
#include "vec.h"

// c [kRows, kCols] (+)= a [kRows, depth] @ b [depth, kCols], both packed by depth
void multiply(const float* a, const float* b, int64_t depth, float* c, int64_t stride, bool add) {
  for (; depth > 0; depth -= kRun, add = true) {
    vf sum[kRows][2];
    for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = vf{};
    for (int64_t p = depth < kRun ? depth : kRun; p > 0; --p) {
      const vf b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 14
      for (int i = 0; i < kRows; ++i) {
        const vf x = splat(a[i]);
        sum[i][0] += x * b0;
        sum[i][1] += x * b1;
      }
      a += kRows;
      b += kCols;
    }
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i) {
      float* row = c + i * stride;
      if (add) {
        sum[i][0] += load(row);
        sum[i][1] += load(row + kLanes);
      }
      store(row, sum[i][0]);
      store(row + kLanes, sum[i][1]);
    }
  }
}

// the transpose of sixteen vectors, halving the blocks that trade places
void transpose(vf (&r)[kLanes]) {
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma GCC unroll 4
  for (int s = 8; s > 0; s /= 2) {
    const vi low = (lane & s) == 0;
    const vi first = low ? lane : lane + 16 - s, second = low ? lane + s : lane + 16;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & s) continue;
      const vf x = r[i], y = r[i + s];
      r[i] = __builtin_shuffle(x, y, first);
      r[i + s] = __builtin_shuffle(x, y, second);
    }
  }
}

// packs a [count, depth] matrix by depth, `width` rows side by side, the last ones filled up with
// zeros; may write up to kLanes floats past the end
template <int64_t width>
void pack(const Strided& from, int64_t count, int64_t depth, float* out) {
  for (int64_t i0 = 0; i0 < count; i0 += width, out += width * depth) {
    const int64_t n = count - i0 < width ? count - i0 : width;
    const float* src = from.data + i0 * from.row;
    if (from.col != 1) {
      for (int64_t p = 0; p < depth; ++p) {
        for (int64_t i = 0; i < n; ++i) out[p * width + i] = src[i * from.row + p * from.col];
        for (int64_t i = n; i < width; ++i) out[p * width + i] = 0.0f;
      }
      continue;
    }
    int64_t p = 0;
    for (; p + kLanes <= depth; p += kLanes) {
      for (int64_t i = 0; i < width; i += kLanes) {
        vf row[kLanes];
        for (int64_t r = 0; r < kLanes; ++r)
          row[r] = i + r < n ? load(src + (i + r) * from.row + p) : vf{};
        transpose(row);
        for (int64_t q = 0; q < kLanes; ++q) store(out + (p + q) * width + i, row[q]);
      }
    }
    for (; p < depth; ++p)
      for (int64_t i = 0; i < width; ++i) out[p * width + i] = i < n ? src[i * from.row + p] : 0.0f;
  }
}

}  // namespace avx512
#pragma GCC pop_options

Strided strided(const Tensor& t) { return {data<float>(t), t.stride(0), t.stride(1)}; }

// the same matrix with rows and columns exchanged, starting at a row and a column
Strided at(const Strided& m, int64_t row, int64_t col) {
  return {m.data + row * m.row + col * m.col, m.row, m.col};
}

Strided flipped(const Strided& m) { return {m.data, m.col, m.row}; }

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace

bool own_product(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  const bool pays = cpu_isa() == Isa::avx512 && __builtin_cpu_is("amd");
  const int64_t m = a.size(0), n = b.size(1), k = a.size(1);
  if (!pays || a.scalar_type() != ScalarType::Float || out.stride(1) != 1 || m < 64 || n < kCols || k == 0)
    return false;
  const Strided left = strided(a), right = flipped(strided(b));
  float* const c = data<float>(out);
  const int64_t stride = out.stride(0), depths = std::min(k, kDepth);
  const Tensor panels = empty({padded(n, kCols) * depths + 16}, ScalarType::Float, a);
  float* const packed = data<float>(panels);
  for (int64_t p = 0; p < k; p += kDepth) {
    const int64_t depth = std::min(kDepth, k - p);
    const bool sum = add || p > 0;
    torch::stable::parallel_for(0, padded(n, kCols) / kCols, 4, [&](int64_t lo, int64_t hi) {
      const int64_t count = std::min(n, hi * kCols) - lo * kCols;
      avx512::pack<kCols>(at(right, lo * kCols, p), count, depth, packed + lo * kCols * depth);
    });
    torch::stable::parallel_for(0, padded(m, kBlock) / kBlock, 1, [&](int64_t lo, int64_t hi) {
      std::vector<float> block(kBlock * depth + 16);
      float edge[kRows * kCols];
      for (int64_t i0 = lo * kBlock; i0 < std::min(m, hi * kBlock); i0 += kBlock) {
        const int64_t rows = std::min(kBlock, m - i0);
        avx512::pack<kRows>(at(left, i0, p), rows, depth, block.data());
        for (int64_t j = 0; j < n; j += kCols) {
          for (int64_t i = 0; i < rows; i += kRows) {
            const int64_t h = std::min(kRows, rows - i), w = std::min(kCols, n - j);
            float* const to = c + (i0 + i) * stride + j;
            const float *x = block.data() + i * depth, *y = packed + j * depth;
            if (h == kRows && w == kCols) {
              avx512::multiply(x, y, depth, to, stride, sum);
              continue;
            }
            avx512::multiply(x, y, depth, edge, kCols, false);
            for (int64_t r = 0; r < h; ++r)
              for (int64_t s = 0; s < w; ++s)
                to[r * stride + s] = edge[r * kCols + s] + (sum ? to[r * stride + s] : 0.0f);
          }
        }
      }
    });
  }
  return true;
}

#else

bool own_product(const Tensor&, const Tensor&, const Tensor&, bool) { return false; }

#endif

}  // namespace sukhops

STABLE_TORCH_LIBRARY_IMPL(sukhops, CompositeExplicitAutograd, m) {
  m.impl("product_count", TORCH_BOX(&sukhops::product_count));
}
