// adaptive_span on the CPU: attention under a soft mask. The cost of a head is proportional to its span.
//
// A block is a few queries of one head. It processes the keys in tiles with an online softmax, starting at the first
// key within the longest span of its queries. The backward computes the five products of a block in one pass over the
// tiles. Neighboring blocks form a run. Runs are distributed over the threads by cost, longest first. A run adds to dk
// and dv of the keys that it sees, so neighboring runs of a head must not be processed at the same time: first all even
// runs are processed, then all odd ones. This also fixes the order of every sum.
#include "common.h"

#include <limits>
#include <numeric>

namespace sukhops {

constexpr int64_t kTile = 60;         // keys in a tile: a multiple of the 6 or 12 rows of a product block
constexpr int64_t kSplitKeys = 1024;  // keys in a split; keys are split between threads if there are only few queries
constexpr int64_t kRun = 1 << 20;     // Left::run of a matrix whose terms are evenly spaced
template <class A>
constexpr A kBeyondPositions = A(1e30);  // larger than every position

template <class A>
struct SpanCall {
  int64_t batch, heads, group, m, n, d, wide;  // group: query heads per key head; wide: d, padded to whole vectors
  int64_t skip, limit;  // a query at position p sees a key if (p - skip) - key is in [0, limit)
  A ramp, inverse_ramp, scale;
  const void *q, *k, *v, *grad, *out;
  int64_t q_stride[3], k_stride[3], v_stride[3], grad_stride[3];
  const A* span;
  int64_t span_stride[3];
  const int64_t* key_start;
  int64_t start_stride[2];
  const int64_t* query_start;  // [B] position of the first query, or null: first_position for all sequences
  int64_t first_position, step;  // step: distance of a query to the next one, 1, or 0 if the queries are heads
  const A* rel;  // [H or 1, S, wide]
  int64_t rel_stride;
  A *maximum, *sum;  // [B, H, M] maximum of the scores, and sum of their weights relative to it
  int64_t splits;  // number of splits of the keys, 1 unless there are only few queries
  A *part_out, *part_maximum, *part_sum;  // [B, H, M, splits, d] and two [B, H, M, splits], if there are splits
  void* grad_q;  // [B, H, M, d]
  A *grad_k, *grad_v, *grad_span;  // two [B, Hkv, N, wide], [B, H, M]
  bool need_q, need_kv;
  int64_t longest;  // most keys that a query sees

  // position of the first query of sequence b
  int64_t start(int64_t b) const { return query_start ? query_start[b] : first_position; }
};

// the buffers of a thread, which share one allocation
template <class A>
struct SpanWork {
  A *q_panels, *q_rows, *g_panels, *g_rows, *sum, *score, *grad_score, *keys, *values;
  A *lo, *hi, *span, *top, *total, *log_sum, *grad_span, *rel, *grad_rel;
  int64_t size = 0;

  SpanWork(A* base, const SpanCall<A>& c, int64_t lanes) {
    const auto take = [&](A*& p, int64_t count) {
      p = base + size;
      size += (count + 15) / 16 * 16;
    };
    for (A** p : {&q_panels, &g_panels, &sum}) take(*p, c.d * lanes);
    for (A** p : {&q_rows, &g_rows}) take(*p, c.wide * lanes);
    for (A** p : {&score, &grad_score}) take(*p, kTile * lanes);
    for (A** p : {&keys, &values}) take(*p, kTile * c.d);
    for (A** p : {&lo, &hi, &span, &top, &total, &log_sum, &grad_span}) take(*p, lanes);
    const int64_t distances = c.rel ? (c.longest + 2 * lanes) * lanes : 0;
    take(rel, distances);
    take(grad_rel, distances);
  }
};

}  // namespace sukhops

#define SUKHOPS_BODY "adaptive_span_rows.h"
#include "isa.h"

