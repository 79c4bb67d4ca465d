// director on the CPU: log-softmax of lm + sum_a gamma_a * logsigmoid(cls_a), its largest entries and its
// gradients.
//
// Decoding is a read of the weights: up to a number of rows of hidden, every weight row is read once,
// straight from memory, and multiplied with all of them. Pieces of the vocabulary are handed to threads as
// they come free, and joined in their order, so a result does not depend on who did what. More rows, and
// gradients, take library products in blocks, as vocab_head does.
#include "blocks.h"

#include <atomic>
#include <cstring>
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#endif

namespace sukhops {

constexpr int64_t kWiden = 24;   // weight rows that are widened to float32 at once
constexpr int64_t kFewRows = 8;       // rows of hidden up to which the lanes run along the depth

struct Dots {
  // float32 or bfloat16, zeros where there is nothing. At most 8 rows: a vector of each in turn (float32 from
  // 5 on: 8 rows, two elements of each). Packed: groups of 64 rows (the last a multiple of 16), one element
  // (bfloat16: two neighbours) of each
  const void* hidden;
  bool packed;
  int64_t count, depth, stride;  // rows of hidden, depth, and the stride of the weight's rows
};

template <class A>
struct GateRows {
  const A* const* tile;     // per head [count, stride]: the LM head, then the classifiers
  const A* const* bias;     // per head, of the whole vocabulary, or null
  int64_t heads, rows, row0, v0, width, stride, vocab, k;
  const A* gamma;    // [heads - 1, rows], or [1, rows] for a shared head
  const A* affine;   // of a shared head, or null
  A* out;            // [rows, vocab] or null
  A* top_value;      // [rows, k]
  int64_t* top_index;
  A* maximum;        // [rows]
  double* sum;       // [rows]
};

template <class A>
struct GateBackwardRows {
  A* const* tile;
  const A* const* bias;
  int64_t heads, rows, row0, v0, width, stride, vocab;
  const A *gamma, *affine;
  const A *grad, *logp;  // [rows, vocab]
  const A* total;        // [rows] the sum of a row of grad
  double* grad_gamma;    // like gamma
  double* grad_affine;   // [rows, 2]
};

}  // namespace sukhops

#define SUKHOPS_BODY "director_rows.h"
#include "isa.h"

#ifdef SUKHOPS_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
namespace sukhops::avx512bf16 {
constexpr int64_t kRegisterBytes = 64;
#include "vec.h"

#include "director_bf16.h"
}  // namespace sukhops::avx512bf16
#pragma GCC pop_options
#endif

namespace sukhops {
namespace {

// the arguments that both heads share, in the accumulation type
template <class A>
struct Heads {
  std::vector<Tensor> weight;     // the LM head, then the classifiers
  std::vector<Tensor> bias_kept;  // owners of `bias`
  std::vector<const A*> bias;
  std::vector<A> gamma;  // [gates, n]
  std::vector<A> affine_kept;
  const A* affine = nullptr;
  int64_t n, v, d;

