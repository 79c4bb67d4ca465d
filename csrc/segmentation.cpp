// Sums over all segmentations of a sequence on the CPU: log-partition, posterior and its gradient, entropy, best
// segmentation, samples. One thread computes a sequence. The recursions and the terms (boundary, window, share, mass)
// are in segmentation_rows.h.
#include "common.h"

#include <memory>

#include "segmentation_means.h"
#include "segmentation_warp.h"

namespace sukhops {

constexpr int64_t kTile = 8;          // rows between two checks of the exponents of the window
constexpr int64_t kPair = 2 * kTile;  // rows whose shares are computed together
constexpr int64_t kDrawTile = 64;     // boundaries whose shares are tabulated at a time for sampling
constexpr int64_t kTogether = 4;      // samples that are drawn at the same time
constexpr int64_t kPadding = 32;      // elements of padding after an array, for vectors that run past its end

// one sequence: its scores, the results of its recursions, and their buffers
template <class S, class A>
struct Chain {
  const S* scores;      // [length, k]
  int64_t length, k;
  A* alpha;             // [length + 1]
  double* exponent;     // [length + 1]
  double base;          // the exponents of the window are relative to it
  A *a, *n;             // [kTile + k + kPadding] the window: mantissas and exponents
  A *sum, *inverse;     // [kPair + k + kPadding] nonzero alpha of the boundaries of a plain pair, and its inverse
  A* from;              // [kPair + k + kPadding] the same alpha, or 0 for boundaries that are not reached
  A* row_buffer;        // [k + kPadding] one row of scores
  A* tile;              // [2, kPair, k + kPadding] shares of two pairs; in the forward, a window too long for registers
  A* w;                 // [length + k + kPadding] mass of each boundary
  A *mean, *after;      // [length + k + kPadding] see segmentation_rows.h: expected_weight, covariance
  A* kept;              // [length, k] exponentials that forward stores, see segmentation_logz_kept; or null
  bool bad;             // whether a score or an exponent makes the result NaN
  A grad;
  S* out;               // [stored, k]
  int64_t stored;       // rows of out; rows from length on are 0
  const S* upstream;    // [length, k]
};

template <class A>
struct Draw {
  uint64_t seed;
  int64_t sequence, sequences, samples;
  A* table;           // [kDrawTile, padded k]
  int64_t* position;  // [samples] current boundary of each sample
  int64_t* segment;   // [samples] length of the segment that starts there
  uint64_t* stream;   // [samples] hashed seed of each sample
  int64_t* segments;  // [samples, sequences, T], starting at this sequence
};

}  // namespace sukhops

#define SUKHOPS_BODY "segmentation_rows.h"
#include "isa.h"

namespace sukhops {
namespace {

struct Lattice {
  Tensor scores;  // [B, T, K], contiguous
  int64_t b, t, k;
  std::vector<int64_t> lengths;  // [B]
};

// the same as torch::stable::contiguous, but without the dispatcher if the tensor is contiguous
Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Lattice lattice(const Tensor& scores, const std::optional<Tensor>& lengths) {
  const int64_t b = scores.size(0), t = scores.size(1);
  Lattice g{as_contiguous(scores), b, t, scores.size(2), std::vector<int64_t>(b, t)};
  if (lengths)
    for (int64_t i = 0; i < b; ++i) {
      const int64_t length = data<int64_t>(*lengths)[i * lengths->stride(0)];
      STD_TORCH_CHECK(length >= 0 && length <= t, "lengths: expected values in [0, T = ", t, "], got ", length,
                      " at sequence ", i);
      g.lengths[i] = length;
    }
  return g;
}

// Calls f(chain, b) for each sequence; an idle thread takes the next sequence. alpha and exponent are rows of the given
// tensors, or buffers of the thread if these are null. `buffers` is the number of buffers of whole sequences that f
// uses: 0, 1 for w, or 3 for w, mean and after.
template <class S, class A, class F>
void each_chain(const Lattice& g, int buffers, const Tensor* alpha, const Tensor* exponent, const F& f) {
  const int64_t window = g.k + kPadding, boundaries = g.t + 1, size = g.t + window;
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, g.t * g.k));
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), (g.b + grain - 1) / grain);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    // not initialized, so that unused memory is never touched
    const int64_t fixed = 2 * kTile + 3 * kPair + (7 + 2 * kPair) * window;
    const std::unique_ptr<A[]> scratch(new A[fixed + buffers * size + (alpha ? 0 : boundaries)]);
    const std::unique_ptr<double[]> exponents(new double[exponent ? 0 : boundaries]);
    A* at = scratch.get();
    const auto take = [&at](int64_t size) { return std::exchange(at, at + size); };
    Chain<S, A> c{};
    c.k = g.k, c.stored = g.t;
    for (A** of : {&c.a, &c.n}) *of = take(kTile + window);
    for (A** of : {&c.sum, &c.inverse, &c.from}) *of = take(kPair + window);
    c.row_buffer = take(window), c.tile = take((2 * kPair + 1) * window);
    if (buffers > 0) c.w = take(size);
    if (buffers > 1) c.mean = take(size), c.after = take(size);
    A* const alpha_buffer = at;
    for (int64_t b; (b = next++) < g.b;) {
      c.scores = data<S>(g.scores) + b * g.t * g.k, c.length = g.lengths[b];
      c.alpha = alpha ? data<A>(*alpha) + b * boundaries : alpha_buffer;
      c.exponent = exponent ? data<double>(*exponent) + b * boundaries : exponents.get();
      f(c, b);
    }
  });
}