namespace sukhops {
namespace {

std::atomic<int64_t> pairs{0};

struct Run {
  // queries [first, last) of `head`, a key head or, in the forward, a query head; phase: 0 for even runs, 1 for odd
  // ones
  int64_t b, head, first, last, lanes, phase, split;
  double cost;
};

// distributes runs over the threads: longest first, each to the thread with the least work so far
std::vector<std::vector<Run>> assign_runs(std::vector<Run> runs, int64_t threads) {
  std::stable_sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) { return a.cost > b.cost; });
  std::vector<std::vector<Run>> assigned(threads);
  std::vector<double> load(threads);
  for (const Run& run : runs) {
    const int64_t least = std::min_element(load.begin(), load.end()) - load.begin();
    assigned[least].push_back(run);
    load[least] += run.cost;
  }
  return assigned;
}

// a tensor [.., rows, d], copied if its rows are not contiguous; stores its pointer in `at` and its strides in `stride`
struct Strided {
  Tensor kept;
  Strided(const Tensor& t, const void*& at, int64_t* stride)
      : kept(t.stride(3) == 1 || t.numel() == 0 ? t : torch::stable::contiguous(t)) {
    at = kept.data_ptr();
    for (int i = 0; i < 3; ++i) stride[i] = kept.stride(i);
  }
};

template <class A>
struct Problem {
  SpanCall<A> call{};
  Strided q, k, v;
  Tensor rel, starts;
  std::vector<int64_t> window;  // [B, Hkv] most keys that a query of the key head sees

  // merge_heads: if there is one query per head, the query heads of a key head are treated as the queries of one head
  Problem(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& span,
          const std::optional<Tensor>& rel_pos, const std::optional<Tensor>& key_start,
          const std::optional<Tensor>& query_start, double ramp, double scale, int64_t skip,
          std::optional<int64_t> max_span, bool merge_heads)
      : q(q_, call.q, call.q_stride), k(k_, call.k, call.k_stride), v(v_, call.v, call.v_stride) {
    SpanCall<A>& c = call;
    c.batch = q_.size(0), c.heads = q_.size(1), c.m = q_.size(2), c.d = q_.size(3);
    c.group = c.heads / k_.size(1), c.n = k_.size(2), c.wide = (c.d + 15) / 16 * 16;
    c.skip = skip, c.limit = std::min(c.n, max_span.value_or(c.n));
    c.first_position = c.n - c.m, c.step = 1;
    c.ramp = static_cast<A>(ramp), c.inverse_ramp = static_cast<A>(1 / ramp), c.scale = static_cast<A>(scale);
    c.span = data<A>(span);
    const bool per_head = span.dim() == 1;
    for (int i = 0; i < 3; ++i) c.span_stride[i] = per_head ? (i == 1 ? span.stride(0) : 0) : span.stride(i);
    if (key_start) {
      c.key_start = data<int64_t>(*key_start);
      for (int i = 0; i < 2; ++i) c.start_stride[i] = key_start->stride(i);
    }
    if (query_start) {
      starts = torch::stable::contiguous(*query_start);
      c.query_start = data<int64_t>(starts);
      for (int64_t b = 0; b < c.batch; ++b)
        STD_TORCH_CHECK(0 <= c.query_start[b] && c.query_start[b] <= c.n - c.m, "query_start: expected 0 to N - M = ",
                        c.n - c.m, ", got ", c.query_start[b], " of sequence ", b);
    }
    if (rel_pos) {
      const int64_t tables = rel_pos->dim() == 3 ? c.heads : 1, s = rel_pos->size(rel_pos->dim() - 2);
      c.limit = std::min(c.limit, s);
      rel = zeros({tables, s, c.wide}, acc_dtype(q_.scalar_type()), q_);
      Tensor to = torch::stable::narrow(rel, 2, 0, c.d);
      torch::stable::copy_(to, tables == 1 && rel_pos->dim() == 2 ? torch::stable::unsqueeze(*rel_pos, 0) : *rel_pos);
      c.rel = data<A>(rel);
      c.rel_stride = rel_pos->dim() == 3 ? s * c.wide : 0;
    }
    if (merge_heads && c.m == 1 && !rel_pos) {
      for (int64_t* stride : {c.q_stride, c.span_stride}) stride[2] = stride[1], stride[1] *= c.group;
      c.start_stride[1] = 0, c.step = 0;
      c.heads /= c.group, c.m = std::exchange(c.group, 1);
    }
    const int64_t spans = per_head ? std::min<int64_t>(c.step ? 1 : c.m, c.m) : c.m;  // spans per head
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t h = 0; h < c.heads; h += c.group) {
        int64_t most = 0;
        for (int64_t g = h; g < h + c.group; ++g)
          for (int64_t i = 0; i < spans; ++i) {
            const A reach = c.ramp + c.span[b * c.span_stride[0] + g * c.span_stride[1] + i * c.span_stride[2]];
            // a NaN span sees all keys
            const int64_t seen = reach < -1 ? 0 : reach < c.limit ? static_cast<int64_t>(reach) + 2 : c.limit;
            most = std::max(most, std::min(seen, c.limit));
          }
        window.push_back(most);
        c.longest = std::max(c.longest, most);
      }
  }

  // Divides the queries into runs of at least `least` queries. With `disjoint`, runs are longer than the window, so
  // that two runs of the same head and phase see no common key.
  std::vector<Run> runs(int64_t least, bool disjoint) const {
    std::vector<Run> out;
    const SpanCall<A>& c = call;
    for (size_t i = 0; i < window.size(); ++i) {
      const int64_t panel = cpu_isa() >= Isa::avx512 ? 32 : 16;
      const int64_t wish = window[i] <= 64 ? panel : window[i] <= 256 ? 32 : 64;
      const int64_t lanes = std::min(wish, (std::max<int64_t>(1, c.m) + panel - 1) / panel * panel);
      const int64_t whole = (std::max(least, disjoint ? window[i] + 1 : 0) + lanes - 1) / lanes * lanes;
      for (int64_t first = 0, phase = 0; first < c.m; first += whole, phase ^= 1) {
        const int64_t last = std::min(c.m, first + whole);
        const double cost = double(last - first) * (window[i] + lanes + 16) * (disjoint ? c.group : 1);
        out.push_back({int64_t(i) / (c.heads / c.group), int64_t(i) % (c.heads / c.group), first, last, lanes, phase, 0,
                       cost});
      }
    }
    return out;
  }
};