  Heads(const Tensor& hidden, const Tensor& lm_weight, const std::vector<Tensor>& cls_weight, const Tensor& g,
        const std::optional<Tensor>& lm_bias, const std::vector<Tensor>& cls_bias,
        const std::optional<Tensor>& cls_affine)
      : n(hidden.size(0)), v(lm_weight.size(0)), d(lm_weight.size(1)) {
    const ScalarType acc = acc_dtype(hidden.scalar_type());
    weight.push_back(torch::stable::contiguous(lm_weight));
    for (const Tensor& w : cls_weight) weight.push_back(torch::stable::contiguous(w));
    for (size_t h = 0; h < weight.size(); ++h) {
      const bool has = h == 0 ? lm_bias.has_value() : cls_bias[h - 1].numel() > 0;
      bias_kept.push_back(as_acc(has ? std::optional(h == 0 ? *lm_bias : cls_bias[h - 1]) : std::nullopt, acc, hidden));
      bias.push_back(has ? data<A>(bias_kept.back()) : nullptr);
    }
    const int64_t gates = g.size(0), s0 = g.stride(0), s1 = g.stride(1);
    gamma.resize(gates * n);
    for (int64_t i = 0; i < gates * n; ++i) {
      gamma[i] = data<A>(g)[i / n * s0 + i % n * s1];
      STD_TORCH_CHECK(gamma[i] >= 0 && gamma[i] < INFINITY, "gamma: expected finite numbers >= 0, got ", gamma[i],
                      " at row ", i % n);
    }
    if (cls_affine) {
      affine_kept = {data<A>(*cls_affine)[0], data<A>(*cls_affine)[cls_affine->stride(0)]};
      affine = affine_kept.data();
    }
  }
  int64_t count() const { return weight.size(); }
};

// the log-sum-exp of each row over a part of the vocabulary
template <class A>
struct Sums {
  std::vector<A> maximum;
  std::vector<double> sum;
  explicit Sums(int64_t n) : maximum(n, -INFINITY), sum(n) {}
  void join(const Sums& later) {
    for (size_t i = 0; i < maximum.size(); ++i) {
      const A top = later.maximum[i] > maximum[i] ? later.maximum[i] : maximum[i];
      const A shift = top == -INFINITY ? A(0) : top;
      sum[i] = sum[i] * std::exp(maximum[i] - shift) + later.sum[i] * std::exp(later.maximum[i] - shift);
      maximum[i] = top;
    }
  }
};

// the k largest scores of each row, descending, the lower index first among equals
template <class A>
struct Top {
  int64_t k;
  std::vector<A> value;
  std::vector<int64_t> index;
  Top(int64_t n, int64_t k) : k(k), value(n * k, -INFINITY), index(n * k, -1) {}
  void join(const Top& other) {
    for (size_t at = 0; k > 0 && at < value.size(); at += k)
      for (int64_t j = 0; j < k && other.index[at + j] >= 0; ++j) {
        const A x = other.value[at + j];
        const int64_t entry = other.index[at + j];
        const auto before = [&](int64_t p) {  // whether (x, entry) comes before what is at p
          return x > value[at + p] || index[at + p] < 0 || (x == value[at + p] && entry < index[at + p]);
        };
        if (!before(k - 1)) break;
        int64_t p = k - 1;
        for (; p > 0 && before(p - 1); --p) {
          value[at + p] = value[at + p - 1];
          index[at + p] = index[at + p - 1];
        }
        value[at + p] = x;
        index[at + p] = entry;
      }
  }
};

template <class A>
struct Found {
  Sums<A> sums;
  Top<A> top;
  Found(int64_t n, int64_t k) : sums(n), top(n, k) {}
  A lse(int64_t i) const { return static_cast<A>(sums.maximum[i] + std::log(sums.sum[i])); }
};

template <class A>
GateRows<A> gate(const Heads<A>& heads, Sums<A>& sums, Top<A>& top, A* out) {
  return {nullptr, heads.bias.data(), heads.count(), heads.n, 0, 0, 0, 0, heads.v, top.k,
          heads.gamma.data(), heads.affine, out, top.value.data(), top.index.data(),
          sums.maximum.data(), sums.sum.data()};
}

// bfloat16: whether gradients are stored so, where A is float
template <class A>
void run_gate_backward(const GateBackwardRows<A>& g, bool bfloat16, int64_t lo, int64_t hi) {
  if constexpr (std::is_same_v<A, float>) {
    if (bfloat16) return SUKHOPS_BEST(gate_backward_rows<uint16_t, float>)(g, lo, hi);
  }
  SUKHOPS_BEST(gate_backward_rows<A, A>)(g, lo, hi);
}

// ---------------------------------------------------------------- few rows: the weights are streamed

using DotsFn = void (*)(const Dots&, const void*, int64_t, float*, int64_t, float*);

DotsFn pick_dots(ScalarType dtype, bool pairs) {
#ifdef SUKHOPS_X86
  if (pairs) return &avx512bf16::dots_bfloat16;
#endif
  if (dtype == ScalarType::BFloat16) return SUKHOPS_BEST(dots<uint16_t>);
  if (dtype == ScalarType::Half) return SUKHOPS_BEST(dots<HalfBits>);
  return SUKHOPS_BEST(dots<float>);
}

// rows of hidden in the layout of Dots; E is float, or uint16_t for pairs of bfloat16
template <class E>
Tensor layout(const Tensor& hidden, bool packed) {
  constexpr int64_t pair = sizeof(E) == 2 ? 2 : 1;  // neighbours of the depth that stay together
  constexpr int64_t lanes = 64 / sizeof(E);
  const int64_t n = hidden.size(0), d = hidden.size(1);
  const int64_t deep = packed ? (d + pair - 1) / pair * pair : (d + lanes - 1) / lanes * lanes;
  const bool eight = !packed && sizeof(E) == 4 && n > 4;
  const Tensor buffer = zeros({(packed ? (n + 15) / 16 * 16 : eight ? 8 : n) * deep},
                              pair == 2 ? ScalarType::BFloat16 : ScalarType::Float, hidden);  // aligned
  E* out = static_cast<E*>(buffer.data_ptr());
  with_type(hidden.scalar_type(), [&](auto s) {
    using S = decltype(s);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t first = packed ? i / 64 * 64 : 0;
      const int64_t width = packed ? std::min<int64_t>(64, (n - first + 15) / 16 * 16) : eight ? 8 : n;
      const int64_t run = packed ? pair : eight ? 2 : lanes;  // of one row's depth
      for (int64_t j = 0; j < d; ++j) {
        const S* from = data<S>(hidden) + i * hidden.stride(0) + j * hidden.stride(1);
        const int64_t at = first * deep + (j / run * width + i - first) * run + j % run;
        if constexpr (sizeof(E) == 2) {
          if constexpr (sizeof(S) == 2) std::memcpy(&out[at], from, 2);
        } else {
          out[at] = static_cast<float>(*from);
        }
      }
    }
  });
  return buffer;
}

void stream(const Tensor& hidden, const Heads<float>& heads, Found<float>& found, float* out, bool packed) {
  const int64_t n = heads.n, v = heads.v, d = heads.d, count = heads.count();
  const ScalarType dtype = hidden.scalar_type();
  const bool pairs = dtype == ScalarType::BFloat16 && fast_bfloat16();
  const Tensor h = pairs ? layout<uint16_t>(hidden, packed) : layout<float>(hidden, packed);
  const Dots dots{h.data_ptr(), packed, n, d, d};
  const DotsFn run = pick_dots(dtype, pairs);
  const int64_t size = item_size(dtype), whole = (d + 15) / 16 * 16;

  // weight rows of each head that are multiplied before they are gated: with many rows of hidden they should
  // stay in the second cache; pieces are some megabytes of weights, whatever the threads
  const int64_t step = packed ? 64 : 256;
  int64_t piece = (4 << 20) / (count * size * std::max<int64_t>(1, d));
  piece = std::max(piece / step * step, step);
  const int64_t pieces = (v + piece - 1) / piece;
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<Sums<float>> sums(pieces, Sums<float>(n));           // joined in the order of the pieces
  std::vector<Top<float>> top(threads, Top<float>(n, found.top.k));  // has one answer in any order
  std::atomic<int64_t> next{0};
  const Tensor tile_of = empty({threads, count * n * step}, ScalarType::Float, hidden);
  const Tensor wide_of = empty({threads, size == 4 ? 0 : kWiden * whole}, ScalarType::Float, hidden);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    float *tile = data<float>(tile_of) + thread * tile_of.size(1), *wide = data<float>(wide_of) + thread * wide_of.size(1);
    std::vector<const float*> tiles(count);
    for (int64_t i = 0; i < count; ++i) tiles[i] = tile + i * n * step;
    for (int64_t p; (p = next++) < pieces;) {
      GateRows<float> g = gate(heads, sums[p], top[thread], out);
      g.tile = tiles.data();
      g.stride = step;
      const int64_t end = std::min(v, (p + 1) * piece);
      for (g.v0 = p * piece; g.v0 < end; g.v0 += step) {
        g.width = std::min(step, end - g.v0);
        for (int64_t i = 0; i < count; ++i)
          run(dots, static_cast<const char*>(heads.weight[i].data_ptr()) + g.v0 * d * size, g.width,
              tile + i * n * step, step, wide);
        SUKHOPS_BEST(gate_rows<float>)(g, 0, n);
      }
    }
  });
  for (const Sums<float>& part : sums) found.sums.join(part);
  for (const Top<float>& part : top) found.top.join(part);
}