// Returns whether the sum over all segmentations is valid. It is NaN if a score is NaN or +inf, or an exponent inexact.
template <class S, class A>
bool run_forward(Chain<S, A>& c) {
  SUKHOPS_BEST(forward<S, A>)(c);
  return c.alpha[c.length] == c.alpha[c.length];
}

// Calls f(chain) for the same sequence in float64, with alpha. float64 has a much larger range of exact exponents.
// Returns whether f was called and returned true. For float64 chains nothing better exists, so f is not called.
template <class F>
bool in_double(const Chain<float, float>& c, const Tensor& like, const F& f) {
  const Lattice g{empty({1, c.length, c.k}, ScalarType::Double, like), 1, c.length, c.k, {c.length}};
  std::copy_n(c.scores, c.length * c.k, data<double>(g.scores));
  bool found = false;
  each_chain<double, double>(g, 1, nullptr, nullptr, [&](Chain<double, double>& d, int64_t) {
    found = run_forward(d) && f(d);
  });
  return found;
}

template <class F>
bool in_double(const Chain<double, double>&, const Tensor&, const F&) { return false; }

// calls f(S{}), where S is the type of the scores: float or double
template <class F>
void with_score(const Lattice& g, const F& f) {
  g.scores.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

std::tuple<Tensor, Tensor, Tensor> log_partition(const Tensor& scores, const std::optional<Tensor>& lengths,
                                                 const Tensor* kept) {
  const Lattice g = lattice(scores, lengths);
  const ScalarType dtype = scores.scalar_type();
  const Tensor logz = empty({g.b}, dtype, scores), alpha = empty({1, g.b, g.t + 1}, dtype, scores);
  const Tensor exponent = empty({1, g.b, g.t + 1}, ScalarType::Double, scores);
  with_score(g, [&](auto s) {
    using S = decltype(s);
    each_chain<S, S>(g, 0, &alpha, &exponent, [&](Chain<S, S>& c, int64_t b) {
      if (kept) c.kept = data<S>(*kept) + b * g.t * g.k;
      S& to = data<S>(logz)[b];
      const auto finish = [&to](const auto& chain) {
        const double end = chain.alpha[chain.length];
        to = end == 0 ? -INFINITY : std::log(end) + chain.exponent[chain.length] * 0.693147180559945309;
        return true;
      };
      if (!(run_forward(c) && finish(c)) && !in_double(c, scores, finish)) to = NAN;
      for (int64_t j = c.length + 1; j <= g.t; ++j) c.alpha[j] = 0, c.exponent[j] = -INFINITY;
    });
  });
  return {logz, alpha, exponent};
}

// Ignores need_gradient: on the CPU the posterior needs only alpha, because it computes masses from the end.
std::tuple<Tensor, Tensor, Tensor> segmentation_logz(const Tensor& scores, const std::optional<Tensor>& lengths, bool) {
  return log_partition(scores, lengths, nullptr);
}

// Also stores the exponentials of the scores in `kept`, where segmentation_marginals_kept writes its result later. They
// are most of the work of the posterior. Exponentials are stored only for rows of plain tiles that need no padding.
// Other rows start with a negative number, and the rest of them is not initialized.
std::tuple<Tensor, Tensor, Tensor, Tensor> segmentation_logz_kept(const Tensor& scores,
                                                                  const std::optional<Tensor>& lengths) {
  const Tensor kept = empty({scores.size(0), scores.size(1), scores.size(2)}, scores.scalar_type(), scores);
  return std::tuple_cat(log_partition(scores, lengths, &kept), std::tuple(kept));
}

// kept: whether `out` holds the exponentials that the forward stored
void posterior(const Tensor& scores, const std::optional<Tensor>& lengths, const Tensor& alpha, const Tensor& exponent,
               const Tensor& grad, const Tensor& out, bool kept) {
  const Lattice g = lattice(scores, lengths);
  const Tensor mantissas = as_contiguous(alpha), exponents = as_contiguous(exponent);
  with_score(g, [&](auto s) {
    using S = decltype(s);
    each_chain<S, S>(g, 1, &mantissas, &exponents, [&](Chain<S, S>& c, int64_t b) {
      c.grad = data<S>(grad)[b * grad.stride(0)];
      c.out = data<S>(out) + b * g.t * g.k;
      if (kept) c.kept = c.out;
      if (c.alpha[c.length] == c.alpha[c.length] && SUKHOPS_BEST(marginals<S>)(c)) return;
      const int64_t count = c.length * c.k;
      std::fill_n(c.out + count, (g.t - c.length) * c.k, S(0));
      const bool found = in_double(c, scores, [&](Chain<double, double>& d) {
        const std::unique_ptr<double[]> scratch(new double[count]);
        d.grad = c.grad, d.out = scratch.get();
        if (!SUKHOPS_BEST(marginals<double>)(d)) return false;
        for (int64_t i = 0; i < count; ++i) c.out[i] = static_cast<S>(d.out[i]);
        return true;
      });
      if (!found) std::fill_n(c.out, count, static_cast<S>(NAN));
    });
  });
}

Tensor segmentation_marginals(const Tensor& scores, const std::optional<Tensor>& lengths, const Tensor& alpha,
                              const Tensor& exponent, const Tensor& grad) {
  const Tensor out = empty({scores.size(0), scores.size(1), scores.size(2)}, scores.scalar_type(), scores);
  posterior(scores, lengths, alpha, exponent, grad, out, false);
  return out;
}

void segmentation_marginals_kept(const Tensor& scores, const std::optional<Tensor>& lengths, const Tensor& alpha,
                                 const Tensor& exponent, const Tensor& grad, Tensor kept) {
  STD_TORCH_CHECK(kept.is_contiguous(), "kept: expected the contiguous tensor that segmentation_logz_kept returned");
  posterior(scores, lengths, alpha, exponent, grad, kept, true);
}

// The mean, over segmentations, of the sum of the weights of their segments (see segment_weight). If `grad` is given,
// also grad times the gradient of the mean through the posterior. Computed in double, because the gradient consists of
// differences of such means.
std::tuple<Tensor, Tensor> mean_and_gradient(const Tensor& scores, const std::optional<Tensor>& lengths,
                                             const Tensor* upstream, const Tensor* grad) {
  const Lattice g = lattice(scores, lengths);
  const ScalarType dtype = scores.scalar_type();
  const Tensor mean = empty({g.b}, dtype, scores), out = empty({grad ? g.b : 0, g.t, g.k}, dtype, scores);
  with_score(g, [&](auto s) {
    using S = decltype(s);
    each_chain<S, double>(g, 3, nullptr, nullptr, [&](Chain<S, double>& c, int64_t b) {
      if (upstream) c.upstream = data<S>(*upstream) + b * g.t * g.k;
      if (grad) c.grad = data<S>(*grad)[b * grad->stride(0)], c.out = data<S>(out) + b * g.t * g.k;
      const bool found = run_forward(c) && SUKHOPS_BEST(moments<S>)(c, grad != nullptr);
      data<S>(mean)[b] = found ? c.mean[c.length] : NAN;
      if (!found && grad) std::fill_n(c.out, c.length * c.k, static_cast<S>(NAN));
      if (!found && grad) std::fill_n(c.out + c.length * c.k, (g.t - c.length) * c.k, S(0));
    });
  });
  return {mean, out};
}

using Means = MeanOperators<&mean_and_gradient>;

// Follows the best sums backward from the end; of equal ones it takes the shorter segment. Returns the score, which it
// adds up along the way.
template <class S>
double trace(const Chain<S, double>& c, int64_t* segments) {
  if (c.bad) return NAN;
  double score = 0, lost = 0;
  for (int64_t j = c.length; j > 0;) {
    double best = -INFINITY;
    int64_t length = 0;
    for (int64_t k = 0; k < std::min(c.k, j); ++k) {
      const double sum = c.a[j - 1 - k] + static_cast<double>(c.scores[(j - 1 - k) * c.k + k]);
      if (sum > best) best = sum, length = k + 1;
    }
    if (!length) return -INFINITY;  // only at the end: a boundary that is reached has a predecessor
    j -= length;
    segments[j] = length;
    warp::add_exactly(score, lost, c.scores[j * c.k + length - 1]);
  }
  return score + lost;
}

std::tuple<Tensor, Tensor> segmentation_viterbi(const Tensor& scores, const std::optional<Tensor>& lengths) {
  const Lattice g = lattice(scores, lengths);
  const Tensor score = empty({g.b}, scores.scalar_type(), scores);
  const Tensor segments = zeros({g.b, g.t}, ScalarType::Long, scores);
  with_score(g, [&](auto s) {
    using S = decltype(s);
    each_chain<S, double>(g, 1, nullptr, nullptr, [&](Chain<S, double>& c, int64_t b) {
      c.a = c.w;
      SUKHOPS_BEST(best_sums<S>)(c);
      data<S>(score)[b] = trace(c, data<int64_t>(segments) + b * g.t);
    });
  });
  return {score, segments};
}

Tensor segmentation_sample(const Tensor& scores, const std::optional<Tensor>& lengths, const Tensor& alpha,
                           const Tensor& exponent, int64_t num_samples, const Tensor& seed) {
  const Lattice g = lattice(scores, lengths);
  const Tensor segments = empty({num_samples, g.b, g.t}, ScalarType::Long, scores);
  with_score(g, [&](auto s) {
    using S = decltype(s);
    std::atomic<int64_t> failed{-1};
    each_chain<S, S>(g, 0, &alpha, &exponent, [&](Chain<S, S>& c, int64_t b) {
      const auto draw_samples = [&](auto& chain) {
        using A = std::remove_reference_t<decltype(*chain.alpha)>;
        int64_t* const out = data<int64_t>(segments) + b * g.t;
        if (chain.alpha[chain.length] == 0) {
          for (int64_t i = 0; i < num_samples; ++i) std::fill_n(out + i * g.b * g.t, g.t, 0);
          return true;
        }
        chain.stored = g.t;
        std::vector<A> table(kDrawTile * (g.k + kPadding));
        std::vector<int64_t> position(num_samples), segment(num_samples);
        std::vector<uint64_t> stream(num_samples);
        const Draw<A> d{static_cast<uint64_t>(data<int64_t>(seed)[0]), b, g.b, num_samples, table.data(),
                        position.data(), segment.data(), stream.data(), out};
        return SUKHOPS_BEST(samples<A>)(chain, d);
      };
      const S end = c.alpha[c.length];
      if (!(end == end && draw_samples(c)) && !in_double(c, scores, draw_samples)) failed = b;
    });
    STD_TORCH_CHECK(failed < 0, "scores: NaN or +inf in sequence ", failed.load(),
                    ", or sums too large for float64: no distribution to sample from");
  });
  return segments;
}

}  // namespace
}  // namespace sukhops

STABLE_TORCH_LIBRARY_IMPL(sukhops, CPU, m) {
  m.impl("segmentation_logz", TORCH_BOX(&sukhops::segmentation_logz));
  m.impl("segmentation_marginals", TORCH_BOX(&sukhops::segmentation_marginals));
  m.impl("segmentation_logz_kept", TORCH_BOX(&sukhops::segmentation_logz_kept));
  m.impl("segmentation_marginals_kept", TORCH_BOX(&sukhops::segmentation_marginals_kept));
  m.impl("segmentation_marginals_backward", TORCH_BOX(&sukhops::Means::marginals_backward));
  m.impl("segmentation_viterbi", TORCH_BOX(&sukhops::segmentation_viterbi));
  m.impl("segmentation_sample", TORCH_BOX(&sukhops::segmentation_sample));
  m.impl("segmentation_entropy", TORCH_BOX(&sukhops::Means::entropy));
  m.impl("segmentation_entropy_backward", TORCH_BOX(&sukhops::Means::entropy_backward));
}