template <class S, class A>
std::tuple<Tensor, Tensor, Tensor> forward(Problem<A>& p, const Tensor& like) {
  SpanCall<A>& c = p.call;
  const Tensor out = empty({like.size(0), like.size(1), like.size(2), c.d}, like.scalar_type(), like);
  const ScalarType acc = acc_dtype(like.scalar_type());
  const auto per_row = [&] { return empty({like.size(0), like.size(1), like.size(2)}, acc, like); };
  const Tensor maximum = per_row(), sum = per_row();
  c.out = out.data_ptr();
  c.maximum = data<A>(maximum), c.sum = data<A>(sum);
  c.splits = !c.rel && c.m <= 32 && c.longest > kSplitKeys ? divide_up(c.n, kSplitKeys) : 1;
  const int64_t rows = out.numel() / c.d, parts = c.splits > 1 ? rows * c.splits : 0;
  const Tensor part = empty({parts, c.d + 2}, acc, like);
  c.part_out = data<A>(part), c.part_maximum = c.part_out + parts * c.d, c.part_sum = c.part_maximum + parts;
  std::fill_n(c.part_sum, parts, A(0));  // a split that sees no key is not computed
  std::vector<Run> runs;  // one run per query head and split
  for (Run run : p.runs(64, false)) {
    const int64_t end = c.start(run.b) + (run.last - 1) * c.step - c.skip + 1;
    const int64_t seen = p.window[run.b * (c.heads / c.group) + run.head] + (run.last - 1 - run.first) * c.step;
    const int64_t first = run.head * c.group, from = c.splits > 1 ? std::max<int64_t>(0, end - seen) / kSplitKeys : 0;
    const int64_t until = c.splits > 1 ? divide_up(std::max<int64_t>(0, end), kSplitKeys) : 1;
    run.cost /= std::max<int64_t>(1, until - from);
    for (run.head = first; run.head < first + c.group; ++run.head)
      for (run.split = from; run.split < until; ++run.split) runs.push_back(run);
  }
  const int64_t threads = torch::stable::get_num_threads();
  const auto assigned = assign_runs(std::move(runs), threads);
  const int64_t size = SpanWork<A>(nullptr, c, 64).size;
  const Tensor work = empty({threads, size}, acc, like);
  const auto block = SUKHOPS_BEST(span_forward<S, A>);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t thread = lo; thread < hi; ++thread) {
      int64_t count = 0;
      for (const Run& run : assigned[thread])
        for (int64_t i = run.first; i < run.last; i += run.lanes)
          count += block(c, run.b, run.head, i, std::min(run.lanes, run.last - i), run.lanes, run.split,
                         data<A>(work) + thread * size);
      pairs.fetch_add(count, std::memory_order_relaxed);
    }
  });
  const auto merge = SUKHOPS_BEST(span_merge<S, A>);
  if (parts) parallel_rows(rows, 16, [&](int64_t row) { merge(c, row); });
  return {out, maximum, sum};
}

