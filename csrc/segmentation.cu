// The segmentation operators on CUDA. One warp computes a recursion, with its window in registers. The recursions are
// in segmentation_warp.h and are tested on the host.
//
// Two warps of a block compute alpha and beta of a sequence at the same time. The posterior is then one independent
// product per segment. A few long sequences would leave most of the device idle, so they are divided into chunks.
// Therefore the last bit of a result depends on the number of sequences.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "segmentation_means.h"
#include "segmentation_warp.h"

namespace sukhops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr unsigned kAll = 0xffffffffu;  // all lanes of a warp
constexpr int kMostSlots = 128;         // most slots of a window: four per lane

// A warp as the owner of a window of up to 32 * C slots. It loads rows of scores, coalesced, into a ring in shared
// memory, one `advance` before they are read. Without the ring, the backward sweep would read global memory along
// diagonals.
template <int C, class S>
struct Warp {
  static constexpr int kOwn = C, kAhead = 8;
  S* ring;             // [rows, k]
  int rows;            // k - 1 + 2 * kAhead
  int64_t loaded = 0;  // rows loaded so far, counted from the end where the sweep starts

  __host__ __device__ static constexpr int64_t shared(int64_t k) { return (k - 1 + 2 * kAhead) * k; }

  __device__ __forceinline__ int lane() const { return threadIdx.x % 32; }
  __device__ __forceinline__ int slot(int i) const { return lane() + 32 * i; }
  __device__ __forceinline__ bool lead() const { return lane() == 0; }
  __device__ __forceinline__ void sync() const { __syncwarp(); }

  template <class A>
  __device__ __forceinline__ A broadcast(const A* v, int slot) const {
    A x = __shfl_sync(kAll, v[0], slot % 32);
#pragma unroll
    for (int i = 1; i < C; ++i) {  // selecting v[i] before the shuffle would move v to memory
      const A y = __shfl_sync(kAll, v[i], slot % 32);
      x = slot / 32 == i ? y : x;
    }
    return x;
  }

  template <class A>
  __device__ __forceinline__ A max(const A* v) const {
    A m = v[0];
#pragma unroll
    for (int i = 1; i < C; ++i) m = v[i] > m ? v[i] : m;
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
      const A other = __shfl_xor_sync(kAll, m, d);
      m = other > m ? other : m;
    }
    return m;
  }

  __device__ __forceinline__ double sum(const double* v) const {
    double s = v[0];
#pragma unroll
    for (int i = 1; i < C; ++i) s += v[i];
#pragma unroll
    for (int d = 16; d > 0; d /= 2) s += __shfl_xor_sync(kAll, s, d);
    return s;
  }

  // the first slot whose value is `top`
  __device__ __forceinline__ int64_t first(const double* v, double top) const {
#pragma unroll
    for (int i = 0; i < C; ++i) {
      const unsigned there = __ballot_sync(kAll, v[i] == top);
      if (there) return 32 * i + __ffs(there) - 1;
    }
    return 0;
  }

  __device__ __forceinline__ void load(const warp::Sequence<S>& q, const warp::Direction& d, int64_t to) {
    for (; loaded < to; ++loaded) {
      const int64_t t = d.backwards ? q.length - 1 - loaded : loaded;
      for (int i = lane(); i < q.k; i += 32) ring[loaded % rows * q.k + i] = q.score[t * q.k + i];
    }
  }

  __device__ __forceinline__ void open(const warp::Sequence<S>& q, const warp::Direction& d, int64_t from) {
    loaded = from;
    if (q.k > 0) load(q, d, d.rows(from + kAhead, q.k));
    __syncwarp();
  }

  // before step u, a multiple of kAhead: loads the rows of the kAhead steps that follow the next kAhead ones
  __device__ __forceinline__ void advance(const warp::Sequence<S>& q, const warp::Direction& d, int64_t u) {
    __syncwarp();  // all lanes have read the rows that are overwritten now
    load(q, d, d.rows(u + 2 * kAhead, q.k));
    __syncwarp();
  }

  __device__ __forceinline__ S score(const warp::Sequence<S>& q, const warp::Direction& d, int64_t u, int64_t i) const {
    const int64_t from_side = d.backwards ? u + i : u;
    return ring[from_side % rows * q.k + i];
  }
};

template <class S>
struct Batch {
  const S* scores;
  const int64_t* lengths;  // or null
  int64_t b, t, k;

