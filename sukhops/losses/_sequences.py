"""Sequences in a batch: padded [S, T], or packed [N] with cu_seqlens [S + 1]."""

from collections.abc import Callable

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


def check_labels(name: str, label: Tensor, shape: tuple[int, ...], target: Tensor) -> Tensor:
    """Labels 1, 0 and -1 (none), bool or integers, of the given shape; values are looked at on the CPU."""
    _checks.check_tensor(name, label)
    if label.dtype != torch.bool and (label.is_floating_point() or label.is_complex()):
        raise TypeError(f"{name}: expected bool or integers, got {label.dtype}")
    _checks.check_device("target", target, name, label)
    _checks.check_shape(name, label, shape, "1, 0 or -1 each")
    label = label.long()
    if label.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = label[(label < -1) | (label > 1)]
        if wrong.numel():
            raise ValueError(f"{name}: expected 1, 0 or -1, got {wrong[0].item()}")
    return label


def as_scores(target: Tensor, **given: Tensor) -> list[Tensor]:
    """The tensors, shaped as target, in the dtype that log-probs are kept in."""
    for name, t in given.items():
        _check_floats(name, t, target)
        _checks.check_shape(name, t, target.shape, "as target")
    return [t.to(_checks.accumulation_dtype(t.dtype)) for t in given.values()]


def sums(
    name: str, logp: Tensor, target: Tensor, sequences: int, total: Callable[[Tensor], Tensor]
) -> Tensor:
    """Sums [S] of log-probs that come per token, or per sequence [S] already."""
    _check_floats(name, logp, target)
    if logp.shape == target.shape:
        return total(*as_scores(target, **{name: logp}))
    if logp.shape != (sequences,):
        raise ValueError(
            f"{name}: expected shape {list(target.shape)} (per token) or [{sequences}] (per sequence), "
            f"got {list(logp.shape)}"
        )
    return logp.to(_checks.accumulation_dtype(logp.dtype))


def _check_floats(name: str, t: Tensor, target: Tensor) -> None:
    _checks.check_tensor(name, t)
    if not t.is_floating_point():
        raise TypeError(f"{name}: expected log-probs of a floating dtype, got {t.dtype}")
    _checks.check_device("target", target, name, t)


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
    owner = torch.bucketize(token, cu_seqlens[1:].contiguous(), right=True)
    return per_sequence[owner.clamp(max=per_sequence.shape[0] - 1)]


def _prefix(before: Tensor, counted: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Counted tokens before each sequence: [S]."""
    total = torch.cat([before, counted.sum().reshape(1)])
    return total[cu_seqlens[:-1].long().clamp(0, counted.shape[0])]


def _is_partition(cu_seqlens: Tensor, n: int) -> Tensor:
    ends = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == n)
    return ends & (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
