// The inner loops of gemm.cpp. Included where the target has AVX-512, after vec.h, with kPairs = false, and where it
// has AVX512-BF16 too with kPairs = true. A unit is what one lane of a product takes: a float, or two neighbours of the
// depth in bfloat16, whose products are summed in float32.

using Element = std::conditional_t<kPairs, uint16_t, float>;
constexpr int64_t kPerUnit = kPairs ? 2 : 1;  // elements of the depth

template <bool pairs = kPairs>
SUKHOPS_INLINE vf multiply_add(vf sum, vf x, vf y) {
  if constexpr (pairs)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
  else
    return sum + x * y;
}

// c [R, kCols] (+)= a @ b of packed units: a [units, kRows], of which the first R count, b [units, kCols]
template <int R>
static void multiply_rows(const float* a, const float* b, int64_t units, float* c, int64_t stride, bool add) {
  for (; units > 0; units -= kRun, add = true) {
    vf sum[R][2];
    for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = vf{};
    for (int64_t p = units < kRun ? units : kRun; p > 0; --p) {
      const vf b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 14
      for (int i = 0; i < R; ++i) {
        const vf x = splat(a[i]);
        sum[i][0] = multiply_add(sum[i][0], x, b0);
        sum[i][1] = multiply_add(sum[i][1], x, b1);
      }
      a += kRows;
      b += kCols;
    }
#pragma GCC unroll 14
    for (int i = 0; i < R; ++i) {
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

// the same for at least the first `rows` of a
static void multiply(int64_t rows, const float* a, const float* b, int64_t units, float* c, int64_t stride, bool add) {
  const auto kernel = rows <= 4 ? &multiply_rows<4> : rows <= 8 ? &multiply_rows<8> : &multiply_rows<kRows>;
  kernel(a, b, units, c, stride, add);
}

// the transpose of sixteen vectors, halving the blocks that trade places
static inline void transpose(vf (&r)[kLanes]) {
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

SUKHOPS_INLINE float unit(const float* p, int64_t, int64_t) { return *p; }

SUKHOPS_INLINE float unit(const uint16_t* p, int64_t stride, int64_t elements) {
  const uint32_t bits = p[0] | (elements > 1 ? uint32_t(p[stride]) << 16 : 0u);
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// packs a [count, depth] matrix as [units][width], the rows after the last one as zeros; `out` has kLanes floats more
template <int64_t width>
static void pack(const Element* from, int64_t row, int64_t col, int64_t count, int64_t depth, float* out) {
  const int64_t units = (depth + kPerUnit - 1) / kPerUnit;
  for (int64_t i0 = 0; i0 < count; i0 += width, out += width * units) {
    const int64_t n = count - i0 < width ? count - i0 : width;
    const Element* src = from + i0 * row;
    int64_t p = 0;
    if (col == 1) {
      for (; (p + kLanes) * kPerUnit <= depth; p += kLanes) {
        for (int64_t i = 0; i < width; i += kLanes) {
          vf block[kLanes];
          for (int64_t r = 0; r < kLanes; ++r)
            block[r] = i + r < n ? load((const float*)(src + (i + r) * row + p * kPerUnit)) : vf{};
          transpose(block);
          for (int64_t q = 0; q < kLanes; ++q) store(out + (p + q) * width + i, block[q]);
        }
      }
    }
    for (; p < units; ++p) {
      const Element* at = src + p * kPerUnit * col;
      const int64_t left = depth - p * kPerUnit;
      if (row == 1 && n == width && left >= kPerUnit) {
#pragma GCC unroll 32
        for (int64_t i = 0; i < width; ++i) out[p * width + i] = unit(at + i, col, 2);
      } else {
        for (int64_t i = 0; i < width; ++i) out[p * width + i] = i < n ? unit(at + i * row, col, left) : 0.0f;
      }
    }
  }
}
