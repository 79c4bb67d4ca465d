"""Sequences in a batch: padded [S, T], or packed [N] with cu_seqlens [S + 1]."""

import torch
from torch import Tensor

from sukhops import _checks

IGNORE = -100


def check_sequences(target: Tensor, cu_seqlens: Tensor | None) -> int:
    """The number S of sequences that `target` [S, T], or [N] with cu_seqlens, holds; raises on bad ones.

    The values of cu_seqlens are looked at on the CPU in eager mode only; elsewhere bad ones give NaN.
    """
    _checks.check_integers("target", target)
    if cu_seqlens is None:
        if target.dim() != 2:
            raise ValueError(
                f"target: expected shape [sequences, T], or [N] with cu_seqlens, got {list(target.shape)}"
            )
        return target.shape[0]
    _checks.check_integers("cu_seqlens", cu_seqlens)
    _checks.check_device("target", target, "cu_seqlens", cu_seqlens)
    if target.dim() != 1:
        raise ValueError(f"target: expected shape [N] with cu_seqlens, got {list(target.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens: expected shape [sequences + 1], got {list(cu_seqlens.shape)}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        if not _is_partition(cu_seqlens, target.shape[0]):
            raise ValueError(
                f"cu_seqlens: expected 0 first, N = {target.shape[0]} last and no step down, "
                f"got {cu_seqlens.tolist()[:20]}"
            )
    return cu_seqlens.shape[0] - 1


def sequence_sum(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sums [S] of `values`, [S, T] or packed [N], over each sequence, in the same order every time."""
    if cu_seqlens is None:
        return values.sum(-1)
    n = values.shape[0]
    offsets = cu_seqlens.long().clamp(0, n).cummax(0).values  # bad ones must not read out of bounds
    sums = torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True, initial=0)
    return sums.masked_fill(~_is_partition(cu_seqlens, n), torch.nan)


def position_in_sequence(counted: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """How many counted tokens of its sequence come before each token: as `counted`, bool [S, T] or [N]."""
    before = counted.cumsum(-1) - counted.long()
    if cu_seqlens is None:
        return before
    return before - per_token(_prefix(before, counted, cu_seqlens), counted, cu_seqlens)


def per_token(per_sequence: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Spreads [S] over the tokens of each sequence: shaped as `like`, [S, T] or [N]."""
    if cu_seqlens is None:
        return per_sequence.unsqueeze(-1).expand(like.shape)
    token = torch.arange(like.shape[0], device=like.device)
    owner = torch.bucketize(token, cu_seqlens[1:], right=True)
    return per_sequence[owner.clamp(max=per_sequence.shape[0] - 1)]


def _prefix(before: Tensor, counted: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Counted tokens before each sequence: [S]."""
    total = torch.cat([before, counted.sum().reshape(1)])
    return total[cu_seqlens[:-1].long().clamp(0, counted.shape[0])]


def _is_partition(cu_seqlens: Tensor, n: int) -> Tensor:
    ends = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == n)
    return ends & (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