template <class S, class A>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Problem<A>& p, const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& span,
    const std::optional<Tensor>& rel_pos, const Tensor& out, const Tensor& maximum, const Tensor& sum, bool need_q,
    bool need_kv, bool need_span, bool need_rel) {
  SpanCall<A>& c = p.call;
  const ScalarType dtype = q.scalar_type(), acc = acc_dtype(dtype);
  const Strided g(grad, c.grad, c.grad_stride);
  const auto none = [&](ScalarType t) { return empty({0}, t, q); };  // a new tensor per output: outputs share no memory
  c.need_q = need_q, c.need_kv = need_kv;
  c.out = out.data_ptr();
  c.maximum = data<A>(maximum), c.sum = data<A>(sum);
  const int64_t kv = c.heads / c.group, tables = c.rel_stride ? c.heads : 1;
  const int64_t table = rel_pos ? p.rel.size(1) * c.wide : 0;
  const Tensor dq = need_q ? empty({c.batch, c.heads, c.m, c.d}, dtype, q) : none(dtype);
  Tensor dk = need_kv ? zeros({c.batch, kv, c.n, c.wide}, acc, q) : none(dtype);
  Tensor dv = need_kv ? zeros({c.batch, kv, c.n, c.wide}, acc, q) : none(dtype);
  const Tensor rows = empty({c.batch, c.heads, c.m}, acc, q);
  c.grad_q = dq.data_ptr();
  if (need_kv) c.grad_k = data<A>(dk), c.grad_v = data<A>(dv);
  c.grad_span = data<A>(rows);

  const int64_t threads = torch::stable::get_num_threads();
  const int64_t size = SpanWork<A>(nullptr, c, 64).size;
  const Tensor work = empty({threads, size}, acc, q);
  const Tensor drel = zeros({need_rel ? threads : 0, tables * table}, acc, q);  // one sum per thread
  const auto block = SUKHOPS_BEST(span_backward<S, A>);
  const std::vector<Run> all = p.runs(256, true);
  for (int64_t phase : {0, 1}) {
    std::vector<Run> runs;
    for (const Run& run : all)
      if (run.phase == phase) runs.push_back(run);
    const auto assigned = assign_runs(std::move(runs), threads);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t lo, int64_t hi) {
      for (int64_t thread = lo; thread < hi; ++thread) {
        int64_t count = 0;
        for (const Run& run : assigned[thread])
          for (int64_t h = run.head * c.group; h < (run.head + 1) * c.group; ++h)
            for (int64_t i = run.first; i < run.last; i += run.lanes) {
              A* to = need_rel ? data<A>(drel) + (thread * tables + (tables > 1 ? h : 0)) * table : nullptr;
              count += block(c, run.b, h, i, std::min(run.lanes, run.last - i), run.lanes,
                             data<A>(work) + thread * size, to);
            }
        pairs.fetch_add(count, std::memory_order_relaxed);
      }
    });
  }
  const auto narrowed = [&](const Tensor& t) {  // drops the padding and converts to the dtype of q
    return torch::stable::contiguous(
        torch::stable::to(torch::stable::narrow(const_cast<Tensor&>(t), t.dim() - 1, 0, c.d), dtype));
  };
  Tensor dspan = none(acc), total = none(dtype);
  if (need_span && span.dim() == 3) dspan = rows;
  if (need_span && span.dim() == 1) {
    dspan = empty({c.heads}, acc, q);
    for (int64_t h = 0; h < c.heads; ++h) {
      double sum = 0;
      for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t i = 0; i < c.m; ++i) sum += data<A>(rows)[(b * c.heads + h) * c.m + i];
      data<A>(dspan)[h] = static_cast<A>(sum);
    }
  }
  if (need_rel) {
    A* first = data<A>(drel);
    for (int64_t thread = 1; thread < threads; ++thread)
      for (int64_t i = 0; i < tables * table; ++i) first[i] += first[thread * tables * table + i];
    const int64_t s = p.rel.size(1);
    total = empty({tables, s, c.d}, dtype, q);
    const std::array<int64_t, 3> sizes{tables, s, c.d}, strides{s * c.wide, c.wide, 1};
    torch::stable::copy_(total,
                         torch::stable::from_blob(first, {sizes.data(), 3}, {strides.data(), 3}, q.device(), acc));
    if (rel_pos->dim() == 2) total = torch::stable::squeeze(total, 0);
  }
  return {dq, need_kv ? narrowed(dk) : dk, need_kv ? narrowed(dv) : dv, dspan, total};
}

