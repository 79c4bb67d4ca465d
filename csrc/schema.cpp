// The signature of every operator. CPU kernels are registered beside their code in csrc/<op>.cpp,
// CUDA launchers, fakes and autograd in sukhops/ops/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sukhops, m) {
  m.def("cpu_capability() -> str");
  m.def("cpu_isas() -> str[]");  // the instruction sets of this CPU that kernels are compiled for, by age
  m.def("use_cpu_isa(str name) -> ()");  // one of them, for the whole process, for tests
  m.def("product_count() -> int");  // matrix products that CPU kernels have taken so far, for tests

  // of logits = softcap * tanh(scale * (hidden . weight + bias) / softcap) / temperature: maximum [N], log_sum [N] =
  // log sum_v exp(logit_v - maximum), target_logit [N, K], topk_value [N, k], topk_index [N, k]; with statistics entropy,
  // log_sum_sq and mean_logit [N] (else [0]); when only `hidden` needs a gradient, mean_weight [N, D] = sum_v p_v
  // (dlogit_v/draw_v) / slope weight_v (else [0]); when the weight or the bias does, logits [R, V], the products of
  // the first R rows that are not dropped, as many of N as logits_budget bytes hold (else [0, V])
  m.def(
      "vocab_head(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, int k, bool statistics, float? softcap, "
      "float scale, float temperature, int ignore_index, int logits_budget, bool need_hidden, bool need_weight, "
      "bool need_bias) "
      "-> (Tensor maximum, Tensor log_sum, Tensor target_logit, Tensor topk_value, Tensor topk_index, "
      "Tensor entropy, Tensor log_sum_sq, Tensor mean_logit, Tensor mean_weight, Tensor logits)");
  // a gradient that is not needed comes back as [0]; an upstream gradient that is None is zero
  m.def(
      "vocab_head_backward(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, "
      "Tensor topk_index, Tensor maximum, Tensor log_sum, Tensor entropy, Tensor mean_weight, Tensor logits, "
      "Tensor? grad_log_sum, Tensor? grad_target, Tensor? grad_topk, Tensor? grad_entropy, float? softcap, "
      "float scale, float temperature, int ignore_index, bool need_hidden, bool need_weight, bool need_bias) "
      "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");

  // log-softmax(lm + sum_a gamma_a * logsigmoid(cls_a)) [N, V]: gamma [A, N] in the accumulation dtype, a
  // bias of shape [0] is none; a shared head has cls_affine [2], no cls_weight, and gamma [1, N]. The scores' maximum [N]
  // and log_sum [N] of what is relative to it say what was subtracted
  m.def(
      "director(Tensor hidden, Tensor lm_weight, Tensor[] cls_weight, Tensor gamma, Tensor? lm_bias, "
      "Tensor[] cls_bias, Tensor? cls_affine) -> (Tensor logp, Tensor maximum, Tensor log_sum)");
  m.def(
      "director_topk(Tensor hidden, Tensor lm_weight, Tensor[] cls_weight, Tensor gamma, Tensor? lm_bias, "
      "Tensor[] cls_bias, Tensor? cls_affine, int k) "
      "-> (Tensor value, Tensor index, Tensor maximum, Tensor log_sum)");
  // logp are columns of a distribution, grad_elsewhere [N] is the sum of the gradients of the others, if there are any
  m.def(
      "director_backward(Tensor grad, Tensor? grad_elsewhere, Tensor logp, Tensor hidden, Tensor lm_weight, "
      "Tensor[] cls_weight, "
      "Tensor gamma, Tensor? lm_bias, Tensor[] cls_bias, Tensor? cls_affine, bool need_hidden, "
      "bool need_lm_weight, bool need_cls_weight, bool need_bias) "
      "-> (Tensor grad_hidden, Tensor grad_lm_weight, Tensor[] grad_cls_weight, Tensor grad_gamma, "
      "Tensor grad_lm_bias, Tensor[] grad_cls_bias, Tensor grad_cls_affine)");
  // hidden . weight[target] + bias[target] [N] where label is 0 or 1 and target is not -100, else 0
  m.def(
      "director_dot(Tensor hidden, Tensor weight, Tensor target, Tensor label, Tensor? bias) -> Tensor");
  m.def(
      "director_dot_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor target, Tensor label, "
      "bool need_hidden, bool need_weight, bool need_bias) "
      "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");
  // the mean over v != target of (sigmoid(c_v) - 1/2)^2 [N] on the same rows, c = a * (logits) + b with affine
  m.def(
      "director_norm(Tensor hidden, Tensor weight, Tensor target, Tensor label, Tensor? bias, "
      "Tensor? affine) -> Tensor");
  m.def(
      "director_norm_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor target, Tensor label, "
      "Tensor? bias, Tensor? affine, bool need_hidden, bool need_weight, bool need_bias) "
      "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor grad_affine)");

  // out [B, H, M, d], and of each row [B, H, M] the maximum of its scores and the sum of its weights relative
  // to it, in the accumulation dtype, as is span [H] or [B, H, M]; rel_pos [S, d]
  // or [H, S, d]; key_start [B, M] int64; a key is x = (position of the query - position of the key) - skip away,
  // and seen if 0 <= x < max_span and < S
  m.def(
      "adaptive_span(Tensor q, Tensor k, Tensor v, Tensor span, Tensor? rel_pos, Tensor? key_start, "
      "Tensor? query_start, float ramp, float scale, int skip, int? max_span) "
      "-> (Tensor out, Tensor maximum, Tensor sum)");
  m.def(
      "adaptive_span_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor span, Tensor? rel_pos, "
      "Tensor? key_start, Tensor? query_start, Tensor out, Tensor maximum, Tensor sum, "
      "float ramp, float scale, int skip, int? max_span, bool need_q, bool need_kv, bool need_span, bool need_rel_pos) "
      "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_span, Tensor grad_rel_pos)");
  m.def("adaptive_span_pairs() -> int");  // query-key pairs that CPU kernels have multiplied so far, for tests

  // sums over the segmentations of scores [B, T, K] (float32 or float64), lengths [B] int64 or all T.
  // alpha * 2^exponent (float64), both [1, B, T + 1], is the sum over the segmentations of the first t positions;
  // on CUDA with need_gradient both are [2, B, T + 1], the second half that over the positions from t on
  m.def(
      "segmentation_logz(Tensor scores, Tensor? lengths, bool need_gradient) "
      "-> (Tensor logz, Tensor alpha, Tensor exponent)");
  // grad [B] times the posterior of each segment [B, T, K]: the gradient of logz
  m.def(
      "segmentation_marginals(Tensor scores, Tensor? lengths, Tensor alpha, Tensor exponent, Tensor grad) "
      "-> Tensor");
  // the same two on the CPU with less work: what the first keeps, [B, T, K], becomes the second one's result
  m.def(
      "segmentation_logz_kept(Tensor scores, Tensor? lengths) "
      "-> (Tensor logz, Tensor alpha, Tensor exponent, Tensor kept)");
  m.def(
      "segmentation_marginals_kept(Tensor scores, Tensor? lengths, Tensor alpha, Tensor exponent, "
      "Tensor grad, Tensor(a!) kept) -> ()");
  m.def(
      "segmentation_marginals_backward(Tensor scores, Tensor? lengths, Tensor grad, Tensor upstream, "
      "bool need_scores) -> (Tensor grad_grad, Tensor grad_scores)");
  m.def("segmentation_entropy(Tensor scores, Tensor? lengths) -> Tensor");
  m.def("segmentation_entropy_backward(Tensor scores, Tensor? lengths, Tensor grad) -> Tensor");
  m.def("segmentation_viterbi(Tensor scores, Tensor? lengths) -> (Tensor score, Tensor segments)");
  m.def(  // seed [1] int64
      "segmentation_sample(Tensor scores, Tensor? lengths, Tensor alpha, Tensor exponent, int num_samples, "
      "Tensor seed) -> Tensor");
}
