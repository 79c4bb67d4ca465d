"""Log-probs of the reference model, given as a tensor or computed with its head."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

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
    with torch.no_grad():
        return linear_logp(ref_hidden, ref_weight, target, ref_bias, group=group)