// ---------------------------------------------------------------- many rows: products in blocks

// tiles of all heads together stay within kTileBytes
template <class A>
struct Tiles {
  Tiling tiling;
  std::vector<Tile> of;
  std::vector<A*> at;
  Tiles(int64_t count, int64_t n, int64_t v, int64_t d, ScalarType product, const Tensor& like)
      : tiling(n, v, d, count * sizeof(A)) {
    for (int64_t i = 0; i < count; ++i) {
      of.emplace_back(tiling, acc_dtype(like.scalar_type()), product, like);
      at.push_back(data<A>(of.back().buffer));
    }
  }
};

template <class A>
void in_blocks(const Tensor& hidden, const Heads<A>& heads, Found<A>& found, A* out) {
  const int64_t n = heads.n, v = heads.v, count = heads.count();
  const ScalarType product = product_dtype(hidden.scalar_type());
  const Tensor h = torch::stable::contiguous(torch::stable::to(hidden, product));
  Tiles<A> tiles(count, n, v, heads.d, product, hidden);
  std::vector<WeightBlocks> blocks;
  for (const Tensor& w : heads.weight) blocks.emplace_back(w, product, tiles.tiling.width);
  GateRows<A> g = gate(heads, found.sums, found.top, out);
  g.tile = tiles.at.data();
  for (g.v0 = 0; g.v0 < v; g.v0 += tiles.tiling.width) {
    g.width = g.stride = std::min(tiles.tiling.width, v - g.v0);
    std::vector<Tensor> block;
    for (WeightBlocks& b : blocks) block.push_back(b.rows(g.v0, g.width));
    for (g.row0 = 0; g.row0 < n; g.row0 += tiles.tiling.rows) {
      const int64_t rows = std::min(tiles.tiling.rows, n - g.row0);
      for (int64_t i = 0; i < count; ++i)
        mm_out(tiles.of[i].products(rows, g.width), rows_of(h, g.row0, rows), transposed(block[i]));
      torch::stable::parallel_for(0, rows, grain(g.width),
                                  [&](int64_t lo, int64_t hi) { SUKHOPS_BEST(gate_rows<A>)(g, lo, hi); });
    }
  }
}

