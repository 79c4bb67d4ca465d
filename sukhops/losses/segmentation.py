"""The likelihood of texts under a hybrid language model, summed over all their segmentations into units."""

import math

import torch
from torch import Tensor

from sukhops import _checks
from sukhops.losses._output import LossOutput, average
from sukhops.losses._sequences import IGNORE
from sukhops.ops.segmentation import segmentation_logz


def check_flat(flat: bool) -> None:
    if not isinstance(flat, bool):
        raise TypeError(f"flat: expected a bool, got {type(flat).__name__}")


def unit_targets(unit_ids: Tensor, lengths: Tensor | None = None, vocabulary: int | None = None) -> Tensor:
    """The units [B, T, K] that may be part of a segmentation; -100 where there is none.

    That is `unit_ids` without those that are -1 and those that end after their sequence: unit_ids[b, t, k]
    covers positions t .. t+k, which must be before lengths[b] (before T without lengths).

    Raises:
        TypeError, ValueError: wrong types or shapes; on the CPU in eager mode an id that counts and is below
            -1, or not below `vocabulary`.
    """
    _checks.check_integers("unit_ids", unit_ids)
    if unit_ids.dim() != 3:
        raise ValueError(f"unit_ids: expected shape [B, T, K], got {list(unit_ids.shape)}")
    b, t, k = unit_ids.shape
    ends = torch.arange(t, device=unit_ids.device).unsqueeze(1) + torch.arange(k, device=unit_ids.device)
    inside = ends < t  # [T, K]
    if lengths is not None:
        _checks.check_integers("lengths", lengths)
        _checks.check_device("unit_ids", unit_ids, "lengths", lengths)
        _checks.check_shape("lengths", lengths, (b,), "one per sequence")
        inside = inside & (ends < lengths[:, None, None])  # [B, T, K]
    if unit_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong, expected = unit_ids < -1, ">= 0"
        if vocabulary is not None:
            wrong, expected = wrong | (unit_ids >= vocabulary), f"in [0, V = {vocabulary})"
        found = unit_ids[inside & wrong]
        if found.numel():
            raise ValueError(f"unit_ids: expected ids {expected}, or -1 for no unit, got {found[0].item()}")
    # an id below -1, -100 too, must not pass for "no unit": the head refuses it
    return unit_ids.clamp(min=-2).where(inside & (unit_ids != -1), IGNORE)


def segmentation_loss(
    logp: Tensor,
    unit_ids: Tensor,
    *,
    lengths: Tensor | None = None,
    flat: bool = False,
    num_items: int | Tensor | None = None,
) -> LossOutput:
    """Negative log-likelihood per symbol of sequences, each the sum over all its segmentations into units.

        p(x) = sum over segmentations of the product of exp(logp[t, k]) over their units
        loss = -(sum of log p(x) over sequences) / (sum of their lengths)

    A sequence that no segmentation covers leaves both sums. With `flat` the loss is instead that of the
    public code's first epochs, which knows nothing of segmentations:

        loss = -(sum of logp over all units of all sequences) / (K * sum of lengths)

    Its divisor counts the places where there is no unit too.

    Args:
        logp: [B, T, K], log-prob in nats of the unit that covers positions t .. t+k given the symbols before
            t; not looked at where there is no unit.
        unit_ids: [B, T, K], integers: that unit, or -1 where there is none. Units that end after their
            sequence count as none.
        lengths: [B], integers in [0, T]; None: T each.
        flat: the warm-up loss.
        num_items: a number > 0 or a 0-dim tensor to divide by: the symbols of the whole
            batch, where this call has a part of it. None: what this call counts.

    Returns:
        LossOutput(loss [], metrics), detached scalars under either loss: bits_per_symbol, the likelihood in
        bits per symbol of the sequences that have a segmentation; unreachable, the number of those that have
        none. No symbol at all gives 0.

    Raises:
        TypeError, ValueError: wrong types, dtypes, shapes or devices; on the CPU an id below -1.
        RuntimeError: a length outside [0, T], on the CPU; on CUDA NaN.

    Source: Grave et al. 2019 (hybrid language models); flat is its public training code's.
    """
    check_flat(flat)
    targets = unit_targets(unit_ids, lengths)
    _checks.check_tensor("logp", logp)
    if not logp.is_floating_point():
        raise TypeError(f"logp: expected log-probs of a floating dtype, got {logp.dtype}")
    _checks.check_device("unit_ids", unit_ids, "logp", logp)
    _checks.check_shape("logp", logp, unit_ids.shape, "as unit_ids")
    logp = logp.to(_checks.accumulation_dtype(logp.dtype))
    none = targets == IGNORE
    b, t, k = unit_ids.shape
    if lengths is None:
        lengths = torch.full((b,), t, device=unit_ids.device)
    scores = logp.masked_fill(none, -torch.inf)  # [B, T, K]
    logz = segmentation_logz(scores.detach() if flat else scores, lengths)  # [B]
    reached = logz != -torch.inf
    symbols = lengths.where(reached, 0).sum()
    total = -logz.where(reached, 0.0).sum()
    nats, loss = total / symbols.clamp(min=1), average(total, symbols, num_items)
    if flat:
        outside = ((lengths < 0) | (lengths > t)).any()  # not on the CPU: logz has raised
        width = logp.new_full((), max(k, 1)).masked_fill(outside, torch.nan)  # NaN in the gradient too
        loss = average(-logp.masked_fill(none, 0.0).sum() / width, lengths.sum(), num_items)
    metrics = {"bits_per_symbol": nats.detach() / math.log(2), "unreachable": (~reached).sum()}
    return LossOutput(loss, metrics)
