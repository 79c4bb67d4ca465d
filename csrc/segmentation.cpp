// Sums over all segmentations of a sequence on the CPU: log-partition, posterior and its gradient, entropy, the
// best segmentation, samples. A sequence has one owner; the recursions are in segmentation_rows.h.
#include "common.h"

namespace sukhops {

constexpr int64_t kTogether = 4;  // sequences that a thread takes side by side
constexpr int64_t kRebase = 8;    // steps between two alignments of a window's exponents
constexpr int64_t kDrawTile = 64;  // boundaries whose inflow is tabulated at a time
constexpr int64_t kPadding = 32;  // numbers behind a window that whole vectors run into

// one sequence: rows [0, length) of k scores, `stride` apart, and the room its recursion needs
template <class S, class A>
struct Chain {
  const S* scores;
  int64_t length, stride, k;
  A* alpha;          // [length + 1]
  double* exponent;  // [length + 1]
  A *a, *n;          // the window, [length + k + kPadding]
  A* w;              // the mass of each boundary, likewise
  A* room;           // one padded row
  double base;       // what exponents in n are relative to
  int64_t tile;      // the first row of the tile in hand
  int bad;
  A grad;
  S* out;          // [stored, k]
  int64_t stored;  // rows of out, those behind length 0
  const S* upstream;
  double *mean, *after, *log_alpha;  // as w
};

template <class A>
struct Draw {
  uint64_t seed;
  int64_t sequence, sequences, samples;
  A* table;           // [kDrawTile, padded k]
  int64_t* position;  // [samples]
  int64_t* segments;  // [samples, sequences, T], at this sequence
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

Lattice lattice(const Tensor& scores, const std::optional<Tensor>& lengths) {
  const int64_t b = scores.size(0), t = scores.size(1);
  Lattice g{torch::stable::contiguous(scores), b, t, scores.size(2), std::vector<int64_t>(b, t)};
  if (lengths)
    for (int64_t i = 0; i < b; ++i) {
      const int64_t length = data<int64_t>(*lengths)[i * lengths->stride(0)];
      STD_TORCH_CHECK(length >= 0 && length <= t, "lengths: expected values in [0, T = ", t, "], got ", length,
                      " at sequence ", i);
      g.lengths[i] = length;
    }
  return g;
}

// f(chains, first, count) on groups of sequences. alpha and exponent are rows of the given tensors, or room of
// the thread's own; `arrays` says how many arrays of a window's length a chain needs, in the order of Chain.
template <class S, class A, class F>
void each_group(const Lattice& g, int arrays, const Tensor* alpha, const Tensor* exponent, int64_t together, const F& f) {
  const int64_t span = g.t + g.k + kPadding, grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, g.t * g.k));
  torch::stable::parallel_for(0, g.b, grain, [&](int64_t lo, int64_t hi) {
    const int64_t group = std::min(together, hi - lo), own = alpha ? 0 : g.t + 1;
    std::vector<A> room(group * (arrays * span + g.k + kPadding + own));
    std::vector<double> exponents(group * own);
    std::vector<Chain<S, A>> chains(group);
    for (int64_t first = lo; first < hi; first += group) {
      const int64_t count = std::min(group, hi - first);
      A* at = room.data();
      for (int64_t i = 0; i < count; ++i) {
        const int64_t b = first + i;
        Chain<S, A>& c = chains[i] = {};
        c.scores = data<S>(g.scores) + b * g.t * g.k;
        c.length = g.lengths[b], c.stride = c.k = g.k, c.stored = g.t;
        c.alpha = alpha ? data<A>(*alpha) + b * (g.t + 1) : std::exchange(at, at + own);
        c.exponent = exponent ? data<double>(*exponent) + b * (g.t + 1) : exponents.data() + i * own;
        c.room = std::exchange(at, at + g.k + kPadding);
        A** const slots[] = {&c.a, &c.n, &c.w};
        for (int s = 0; s < std::min(arrays, 3); ++s) *slots[s] = std::exchange(at, at + span);
        if constexpr (std::is_same_v<A, double>) {
          double** const more[] = {&c.mean, &c.after, &c.log_alpha};
          for (int s = 3; s < arrays; ++s) *more[s - 3] = std::exchange(at, at + span);
        }
      }
      f(chains.data(), first, count);
    }
  });
}