  // length is -1 if lengths[i] is out of range
  __device__ warp::Sequence<S> sequence(int64_t i) const {
    const int64_t n = lengths ? lengths[i] : t;
    return {scores + i * t * k, n < 0 || n > t ? -1 : n, k};
  }
};

// sequences in `count` chunks of `steps` steps
struct Chunks {
  int64_t steps, count;
  warp::Number<double>* windows;   // [sides, b, count, k], at the start of each chunk
  warp::Number<double>* matrices;  // [sides, b, count - 1, k, k]
};

// ------------------------------------------------------------------ kernels

// computes the matrices of the chunks; one block per row of a matrix
template <int C, class S>
__global__ void __launch_bounds__(32, 1) transfers(Batch<S> g, Chunks chunks) {
  extern __shared__ char memory[];
  const int64_t row = blockIdx.x, i = row % g.k, c = row / g.k % (chunks.count - 1);
  const int64_t b = row / g.k / (chunks.count - 1) % g.b, side = row / g.k / (chunks.count - 1) / g.b;
  Warp<C, S> p{reinterpret_cast<S*>(memory), static_cast<int>(g.k - 1 + 2 * Warp<C, S>::kAhead)};
  const warp::Sequence<S> q = g.sequence(b);
  const int64_t from = c * chunks.steps, to = from + chunks.steps;
  if (to < q.length) warp::transfer<S>(p, q, side == 1, from, to, i, chunks.matrices + row * g.k);
}

// computes the window at the start of each chunk; one block per side of a sequence
template <int C, class S>
__global__ void __launch_bounds__(32, 1) windows(Batch<S> g, Chunks chunks) {
  const int64_t b = blockIdx.x % g.b;
  const Warp<C, S> p{};
  const warp::Sequence<S> q = g.sequence(b);
  warp::Number<double>* window = chunks.windows + blockIdx.x * chunks.count * g.k;
  const warp::Number<double>* matrix = chunks.matrices + blockIdx.x * (chunks.count - 1) * g.k * g.k;
  for (int64_t o = p.lane(); o < g.k; o += 32) window[o] = {o == 0 ? 1.0 : 0.0, o == 0 ? 0.0 : -warp::infinity()};
  for (int64_t to = chunks.steps; to < q.length; to += chunks.steps, window += g.k, matrix += g.k * g.k) {
    p.sync();
    warp::compose(p, g.k, window, matrix, window + g.k);
  }
}

// one block per chunk of a sequence: warp 0 computes alpha and logz, warp 1 (only for gradients) beta
template <int C, class S>
__global__ void __launch_bounds__(64, 1) sweeps(Batch<S> g, Chunks chunks, S* logz, double* value, double* exponent) {
  extern __shared__ char memory[];
  const int64_t b = blockIdx.x / chunks.count, c = blockIdx.x % chunks.count, side = threadIdx.x / 32;
  const int64_t at = (side * g.b + b) * (g.t + 1), from = c * chunks.steps;
  Warp<C, S> p{reinterpret_cast<S*>(memory) + side * Warp<C, S>::shared(g.k),
               static_cast<int>(g.k - 1 + 2 * Warp<C, S>::kAhead)};
  const warp::Sequence<S> q = g.sequence(b);
  if (c > 0 && from >= q.length) return;
  const int64_t to = from + chunks.steps < q.length ? from + chunks.steps : q.length;
  for (int64_t j = (q.length < 0 ? 0 : q.length + 1) + p.lane(); j <= g.t && c == 0; j += 32)
    value[at + j] = q.length < 0 ? NAN : 0, exponent[at + j] = q.length < 0 ? 0 : -warp::infinity();
  if (q.length >= 0) {
    auto w = c > 0 ? warp::window_of<S>(p, from, g.k, chunks.windows + ((side * g.b + b) * chunks.count + c) * g.k)
                   : warp::unit<S>(p, 0, g.k > 0 ? g.k : 1, 0);
    warp::sweep(p, q, side == 1, from, to, w, value + at, exponent + at);
  }
  __syncwarp();
  if (side == 0 && p.lead() && to == q.length) {
    const double end = q.length < 0 ? NAN : value[at + q.length];
    logz[b] = S(end == 0 ? -warp::infinity()
                : q.length < 0 ? end
                               : log(end) + exponent[at + q.length] * 0.693147180559945309);
  }
}