// Up to how many rows the weights are streamed, by measurement (bench/bench_director.py). The kernels are made
// for 32 registers of 16 floats: with fewer, library products win from a few rows on.
int64_t stream_rows() { return cpu_isa() == Isa::avx512 ? 512 : cpu_isa() == Isa::avx2 ? 4 : 0; }

template <class A>
void pass(const Tensor& hidden, const Heads<A>& heads, Found<A>& found, A* out) {
  if (heads.n == 0) return;
  if constexpr (std::is_same_v<A, float>) {
    if (heads.n <= stream_rows()) return stream(hidden, heads, found, out, heads.n > kFewRows);
  }
  in_blocks(hidden, heads, found, out);
}

template <class A>
Tensor logp(const Tensor& hidden, const Heads<A>& heads) {
  const Tensor out = empty({heads.n, heads.v}, acc_dtype(hidden.scalar_type()), hidden);
  Found<A> found(heads.n, 0);
  pass<A>(hidden, heads, found, data<A>(out));
  const auto normalise = SUKHOPS_BEST(subtract<A>);
  const int64_t width = 16384, per_row = (heads.v + width - 1) / width;
  parallel_rows(heads.n * per_row, 1, [&](int64_t i) {
    const int64_t row = i / per_row, v0 = i % per_row * width;
    const A lse = found.lse(row);
    normalise(data<A>(out) + row * heads.v + v0, std::min(width, heads.v - v0), lse);
  });
  return out;
}