template <class S, class A>
void run_forward(Chain<S, A>* chains, int64_t count) {
  static const auto run = SUKHOPS_BEST(forward<S, A>);
  run(chains, count);
}

// calls f(S{}) with the type of the scores: float or double
template <class F>
void with_score(const Lattice& g, const F& f) {
  g.scores.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

std::tuple<Tensor, Tensor, Tensor> segmentation_logz(const Tensor& scores, const std::optional<Tensor>& lengths) {
  const Lattice g = lattice(scores, lengths);
  const ScalarType dtype = scores.scalar_type();
  const Tensor logz = empty({g.b}, dtype, scores), alpha = empty({g.b, g.t + 1}, dtype, scores);
  const Tensor exponent = empty({g.b, g.t + 1}, ScalarType::Double, scores);
  with_score(g, [&](auto s) {
    using S = decltype(s);
    each_group<S, S>(g, 2, &alpha, &exponent, kTogether, [&](Chain<S, S>* chains, int64_t first, int64_t count) {
      run_forward(chains, count);
      for (int64_t i = 0; i < count; ++i) {
        const Chain<S, S>& c = chains[i];
        const double log = std::log(static_cast<double>(c.alpha[c.length]));
        data<S>(logz)[first + i] = c.alpha[c.length] == 0 ? log : log + c.exponent[c.length] * 0.693147180559945309;
        for (int64_t j = c.length + 1; j <= g.t; ++j) c.alpha[j] = 0, c.exponent[j] = -INFINITY;
      }
    });
  });
  return {logz, alpha, exponent};
}

Tensor segmentation_marginals(const Tensor& scores, const std::optional<Tensor>& lengths, const Tensor& alpha,
                              const Tensor& exponent, const Tensor& grad) {
  const Lattice g = lattice(scores, lengths);
  const Tensor out = empty({g.b, g.t, g.k}, scores.scalar_type(), scores);
  with_score(g, [&](auto s) {
    using S = decltype(s);
    each_group<S, S>(g, 3, &alpha, &exponent, kTogether, [&](Chain<S, S>* chains, int64_t first, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        chains[i].grad = data<S>(grad)[(first + i) * grad.stride(0)];
        chains[i].out = data<S>(out) + (first + i) * g.t * g.k;
      }
      static const auto run = SUKHOPS_BEST(marginals<S>);
      run(chains, count);
    });
  });
  return out;
}

// the mean over segmentations of a sum over segments (`expect` says which) and, if asked for, grad times its
// gradient through the posterior; in double throughout, since differences of such means are what is wanted
std::tuple<Tensor, Tensor> mean_and_gradient(const Tensor& scores, const std::optional<Tensor>& lengths, const Tensor* upstream,
                                             const Tensor* grad, bool need_gradient) {
  const Lattice g = lattice(scores, lengths);
  const ScalarType dtype = scores.scalar_type();
  const Tensor mean = empty({g.b}, dtype, scores);
  const Tensor out = empty({need_gradient ? g.b : 0, g.t, g.k}, dtype, scores);
  with_score(g, [&](auto s) {
    using S = decltype(s);
    each_group<S, double>(g, 6, nullptr, nullptr, 1, [&](Chain<S, double>* c, int64_t b, int64_t) {
      if (upstream) c->upstream = data<S>(*upstream) + b * g.t * g.k;
      if (need_gradient) {
        c->grad = data<S>(*grad)[b * grad->stride(0)];
        c->out = data<S>(out) + b * g.t * g.k;
      }
      run_forward(c, 1);
      static const auto run = SUKHOPS_BEST(moments<S>);
      run(c, need_gradient);
      data<S>(mean)[b] = c->mean[c->length];
    });
  });
  return {mean, out};
}

std::tuple<Tensor, Tensor> segmentation_marginals_backward(
    const Tensor& scores, const std::optional<Tensor>& lengths, const Tensor& grad, const Tensor& upstream,
    bool need_scores) {
  const Tensor given = torch::stable::contiguous(upstream);
  return mean_and_gradient(scores, lengths, &given, &grad, need_scores);
}

