"""Slices of a vocabulary over the ranks of a process group: the only room that communicates.

Every rank holds some rows of a head's weight; slices follow each other in the group's rank order. A rank
computes its slice with the operators as they are. A few numbers per row travel, and every rank combines them
in rank order: results are the same on all ranks to the bit.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from sukhops import _checks, testing


class Slices(NamedTuple):
    group: dist.ProcessGroup
    rank: int
    sizes: tuple[int, ...]  # rows of the weight on each rank

    @property
    def start(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def size(self) -> int:
        return self.sizes[self.rank]

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def held(self) -> list[int]:
        """Ranks whose slice is not empty."""
        return [r for r, size in enumerate(self.sizes) if size]


def slices(group: dist.ProcessGroup, hidden: Tensor, weight: Tensor, **equal: int | Tensor) -> Slices:
    """Where each rank's slice is; raises on every rank if what must be the same on all ranks is not."""
    if not isinstance(group, dist.ProcessGroup):
        got = (
            "that this process is not in"
            if group is dist.GroupMember.NON_GROUP_MEMBER
            else type(group).__name__
        )
        raise ValueError(f"group: expected a torch.distributed.ProcessGroup, got one {got}")
    numbers = {
        "rows of hidden": hidden[..., 0].numel() if hidden.shape[-1] else 0,
        "D": weight.shape[1],
        "dtype": _checks.FLOATS.index(weight.dtype),
    } | {name: value for name, value in equal.items() if not isinstance(value, Tensor)}
    if testing.ranks_are_compared():
        tensors = {"hidden": hidden} | {n: t for n, t in equal.items() if isinstance(t, Tensor)}
        numbers |= {f"values of {name}": _digest(t) for name, t in tensors.items()}
    mine = torch.tensor([weight.shape[0], *numbers.values()], device=hidden.device)
    sizes, *found = _gather(mine, group).T.tolist()
    for name, values in zip(numbers, found, strict=True):
        if len(set(values)) > 1:
            raise ValueError(f"group: expected the same {name} on all ranks, got {values} by rank")
    if not sum(sizes):
        raise ValueError("weight: expected at least one row on some rank, every slice is empty")
    return Slices(group, dist.get_rank(group), tuple(sizes))


def head(
    local: Callable, group: dist.ProcessGroup, hidden: Tensor, weight: Tensor, targets: Tensor,
    bias: Tensor | None, *, k: int, statistics: bool, ignore_index: int, **curve,
):  # fmt: skip
    """The Head of the whole vocabulary from `local`, which computes that of a slice; see `ops.vocab_head`."""
    where = slices(
        group, hidden, weight,
        targets=targets.shape[1], k=k, statistics=int(statistics), target=targets,
    )  # fmt: skip
    if k > where.total:
        raise ValueError(f"k: expected an int in [1, V = {where.total}], got {k}")
    ignored = targets == ignore_index
    wrong = ~ignored & ((targets < 0) | (targets >= where.total))
    if targets.device.type == "cpu" and wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise RuntimeError(
            f"target: expected values in [0, {where.total}) or ignore_index ({ignore_index}), "
            f"got {targets[row, column].item()} at row {row}"
        )
    inside = (targets >= where.start) & (targets < where.start + where.size)
    own = torch.where(inside, targets - where.start, 0).masked_fill(ignored, ignore_index)
    if not where.size:  # one row that will count for nothing keeps hidden in the graph of every rank
        weight = torch.cat([weight, weight.new_zeros(1, weight.shape[1])])
        bias = None if bias is None else torch.cat([bias, bias.new_zeros(1)])
    x = whole_gradient(hidden.reshape(len(targets), -1), group)
    part = local(
        x, weight, own, bias,
        k=min(k, where.size), statistics=statistics, ignore_index=ignore_index, **curve,
    )  # fmt: skip
    counted = (~ignored).any(1) if targets.shape[1] else torch.ones_like(part.maximum, dtype=torch.bool)
    return type(part)(*_Combine.apply(*part, inside, counted, wrong.any(1), k, statistics, where))