template <class A>
std::tuple<Tensor, Tensor> topk(const Tensor& hidden, const Heads<A>& heads, int64_t k) {
  const int64_t n = heads.n, v = heads.v;
  const Tensor values = empty({n, k}, acc_dtype(hidden.scalar_type()), hidden);
  const Tensor indices = empty({n, k}, ScalarType::Long, hidden);
  A* value = data<A>(values);
  int64_t* index = data<int64_t>(indices);
  if (k > 1024 && 16 * k > v) {  // close to a sort: keeping a short list is no longer cheap
    const Tensor all = logp<A>(hidden, heads);
    parallel_rows(n, 1, [&](int64_t i) {
      const A* row = data<A>(all) + i * v;
      std::vector<int64_t> order(v);
      for (int64_t j = 0; j < v; ++j) order[j] = j;
      const bool nan = row[0] != row[0];  // the log-sum-exp is in every entry
      if (!nan)
        std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int64_t a, int64_t b) {
          return row[a] > row[b] || (row[a] == row[b] && a < b);
        });
      for (int64_t j = 0; j < k; ++j) {
        index[i * k + j] = order[j];
        value[i * k + j] = nan ? A(NAN) : row[order[j]];
      }
    });
    return {values, indices};
  }
  Found<A> found(n, k);
  pass<A>(hidden, heads, found, nullptr);
  parallel_rows(n, 64, [&](int64_t i) {
    const A lse = found.lse(i);
    finish_top(&found.top.value[i * k], &found.top.index[i * k], k, lse != lse);
    for (int64_t j = 0; j < k; ++j) {
      value[i * k + j] = found.top.value[i * k + j] - lse;
      index[i * k + j] = found.top.index[i * k + j];
    }
  });
  return {values, indices};
}

// ---------------------------------------------------------------- gradients of logp

struct Gradients {
  Tensor hidden, lm_weight;
  std::vector<Tensor> cls_weight;
  Tensor gamma, lm_bias;
  std::vector<Tensor> cls_bias;
  Tensor affine;
};

template <class A>
Gradients logp_backward(const Tensor& grad, const Tensor& logp, const Tensor& hidden, const Heads<A>& heads,
                        bool need_hidden, bool need_lm, bool need_cls, bool need_bias) {
  const int64_t n = heads.n, v = heads.v, d = heads.d, count = heads.count();
  const ScalarType dtype = hidden.scalar_type(), acc = acc_dtype(dtype), product = product_dtype(dtype);
  const Tensor h = torch::stable::contiguous(torch::stable::to(hidden, product));
  Tiles<A> tiles(count, n, v, d, product, hidden);
  const bool one_tile = tiles.tiling.rows >= n;
  std::vector<WeightBlocks> blocks;
  std::vector<WeightGradient> dw;
  std::vector<Tensor> weight_grad, bias_grad;
  for (int64_t i = 0; i < count; ++i) {
    const bool need = i == 0 ? need_lm : need_cls;
    blocks.emplace_back(heads.weight[i], product, tiles.tiling.width);
    weight_grad.push_back(need ? zeros({v, d}, dtype, hidden) : Tensor());
    dw.emplace_back(weight_grad[i], product, acc, tiles.tiling.width, one_tile);
    bias_grad.push_back(zeros({need_bias && heads.bias[i] ? v : 0}, acc, hidden));
  }
  Tensor dh = zeros({need_hidden ? n : 0, d}, acc, hidden), scratch;
  std::vector<A> total(n);
  parallel_rows(n, grain(v), [&](int64_t i) {
    double sum = 0;
    for (int64_t j = 0; j < v; ++j) sum += data<A>(grad)[i * v + j];
    total[i] = static_cast<A>(sum);
  });
  std::vector<double> grad_gamma(heads.gamma.size()), grad_affine(heads.affine ? 2 * n : 0);
  GateBackwardRows<A> g{tiles.at.data(), heads.bias.data(), count, n, 0, 0, 0, 0, v, heads.gamma.data(),
                        heads.affine, data<A>(grad), data<A>(logp), total.data(), grad_gamma.data(),
                        grad_affine.data()};
  for (g.v0 = 0; g.v0 < v && n > 0; g.v0 += tiles.tiling.width) {
    g.width = g.stride = std::min(tiles.tiling.width, v - g.v0);
    std::vector<Tensor> block;
    for (WeightBlocks& b : blocks) block.push_back(b.rows(g.v0, g.width));
    for (g.row0 = 0; g.row0 < n; g.row0 += tiles.tiling.rows) {
      const int64_t count_rows = std::min(tiles.tiling.rows, n - g.row0);
      const Tensor rows = rows_of(h, g.row0, count_rows);
      for (int64_t i = heads.affine ? 0 : 1; i < count; ++i)
        mm_out(tiles.of[i].products(count_rows, g.width), rows, transposed(block[i]));
      torch::stable::parallel_for(0, count_rows, grain(g.width), [&](int64_t lo, int64_t hi) {
        run_gate_backward(g, product == ScalarType::BFloat16, lo, hi);
      });
      for (int64_t i = 0; i < count; ++i) {
        const Tensor z = tiles.of[i].gradients(count_rows, g.width);
        if (need_hidden)
          accumulate(rows_of(dh, g.row0, count_rows), z, block[i], g.v0 == 0 && i == 0, scratch);
        dw[i].add(z, rows, g.v0, g.row0 == 0);
        if (bias_grad[i].numel()) add_columns(data<A>(bias_grad[i]) + g.v0, z);
      }
    }
    for (WeightGradient& w : dw) w.finish(g.v0, g.width);
  }
  const auto or_none = [&](const Tensor& t) { return t.defined() ? t : empty({0}, dtype, hidden); };
  Gradients out{need_hidden ? torch::stable::to(dh, dtype) : or_none(Tensor()), or_none(weight_grad[0]), {},
                empty({int64_t(heads.gamma.size()) / std::max<int64_t>(1, n), n}, acc, hidden),
                torch::stable::to(bias_grad[0], dtype), {}, empty({0}, acc, hidden)};
  for (int64_t i = 1; i < count; ++i) {
    out.cls_weight.push_back(or_none(weight_grad[i]));
    out.cls_bias.push_back(torch::stable::to(bias_grad[i], dtype));
  }
  for (size_t i = 0; i < grad_gamma.size(); ++i) data<A>(out.gamma)[i] = static_cast<A>(grad_gamma[i]);
  if (heads.affine) out.affine = sum_of_rows(grad_affine, n, acc, hidden);
  return out;
}

