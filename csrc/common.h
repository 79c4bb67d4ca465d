// Helpers of all CPU kernels: dtype dispatch, tensor creation, the instruction set, parallel loops.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "plain.h"

namespace sukhops {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The instruction set of the kernels: the fastest one of this CPU, unless a test selected another (isa.cpp).
enum class Isa { base, avx2, avx512, avx512_bf16 };
Isa cpu_isa();

// whether kernels multiply pairs of bfloat16 (AVX512_BF16); only where that is faster than float32
bool fast_bfloat16();

// calls f(T{}), where T is the C++ type of the dtype
template <class F>
void with_type(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default: STD_TORCH_CHECK(false, "expected dtype float32, float64, bfloat16 or float16");
  }
}

// the accumulation dtype: float64 for float64, else float32
inline ScalarType acc_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline int64_t item_size(ScalarType dtype) {
  int64_t size = 0;
  with_type(dtype, [&](auto t) { size = sizeof t; });
  return size;
}

// An uninitialized contiguous tensor. Bypasses the dispatcher, whose overhead exceeds the time of a small operator.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;)
    strides[i] = std::exchange(step, step * std::max<int64_t>(1, sizes.begin()[i]));
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device, like.get_device(), &made));
  return Tensor(made);
}

inline Tensor zeros(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  return torch::stable::new_zeros(like, std::vector<int64_t>(sizes), dtype);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// a view of a matrix in memory that `owner` owns; `stride` is the row stride in elements
inline Tensor matrix_at(void* at, int64_t rows, int64_t cols, int64_t stride, ScalarType dtype, const Tensor& owner) {
  const std::array<int64_t, 2> sizes{rows, cols}, strides{stride, 1};
  return torch::stable::from_blob(at, {sizes.data(), 2}, {strides.data(), 2}, owner.device(), dtype);
}

// a view of the first rows * cols elements of a buffer as a matrix
inline Tensor matrix(const Tensor& buffer, int64_t rows, int64_t cols) {
  return matrix_at(buffer.data_ptr(), rows, cols, cols, buffer.scalar_type(), buffer);
}

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// the size of balanced pieces of n items, at most `most` items each
inline int64_t balanced_size(int64_t n, int64_t most) { return divide_up(n, std::max<int64_t>(1, divide_up(n, most))); }

// calls f(i) for i in [0, n) in parallel; a thread takes ranges of at least `grain`
template <class F>
void parallel_rows(int64_t n, int64_t grain, const F& f) {
  torch::stable::parallel_for(0, n, std::max<int64_t>(1, grain), [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) f(i);
  });
}

// Scratch memory of the calling thread, aligned to a cache line and reused by later calls. `Purpose` is a tag type:
// buffers that are in use at the same time have different tags.
template <class T, class Purpose>
T* thread_memory(int64_t size) {
  static thread_local std::vector<T> memory;
  const size_t more = 64 / sizeof(T);
  if (memory.size() < size + more) memory.resize(size + more);
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

// calls f(i) for i in [0, n) in one parallel region with dynamic scheduling: an idle thread takes the next i
template <class F>
void parallel_dynamic(int64_t n, const F& f) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(n, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
  });
}

}  // namespace sukhops
