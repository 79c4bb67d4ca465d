"""Log-probs of the reference model, given as a tensor or computed with its head."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sukhops import _checks
from sukhops.ops.vocab_head import linear_logp


def reference_logp(
    target: Tensor,
    ref_logp: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    group: ProcessGroup | None,
) -> Tensor | None:
    """`ref_logp`, or the log-probs of `target` under the reference head; detached. None if neither is given.

    Raises:
        ValueError: both ref_logp and a reference head are given, or only a part of the head.
        TypeError, ValueError: ref_hidden, ref_weight or ref_bias has the wrong dtype or shape.
    """
    head = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    given = [name for name, t in head.items() if t is not None]
    if ref_logp is not None:
        if given:
            raise ValueError(
                f"ref_logp: expected either ref_logp or (ref_hidden, ref_weight[, ref_bias]), got {given} too"
            )
        return ref_logp.detach()
    if not given:
        return None
    if ref_hidden is None or ref_weight is None:
        name = "ref_hidden" if ref_hidden is None else "ref_weight"
        raise ValueError(f"{name}: expected both ref_hidden and ref_weight for a reference, got {given}")
    return logp_without_gradient(target, group, **head)


def logp_without_gradient(target: Tensor, group: ProcessGroup | None, **head: Tensor | None) -> Tensor:
    """`linear_logp` of a head: hidden, weight and bias, in this order and by the names that errors show."""
    hidden_name, weight_name, bias_name = head
    hidden, weight, bias = _checks.as_floats(**head)
    _checks.check_weight(weight_name, hidden, weight, bias, bias_name, group, hidden_name)
    rows = (*target.shape, weight.shape[1])
    _checks.check_shape(hidden_name, hidden, rows, f"one row per target, D as in {weight_name}")
    with torch.no_grad():
        return linear_logp(hidden, weight, target, bias, group=group)
