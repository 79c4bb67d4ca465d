// The signature of every operator. CPU kernels are registered beside their code in csrc/<op>.cpp,
// CUDA launchers, fakes and autograd in sukhops/ops/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sukhops, m) {
  m.def("cpu_capability() -> str");
  m.def("product_count() -> int");  // matrix products that CPU kernels have taken so far, for tests

  // lse [N], target_logit [N, K], topk_value [N, k], topk_index [N, k], and, when only `hidden` needs
  // a gradient, mean_weight [N, D] = sum_v p_v dlogit_v/draw_v weight_v (else [0])
  m.def(
      "vocab_head(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, int k, float? softcap, "
      "float scale, int ignore_index, bool need_hidden, bool need_weight, bool need_bias) "
      "-> (Tensor lse, Tensor target_logit, Tensor topk_value, Tensor topk_index, Tensor mean_weight)");
  // a gradient that is not needed comes back as [0]; an upstream gradient that is None is zero
  m.def(
      "vocab_head_backward(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, "
      "Tensor topk_index, Tensor lse, Tensor mean_weight, Tensor? grad_lse, Tensor? grad_target, "
      "Tensor? grad_topk, float? softcap, float scale, int ignore_index, bool need_hidden, "
      "bool need_weight, bool need_bias) "
      "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");
}
