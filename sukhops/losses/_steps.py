"""Reasoning steps of completions: step ids per token, and sums per step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sukhops import _checks
from sukhops.losses._sequences import IGNORE, check_sequences, per_token


def step_ids(
    spans: Sequence[Sequence[tuple[int, int]]], target: Tensor, offsets: Tensor | None = None
) -> Tensor:
    """The step that each token belongs to, computed from the spans of the steps.

    Args:
        spans: for each sequence a list of its steps in order, each (start, end) without end. start and end
            are positions in target, or characters of the text if offsets are given.
        target: [B, T], integers; a token with -100 belongs to no step.
        offsets: [B, T, 2], (start, end) of each target token in the characters of its sequence, as fast
            tokenizers return them. A token belongs to the step that contains its first character.

    Returns:
        [B, T], int64, for `step_kto_loss`, the index of the step in the list of its sequence, -1 for none.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; a span ends before it starts, extends
            beyond T, or overlaps the span before it.

    Source: this library, for Step-KTO (Lin et al. 2025).
    """
    check_sequences(target, None)
    if len(spans) != target.shape[0]:
        raise ValueError(f"spans: expected one list per sequence [{target.shape[0]}], got {len(spans)}")
    if offsets is None:
        first = torch.arange(target.shape[1], device=target.device).expand(target.shape)
    else:
        _checks.check_integers("offsets", offsets)
        _checks.check_shape("offsets", offsets, (*target.shape, 2), "[B, T, 2]")
        first = offsets[..., 0].to(target.device)
    ids = torch.full(target.shape, -1, dtype=torch.int64, device=target.device)
    for row, steps in enumerate(spans):
        last = 0
        for step, (start, end) in enumerate(steps):
            if not last <= start <= end or (offsets is None and end > target.shape[1]):
                raise ValueError(
                    f"spans: expected increasing (start, end) within [0, {target.shape[1]}], "
                    f"got {(start, end)} after {last} in sequence {row}"
                )
            ids[row, (first[row] >= start) & (first[row] < end)] = step
            last = end
    return ids.masked_fill(target == IGNORE, -1)


def step_sums(
    values: Tensor,
    target: Tensor,
    ids: Tensor,
    steps: int,
    cu_seqlens: Tensor | None,
    name: str = "step_ids",
) -> tuple[Tensor, Tensor]:
    """Sums of `values` per step, and numbers of tokens (not ignored) per step: both [S, steps].

    values and ids are shaped as target, [S, T] or packed [N]. Each sum runs in the order of the tokens.

    Raises:
        TypeError, ValueError: ids have the wrong type, shape or device; an id is outside [-1, steps), on the
            CPU in eager mode. Elsewhere every sum is NaN instead.
    """
    _checks.check_integers(name, ids)
    _checks.check_shape(name, ids, target.shape, "as target")
    _checks.check_device("target", target, name, ids)
    sequences = check_sequences(target, cu_seqlens)
    bad = ((ids < -1) | (ids >= steps)).any()
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and bad:
        raise ValueError(
            f"{name}: expected ids in [-1, {steps}), -1 for none, "
            f"got {ids.min().item()} to {ids.max().item()}"
        )
    row = per_token(torch.arange(sequences, device=ids.device), ids, cu_seqlens)
    none = sequences * steps
    bins = (row * steps + ids).where((ids >= 0) & (ids < steps) & (target != IGNORE), none).flatten()
    order = bins.argsort(stable=True)
    ends = torch.searchsorted(bins[order], torch.arange(none + 2, device=ids.device))
    totals = torch.segment_reduce(values.flatten()[order], "sum", offsets=ends, unsafe=True, initial=0)
    totals = totals[:none].masked_fill(bad, torch.nan)
    return totals.view(sequences, steps), ends[: none + 1].diff().view(sequences, steps)