class _Combine(Function):
    """The fields of a Head of the whole vocabulary from those of a slice.

    A slice's share of the probability is w = exp(log_w), log_w = (its maximum - the whole's) + its log_sum -
    the whole's.
    """

    @staticmethod
    def forward(
        ctx, maximum, log_sum, logit, value, index, entropy, log_sum_sq, mean_logit, inside, counted, wrong,
        k, statistics, where,
    ):  # fmt: skip
        ctx.set_materialize_grads(False)
        targets, few = logit.shape[1], value.shape[1]
        index = (index + where.start).to(torch.int64 if value.dtype == torch.float64 else torch.int32)
        rows = [
            maximum.unsqueeze(1), log_sum.unsqueeze(1), logit.where(inside, 0.0),
            _widened(value, k), _widened(index.view(value.dtype), k),
        ]  # fmt: skip
        if statistics:
            rows.append(torch.stack([entropy, log_sum_sq, mean_logit], 1))
        found = _gather(torch.cat(rows, 1), where.group)  # [ranks, N, numbers]
        held = where.held
        top, log_w, whole = _shares(found[held, :, 0], found[held, :, 1])
        whole = whole.masked_fill(wrong, torch.nan)
        logit = found[:, :, 2 : 2 + targets].sum(0)  # one rank has it, the others 0
        few_of = [min(k, size) for size in where.sizes]
        at = 2 + targets
        values = torch.cat([found[r, :, at : at + m] for r, m in enumerate(few_of)], 1)
        places = [found[r, :, at + k : at + k + m] for r, m in enumerate(few_of)]
        indices = torch.cat(places, 1).view(index.dtype).long()
        values, order = values.sort(dim=1, descending=True, stable=True)  # the lower rank, so index, first
        values, order = values[:, :k].masked_fill(whole.isnan().unsqueeze(1), torch.nan), order[:, :k]
        indices = indices.gather(1, order)
        mine = log_w[held.index(where.rank)] if where.size else torch.full_like(whole, -torch.inf)
        numbers = [entropy, log_sum_sq, mean_logit]
        if statistics:
            h, q, z = found[held, :, at + 2 * k :].unbind(2)
            w = log_w.exp()
            sizes = w.new_tensor([where.sizes[r] for r in held]).unsqueeze(1)
            numbers = [
                (w * (h - log_w)).masked_fill(w == 0, 0.0).sum(0),
                (2 * log_w + q).masked_fill(w == 0, -torch.inf).logsumexp(0),
                (z * (sizes / where.total)).sum(0),
            ]
            numbers = [x.masked_fill(wrong, torch.nan) for x in numbers]
        outputs = tuple(
            x.masked_fill(~counted.view(-1, *[1] * (x.dim() - 1)), 0) if len(x) else x
            for x in (top, whole, logit, values, indices, *numbers)
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
        if of_entropy is not None:
            share = (of_entropy * w * (entropy - log_w - whole_entropy)).masked_fill(w == 0, 0.0)
            log_sum = share if log_sum is None else log_sum + share
            of_entropy = of_entropy * w
        if of_value is not None:
            spread = of_value.new_zeros(len(order), ctx.all).scatter(1, order, of_value)
            of_value = spread[:, ctx.first : ctx.first + ctx.few]
        of_logit = None if of_logit is None else of_logit.where(inside, 0.0)
        return None, log_sum, of_logit, of_value, None, of_entropy, *[None] * 8


def whole_gradient(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """t itself, whose gradient is then summed over the group."""
    return _SummedGradient.apply(t, group) if t.requires_grad and torch.is_grad_enabled() else t


class _SummedGradient(Function):
    @staticmethod
    def forward(ctx, t, group):
        ctx.group = group
        return t.view_as(t)

    @staticmethod
    def backward(ctx, grad):
        total = grad.to(_checks.accumulation_dtype(grad.dtype), copy=True).contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total.to(grad.dtype), None


def _shares(maximum: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of slices [ranks, N]: the maximum [N], each slice's log of its share, and the log of the sum [N]."""
    top = maximum.amax(0)
    sums = (maximum - top.masked_fill(top == -torch.inf, 0.0)) + log_sum
    whole = sums.logsumexp(0)
    return top, sums - whole, whole


def _gather(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...] in rank order."""
    count = dist.get_world_size(group)
    out = t.new_empty(count * t.numel())
    dist.all_gather_into_tensor(out, t.flatten(), group=group)
    return out.view(count, *t.shape)


def _widened(t: Tensor, k: int) -> Tensor:
    """t [N, at most k] with columns to k."""
    return torch.nn.functional.pad(t, (0, k - t.shape[1]))


def _digest(t: Tensor) -> int:
    """A number that tells tensors apart, the same for the same bits."""
    numbers = t.detach().contiguous().view(torch.uint8).flatten().long()
    places = torch.arange(1, numbers.numel() + 1, device=t.device)
    return (numbers * (places * 0x9E3779B1 % 0x7FFFFFFF)).sum().item()
