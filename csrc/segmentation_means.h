// Operators that take the mean of segment weights over all segmentations, or its gradient. Included by segmentation.cpp
// and segmentation.cu, which compute both in one pass.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace sukhops {

// pass(scores, lengths, upstream, grad) returns the means [B] and, if grad is given, the gradient of grad . means.
template <auto pass>
struct MeanOperators {
  using Tensor = torch::stable::Tensor;
  using Lengths = const std::optional<Tensor>&;

  static std::tuple<Tensor, Tensor> marginals_backward(const Tensor& scores, Lengths lengths, const Tensor& grad,
                                                       const Tensor& upstream, bool need_scores) {
    const Tensor given = torch::stable::contiguous(upstream);
    return pass(scores, lengths, &given, need_scores ? &grad : nullptr);
  }

  static Tensor entropy(const Tensor& scores, Lengths lengths) {
    return std::get<0>(pass(scores, lengths, nullptr, nullptr));
  }

  static Tensor entropy_backward(const Tensor& scores, Lengths lengths, const Tensor& grad) {
    return std::get<1>(pass(scores, lengths, nullptr, &grad));
  }
};

}  // namespace sukhops
