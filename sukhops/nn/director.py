"""Director as modules: the training loss, and a head that replaces a model's `lm_head`."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sukhops.losses import director as losses
from sukhops.losses._output import LossOutput
from sukhops.ops.director import (
    DirectorTopK,
    classifier_logit,
    classifier_terms,
    director_logp,
    director_topk,
)
from sukhops.ops.vocab_head import linear_logp
from sukhops.parallel._dtensor import takes_dtensors


class DirectorLoss(nn.Module):
    """Trains a language-model head and a classifier head on a batch that mixes plain and labeled examples.

    See `sukhops.losses.director_loss` for the formula. The logits of the language model are computed only for
    rows that train it. The classifier needs no matrix product unless norm_weight is set, because only the
    emitted token has a label; its gradient touches only the weight rows of emitted tokens.

    Args:
        gamma: weight of the classifier loss, >= 0.
        norm_weight: factor of the mean of (sigmoid(cls) - 1/2)**2 over the tokens that were not emitted; 0:
            this term is not computed.
        class_weight: (negative, positive) factors of the binary cross entropy, >= 0.
        reduction: "mean" over all tokens that train a head, or "sum_of_means", the sum of per-example means
            as in the published code.
        train_lm_on_positive: whether positive examples train the language model too.
        detach_hidden: whether to detach hidden, so that only the heads are trained.

    Raises:
        ValueError: an option is out of range.

    Source: Arora et al. 2022 (Director).
    """

    def __init__(
        self,
        gamma: float = 0.5,
        *,
        norm_weight: float = 0.0,
        class_weight: tuple[float, float] = (1.0, 1.0),
        reduction: str = "mean",
        train_lm_on_positive: bool = False,
        detach_hidden: bool = False,
    ):
        super().__init__()
        for name, value in (("gamma", gamma), ("norm_weight", norm_weight)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
        if len(class_weight) != 2 or not all(0 <= w < math.inf for w in class_weight):
            raise ValueError(f"class_weight: expected (negative, positive), both >= 0, got {class_weight!r}")
        if reduction not in losses.REDUCTIONS:
            raise ValueError(f"reduction: expected one of {losses.REDUCTIONS}, got {reduction!r}")
        self.gamma = gamma
        self.norm_weight = norm_weight
        self.class_weight = (class_weight[0], class_weight[1])
        self.reduction = reduction
        self.train_lm_on_positive = train_lm_on_positive
        self.detach_hidden = detach_hidden

    def extra_repr(self) -> str:
        return (
            f"gamma={self.gamma}, norm_weight={self.norm_weight}, class_weight={self.class_weight}, "
            f"reduction={self.reduction!r}, train_lm_on_positive={self.train_lm_on_positive}, "
            f"detach_hidden={self.detach_hidden}"
        )

    @takes_dtensors
    def forward(
        self,
        hidden: Tensor,
        lm_weight: Tensor,
        cls_weight: Tensor | None,
        target: Tensor,
        label: Tensor,
        *,
        lm_bias: Tensor | None = None,
        cls_bias: Tensor | None = None,
        cls_affine: tuple | None = None,
        num_items: int | Tensor | None = None,
        group: ProcessGroup | None = None,
    ) -> LossOutput:
        """The loss of a batch.

        Args:
            hidden: [..., D], float32, bfloat16, float16 or float64; row i predicts target i.
            lm_weight: [V, D].
            cls_weight: [V, D], or None with `cls_affine`.
            target: [B, T] or [N], integers in [0, V), or -100 for an ignored token.
            label: [B], or shaped as target: 1 or 0 for a classifier example, -1 for a plain one.
            lm_bias, cls_bias: [V], or None.
            cls_affine: (a, b) of a shared head, whose classifier logit is a * lm + b, or None.
            num_items: number of tokens that train a head in the whole batch, if this call has a part of it;
                a token that trains both heads counts twice. None: their number in this call.
            group: as in `sukhops.linear_logp`, for both heads.

        Returns:
            LossOutput(loss, metrics), see `sukhops.losses.director_loss`.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device; cls_weight and
                cls_affine are both given or both None; cls_bias is given with cls_affine.
            RuntimeError: a target is outside [0, V) or a label outside {1, 0, -1}, on the CPU. On CUDA the
                loss is NaN instead.
        """
        if (cls_weight is None) == (cls_affine is None):
            got = "both" if cls_affine is not None else "neither"
            raise ValueError(f"cls_affine: expected exactly one of cls_weight and cls_affine, got {got}")
        if cls_affine is not None and cls_bias is not None:
            raise ValueError("cls_bias: expected None with cls_affine, whose b is the bias, got a bias")
        if cls_weight is not None and cls_weight.shape != lm_weight.shape:
            raise ValueError(
                f"cls_weight: expected shape {list(lm_weight.shape)} as lm_weight, "
                f"got {list(cls_weight.shape)}"
            )
        if label.shape != target.shape:
            if label.shape != target.shape[:1] or target.dim() != 2:
                raise ValueError(
                    f"label: expected shape {list(target.shape)} or [B] (one per sequence of target [B, T]), "
                    f"got {list(label.shape)}"
                )
            label = label.unsqueeze(1).expand(target.shape)
        if self.detach_hidden:
            hidden = hidden.detach()
        weight, bias = (lm_weight, lm_bias) if cls_weight is None else (cls_weight, cls_bias)
        if self.norm_weight:
            cls_logit, norm = classifier_terms(hidden, weight, target, label, bias, cls_affine, group)
        else:
            cls_logit, norm = classifier_logit(hidden, weight, target, label, bias, group), None
        if cls_affine is not None:
            a, b = cls_affine
            cls_logit = (a * cls_logit + b).where((target != losses.IGNORE) & (label >= 0), 0.0)
        lm_target = losses.lm_target(target, label, self.train_lm_on_positive)
        lm_logp = linear_logp(hidden, lm_weight, lm_target, lm_bias, group=group)
        return losses.director_loss(
            lm_logp,
            cls_logit,
            target,
            label,
            gamma=self.gamma,
            norm=norm,
            norm_weight=self.norm_weight,
            class_weight=self.class_weight,
            reduction=self.reduction,
            train_lm_on_positive=self.train_lm_on_positive,
            num_items=num_items,
        )


def _check_gamma(gamma: object) -> None:
    if isinstance(gamma, Tensor):
        if not gamma.is_floating_point():
            raise TypeError(f"gamma: expected a tensor of a floating dtype, got {gamma.dtype}")
    elif isinstance(gamma, bool) or not isinstance(gamma, int | float):
        raise TypeError(f"gamma: expected a number or a tensor, got {type(gamma).__name__}")
    elif not 0 <= gamma < math.inf:
        raise ValueError(f"gamma: expected a finite number >= 0, got {gamma!r}")


class DirectorHead(nn.Module):
    """A drop-in `lm_head` that returns the gated log-probabilities of `director_logp`.

    `model.lm_head = DirectorHead.from_linear(model.lm_head)` keeps the model's own weight, tied or not.
    `generate` then decodes from the gated distribution, because the head returns log-probabilities (float32)
    as logits. For models of transformers, use `sukhops.integrations.transformers.add_director_head`, which
    also saves, loads and resizes the head.

    The language model has the parameters `weight` and `bias`, as in nn.Linear. The classifier has
    `cls_weight` and `cls_bias`, or `scale` and `shift` in a shared head. `HeadLoss(head, DirectorLoss())`
    trains all of them. If you call `DirectorLoss` yourself, pass `lm_bias=head.bias`,
    `cls_bias=head.cls_bias` and `cls_affine=head.cls_affine` in addition to the two weights.

    `gamma` may be set between calls; setting an invalid value raises. A number is stored as an attribute, a
    tensor as a buffer, which `.to` moves and `state_dict` includes.

    If a model class of transformers creates this module in its `__init__`, call `module.reset_parameters()`
    in the `_init_weights` of that class. `from_pretrained` then initializes only parameters that the
    checkpoint lacks. (If the checkpoint lacks a tensor gamma, set gamma after loading.)

    Args:
        d_model: width D of hidden.
        vocab_size: size V of the vocabulary.
        gamma: strength of the gate: a number >= 0, or a tensor that broadcasts over the rows of hidden.
        shared: whether the classifier shares the weight of the language model: its logit is then
            scale * lm + shift, without a classifier matrix.
        bias: whether the language-model head has a bias.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: gamma is neither a finite number >= 0 nor a floating-point tensor.

    Source: Arora et al. 2022 (Director).
    """

    gamma: float | Tensor
    weight: Tensor
    bias: Tensor | None
    cls_weight: Tensor | None
    cls_bias: Tensor | None

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        *,
        gamma: float | Tensor = 1.0,
        shared: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_features, self.out_features = d_model, vocab_size
        self.gamma = gamma
        self.shared = shared
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model, **options))
        self.bias = nn.Parameter(torch.empty(vocab_size, **options)) if bias else None
        if shared:
            self.scale = nn.Parameter(torch.empty((), **options))
            self.shift = nn.Parameter(torch.empty((), **options))
            self.cls_weight = self.cls_bias = None
        else:
            self.cls_weight = nn.Parameter(torch.empty(vocab_size, d_model, **options))
            self.cls_bias = nn.Parameter(torch.empty(vocab_size, **options))
        self.reset_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "gamma":  # a tensor is a buffer, a number an attribute: remove the old one of either kind
            _check_gamma(value)
            for kept in (self.__dict__, self._buffers, self._parameters):
                kept.pop(name, None)
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                return self.register_buffer(name, value)
        super().__setattr__(name, value)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, gamma: float | Tensor = 1.0, shared: bool = False
    ) -> "DirectorHead":
        """Creates a head that uses the weight [V, D] and the bias of an nn.Linear as its own parameters."""
        weight = linear.weight
        head = cls(
            weight.shape[1], weight.shape[0], gamma=gamma, shared=shared, device="meta", dtype=weight.dtype
        )
        head.weight, head.bias = weight, linear.bias
        for name in ("scale", "shift") if shared else ("cls_weight", "cls_bias"):
            empty = torch.empty_like(getattr(head, name), device=weight.device)
            setattr(head, name, nn.Parameter(empty))
        head.reset_classifier()
        return head

    def reset_parameters(self) -> None:
        """Sets weights uniformly at random in +-D**-0.5, biases to 0, and a shared head to cls = lm."""
        bound = max(1, self.in_features) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.reset_classifier()

    def reset_classifier(self) -> None:
        """Initializes the classifier like `reset_parameters`; the language model keeps its weight."""
        if self.cls_weight is None or self.cls_bias is None:  # a shared head
            nn.init.ones_(self.scale)
            nn.init.zeros_(self.shift)
        else:
            bound = max(1, self.in_features) ** -0.5
            nn.init.uniform_(self.cls_weight, -bound, bound)
            nn.init.zeros_(self.cls_bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, gamma={self.gamma}, shared={self.shared}"

    @property
    def cls_affine(self) -> tuple[Tensor, Tensor] | None:
        """(scale, shift) of a shared head; None for a head with a classifier matrix."""
        return (self.scale, self.shift) if self.shared else None

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> log-probabilities [..., V] in nats, float32 (float64 for float64 inputs)."""
        return director_logp(
            hidden, self.weight, self.cls_weight, gamma=self.gamma, lm_bias=self.bias,
            cls_bias=self.cls_bias, cls_affine=self.cls_affine,
        )  # fmt: skip

    def topk(self, hidden: Tensor, k: int) -> DirectorTopK:
        """hidden [..., D] -> values and indices [..., k] of the k most probable tokens.

        See `sukhops.director_topk`.
        """
        return director_topk(
            hidden, self.weight, self.cls_weight, k, gamma=self.gamma, lm_bias=self.bias,
            cls_bias=self.cls_bias, cls_affine=self.cls_affine,
        )  # fmt: skip