// ---------------------------------------------------------------- registration

Tensor director(const Tensor& hidden, const Tensor& lm_weight, const std::vector<Tensor>& cls_weight,
                const Tensor& gamma, const std::optional<Tensor>& lm_bias, const std::vector<Tensor>& cls_bias,
                const std::optional<Tensor>& cls_affine) {
  return in_acc(hidden, [&](auto a) {
    using A = decltype(a);
    return logp<A>(hidden, Heads<A>(hidden, lm_weight, cls_weight, gamma, lm_bias, cls_bias, cls_affine));
  });
}

std::tuple<Tensor, Tensor> director_topk(
    const Tensor& hidden, const Tensor& lm_weight, const std::vector<Tensor>& cls_weight, const Tensor& gamma,
    const std::optional<Tensor>& lm_bias, const std::vector<Tensor>& cls_bias,
    const std::optional<Tensor>& cls_affine, int64_t k) {
  return in_acc(hidden, [&](auto a) {
    using A = decltype(a);
    return topk<A>(hidden, Heads<A>(hidden, lm_weight, cls_weight, gamma, lm_bias, cls_bias, cls_affine), k);
  });
}

std::tuple<Tensor, Tensor, std::vector<Tensor>, Tensor, Tensor, std::vector<Tensor>, Tensor> director_backward(
    const Tensor& grad, const Tensor& logp, const Tensor& hidden, const Tensor& lm_weight,
    const std::vector<Tensor>& cls_weight, const Tensor& gamma, const std::optional<Tensor>& lm_bias,
    const std::vector<Tensor>& cls_bias, const std::optional<Tensor>& cls_affine, bool need_hidden, bool need_lm,
    bool need_cls, bool need_bias) {
  return in_acc(hidden, [&](auto a) {
    using A = decltype(a);
    const Heads<A> heads(hidden, lm_weight, cls_weight, gamma, lm_bias, cls_bias, cls_affine);
    Gradients g = logp_backward<A>(torch::stable::contiguous(grad), torch::stable::contiguous(logp), hidden, heads,
                                   need_hidden, need_lm, need_cls, need_bias);
    return std::tuple(g.hidden, g.lm_weight, g.cls_weight, g.gamma, g.lm_bias, g.cls_bias, g.affine);
  });
}

}  // namespace
}  // namespace sukhops

STABLE_TORCH_LIBRARY_IMPL(sukhops, CPU, m) {
  m.impl("director", TORCH_BOX(&sukhops::director));
  m.impl("director_topk", TORCH_BOX(&sukhops::director_topk));
  m.impl("director_backward", TORCH_BOX(&sukhops::director_backward));
}
