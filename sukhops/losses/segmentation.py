"""Likelihood of texts under a hybrid language model, summed over all their segmentations into units."""

import math

import torch
from torch import Tensor

from sukhops import _checks
from sukhops.losses._output import LossOutput, average
from sukhops.losses._sequences import IGNORE
from sukhops.ops.segmentation import segmentation_logz


def check_flat(flat: bool) -> None:
    """Raises a TypeError unless flat is a bool."""
    if not isinstance(flat, bool):
        raise TypeError(f"flat: expected a bool, got {type(flat).__name__}")


def unit_targets(unit_ids: Tensor, lengths: Tensor | None = None, vocabulary: int | None = None) -> Tensor:
    """Replaces unit ids that cannot be part of a segmentation by -100, for use as targets of `linear_logp`.

    Args:
        unit_ids: [B, T, K], integers: the unit that covers positions t .. t+k, or -1 if there is none. Units
            that end after their sequence are replaced too.
        lengths: [B], integers in [0, T]. None: all T.
        vocabulary: size V of the vocabulary, to check ids. None: only check that they are >= -1.

    Returns:
        [B, T, K], of the dtype of unit_ids.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; on the CPU, an id of a unit
            that ends in its sequence is outside [-1, V) (under torch.compile a RuntimeError).

    Source: Grave et al. 2019 (hybrid language models).
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
    if unit_ids.device.type == "cpu":
        wrong, expected = unit_ids < -1, ">= 0"
        if vocabulary is not None:
            wrong, expected = wrong | (unit_ids >= vocabulary), f"in [0, V = {vocabulary})"
        wrong, message = inside & wrong, f"unit_ids: expected ids {expected}, or -1 for no unit"
        if torch.compiler.is_compiling():
            torch._assert_async(~wrong.any(), message)
        elif wrong.any():
            raise ValueError(f"{message}, got {unit_ids[wrong][0].item()}")
    # invalid ids, -100 included, must not be taken for "no unit": they become -2, for which the head raises
    return unit_ids.clamp(min=-2).where(inside & (unit_ids != -1), IGNORE)


def segmentation_loss(
    logp: Tensor,
    unit_ids: Tensor,
    *,
    lengths: Tensor | None = None,
    flat: bool = False,
    num_items: int | Tensor | None = None,
) -> LossOutput:
    """Negative log-likelihood per symbol, where the likelihood of a sequence sums over its segmentations.

        p(x) = sum over segmentations of the product of exp(logp[t, k]) over their units
        loss = -(sum of log p(x) over sequences) / (sum of their lengths)

    A sequence without a segmentation is left out of both sums. With `flat` the loss is that of the first
    epochs in the public training code, which does not use segmentations:

        loss = -(sum of logp over all units of all sequences) / (K * sum of lengths)

    This divides by the number of all entries [t, k] within the lengths, with or without a unit.

    Args:
        logp: [B, T, K], log-prob in nats of the unit that covers positions t .. t+k, given the symbols before
            t; ignored if there is no unit.
        unit_ids: [B, T, K], integers: this unit, or -1 if there is none. Units that end after their sequence
            are ignored.
        lengths: [B], integers in [0, T]. None: all T.
        flat: whether to compute the second loss, for warm-up.
        num_items: a number > 0 or a 0-dim tensor: the number of symbols in the whole batch, if this call has
            a part of it. None: their number in this call.

    Returns:
        LossOutput(loss [], metrics). Metrics are detached scalars, the same with `flat`. bits_per_symbol is
        the negative log-likelihood per symbol, in bits, of the sequences that have a segmentation;
        unreachable is the number of sequences without one. Without symbols the loss is 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device; on the CPU, an id is
            below -1.
        RuntimeError: a length is outside [0, T], on the CPU. On CUDA the loss is NaN instead.

    Source: Grave et al. 2019 (hybrid language models); flat is from its public training code.
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
        outside = ((lengths < 0) | (lengths > t)).any()  # only on CUDA: on the CPU segmentation_logz raises
        width = logp.new_full((), max(k, 1)).masked_fill(outside, torch.nan)  # makes the gradient NaN too
        loss = average(-logp.masked_fill(none, 0.0).sum() / width, lengths.sum(), num_items)
    metrics = {"bits_per_symbol": nats.detach() / math.log(2), "unreachable": (~reached).sum()}
    return LossOutput(loss, metrics)
