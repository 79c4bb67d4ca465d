// Compares the portable product kernels (NEON on aarch64) with float64, without torch; run by tests/test_compilers.py.
// If an error is too large, prints the shape and exits with 1.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "plain.h"

namespace sukhops::base {
#ifdef __aarch64__
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
constexpr int64_t kRegisterBytes = 16;
constexpr bool kPairs = false;
#include "vec.h"

#include "product_kernels.h"
}  // namespace sukhops::base

using namespace sukhops;
using namespace sukhops::base;

static std::mt19937 generator(0);

template <class T>
static std::vector<T> normal(int64_t size) {
  std::normal_distribution<float> draw;
  std::vector<T> x(size);
  for (T& v : x) put(&v, draw(generator));
  return x;
}

// out [m, n] = a [m, k] @ b, where b is [k, n] or [n, k] transposed; whether all errors are a few roundings
template <class A, class T>
static bool right(void (*kernel)(const Factors&), int64_t m, int64_t n, int64_t k, bool transposed) {
  const std::vector<T> a = normal<T>(m * k), b = normal<T>(n * k);
  std::vector<A> out(m * n);
  std::vector<double> scratch(1 << 18);
  const int64_t row = transposed ? 1 : n, col = transposed ? k : 1;
  kernel({a.data(), k, 1, b.data(), row, col, m, n, k, out.data(), n, false, m <= kThinRows, scratch.data()});
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double exact = 0, size = 0;
      for (int64_t p = 0; p < k; ++p) {
        const double x = to_float(a[i * k + p]), y = to_float(b[p * row + j * col]);
        exact += x * y;
        size += std::fabs(x * y);
      }
      if (std::fabs(out[i * n + j] - exact) <= (sizeof(A) == 8 ? 1e-15 : 1e-6) * size) continue;
      std::printf("%ld x %ld x %ld: %g, exact %g\n", long(m), long(n), long(k), double(out[i * n + j]), exact);
      return false;
    }
  return true;
}

int main() {
  bool good = true;
  for (const int64_t m : {1, 3, 4, 7, 9, 16, 31, 60})
    for (const int64_t n : {1, 8, 17, 70})
      for (const int64_t k : {1, 16, 33, 300}) {
        good &= right<float, float>(blocked<float, float, float>, m, n, k, true);
        good &= right<float, float>(blocked<float, float, float>, m, n, k, false);
        good &= right<float, HalfBits>(blocked<float, HalfBits, HalfBits>, m, n, k, false);
        good &= right<float, uint16_t>(blocked<float, uint16_t, uint16_t>, m, n, k, true);
        good &= right<double, double>(blocked<double, double, double>, m, n, k, true);
        if (m > kStreamRows) continue;
        good &= right<float, float>(streamed<float, float>, m, n, k, true);
        good &= right<float, HalfBits>(streamed<HalfBits, HalfBits>, m, n, k, true);
        good &= right<float, uint16_t>(streamed<uint16_t, uint16_t>, m, n, k, true);
      }
  std::vector<float> x(kLanes);
  for (float v = -80; v < 80; v += 0.37f) {
    for (int64_t i = 0; i < kLanes; ++i) x[i] = v + 0.01f * i;
    const vf e = vexp(load(x.data())), t = vtanh(load(x.data()));
    for (int64_t i = 0; i < kLanes; ++i) {
      good &= std::fabs(e[i] / std::exp(double(x[i])) - 1) < 3e-7;
      good &= std::fabs(t[i] - std::tanh(double(x[i]))) <= 5e-7 * std::fabs(t[i]);
    }
  }
  if (good) std::printf("products are right\n");
  return !good;
}
