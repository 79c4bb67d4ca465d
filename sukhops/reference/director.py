"""Reference of Director's operators in plain PyTorch, which stores all logits of both heads.

    logp = log_softmax(lm + sum_a gamma_a * logsigmoid(cls_a))      lm = hidden @ lm_weight.T + lm_bias
    cls  = hidden @ cls_weight.T + cls_bias, or a * lm + b for a shared head

The published formula starts with log_softmax(lm) instead of lm. The difference is a constant per row, which
the outer normalization cancels. A gate with gamma = 0 is 0 even if the classifier's logit is infinite.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sukhops.ops._director_arguments import as_list
from sukhops.ops.director import ClassifierTerms, DirectorTopK


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    z = hidden @ weight.T  # [..., V]
    z = z if z.dtype == torch.float64 else z.float()
    return z if bias is None else z + bias.to(z.dtype)


def _affine(z: Tensor, affine: tuple) -> Tensor:
    a, b = (x.to(z.dtype) if isinstance(x, Tensor) else x for x in affine)
    return a * z + b


def scores(
    hidden: Tensor,
    lm_weight: Tensor,
    cls_weight: Tensor | list[Tensor] | None,
    *,
    gamma: float | Tensor | list = 1.0,
    lm_bias: Tensor | None = None,
    cls_bias: Tensor | list | None = None,
    cls_affine: tuple | None = None,
) -> Tensor:
    """Gated scores lm + sum_a gamma_a * logsigmoid(cls_a), not normalized: [..., V]."""
    lm = _logits(hidden, lm_weight, lm_bias)  # [..., V]
    if cls_affine is not None:
        gates = [_affine(lm, cls_affine)]
    else:
        weights = as_list(cls_weight)
        biases = as_list(cls_bias) if cls_bias is not None else [None] * len(weights)
        gates = [_logits(hidden, w, b) for w, b in zip(weights, biases, strict=True)]
    strengths = gamma if isinstance(gamma, (list, tuple)) else [gamma] * len(gates)
    out = lm
    for cls, strength in zip(gates, strengths, strict=True):
        log_gate = F.logsigmoid(cls)  # [..., V]
        strength = (
            torch.as_tensor(strength, dtype=lm.dtype, device=lm.device).expand(lm.shape[:-1]).unsqueeze(-1)
        )  # [..., 1]
        off = (strength == 0) & log_gate.isinf()  # [..., V]
        out = out + strength * log_gate.masked_fill(off, 0.0)
    return out


def director_logp(
    hidden: Tensor,
    lm_weight: Tensor,
    cls_weight: Tensor | list[Tensor] | None,
    *,
    gamma: float | Tensor | list = 1.0,
    lm_bias: Tensor | None = None,
    cls_bias: Tensor | list | None = None,
    cls_affine: tuple | None = None,
) -> Tensor:
    """See `sukhops.director_logp`."""
    z = scores(
        hidden, lm_weight, cls_weight, gamma=gamma, lm_bias=lm_bias, cls_bias=cls_bias, cls_affine=cls_affine
    )
    return torch.log_softmax(z, -1)


def director_topk(
    hidden: Tensor,
    lm_weight: Tensor,
    cls_weight: Tensor | list[Tensor] | None,
    k: int,
    *,
    gamma: float | Tensor | list = 1.0,
    lm_bias: Tensor | None = None,
    cls_bias: Tensor | list | None = None,
    cls_affine: tuple | None = None,
) -> DirectorTopK:
    """See `sukhops.director_topk`."""
    logp = director_logp(
        hidden, lm_weight, cls_weight, gamma=gamma, lm_bias=lm_bias, cls_bias=cls_bias, cls_affine=cls_affine
    )
    return DirectorTopK(*logp.topk(k))


def _classified(target: Tensor, label: Tensor) -> Tensor:
    return (target != -100) & (label >= 0)


def classifier_logit(
    hidden: Tensor, weight: Tensor, target: Tensor, label: Tensor, bias: Tensor | None = None
) -> Tensor:
    """See `sukhops.ops.director.classifier_logit`."""
    counts = _classified(target, label)  # [...]
    picked = _logits(hidden, weight, bias).gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return picked.where(counts, 0.0)


def classifier_norm(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    label: Tensor,
    bias: Tensor | None = None,
    affine: tuple | None = None,
) -> Tensor:
    """See `sukhops.ops.director.classifier_norm`."""
    cls = _logits(hidden, weight, bias)  # [..., V]
    if affine is not None:
        cls = _affine(cls, affine)
    square = (cls.sigmoid() - 0.5).square()  # [..., V]
    others = torch.ones_like(square).scatter(-1, target.clamp(min=0).unsqueeze(-1), 0.0)
    mean = (square * others).sum(-1) / max(1, weight.shape[0] - 1)  # [...]
    return mean.where(_classified(target, label), 0.0)


def classifier_terms(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    label: Tensor,
    bias: Tensor | None = None,
    affine: tuple | None = None,
) -> ClassifierTerms:
    """See `sukhops.ops.director.classifier_terms`."""
    logit = classifier_logit(hidden, weight, target, label, bias)
    return ClassifierTerms(logit, classifier_norm(hidden, weight, target, label, bias, affine))