// calls f(S{}, A{}), where S is the storage type of the dtype and A the type of the computation
template <class F>
auto with_storage(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Double: return f(double{}, double{});
    case ScalarType::BFloat16: return f(uint16_t{}, float{});
    case ScalarType::Half: return f(HalfBits{}, float{});
    default: return f(float{}, float{});
  }
}

std::tuple<Tensor, Tensor, Tensor> adaptive_span(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& span, const std::optional<Tensor>& rel_pos,
    const std::optional<Tensor>& key_start, const std::optional<Tensor>& query_start, double ramp, double scale,
    int64_t skip, std::optional<int64_t> max_span) {
  return with_storage(q.scalar_type(), [&](auto s, auto a) {
    Problem<decltype(a)> p(q, k, v, span, rel_pos, key_start, query_start, ramp, scale, skip, max_span, true);
    return forward<decltype(s)>(p, q);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adaptive_span_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& span,
    const std::optional<Tensor>& rel_pos, const std::optional<Tensor>& key_start,
    const std::optional<Tensor>& query_start, const Tensor& out, const Tensor& maximum, const Tensor& sum, double ramp,
    double scale, int64_t skip, std::optional<int64_t> max_span, bool need_q, bool need_kv, bool need_span,
    bool need_rel_pos) {
  return with_storage(q.scalar_type(), [&](auto s, auto a) {
    Problem<decltype(a)> p(q, k, v, span, rel_pos, key_start, query_start, ramp, scale, skip, max_span, false);
    return backward<decltype(s)>(p, grad, q, k, span, rel_pos, torch::stable::contiguous(out),
                                 torch::stable::contiguous(maximum), torch::stable::contiguous(sum), need_q, need_kv,
                                 need_span, need_rel_pos);
  });
}

int64_t adaptive_span_pairs() { return pairs.load(std::memory_order_relaxed); }

}  // namespace
}  // namespace sukhops

STABLE_TORCH_LIBRARY_IMPL(sukhops, CPU, m) {
  m.impl("adaptive_span", TORCH_BOX(&sukhops::adaptive_span));
  m.impl("adaptive_span_backward", TORCH_BOX(&sukhops::adaptive_span_backward));
}

STABLE_TORCH_LIBRARY_IMPL(sukhops, CompositeExplicitAutograd, m) {
  m.impl("adaptive_span_pairs", TORCH_BOX(&sukhops::adaptive_span_pairs));
}
