"""Reference of `linear_logp`, `linear_token_stats`, `linear_topk` in plain PyTorch, with all logits stored.

logits = softcap * tanh(raw / softcap) / temperature,  raw = scale * (hidden @ weight.T + bias)
lse    = log sum_v exp(logits[v]),  logp = logits[target] - lse, computed by log_softmax
"""

from collections.abc import Collection
from typing import Literal, overload

import torch
from torch import Tensor

from sukhops.ops.vocab_head import LogpAndLse, TokenStats, TopK, check_outputs


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    temperature: float,
) -> Tensor:
    """Logits [..., V], float32 (float64 for float64 inputs); the matrix product is in the inputs' dtype."""
    z = hidden @ weight.T  # [..., V]
    if z.dtype != torch.float64:
        z = z.float()
    if bias is not None:
        z = z + bias.to(z.dtype)
    z = scale * z
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


@overload
def linear_logp(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *,
    softcap: float | None = None, scale: float = 1.0, temperature: float = 1.0, ignore_index: int = -100,
    return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def linear_logp(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *,
    softcap: float | None = None, scale: float = 1.0, temperature: float = 1.0, ignore_index: int = -100,
    return_lse: Literal[True],
) -> LogpAndLse: ...  # fmt: skip
def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_lse: bool = False,
) -> Tensor | LogpAndLse:
    """See `sukhops.linear_logp`."""
    z = logits(hidden, weight, bias, softcap, scale, temperature)  # [..., V]
    single = target.dim() < hidden.dim()
    targets = target.unsqueeze(-1) if single else target  # [..., K]
    counts = targets != ignore_index  # [..., K]
    row_counts = counts.any(-1) | (targets.shape[-1] == 0)  # [...]
    lse = torch.logsumexp(z, -1).where(row_counts, 0.0)  # [...]
    logp = torch.log_softmax(z, -1).gather(-1, targets.where(counts, 0).long()).where(counts, 0.0)  # [..., K]
    logp = logp.squeeze(-1) if single else logp
    return LogpAndLse(logp, lse) if return_lse else logp


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    outputs: Collection[str] = ("logp",),
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> TokenStats:
    """See `sukhops.linear_token_stats`."""
    check_outputs(outputs)
    z = logits(hidden, weight, bias, softcap, scale, temperature)  # [..., V]
    counts = target != ignore_index  # [...]
    index = target.where(counts, 0).long().unsqueeze(-1)  # [..., 1]
    logp = torch.log_softmax(z, -1)  # [..., V]
    p = logp.exp()
    lse = torch.logsumexp(z, -1)  # [...]
    picked = z.gather(-1, index)  # [..., 1]
    before = (z > picked) | ((z == picked) & (torch.arange(z.shape[-1], device=z.device) < index))
    found = TokenStats(
        logp=logp.gather(-1, index).squeeze(-1),
        lse=lse,
        entropy=-(p * logp.masked_fill(p == 0, 0.0)).sum(-1),
        log_sum_sq=torch.logsumexp(2 * logp, -1).detach(),
        mean_logit=z.mean(-1).detach(),
        top1=~before.any(-1) & ~lse.isnan(),
    )
    return TokenStats(
        *(t.masked_fill(~counts, 0) if n in outputs else None for n, t in found._asdict().items())
    )


def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
) -> TopK:
    """See `sukhops.linear_topk`."""
    z = logits(hidden, weight, bias, softcap, scale, temperature)  # [..., V]
    values, indices = z.topk(k)  # [..., k]
    return TopK(values, indices, torch.logsumexp(z, -1))