Tensor segmentation_entropy(const Tensor& scores, const std::optional<Tensor>& lengths) {
  return std::get<0>(mean_and_gradient(scores, lengths, nullptr, nullptr, false));
}

Tensor segmentation_entropy_backward(const Tensor& scores, const std::optional<Tensor>& lengths, const Tensor& grad) {
  return std::get<1>(mean_and_gradient(scores, lengths, nullptr, &grad, true));
}

// follows the best sums back from the end, the shorter segment first among equals; the score is added along it
template <class S>
double trace(const Chain<S, double>& c, int64_t* segments) {
  if (c.bad) return NAN;
  double score = 0;
  for (int64_t j = c.length; j > 0;) {
    double best = -INFINITY;
    int64_t length = 0;
    for (int64_t k = 0; k < std::min(c.k, j); ++k) {
      const double sum = c.a[j - 1 - k] + static_cast<double>(c.scores[(j - 1 - k) * c.stride + k]);
      if (sum > best) best = sum, length = k + 1;
    }
    if (!length) return -INFINITY;  // at the end, or nowhere: a boundary that is reached has a way back
    j -= length;
    segments[j] = length;
    score += c.scores[j * c.stride + length - 1];
  }
  return score;
}

std::tuple<Tensor, Tensor> segmentation_viterbi(const Tensor& scores, const std::optional<Tensor>& lengths) {
  const Lattice g = lattice(scores, lengths);
  const Tensor score = empty({g.b}, scores.scalar_type(), scores);
  const Tensor segments = zeros({g.b, g.t}, ScalarType::Long, scores);
  with_score(g, [&](auto s) {
    using S = decltype(s);
    each_group<S, double>(g, 1, nullptr, nullptr, kTogether, [&](Chain<S, double>* chains, int64_t first, int64_t count) {
      static const auto run = SUKHOPS_BEST(best_sums<S>);
      run(chains, count);
      for (int64_t i = 0; i < count; ++i)
        data<S>(score)[first + i] = trace(chains[i], data<int64_t>(segments) + (first + i) * g.t);
    });
  });
  return {score, segments};
}

Tensor segmentation_sample(const Tensor& scores, const std::optional<Tensor>& lengths, const Tensor& alpha,
                           const Tensor& exponent, int64_t num_samples, const Tensor& seed) {
  const Lattice g = lattice(scores, lengths);
  const Tensor segments = zeros({num_samples, g.b, g.t}, ScalarType::Long, scores);
  with_score(g, [&](auto s) {
    using S = decltype(s);
    each_group<S, S>(g, 2, &alpha, &exponent, 1, [&](Chain<S, S>* c, int64_t b, int64_t) {
      const S end = c->alpha[c->length];
      STD_TORCH_CHECK(end == end, "scores: NaN or +inf in sequence ", b, ", which has no distribution to sample");
      if (end == 0) return;
      std::vector<S> table(kDrawTile * (g.k + kPadding));
      std::vector<int64_t> position(num_samples);
      const Draw<S> d{static_cast<uint64_t>(data<int64_t>(seed)[0]), b, g.b, num_samples, table.data(),
                      position.data(), data<int64_t>(segments) + b * g.t};
      static const auto run = SUKHOPS_BEST(samples<S>);
      run(c, d);
    });
  });
  return segments;
}

}  // namespace
}  // namespace sukhops

STABLE_TORCH_LIBRARY_IMPL(sukhops, CPU, m) {
  m.impl("segmentation_logz", TORCH_BOX(&sukhops::segmentation_logz));
  m.impl("segmentation_marginals", TORCH_BOX(&sukhops::segmentation_marginals));
  m.impl("segmentation_marginals_backward", TORCH_BOX(&sukhops::segmentation_marginals_backward));
  m.impl("segmentation_viterbi", TORCH_BOX(&sukhops::segmentation_viterbi));
  m.impl("segmentation_sample", TORCH_BOX(&sukhops::segmentation_sample));
  m.impl("segmentation_entropy", TORCH_BOX(&sukhops::segmentation_entropy));
  m.impl("segmentation_entropy_backward", TORCH_BOX(&sukhops::segmentation_entropy_backward));
}
