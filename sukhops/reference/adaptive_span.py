"""Reference of adaptive-span attention in plain PyTorch.

Weights are multiplied by the soft mask before the only normalization, so large scores outside of the span do
not cost precision. The clamped ramp has gradient 1 at both of its ends. A query whose weights are all 0 has
output 0 and no gradient.
"""

import torch
from torch import Tensor


def adaptive_span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Tensor,
    *,
    ramp: float = 32.0,
    rel_pos: Tensor | None = None,
    scale: float | None = None,
    include_self: bool = True,
    max_span: int | None = None,
    key_start: Tensor | None = None,
    query_start: Tensor | int | None = None,
) -> Tensor:
    """See `sukhops.adaptive_span_attention`."""
    (_, heads, m, d), n = q.shape, k.shape[2]
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = d**-0.5 if scale is None else scale
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))  # [B, H, N, d]
    key = torch.arange(n, device=q.device)  # [N]
    if n == 0:  # then M = 0 too
        return q @ k.mT @ v
    query = torch.arange(m, device=q.device).unsqueeze(1)  # [M, 1]
    if isinstance(query_start, Tensor):
        query = query_start[:, None, None, None] + query  # [B, 1, M, 1]
    else:
        query = (n - m if query_start is None else query_start) + query
    x = query - key - int(not include_self)  # [M, N] or [B, 1, M, N]
    seen = x >= 0
    for limit in (max_span, None if rel_pos is None else rel_pos.shape[-2]):
        if limit is not None:
            seen = seen & (x < limit)
    if key_start is not None:
        first = key_start if key_start.dim() == 2 else key_start.unsqueeze(1)  # [B, 1 or M]
        seen = seen & (key >= first[:, None, :, None])

    score = (q @ k.mT).to(acc)  # [B, H, M, N]
    if rel_pos is not None:
        by_distance = (q @ rel_pos.mT).to(acc)  # [B, H, M, S]
        index = x.clamp(0, rel_pos.shape[-2] - 1).expand(score.shape)
        score = score + by_distance.gather(-1, index)
    score = scale * score

    spans = span.to(acc)
    spans = spans.view(-1, 1, 1) if span.dim() == 1 else spans.unsqueeze(-1)  # [H, 1, 1] or [B, H, M, 1]
    ratio = (ramp + (spans - x)) / ramp  # [B, H, M, N] or [H, M, N]; exact at the ends of the ramp
    # not clamp: at its bounds torch 2.14 has half the gradient of torch 2.13
    mask = ratio.masked_fill(ratio < 0, 0.0).masked_fill(ratio > 1, 1.0)
    counts = seen & ~(ratio <= 0)  # true for NaN, so that it reaches the output
    top = score.detach().masked_fill(~counts, -torch.inf).amax(-1, keepdim=True)
    shifted = score - top.masked_fill(top == -torch.inf, 0.0)
    shifted = shifted.masked_fill(shifted > 80, 80.0)  # it exceeds 0 only where the mask is 0
    weight = mask * shifted.masked_fill(~(seen & ~(ratio < 0)), -torch.inf).exp()
    total = weight.sum(-1, keepdim=True)
    empty = total == 0
    weight = weight.masked_fill(empty, 0.0) / total.masked_fill(empty, 1.0)
    return (weight.to(q.dtype) @ v).to(q.dtype)
