"""Reference of `linear_logp` and `linear_topk`: plain PyTorch that writes every logit.

logits = softcap * tanh(raw / softcap),  raw = scale * (hidden @ weight.T + bias)
lse    = log sum_v exp(logits[v]),       logp = logits[target] - lse
"""

import torch
from torch import Tensor

from sukhops.ops.vocab_head import LogpAndLse, TopK


def logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float
) -> Tensor:
    """[..., V], float32 (float64 for float64 inputs); the product itself in the inputs' dtype."""
    z = hidden @ weight.T  # [..., V]
    if z.dtype != torch.float64:
        z = z.float()
    if bias is not None:
        z = z + bias.to(z.dtype)
    z = scale * z
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    return_lse: bool = False,
) -> Tensor | LogpAndLse:
    """See `sukhops.linear_logp`."""
    z = logits(hidden, weight, bias, softcap, scale)  # [..., V]
    single = target.dim() < hidden.dim()
    targets = target.unsqueeze(-1) if single else target  # [..., K]
    counts = targets != ignore_index  # [..., K]
    row_counts = counts.any(-1)  # [...]
    lse = torch.logsumexp(z, -1).where(row_counts, 0.0)  # [...]
    picked = z.gather(-1, targets.where(counts, 0).long())  # [..., K]
    logp = (picked - lse.unsqueeze(-1)).where(counts, 0.0)  # [..., K]
    logp = logp.squeeze(-1) if single else logp
    return LogpAndLse(logp, lse) if return_lse else logp


def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
) -> TopK:
    """See `sukhops.linear_topk`."""
    z = logits(hidden, weight, bias, softcap, scale)  # [..., V]
    values, indices = z.topk(k)  # [..., k]
    return TopK(values, indices, torch.logsumexp(z, -1))
