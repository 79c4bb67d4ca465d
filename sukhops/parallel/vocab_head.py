"""The vocabulary head on slices: every rank computes its slice with the operator and combines all results."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from sukhops.parallel._slices import (
    best,
    digest,
    gather,
    gradients,
    index_bits,
    one_row,
    shares,
    slices,
    whole_gradient,
    widened,
)

IGNORE = -100  # for indices in a slice, because the caller's ignore_index may be a valid index there


def head(
    local: Callable, group: dist.ProcessGroup, hidden: Tensor, weight: Tensor, targets: Tensor,
    bias: Tensor | None, *, k: int, statistics: tuple[str, ...], ignore_index: int, **curve: Any,
) -> Any:  # fmt: skip
    """The `Head` of the whole vocabulary; `local` computes that of a slice.

    Arguments are those of `sukhops.ops.vocab_head.vocab_head`.
    """
    where = slices(
        group, hidden, weight,
        targets=targets.shape[1], k=k, target=targets,
        gradients=gradients(hidden), options=digest(curve, ignore_index, bias is None, statistics),
    )  # fmt: skip
    k = min(k, where.total)
    ignored = targets == ignore_index
    wrong = ~ignored & ((targets < 0) | (targets >= where.total))
    if targets.device.type == "cpu" and wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise RuntimeError(
            f"target: expected values in [0, {where.total}) or ignore_index ({ignore_index}), "
            f"got {targets[row, column].item()} at row {row}"
        )
    inside = (targets >= where.start) & (targets < where.start + where.size)
    own = torch.where(inside, targets - where.start, 0).masked_fill(ignored, IGNORE)
    x = whole_gradient(hidden.reshape(len(targets), hidden.shape[-1]), group)
    part = local(
        x, one_row(weight, where), own, one_row(bias, where),
        k=min(k, where.size), statistics=statistics, ignore_index=IGNORE, **curve,
    )  # fmt: skip
    counted = (~ignored).any(1) if targets.shape[1] else torch.ones_like(part.maximum, dtype=torch.bool)
    return type(part)(*_Combine.apply(*part, inside, counted, wrong.any(1), k, statistics, where))


class _Combine(Function):
    """Computes the fields of a Head of the whole vocabulary from those of the slices.

    The probability of a slice is w = exp(log_w), with log_w = (maximum of the slice - maximum of all) +
    log_sum of the slice - log_sum of all.
    """

    @staticmethod
    def forward(
        ctx, maximum, log_sum, logit, value, index, entropy, log_sum_sq, mean_logit, inside, counted, wrong,
        k, statistics, where,
    ):  # fmt: skip
        ctx.set_materialize_grads(False)
        targets, few = logit.shape[1], value.shape[1]
        rows = [
            maximum.unsqueeze(1), log_sum.unsqueeze(1), logit.where(inside, 0.0),
            widened(value, k), index_bits(index, where, value, k),
        ]  # fmt: skip
        own = {"entropy": entropy, "log_sum_sq": log_sum_sq, "mean_logit": mean_logit}
        rows += [own[name].unsqueeze(1) for name in statistics]
        found = gather(torch.cat(rows, 1), where.group)  # [ranks, N, numbers]
        held = where.held
        top, log_w, whole = shares(found[held, :, 0], found[held, :, 1])
        whole = whole.masked_fill(wrong, torch.nan)
        logit = found[:, :, 2 : 2 + targets].sum(0)  # it is 0 on all ranks but one
        few_of = [min(k, size) for size in where.sizes]
        at = 2 + targets
        values, indices, order = best(
            [found[r, :, at : at + m] for r, m in enumerate(few_of)],
            [found[r, :, at + k : at + k + m] for r, m in enumerate(few_of)],
            k,
        )
        values = values.masked_fill(whole.isnan().unsqueeze(1), torch.nan)
        mine = log_w[held.index(where.rank)] if where.size else torch.full_like(whole, -torch.inf)
        w, numbers = log_w.exp(), {name: entropy.new_empty(0) for name in own}
        for name, x in zip(statistics, found[held, :, at + 2 * k :].unbind(2), strict=True):
            if name == "entropy":
                x = (w * (x - log_w)).masked_fill(w == 0, 0.0).sum(0)
            elif name == "log_sum_sq":
                x = (2 * log_w + x).masked_fill(w == 0, -torch.inf).logsumexp(0)
            else:
                sizes = w.new_tensor([where.sizes[r] for r in held]).unsqueeze(1)
                x = (x * (sizes / where.total)).sum(0)
            numbers[name] = x.masked_fill(wrong, torch.nan)
        outputs = tuple(
            x.masked_fill(~counted.view(-1, *[1] * (x.dim() - 1)), 0) if len(x) else x
            for x in (top, whole, logit, values, indices, *numbers.values())
        )
        ctx.save_for_backward(mine, entropy, outputs[5], order, inside)
        ctx.first, ctx.few, ctx.all = sum(few_of[: where.rank]), few, sum(few_of)
        ctx.mark_non_differentiable(outputs[0], outputs[4], *outputs[6:])
        return outputs

    @staticmethod
    def backward(ctx, _maximum, of_sum, of_logit, of_value, _index, of_entropy, *_):
        log_w, entropy, whole_entropy, order, inside = ctx.saved_tensors
        w = log_w.exp()
        log_sum = None if of_sum is None else of_sum * w
        if of_entropy is not None and whole_entropy.numel():  # torch.compile passes it also if not needed
            share = (of_entropy * w * (entropy - log_w - whole_entropy)).masked_fill(w == 0, 0.0)
            log_sum = share if log_sum is None else log_sum + share
            of_entropy = of_entropy * w
        if of_value is not None:
            spread = of_value.new_zeros(len(order), ctx.all).scatter(1, order, of_value)
            of_value = spread[:, ctx.first : ctx.first + ctx.few]
        of_logit = None if of_logit is None else of_logit.where(inside, 0.0)
        return None, log_sum, of_logit, of_value, None, of_entropy, *[None] * 8
