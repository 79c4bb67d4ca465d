// Matrix products. Selects the kernel from the shape and the dtypes, and divides the work between threads. A thread
// computes its cell of a result alone, so one parallel region can hold several products and the passes before and after
// them.
//
// float32 and float64 products use the BLAS library of PyTorch, except on AMD CPUs, where MKL uses only a part of AVX2
// and half of AVX-512. Our own kernels (product_kernels.h) do what the library does not offer: half precisions with
// float32 results, and fast products of few rows with a weight.
//
// Our kernels pack a block of b and a few rows of a, and keep a tile of sums in registers. If there are only few rows,
// the weight is streamed instead: it is read once, without packing, at the speed of memory. The order in which our
// kernels sum an element does not depend on how the result is divided between threads.
#include "product.h"

#define SUKHOPS_BODY "product_kernels.h"
#define SUKHOPS_PAIRS
#include "isa.h"

namespace sukhops {

static std::atomic<int64_t> products{0};

void count_products(int64_t count) { products.fetch_add(count, std::memory_order_relaxed); }

int64_t product_count() { return products.load(std::memory_order_relaxed); }

namespace {

constexpr int64_t kCellRows = 504, kCellCols = 512;  // most rows and columns of a cell
constexpr int64_t kOneRowDepth = 1024;  // most terms that the library sums at a time in a product of one row

using Kernel = void (*)(const Factors&);

// the element type of the kernels: bfloat16 and float16 are passed as their bits
template <class T>
using bits_t = std::conditional_t<std::is_same_v<T, BFloat16>, uint16_t,
                                  std::conditional_t<std::is_same_v<T, Half>, HalfBits, T>>;

template <class S, class T>
Kernel choose_kernel(bool pairs, bool stream) {
#ifdef SUKHOPS_X86
  if constexpr (std::is_same_v<S, uint16_t> || std::is_same_v<T, uint16_t>) {
    if (pairs) return stream ? &avx512bf16::streamed<S, T> : &avx512bf16::blocked<float, S, T>;
  }
#endif
  return stream ? SUKHOPS_BEST(streamed<S, T>) : SUKHOPS_BEST(blocked<float, S, T>);
}

bool is_streamed(const Product& p) {
  const int64_t most = cpu_isa() >= Isa::avx512 ? kStreamRows : kStreamRows / 2;
  return p.a.rows <= most && p.b.row_stride == 1 && p.out.dtype == ScalarType::Float && !p.add;
}

bool is_amd() {
#ifdef __x86_64__
  return cpu_isa() != Isa::base && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// The kernel of a product, or null for the library. The factors have the same dtype, or a is float32 and b has a half
// precision.
Kernel choose_kernel(const Product& p) {
  const ScalarType s = p.a.dtype, narrow = p.b.dtype;
  const bool pairs = narrow == ScalarType::BFloat16 && fast_bfloat16(), stream = is_streamed(p);
  if (narrow == p.out.dtype && item_size(narrow) >= 4 && !stream && !is_amd()) return nullptr;
  if (narrow == ScalarType::Double) return SUKHOPS_BEST(blocked<double, double, double>);
  Kernel kernel = nullptr;
  with_type(narrow, [&](auto x) {
    using N = bits_t<decltype(x)>;
    if constexpr (!std::is_same_v<N, double>)
      kernel = s == narrow ? choose_kernel<N, N>(pairs, stream) : choose_kernel<float, N>(pairs, stream);
  });
  return kernel;
}

void library_multiply(const Product& p);

struct OneRow {};

// A product of one row, computed by the library in pieces of the depth. MKL adds the terms one by one to the previous
// value of the output, which is inaccurate for long sums.
template <class A>
void library_multiply_row(const Product& p) {
  A *const out = static_cast<A*>(p.out.data), *const sum = thread_memory<A, OneRow>(p.b.cols);
  for (int64_t k = 0, depth; k < p.a.cols; k += depth) {
    depth = std::min(kOneRowDepth, p.a.cols - k);
    library_multiply({Matrix(sum, p.out.dtype, 1, p.b.cols, p.b.cols), p.a.submatrix(0, k, 1, depth),
             p.b.submatrix(k, 0, depth, p.b.cols)});
    for (int64_t j = 0; j < p.b.cols; ++j) out[j] = p.add || k > 0 ? out[j] + sum[j] : sum[j];
  }
}

// The library uses one thread if it is called inside a parallel region.
void library_multiply(const Product& p) {
  if (p.a.rows == 1 && p.a.cols > kOneRowDepth && p.out.dtype == ScalarType::Float)
    return library_multiply_row<float>(p);
  if (p.a.rows == 1 && p.a.cols > kOneRowDepth && p.out.dtype == ScalarType::Double)
    return library_multiply_row<double>(p);
  const auto tensor = [](const Matrix& m) {
    const std::array<int64_t, 2> sizes{m.rows, m.cols}, strides{m.row_stride, m.col_stride};
    return torch::stable::from_blob(m.data, {sizes.data(), 2}, {strides.data(), 2},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), m.dtype);
  };
  const Tensor out = tensor(p.out), a = tensor(p.a), b = tensor(p.b);
  if (p.add) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
}

struct Packed {};

// computes rows [i, i + m) and columns [j, j + n) of the result
void run_kernel(Kernel kernel, const Product& p, int64_t i, int64_t j, int64_t m, int64_t n) {
  const int64_t k = p.a.cols;
  const Matrix a = p.a.submatrix(i, 0, m, k), b = p.b.submatrix(0, j, k, n), out = p.out.submatrix(i, j, m, n);
  if (!kernel) return library_multiply({out, a, b, p.add});
  const bool narrow = item_size(out.dtype) == 2;
  const int64_t sums = narrow ? m * n : 0;
  const int64_t streamed = kStreamRows * (k + 32);
  const int64_t blocked = (2 * kBlockBytes + 2 * 8 * kDepth * 16) / 4;
  float* const memory = thread_memory<float, Packed>(sums + (is_streamed(p) ? streamed : blocked));
  const Factors f{a.data, a.row_stride, a.col_stride, b.data, b.row_stride, b.col_stride, m, n, k,
                  narrow ? memory : out.data, narrow ? n : out.row_stride, p.add, p.a.rows <= kThinRows, memory + sums};
  kernel(f);
  if (!narrow) return;
  with_type(out.dtype, [&](auto x) {
    using N = bits_t<decltype(x)>;
    if constexpr (sizeof(N) == 2)
      SUKHOPS_BEST(round_rows<N>)(memory, m, n, static_cast<N*>(out.data), out.row_stride);
  });
}

// most columns of a cell, so that its packed block of b stays in L2
int64_t max_cell_cols(const Product& p) {
  return std::max(kCellCols, kBlockBytes / 4 / std::max<int64_t>(64, p.a.cols));
}

// Divides a result into cells of `rows` x `cols`: enough cells for all threads, but each large enough to pay for
// packing. If the depth is small, cells are wide, because threads that write to neighboring columns of newly allocated
// memory wait for each other's page faults.
struct Cells {
  int64_t rows = 0, cols = 0;
  Cells() = default;
  Cells(const Product& p, int64_t threads) {
    rows = balanced_size(p.a.rows, kCellRows);
    cols = balanced_size(p.b.cols, max_cell_cols(p));
    const auto more = [&](int64_t cells, int64_t least) { return count(p) < cells && rows * cols > least; };
    while (more(4 * threads, 256 * 256) || more(2 * threads, 128 * 128) || more(threads, 16 * 64)) {
      if (rows > cols || (p.a.cols < kProductRun && rows > kProductRun)) rows = (rows + 1) / 2;
      else cols = (cols / 2 + 31) / 32 * 32;
    }
  }
  int64_t across(const Product& p) const { return divide_up(p.b.cols, cols); }
  int64_t count(const Product& p) const { return divide_up(p.a.rows, rows) * across(p); }
};

}  // namespace

void multiply(const Product& p) {
  const Kernel kernel = choose_kernel(p);
  if (is_streamed(p)) return run_kernel(kernel, p, 0, 0, p.a.rows, p.b.cols);
  const int64_t rows = balanced_size(p.a.rows, kCellRows), cols = balanced_size(p.b.cols, max_cell_cols(p));
  for (int64_t j = 0; j < p.b.cols; j += cols)
    for (int64_t i = 0; i < p.a.rows; i += rows)
      run_kernel(kernel, p, i, j, std::min(rows, p.a.rows - i), std::min(cols, p.b.cols - j));
}

void multiply_all(const std::vector<Product>& products) {
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<Cells> cells;
  std::vector<int64_t> first{0};
  for (const Product& p : products) {
    const bool empty = p.out.rows == 0 || p.out.cols == 0, ours = choose_kernel(p);
    if (!ours && !empty) library_multiply(p);
    cells.push_back(ours && !empty ? Cells(p, threads) : Cells{});
    first.push_back(first.back() + (ours && !empty ? cells.back().count(p) : 0));
  }
  parallel_dynamic(first.back(), [&](int64_t cell) {
    size_t at = 0;
    while (cell >= first[at + 1]) ++at;
    const Product& p = products[at];
    const Cells& c = cells[at];
    const int64_t i = (cell - first[at]) / c.across(p) * c.rows, j = (cell - first[at]) % c.across(p) * c.cols;
    run_kernel(choose_kernel(p), p, i, j, std::min(c.rows, p.a.rows - i), std::min(c.cols, p.b.cols - j));
  });
}

}  // namespace sukhops

STABLE_TORCH_LIBRARY_IMPL(sukhops, CompositeExplicitAutograd, m) {
  m.impl("product_count", TORCH_BOX(&sukhops::product_count));
}
