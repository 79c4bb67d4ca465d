// The signatures of all operators. CPU kernels are registered in csrc/<op>.cpp; CUDA launchers, fakes and autograd in
// sukhops/ops/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sukhops, m) {
  m.def("cpu_capability() -> str");
  m.def("cpu_isas() -> str[]");  // the instruction sets of this CPU that the kernels are compiled for, oldest first
  m.def("use_cpu_isa(str name) -> ()");  // for tests: selects one of cpu_isas() for the whole process
  m.def("product_count() -> int");  // for tests: number of matrix products so far in CPU kernels

  // Of logits = softcap * tanh(scale * (hidden . weight + bias) / softcap) / temperature, for each of N rows:
  //   maximum [N]; log_sum [N] = log sum_v exp(logit_v - maximum); target_logit [N, K]; topk_value, topk_index [N, k];
  //   if `statistics`: entropy, log_sum_sq and mean_logit [N], else [0];
  //   if only `hidden` needs a gradient: mean_weight [N, D] = sum_v p_v (dlogit_v/draw_v) / slope weight_v, else [0];
  //   if the weight or the bias needs a gradient: logits [R, V], the products hidden . weight of the first R rows that
  //   are not ignored, where R <= N is the number of rows that fit into logits_budget bytes; else [0, V].
  m.def(
      "vocab_head(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, int k, bool statistics, float? softcap, "
      "float scale, float temperature, int ignore_index, int logits_budget, bool need_hidden, bool need_weight, "
      "bool need_bias) "
      "-> (Tensor maximum, Tensor log_sum, Tensor target_logit, Tensor topk_value, Tensor topk_index, "
      "Tensor entropy, Tensor log_sum_sq, Tensor mean_logit, Tensor mean_weight, Tensor logits)");
  // A gradient that is not needed is returned as [0]. An upstream gradient that is None is zero.
  m.def(
      "vocab_head_backward(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, "
      "Tensor topk_index, Tensor maximum, Tensor log_sum, Tensor entropy, Tensor mean_weight, Tensor logits, "
      "Tensor? grad_log_sum, Tensor? grad_target, Tensor? grad_topk, Tensor? grad_entropy, float? softcap, "
      "float scale, float temperature, int ignore_index, bool need_hidden, bool need_weight, bool need_bias) "
      "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");

  // logp [N, V] = log-softmax of the scores lm + sum_a gamma_a * logsigmoid(cls_a). gamma [A, N] has the accumulation
  // dtype. A bias of shape [0] means no bias. A shared head has cls_affine [2], no cls_weight, and gamma [1, N]. logp
  // is (scores - maximum) - log_sum, with maximum and log_sum [N].
  m.def(
      "director(Tensor hidden, Tensor lm_weight, Tensor[] cls_weight, Tensor gamma, Tensor? lm_bias, "
      "Tensor[] cls_bias, Tensor? cls_affine) -> (Tensor logp, Tensor maximum, Tensor log_sum)");
  m.def(
      "director_topk(Tensor hidden, Tensor lm_weight, Tensor[] cls_weight, Tensor gamma, Tensor? lm_bias, "
      "Tensor[] cls_bias, Tensor? cls_affine, int k) "
      "-> (Tensor value, Tensor index, Tensor maximum, Tensor log_sum)");
  // logp may have only some columns of a distribution. grad_elsewhere [N] is then the sum of grad over all other
  // columns.
  m.def(
      "director_backward(Tensor grad, Tensor? grad_elsewhere, Tensor logp, Tensor hidden, Tensor lm_weight, "
      "Tensor[] cls_weight, "
      "Tensor gamma, Tensor? lm_bias, Tensor[] cls_bias, Tensor? cls_affine, bool need_hidden, "
      "bool need_lm_weight, bool need_cls_weight, bool need_bias) "
      "-> (Tensor grad_hidden, Tensor grad_lm_weight, Tensor[] grad_cls_weight, Tensor grad_gamma, "
      "Tensor grad_lm_bias, Tensor[] grad_cls_bias, Tensor grad_cls_affine)");
  // [N] hidden . weight[target] + bias[target] for rows whose label is 0 or 1 and whose target is not -100, else 0
  m.def(
      "director_dot(Tensor hidden, Tensor weight, Tensor target, Tensor label, Tensor? bias) -> Tensor");
  m.def(
      "director_dot_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor target, Tensor label, "
      "bool need_hidden, bool need_weight, bool need_bias) "
      "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");
  // [N] the mean over v != target of (sigmoid(c_v) - 1/2)^2 for the same rows, else 0. c are the logits of the weight
  // or, with affine = (a, b), a * logits + b. Second result: director_dot of the same arguments. Third: the products
  // hidden @ weight^T of the first of these rows, up to logits_budget bytes.
  m.def(
      "director_norm(Tensor hidden, Tensor weight, Tensor target, Tensor label, Tensor? bias, "
      "Tensor? affine, int logits_budget) -> (Tensor norm, Tensor logit, Tensor logits)");
  m.def(
      "director_norm_backward(Tensor grad, Tensor grad_logit, Tensor hidden, Tensor weight, Tensor target, "
      "Tensor label, Tensor? bias, Tensor? affine, Tensor logits, bool need_hidden, bool need_weight, "
      "bool need_bias) "
      "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor grad_affine)");

  // out [B, H, M, d]; maximum [B, H, M] of the scores of each query, and sum [B, H, M] of its weights relative to the
  // maximum, both in the accumulation dtype. span [H] or [B, H, M] has the accumulation dtype too. rel_pos is [S, d] or
  // [H, S, d], key_start [B, M] int64. The distance of a key is x = (position of the query - position of the key) -
  // skip; a query sees the key if 0 <= x < min(max_span, S).
  m.def(
      "adaptive_span(Tensor q, Tensor k, Tensor v, Tensor span, Tensor? rel_pos, Tensor? key_start, "
      "Tensor? query_start, float ramp, float scale, int skip, int? max_span) "
      "-> (Tensor out, Tensor maximum, Tensor sum)");
  m.def(
      "adaptive_span_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor span, Tensor? rel_pos, "
      "Tensor? key_start, Tensor? query_start, Tensor out, Tensor maximum, Tensor sum, "
      "float ramp, float scale, int skip, int? max_span, bool need_q, bool need_kv, bool need_span, bool need_rel_pos) "
      "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_span, Tensor grad_rel_pos)");
  m.def("adaptive_span_pairs() -> int");  // for tests: number of query-key pairs so far in CPU kernels

  // Sums over the segmentations of scores [B, T, K] (float32 or float64); lengths [B] int64, or None if all are T.
  // alpha * 2^exponent, both [1, B, T + 1], is the sum over the segmentations of the first t positions; exponent is
  // float64. On CUDA with need_gradient both are [2, B, T + 1]; the second half is the sum over the segmentations of
  // the positions from t on.
  m.def(
      "segmentation_logz(Tensor scores, Tensor? lengths, bool need_gradient) "
      "-> (Tensor logz, Tensor alpha, Tensor exponent)");
  // grad [B] times the posterior of each segment [B, T, K]: the gradient of logz
  m.def(
      "segmentation_marginals(Tensor scores, Tensor? lengths, Tensor alpha, Tensor exponent, Tensor grad) "
      "-> Tensor");
  // The same two operators on the CPU with less work: the first stores exponentials in `kept` [B, T, K]; the second
  // uses them and overwrites `kept` with the posterior.
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
