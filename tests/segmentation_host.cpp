// Runs the recursions of segmentation.cu on the CPU, one sequence per call, for tests/test_segmentation_cuda.py.
#include "segmentation_warp.h"

#include <algorithm>
#include <vector>

using namespace sukhops::warp;

namespace {

// calls f with the window width that segmentation.cu chooses for k
template <class F>
void with_owner(int64_t k, const F& f) {
  Host<32> narrow;
  Host<64> middle;
  Host<128> wide;
  if (k <= 32) return f(narrow);
  if (k <= 64) return f(middle);
  f(wide);
}

// like the kernels transfers, windows and sweeps
template <class S, class P>
void sweep_in_chunks(P& p, const Sequence<S>& q, bool backwards, int64_t steps, double* value, double* exponent) {
  std::vector<Number<double>> window(q.k), next(q.k), matrix(q.k * q.k);
  for (int64_t from = 0; from == 0 || from < q.length; from += steps) {
    auto w = from == 0 ? unit<S>(p, 0, q.k, 0) : window_of<S>(p, from, q.k, window.data());
    const int64_t to = from + steps < q.length ? from + steps : q.length;
    sweep(p, q, backwards, from, to, w, value, exponent);
    if (to == q.length) return;
    if (from == 0) std::fill(window.begin(), window.end(), Number<double>{0, -infinity()}), window[0] = {1, 0};
    for (int64_t i = 0; i < q.k; ++i) transfer<S>(p, q, backwards, from, to, i, matrix.data() + i * q.k);
    compose(p, q.k, window.data(), matrix.data(), next.data());
    window.swap(next);
  }
}

// in chunks of `steps`; 0: in one piece
template <class S>
void posterior_of(const Sequence<S>& q, int64_t steps, S* logz, S* out) {
  std::vector<double> alpha(q.length + 1), alpha_n(q.length + 1), beta(q.length + 1), beta_n(q.length + 1);
  with_owner(q.k, [&](auto& p) {
    const auto run = [&](bool backwards, double* value, double* exponent) {
      steps && q.k ? sweep_in_chunks(p, q, backwards, steps, value, exponent)
                   : sweep<S>(p, q, backwards, value, exponent);
    };
    run(false, alpha.data(), alpha_n.data());
    run(true, beta.data(), beta_n.data());
  });
  const auto log_of = [](double a, double n) { return a == 0 ? -infinity() : std::log(a) + n * 0.693147180559945309; };
  logz[0] = S(log_of(alpha[q.length], alpha_n[q.length]));
  logz[1] = S(log_of(beta[0], beta_n[0]));
  for (int64_t t = 0; t < q.length && alpha[q.length] != 0; ++t)
    for (int64_t i = 0; i < q.k && t + i < q.length; ++i)
      out[t * q.k + i] = beta[0] != beta[0] ? S(NAN)
                                            : S(posterior(q.score[t * q.k + i], alpha[t], alpha_n[t], beta[t + 1 + i],
                                                          beta_n[t + 1 + i], alpha[q.length], alpha_n[q.length]));
}

template <class S>
void moments_of(const Sequence<S>& q, const S* upstream, S* mean, S* out) {
  std::vector<double> alpha(q.length + 1), exponent(q.length + 1), sums(q.length + 1);
  with_owner(q.k, [&](auto& p) {
    sweep<double>(p, q, false, alpha.data(), exponent.data());
    expect(p, q, alpha.data(), exponent.data(), upstream, sums.data());
    covariance(p, q, alpha.data(), exponent.data(), upstream, sums.data(), 1.0, out);
  });
  *mean = S(sums[q.length]);
}

template <class S>
void best_of(const Sequence<S>& q, S* score, int64_t* segments) {
  std::vector<double> sums(q.length + 1);
  with_owner(q.k, [&](auto& p) { *score = best_sums(p, q, sums.data()) ? S(trace(p, q, sums.data(), segments)) : S(NAN); });
}

template <class S>
void samples_of(const Sequence<S>& q, int64_t t, int64_t samples, int64_t seed, int64_t* segments) {
  std::vector<double> alpha(q.length + 1), exponent(q.length + 1);
  with_owner(q.k, [&](auto& p) { sweep<S>(p, q, false, alpha.data(), exponent.data()); });
  for (int64_t s = 0; s < samples && alpha[q.length] != 0; ++s)
    draw(q, alpha.data(), exponent.data(), uint64_t(seed) + 0x9e3779b97f4a7c15u * uint64_t(s + 1), segments + s * t);
}

}  // namespace

#define HOST(S, NAME)                                                                                          \
  extern "C" void posterior_##NAME(const S* x, int64_t n, int64_t k, int64_t steps, S* logz, S* out) {         \
    posterior_of(Sequence<S>{x, n, k}, steps, logz, out);                                                      \
  }                                                                                                            \
  extern "C" void moments_##NAME(const S* x, int64_t n, int64_t k, const S* upstream, S* mean, S* out) {       \
    moments_of(Sequence<S>{x, n, k}, upstream, mean, out);                                                     \
  }                                                                                                            \
  extern "C" void best_##NAME(const S* x, int64_t n, int64_t k, S* score, int64_t* segments) {                 \
    best_of(Sequence<S>{x, n, k}, score, segments);                                                            \
  }                                                                                                            \
  extern "C" void samples_##NAME(const S* x, int64_t n, int64_t k, int64_t t, int64_t samples, int64_t seed,   \
                                 int64_t* segments) {                                                          \
    samples_of(Sequence<S>{x, n, k}, t, samples, seed, segments);                                              \
  }
extern "C" int64_t chunks(int64_t b, int64_t t, int64_t k, int64_t warps) { return chunk_steps(b, t, k, warps); }
HOST(float, float32)
HOST(double, float64)
