// Matrix products: here the kernel is chosen, from the product's shape. A thread computes a part of a result by itself,
// so that a parallel region holds as many products as there are, and what comes before or after them.
//
// float32 and float64 go to the library, except on AMD: there MKL leaves a part of AVX2 and half of AVX-512 unused. What
// the library does not have is ours: half precisions with float32 results, and weights that few rows are multiplied with.
//
// The usual scheme: a block of b and a few rows of a are packed, and the kernel keeps their sums in registers. A weight
// that few rows are multiplied with is not packed but streamed, as fast as memory gives it. Within a product of ours an
// element is summed in the same order whatever part of it a thread computes.
#include "product.h"

#define SUKHOPS_BODY "product_kernels.h"
#define SUKHOPS_PAIRS
#include "isa.h"

namespace sukhops {

static std::atomic<int64_t> products{0};

void count_products(int64_t count) { products.fetch_add(count, std::memory_order_relaxed); }

int64_t product_count() { return products.load(std::memory_order_relaxed); }

namespace {

constexpr int64_t kCellRows = 504, kCellCols = 512;  // of a result that a thread computes at a time, at most
constexpr int64_t kOneRowDepth = 1024;                // terms of one row that the library adds up at a time

using Kernel = void (*)(const Factors&);

// bfloat16 and float16 as their bits
template <class T>
using bits_t = std::conditional_t<std::is_same_v<T, BFloat16>, uint16_t,
                                  std::conditional_t<std::is_same_v<T, Half>, HalfBits, T>>;

template <class S, class T>
Kernel pick(bool pairs, bool few) {
#ifdef SUKHOPS_X86
  if constexpr (std::is_same_v<S, uint16_t> || std::is_same_v<T, uint16_t>) {
    if (pairs) return few ? &avx512bf16::streamed<S, T> : &avx512bf16::blocked<float, S, T>;
  }
#endif
  return few ? SUKHOPS_BEST(streamed<S, T>) : SUKHOPS_BEST(blocked<float, S, T>);
}

bool streams(const Product& p) {
  const int64_t most = cpu_isa() >= Isa::avx512 ? kStreamRows : kStreamRows / 2;
  return p.a.rows <= most && p.b.row == 1 && p.out.dtype == ScalarType::Float && !p.add;
}

bool amd() {
#ifdef __x86_64__
  return cpu_isa() != Isa::base && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// null: the library's. The factors have the same dtype, or a is float32 and b in a half precision.
Kernel pick(const Product& p) {
  const ScalarType s = p.a.dtype, narrow = p.b.dtype;
  const bool pairs = narrow == ScalarType::BFloat16 && fast_bfloat16(), few = streams(p);
  if (narrow == p.out.dtype && item_size(narrow) >= 4 && !few && !amd()) return nullptr;
  if (narrow == ScalarType::Double) return SUKHOPS_BEST(blocked<double, double, double>);
  Kernel kernel = nullptr;
  with_type(narrow, [&](auto x) {
    using N = bits_t<decltype(x)>;
    if constexpr (!std::is_same_v<N, double>)
      kernel = s == narrow ? pick<N, N>(pairs, few) : pick<float, N>(pairs, few);
  });
  return kernel;
}

void library(const Product& p);

struct OneRow {};

// One row by the library, in parts: MKL adds one term after the other, to what is there already.
template <class A>
void library_row(const Product& p) {
  A *const out = static_cast<A*>(p.out.data), *const sum = thread_memory<A, OneRow>(p.b.cols);
  for (int64_t k = 0, depth; k < p.a.cols; k += depth) {
    depth = std::min(kOneRowDepth, p.a.cols - k);
    library({Matrix(sum, p.out.dtype, 1, p.b.cols, p.b.cols), p.a.part(0, k, 1, depth), p.b.part(k, 0, depth, p.b.cols)});
    for (int64_t j = 0; j < p.b.cols; ++j) out[j] = p.add || k > 0 ? out[j] + sum[j] : sum[j];
  }
}

// the library computes with one thread inside a parallel region
void library(const Product& p) {
  if (p.a.rows == 1 && p.a.cols > kOneRowDepth && p.out.dtype == ScalarType::Float) return library_row<float>(p);
  if (p.a.rows == 1 && p.a.cols > kOneRowDepth && p.out.dtype == ScalarType::Double) return library_row<double>(p);
  const auto tensor = [](const Matrix& m) {
    const std::array<int64_t, 2> sizes{m.rows, m.cols}, strides{m.row, m.col};
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

// rows [i, i + m) and columns [j, j + n) of a product's result
void run(Kernel kernel, const Product& p, int64_t i, int64_t j, int64_t m, int64_t n) {
  const int64_t k = p.a.cols;
  const Matrix a = p.a.part(i, 0, m, k), b = p.b.part(0, j, k, n), out = p.out.part(i, j, m, n);
  if (!kernel) return library({out, a, b, p.add});
  const bool narrow = item_size(out.dtype) == 2;
  const int64_t sums = narrow ? m * n : 0;
  const int64_t streamed = kStreamRows * (k + 32);
  const int64_t blocked = (2 * kBlockBytes + 2 * 8 * kDepth * 16) / 4;
  float* const memory = thread_memory<float, Packed>(sums + (streams(p) ? streamed : blocked));
  const Factors f{a.data, a.row, a.col, b.data, b.row, b.col, m, n, k, narrow ? memory : out.data,
                  narrow ? n : out.row, p.add, p.a.rows <= kThinRows, memory + sums};
  kernel(f);
  if (!narrow) return;
  with_type(out.dtype, [&](auto x) {
    using N = bits_t<decltype(x)>;
    if constexpr (sizeof(N) == 2)
      SUKHOPS_BEST(round_rows<N>)(memory, m, n, static_cast<N*>(out.data), out.row);
  });
}

// columns of a part of a result whose packed block of b stays in the second cache
int64_t columns(const Product& p) { return std::max(kCellCols, kBlockBytes / 4 / std::max<int64_t>(64, p.a.cols)); }

// Parts of a result: enough of them for all threads, and large enough to pay for packing. Wide ones where the depth is
// small: two threads that write new memory close to each other wait for its pages.
struct Cells {
  int64_t rows = 0, cols = 0;
  Cells() = default;
  Cells(const Product& p, int64_t threads) {
    rows = even(p.a.rows, kCellRows);
    cols = even(p.b.cols, columns(p));
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
  const Kernel kernel = pick(p);
  if (streams(p)) return run(kernel, p, 0, 0, p.a.rows, p.b.cols);
  const int64_t rows = even(p.a.rows, kCellRows), cols = even(p.b.cols, columns(p));
  for (int64_t j = 0; j < p.b.cols; j += cols)
    for (int64_t i = 0; i < p.a.rows; i += rows)
      run(kernel, p, i, j, std::min(rows, p.a.rows - i), std::min(cols, p.b.cols - j));
}

void multiply_all(const std::vector<Product>& products) {
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<Cells> cells;
  std::vector<int64_t> first{0};
  for (const Product& p : products) {
    const bool empty = p.out.rows == 0 || p.out.cols == 0, ours = pick(p);
    if (!ours && !empty) library(p);
    cells.push_back(ours && !empty ? Cells(p, threads) : Cells{});
    first.push_back(first.back() + (ours && !empty ? cells.back().count(p) : 0));
  }
  each_cell(first.back(), [&](int64_t cell) {
    size_t at = 0;
    while (cell >= first[at + 1]) ++at;
    const Product& p = products[at];
    const Cells& c = cells[at];
    const int64_t i = (cell - first[at]) / c.across(p) * c.rows, j = (cell - first[at]) % c.across(p) * c.cols;
    run(pick(p), p, i, j, std::min(c.rows, p.a.rows - i), std::min(c.cols, p.b.cols - j));
  });
}

}  // namespace sukhops

STABLE_TORCH_LIBRARY_IMPL(sukhops, CompositeExplicitAutograd, m) {
  m.impl("product_count", TORCH_BOX(&sukhops::product_count));
}
