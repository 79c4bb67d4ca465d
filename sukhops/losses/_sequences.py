"""Sequences in a batch: S padded ones as [S, T], or packed ones as [N] with cu_seqlens [S + 1]."""

from collections.abc import Callable

import torch
from torch import Tensor

from sukhops import _checks

IGNORE = -100


def check_sequences(target: Tensor, cu_seqlens: Tensor | None) -> int:
    """The number S of sequences in `target` [S, T], or in `target` [N] with cu_seqlens [S + 1].

    Raises:
        TypeError, ValueError: target or cu_seqlens have the wrong type, shape or device; cu_seqlens decrease
            or do not run from 0 to N (checked on the CPU in eager mode; elsewhere sums are NaN instead).
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
                f"cu_seqlens: expected non-decreasing values from 0 to N = {target.shape[0]}, "
                f"got {cu_seqlens.tolist()[:20]}"
            )
    return cu_seqlens.shape[0] - 1


def check_labels(
    name: str, label: Tensor, shape: tuple[int, ...], target: Tensor, counted: Tensor | None = None
) -> Tensor:
    """Labels 1, 0 and -1 (no label), bool or integers of the given shape, as int64 of that shape.

    counted: bool, of that shape: where the values are checked. None: everywhere.

    Raises:
        TypeError, ValueError: label has the wrong type, shape or device; a value is not 1, 0 or -1, which is
            checked on the CPU in eager mode.
    """
    _checks.check_tensor(name, label)
    if label.dtype != torch.bool and (label.is_floating_point() or label.is_complex()):
        raise TypeError(f"{name}: expected bool or integers, got {label.dtype}")
    _checks.check_device("target", target, name, label)
    _checks.check_shape(name, label, shape, "1, 0 or -1 each")
    label = label.long()
    if label.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (label < -1) | (label > 1)
        if counted is not None:
            wrong = wrong & counted
        if wrong.any():
            raise ValueError(f"{name}: expected 1, 0 or -1, got {label[wrong][0].item()}")
    return label


def as_scores(target: Tensor, **given: Tensor) -> list[Tensor]:
    """The given log-probs, each shaped as target, in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: a tensor has the wrong type, shape or device.
    """
    for name, t in given.items():
        _check_floats(name, t, target)
        _checks.check_shape(name, t, target.shape, "as target")
    return [t.to(_checks.accumulation_dtype(t.dtype)) for t in given.values()]


def sums(
    name: str, logp: Tensor, target: Tensor, sequences: int, total: Callable[[Tensor], Tensor]
) -> Tensor:
    """Sums per sequence [S] of log-probs that are given per token (shaped as target) or per sequence [S].

    `total` computes the sums [S] of log-probs per token.

    Raises:
        TypeError, ValueError: logp has the wrong type, shape or device.
    """
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
        raise TypeError(f"{name}: expected a floating dtype, got {t.dtype}")
    _checks.check_device("target", target, name, t)


def sequence_sum(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sums [S] of `values`, [S, T] or packed [N], over each sequence, always in the same order.

    All sums are NaN if cu_seqlens decrease or do not run from 0 to N.
    """
    if cu_seqlens is None:
        return values.sum(-1)
    n = values.shape[0]
    offsets = cu_seqlens.long().clamp(0, n).cummax(0).values  # invalid values must not read out of bounds
    sums = torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True, initial=0)
    return sums.masked_fill(~_is_partition(cu_seqlens, n), torch.nan)


def position_in_sequence(counted: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """For each token, how many earlier tokens of its sequence are `counted`: int64, shaped as `counted`.

    `counted` is bool, [S, T] or packed [N].
    """
    before = counted.cumsum(-1) - counted.long()
    if cu_seqlens is None:
        return before
    return before - per_token(_prefix(before, counted, cu_seqlens), counted, cu_seqlens)


def per_token(per_sequence: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Repeats a value per sequence [S] for each token of the sequence: shaped as `like`, [S, T] or [N]."""
    if cu_seqlens is None:
        return per_sequence.unsqueeze(-1).expand(like.shape)
    token = torch.arange(like.shape[0], device=like.device)
    owner = torch.bucketize(token, cu_seqlens[1:].contiguous(), right=True)
    return per_sequence[owner.clamp(max=per_sequence.shape[0] - 1)]


def _prefix(before: Tensor, counted: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Number of counted tokens in all earlier sequences: [S]."""
    total = torch.cat([before, counted.sum().reshape(1)])
    return total[cu_seqlens[:-1].long().clamp(0, counted.shape[0])]


def _is_partition(cu_seqlens: Tensor, n: int) -> Tensor:
    """Whether cu_seqlens run from 0 to n without decreasing: bool []."""
    ends = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == n)
    return ends & (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