template <class S>
__global__ void posteriors(Batch<S> g, const double* value, const double* exponent, const S* grad, int64_t grad_stride,
                           S* out) {
  const int64_t all = g.b * g.t * g.k, sides = g.b * (g.t + 1);
  for (int64_t e = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; e < all; e += int64_t(gridDim.x) * blockDim.x) {
    const int64_t b = e / (g.t * g.k), t = e / g.k % g.t, j = t + 1 + e % g.k, at = b * (g.t + 1);
    const warp::Sequence<S> q = g.sequence(b);
    double p = q.length < 0 ? NAN : 0;
    if (j <= q.length && value[sides + at] != value[sides + at])
      p = NAN;  // the last sum of the beta sweep is NaN
    else if (j <= q.length && value[at + q.length] != 0)
      p = warp::posterior(g.scores[e], value[at + t], exponent[at + t], value[sides + at + j], exponent[sides + at + j],
                          value[at + q.length], exponent[at + q.length]);
    out[e] = p == 0 ? S(0) : S(p * grad[b * grad_stride]);
  }
}

template <int C, class S>
__global__ void __launch_bounds__(32, 1) best(Batch<S> g, double* sums, S* score, int64_t* segments) {
  extern __shared__ char memory[];
  const int64_t b = blockIdx.x;
  Warp<C, S> p{reinterpret_cast<S*>(memory), static_cast<int>(g.k - 1 + 2 * Warp<C, S>::kAhead)};
  const warp::Sequence<S> q = g.sequence(b);
  double found = NAN;
  if (q.length >= 0 && warp::best_sums(p, q, sums + b * (g.t + 1)))
    found = warp::trace(p, q, sums + b * (g.t + 1), segments + b * g.t);
  if (p.lead()) score[b] = S(found);
}

template <class S>
__global__ void draws(Batch<S> g, const double* alpha, const double* exponent, const int64_t* seed, int64_t samples,
                      int64_t* segments) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x, b = i % g.b, at = b * (g.t + 1);
  if (i >= samples * g.b) return;
  const warp::Sequence<S> q = g.sequence(b);
  const double end = q.length < 0 ? NAN : alpha[at + q.length];
  if (end != end)
    for (int64_t t = 0; t < g.t; ++t) segments[i * g.t + t] = -1;
  else if (end != 0)
    warp::draw(q, alpha + at, exponent + at,
               static_cast<uint64_t>(*seed) + 0x9e3779b97f4a7c15u * static_cast<uint64_t>(i + 1), segments + i * g.t);
}

// scratch: alpha, exponent and mean, [3, B, T + 1]; out is null if no gradient is needed
template <int C, class S>
__global__ void __launch_bounds__(32, 1) moments(Batch<S> g, const S* upstream, const S* grad, int64_t grad_stride,
                                              double* scratch, S* mean, S* out) {
  extern __shared__ char memory[];
  const int64_t b = blockIdx.x, n = g.b * (g.t + 1), at = b * (g.t + 1), from = b * g.t * g.k;
  Warp<C, S> p{reinterpret_cast<S*>(memory), static_cast<int>(g.k - 1 + 2 * Warp<C, S>::kAhead)};
  const warp::Sequence<S> q = g.sequence(b);
  double *alpha = scratch + at, *exponent = scratch + n + at, *sum = scratch + 2 * n + at;
  const S* weights = upstream ? upstream + from : nullptr;
  if (q.length >= 0) {
    warp::sweep<double>(p, q, false, alpha, exponent);
    warp::expect(p, q, alpha, exponent, weights, sum);
    if (out) warp::covariance(p, q, alpha, exponent, weights, sum, double(grad[b * grad_stride]), out + from);
  }
  __syncwarp();
  if (p.lead()) mean[b] = q.length < 0 ? S(NAN) : S(sum[q.length]);
  if (out)
    for (int64_t e = (q.length < 0 ? 0 : q.length * g.k) + p.lane(); e < g.t * g.k; e += 32)
      out[from + e] = q.length < 0 ? S(NAN) : S(0);
}

// ------------------------------------------------------------------ launches

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  return torch::stable::new_empty(like, std::vector<int64_t>(sizes), dtype);
}

