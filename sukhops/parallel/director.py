"""Director on slices of the vocabulary: log-probs, the k largest, and the classifier's training terms."""

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from sukhops.parallel._slices import (
    Slices,
    Sum,
    best,
    digest,
    gather,
    gradients,
    index_bits,
    living,
    one_row,
    shares,
    slices,
    together,
    whole_gradient,
    widened,
)

_ops = torch.ops.sukhops
IGNORE = -100


def director_logp(
    group: dist.ProcessGroup, hidden: Tensor, lm_weight: Tensor, cls_weight: list[Tensor], gamma: Tensor,
    lm_bias: Tensor | None, cls_bias: list[Tensor | None], affine: Tensor | None,
) -> Tensor:  # fmt: skip
    """The columns [N, slice size] of this rank's slice of Director's log-probs [N, V]."""
    where, hidden, lm_weight, cls_weight, gamma, lm_bias, shifts, affine = _director(
        group, hidden, lm_weight, cls_weight, gamma, lm_bias, cls_bias, affine
    )
    heads = len(cls_weight)
    return _Logp.apply(where, heads, hidden, lm_weight, gamma, lm_bias, affine, *cls_weight, *shifts)


def director_topk(
    group: dist.ProcessGroup, hidden: Tensor, lm_weight: Tensor, cls_weight: list[Tensor], gamma: Tensor,
    lm_bias: Tensor | None, cls_bias: list[Tensor | None], affine: Tensor | None, k: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The k most probable tokens of the whole vocabulary: values and indices [N, k]."""
    where, *arguments = _director(group, hidden, lm_weight, cls_weight, gamma, lm_bias, cls_bias, affine, k=k)
    if k > where.total:
        raise ValueError(f"k: expected an int in [1, V = {where.total}], got {k}")
    few_of = [min(k, size) for size in where.sizes]
    value, index, maximum, log_sum = _ops.director_topk(*arguments, max(1, few_of[where.rank]))
    numbers = [
        maximum.unsqueeze(1),
        log_sum.unsqueeze(1),
        widened(value, k),
        index_bits(index, where, value, k),
    ]
    found = gather(torch.cat(numbers, 1), group)
    held = where.held
    _, log_w, whole = shares(found[held, :, 0], found[held, :, 1])
    shift = log_w.unsqueeze(2)  # -inf if a slice has no finite score: its own log-probs are then NaN
    values, indices, _ = best(
        [
            (found[r, :, 2 : 2 + few_of[r]] + shift[i]).masked_fill(shift[i] == -torch.inf, -torch.inf)
            for i, r in enumerate(held)
        ],
        [found[r, :, 2 + k : 2 + k + few_of[r]] for r in held],
        k,
    )
    return values.masked_fill(whole.isnan().unsqueeze(1), torch.nan), indices


def classifier_logit(
    group: dist.ProcessGroup, hidden: Tensor, weight: Tensor, target: Tensor, label: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """The classifier's logit of each target [N], computed on the rank whose slice contains the target."""
    where, inside, own, wrong = _classifier(group, hidden, weight, target, label)
    weight, bias = one_row(weight, where), one_row(bias, where)
    dot = _ops.director_dot(whole_gradient(hidden, group), weight, own, label.where(inside, -1), bias)
    return Sum.apply(dot, group).masked_fill(wrong, torch.nan)


def classifier_terms(
    group: dist.ProcessGroup, hidden: Tensor, weight: Tensor, target: Tensor, label: Tensor,
    bias: Tensor | None, affine: Tensor | None, logits_budget: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The mean of (sigmoid(cls) - 1/2)^2 over all tokens except the target: [N], and `classifier_logit`."""
    where, inside, own, wrong = _classifier(group, hidden, weight, target, label, affine)
    weight, bias = one_row(weight, where), one_row(bias, where)
    x = whole_gradient(hidden, group)
    pair = None if affine is None else whole_gradient(affine, group)
    # The operator leaves out one entry and returns its logit: the target, or entry 0 if the target is in the
    # slice of another rank. In that case the term of entry 0 is added again.
    mean, logit, _ = _ops.director_norm(x, weight, own, label, bias, pair, logits_budget)
    norm = mean * max(1, len(weight) - 1)
    elsewhere = ~inside & (target != IGNORE) & (label >= 0)
    left_out = logit.where(elsewhere, 0.0)
    if pair is not None:
        left_out = pair[0] * left_out + pair[1]
    norm = norm + (left_out.sigmoid() - 0.5).square().where(elsewhere, 0.0)
    if not where.size:
        norm = norm.masked_fill(torch.ones_like(inside), 0.0)
    total, picked = Sum.apply(torch.stack([norm, logit.where(inside, 0.0)]), group).unbind()
    mean = (total / max(1, where.total - 1)).masked_fill(wrong, torch.nan)
    return mean, picked.masked_fill(wrong, torch.nan)


def _director(
    group: dist.ProcessGroup, hidden: Tensor, lm_weight: Tensor, cls_weight: list[Tensor], gamma: Tensor,
    lm_bias: Tensor | None, cls_bias: list[Tensor | None], affine: Tensor | None, **equal: int,
) -> tuple[
    Slices, Tensor, Tensor, list[Tensor], Tensor, Tensor | None, list[Tensor], Tensor | None
]:  # fmt: skip
    """The slices, and the operator's arguments; gradients of shared arguments are summed over the group."""
    given = tuple(t is None for t in (lm_bias, *cls_bias, affine))
    where = slices(
        group, hidden, lm_weight, classifiers=len(cls_weight), gamma=gamma, options=digest(given),
        gradients=gradients(hidden, lm_weight, *cls_weight, gamma, lm_bias, *cls_bias, affine), **equal,
    )  # fmt: skip
    shared: list[Any] = [None if t is None else whole_gradient(t, group) for t in (hidden, gamma, affine)]
    weights = [one_row(w, where) for w in (lm_weight, *cls_weight)]
    shifts = [hidden.new_empty(0) if b is None else one_row(b, where) for b in cls_bias]
    lm_shift = one_row(lm_bias, where)
    return where, shared[0], weights[0], weights[1:], shared[1], lm_shift, shifts, shared[2]


def _classifier(
    group: dist.ProcessGroup, hidden: Tensor, weight: Tensor, target: Tensor, label: Tensor,
    affine: Tensor | None = None,
) -> tuple[Slices, Tensor, Tensor, Tensor]:  # fmt: skip
    """The slices; masks and targets [N]: in this slice, index in this slice (0 if not in it), invalid."""
    where = slices(group, hidden, weight, target=target, label=label, gradients=gradients(hidden, affine))
    given = target != IGNORE
    wrong_target = given & ((target < 0) | (target >= where.total))
    wrong_label = given & ((label < -1) | (label > 1))
    if target.device.type == "cpu":  # raise on every rank; the operator would raise on one of them only
        for name, wrong, t, expected in (
            ("target", wrong_target, target, f"values in [0, {where.total}) or {IGNORE}"),
            ("label", wrong_label, label, "1, 0 or -1"),
        ):
            if wrong.any():
                row = int(wrong.nonzero()[0])
                raise RuntimeError(f"{name}: expected {expected}, got {t[row].item()} at row {row}")
    inside = given & (target >= where.start) & (target < where.start + where.size)
    own = torch.where(inside, target - where.start, 0).where(given, IGNORE)
    return where, inside, own, wrong_target | wrong_label


class _Logp(Function):
    """The columns of this rank's slice, normalized over the vocabulary; the operator's lists come last."""

    @staticmethod
    def forward(ctx, where, heads, hidden, lm_weight, gamma, lm_bias, affine, *rest):
        cls_weight, cls_bias = rest[:heads], rest[heads:]
        logp, maximum, log_sum = _ops.director(
            hidden, lm_weight, cls_weight, gamma, lm_bias, cls_bias, affine
        )
        found, held = gather(torch.stack([maximum, log_sum]), where.group), where.held
        _, log_w, _ = shares(found[held, 0], found[held, 1])
        if where.size:
            mine = log_w[held.index(where.rank)].unsqueeze(1)
            logp = (logp + mine).masked_fill(mine == -torch.inf, -torch.inf)
        ctx.group, ctx.size, ctx.heads = weakref.ref(where.group), where.size, heads
        ctx.save_for_backward(logp, hidden, lm_weight, gamma, lm_bias, affine, *rest)
        return logp if where.size else logp[:, :0].clone()

    @staticmethod
    def backward(ctx, grad):
        logp, hidden, lm_weight, gamma, lm_bias, affine, *rest = ctx.saved_tensors
        mine = grad.sum(1)
        total = mine.clone()
        with together():
            dist.all_reduce(total, group=living(ctx.group))
        if not ctx.size:
            grad, logp = torch.zeros_like(logp), torch.full_like(logp, -torch.inf)
        need_hidden, need_lm, _, need_lm_bias, _, *need = ctx.needs_input_grad[2:]
        need_cls, need_cls_bias = any(need[: ctx.heads]), any(need[ctx.heads :])
        of_hidden, of_lm, of_cls, of_gamma, of_lm_bias, of_cls_bias, of_affine = _ops.director_backward(
            grad, total - mine, logp, hidden, lm_weight, rest[: ctx.heads], gamma, lm_bias,
            rest[ctx.heads :], affine, need_hidden, need_lm, need_cls, need_lm_bias or need_cls_bias,
        )  # fmt: skip
        grads = (of_hidden, of_lm, of_gamma, of_lm_bias, of_affine, *of_cls, *of_cls_bias)
        return None, None, *(g if n else None for g, n in zip(grads, ctx.needs_input_grad[2:], strict=True))