struct Launch {
  Tensor scores;
  std::optional<Tensor> lengths;
  int64_t b, t, k;
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  Launch(const Tensor& given, const std::optional<Tensor>& given_lengths)
      : scores(torch::stable::contiguous(given)), b(given.size(0)), t(given.size(1)), k(given.size(2)),
        guard(given.get_device_index()) {
    STD_TORCH_CHECK(k <= kMostSlots, "scores: CUDA supports segments of up to K = ", kMostSlots,
                    " positions, got K = ", k);
    if (given_lengths) lengths = torch::stable::contiguous(*given_lengths);
    void* raw = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(given.get_device_index(), &raw));
    stream = static_cast<cudaStream_t>(raw);
  }

  template <class S>
  Batch<S> batch() const {
    return {data<S>(scores), lengths ? data<int64_t>(*lengths) : nullptr, b, t, k};
  }
};

// the number of slots per lane, as a type
template <int C>
struct Slots {
  static constexpr int value = C;
};

// calls f(S{}, Slots<C>()) for the dtype of the scores and the size of the window
template <class F>
void choose(const Launch& l, const F& f) {
  const auto width = [&](auto s) {
    if (l.k <= 32) return f(s, Slots<1>());
    if constexpr (sizeof(s) == 8) {  // four double slots per lane would spill registers
      STD_TORCH_CHECK(l.k <= 64, "scores: CUDA supports float64 segments of up to K = 64 positions, got K = ", l.k);
      f(s, Slots<2>());
    } else {
      l.k <= 64 ? f(s, Slots<2>()) : f(s, Slots<4>());
    }
  };
  l.scores.scalar_type() == ScalarType::Double ? width(double{}) : width(float{});
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

template <class K, class... Args>
void launch(K kernel, const Launch& l, int64_t blocks, int threads, int64_t shared, Args... args) {
  if (blocks == 0) return;
  if (shared > (48 << 10)) {
    const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    STD_TORCH_CHECK(shared <= most, "scores: K = ", l.k, " needs ", shared, " bytes of shared memory, this device has ",
                    most);
    // the maximum of the device, so that no other thread sets a lower limit before this launch
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  }
  kernel<<<static_cast<unsigned>(blocks), threads, static_cast<size_t>(shared), l.stream>>>(args...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor, Tensor> segmentation_logz(const Tensor& scores, const std::optional<Tensor>& lengths,
                                                     bool need_gradient) {
  const Launch l(scores, lengths);
  const ScalarType dtype = scores.scalar_type();
  const int64_t sides = need_gradient ? 2 : 1;
  const Tensor logz = empty({l.b}, dtype, scores), value = empty({sides, l.b, l.t + 1}, ScalarType::Double, scores);
  const Tensor exponent = empty({sides, l.b, l.t + 1}, ScalarType::Double, scores);
  const int64_t warps = 8 * attribute(cudaDevAttrMultiProcessorCount);  // two warps per scheduler
  const int64_t steps = warp::chunk_steps(l.b, l.t, l.k, warps);
  const int64_t count = steps < l.t ? (l.t + steps - 1) / steps : 1, matrix_rows = count > 1 ? sides * l.b * l.k : 0;
  const Tensor window = empty({matrix_rows, count, 2}, ScalarType::Double, scores);
  const Tensor matrix = empty({matrix_rows, count - 1, l.k, 2}, ScalarType::Double, scores);
  const Chunks chunks{steps, count, data<warp::Number<double>>(window), data<warp::Number<double>>(matrix)};
  choose(l, [&](auto s, auto c) {
    using S = decltype(s);
    constexpr int C = decltype(c)::value;
    const int64_t shared = Warp<C, S>::shared(l.k) * sizeof(S);
    launch(transfers<C, S>, l, matrix_rows * (count - 1), 32, shared, l.batch<S>(), chunks);
    launch(windows<C, S>, l, count > 1 ? sides * l.b : 0, 32, 0, l.batch<S>(), chunks);
    launch(sweeps<C, S>, l, l.b * count, 32 * static_cast<int>(sides), sides * shared, l.batch<S>(), chunks,
           data<S>(logz), data<double>(value), data<double>(exponent));
  });
  return {logz, value, exponent};
}

Tensor segmentation_marginals(const Tensor& scores, const std::optional<Tensor>& lengths, const Tensor& alpha,
                              const Tensor& exponent, const Tensor& grad) {
  const Launch l(scores, lengths);
  STD_TORCH_CHECK(alpha.size(0) == 2,
                  "alpha: expected both sweeps, which segmentation_logz returns with need_gradient=True");
  const Tensor value = torch::stable::contiguous(alpha), powers = torch::stable::contiguous(exponent);
  const Tensor out = empty({l.b, l.t, l.k}, scores.scalar_type(), scores);
  const int64_t blocks = (l.b * l.t * l.k + 255) / 256;
  choose(l, [&](auto s, auto) {
    using S = decltype(s);
    launch(posteriors<S>, l, blocks < 65536 ? blocks : 65536, 256, 0, l.batch<S>(),
           static_cast<const double*>(data<double>(value)), static_cast<const double*>(data<double>(powers)),
           static_cast<const S*>(data<S>(grad)), grad.stride(0), data<S>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor> mean_and_gradient(const Tensor& scores, const std::optional<Tensor>& lengths,
                                             const Tensor* upstream, const Tensor* grad) {
  const Launch l(scores, lengths);
  const ScalarType dtype = scores.scalar_type();
  const Tensor mean = empty({l.b}, dtype, scores), out = empty({grad ? l.b : 0, l.t, l.k}, dtype, scores);
  const Tensor scratch = empty({3, l.b, l.t + 1}, ScalarType::Double, scores);
  choose(l, [&](auto s, auto c) {
    using S = decltype(s);
    constexpr int C = decltype(c)::value;
    launch(moments<C, S>, l, l.b, 32, Warp<C, S>::shared(l.k) * sizeof(S), l.batch<S>(),
           static_cast<const S*>(upstream ? data<S>(*upstream) : nullptr),
           static_cast<const S*>(grad ? data<S>(*grad) : nullptr), grad ? grad->stride(0) : 0, data<double>(scratch),
           data<S>(mean), grad ? data<S>(out) : nullptr);
  });
  return {mean, out};
}

using Means = MeanOperators<&mean_and_gradient>;

std::tuple<Tensor, Tensor> segmentation_viterbi(const Tensor& scores, const std::optional<Tensor>& lengths) {
  const Launch l(scores, lengths);
  const Tensor score = empty({l.b}, scores.scalar_type(), scores);
  const Tensor sums = empty({l.b, l.t + 1}, ScalarType::Double, scores);
  const Tensor segments = torch::stable::new_zeros(scores, std::vector<int64_t>{l.b, l.t}, ScalarType::Long);
  choose(l, [&](auto s, auto c) {
    using S = decltype(s);
    constexpr int C = decltype(c)::value;
    launch(best<C, S>, l, l.b, 32, Warp<C, S>::shared(l.k) * sizeof(S), l.batch<S>(), data<double>(sums),
           data<S>(score), data<int64_t>(segments));
  });
  return {score, segments};
}

Tensor segmentation_sample(const Tensor& scores, const std::optional<Tensor>& lengths, const Tensor& alpha,
                           const Tensor& exponent, int64_t num_samples, const Tensor& seed) {
  const Launch l(scores, lengths);
  const Tensor segments =
      torch::stable::new_zeros(scores, std::vector<int64_t>{num_samples, l.b, l.t}, ScalarType::Long);
  choose(l, [&](auto s, auto) {
    using S = decltype(s);
    launch(draws<S>, l, (num_samples * l.b + 127) / 128, 128, 0, l.batch<S>(),
           static_cast<const double*>(data<double>(alpha)), static_cast<const double*>(data<double>(exponent)),
           static_cast<const int64_t*>(data<int64_t>(seed)), num_samples, data<int64_t>(segments));
  });
  return segments;
}

}  // namespace
}  // namespace sukhops

STABLE_TORCH_LIBRARY_IMPL(sukhops, CUDA, m) {
  m.impl("segmentation_logz", TORCH_BOX(&sukhops::segmentation_logz));
  m.impl("segmentation_marginals", TORCH_BOX(&sukhops::segmentation_marginals));
  m.impl("segmentation_marginals_backward", TORCH_BOX(&sukhops::Means::marginals_backward));
  m.impl("segmentation_viterbi", TORCH_BOX(&sukhops::segmentation_viterbi));
  m.impl("segmentation_sample", TORCH_BOX(&sukhops::segmentation_sample));
  m.impl("segmentation_entropy", TORCH_BOX(&sukhops::Means::entropy));
  m.impl("segmentation_entropy_backward", TORCH_BOX(&sukhops::Means::entropy_backward));
}
