"""Shared parts of the operators on slices: ranges of the slices, communication, gradients over the group."""

import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from sukhops import _checks, testing

Given = TypeVar("Given", Tensor, Tensor | None)


class Slices(NamedTuple):
    """The slices of the vocabulary: rank r holds sizes[r] rows of the weight."""

    group: dist.ProcessGroup
    rank: int
    sizes: tuple[int, ...]

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
        """The ranks whose slices are not empty."""
        return [r for r, size in enumerate(self.sizes) if size]


def slices(group: dist.ProcessGroup, hidden: Tensor, weight: Tensor, **equal: int | Tensor) -> Slices:
    """The slices of all ranks. Raises a ValueError on every rank if shapes or `equal` differ by rank."""
    numbers = {n: x for n, x in equal.items() if not isinstance(x, Tensor)}
    if testing.ranks_are_compared():
        tensors = {"hidden": hidden} | {n: x for n, x in equal.items() if isinstance(x, Tensor)}
        numbers |= {f"values of {name}": _digest_of_values(t) for name, t in tensors.items()}
    sizes = agreed(
        group, hidden, weight.shape[0], D=weight.shape[1], dtype=_checks.FLOATS.index(weight.dtype),
        **{"rows of hidden": hidden.shape[:-1].numel()}, **numbers,
    )  # fmt: skip
    if not sum(sizes):
        raise ValueError("weight: expected at least one row on some rank, got only empty slices")
    return Slices(group, dist.get_rank(group), sizes)


def agreed(group: dist.ProcessGroup, like: Tensor, own: int, **equal: int) -> tuple[int, ...]:
    """The number `own` of every rank. Raises a ValueError on every rank if `equal` differs between ranks."""
    if not isinstance(group, dist.ProcessGroup):
        outside = group is dist.GroupMember.NON_GROUP_MEMBER
        got = "a group that this process is not in" if outside else type(group).__name__
        raise ValueError(f"group: expected a torch.distributed.ProcessGroup, got {got}")
    found = gather(torch.tensor([own, *equal.values()], device=like.device), group).T.tolist()
    for name, values in zip(equal, found[1:], strict=True):
        if len(set(values)) > 1:
            raise ValueError(f"group: expected the same {name} on all ranks, got {values} by rank")
    return tuple(found[0])


def one_row(t: Given, where: Slices) -> Given:
    """t, or one row of zeros if the slice is empty: then hidden is in the autograd graph of every rank.

    The caller drops the results of this row.
    """
    return t if t is None or where.size else torch.cat([t, t.new_zeros(1, *t.shape[1:])])


def living(group: weakref.ref) -> dist.ProcessGroup:
    """The group that an autograd graph refers to.

    The reference is weak, because gloo aborts if a group is still referenced after its destruction.
    """
    found = group()
    if found is None:
        raise RuntimeError("group: it was destroyed before the backward pass of a call that used it")
    return found


def whole_gradient(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns t unchanged; its gradient is summed over the group."""
    return SummedGradient.apply(t, group) if t.requires_grad and torch.is_grad_enabled() else t


class SummedGradient(Function):
    @staticmethod
    def forward(ctx, t, group):
        ctx.group = weakref.ref(group)
        return t.view_as(t)

    @staticmethod
    def backward(ctx, grad):
        total = grad.to(_checks.accumulation_dtype(grad.dtype), copy=True).contiguous()
        with together():
            dist.all_reduce(total, group=living(ctx.group))
        return total.to(grad.dtype), None


class Sum(Function):
    """The sum over the ranks. The gradient goes to each rank's summand unchanged."""

    @staticmethod
    def forward(ctx, t, group):
        total = t.clone()
        with together():
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def shares(maximum: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Combines slices [ranks, N]: maximum [N], log-probability of each slice [ranks, N], log of the sum [N].

    The log of the sum is relative to the maximum, like log_sum.
    """
    top = maximum.amax(0)
    sums = (maximum - top.masked_fill(top == -torch.inf, 0.0)) + log_sum
    whole = sums.logsumexp(0)
    return top, sums - whole, whole


def best(values: list[Tensor], bits: list[Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of all ranks' values [N, k], their indices, and their positions in the joined values.

    Among equal values the lower index comes first. bits are indices from `index_bits`.
    """
    joined = torch.cat(values, 1)
    joined, order = joined.sort(dim=1, descending=True, stable=True)
    indices = torch.cat(bits, 1).view(torch.int64 if joined.dtype == torch.float64 else torch.int32)
    return joined[:, :k], indices.long().gather(1, order[:, :k]), order[:, :k]


def index_bits(index: Tensor, where: Slices, like: Tensor, k: int) -> Tensor:
    """Indices [N, at most k] in the slice, as bits of indices [N, k] in the vocabulary, in like's dtype.

    So values and indices can be sent in one tensor.
    """
    wide = torch.int64 if like.dtype == torch.float64 else torch.int32
    return widened((index + where.start).to(wide).view(like.dtype), k)


def widened(t: Tensor, k: int) -> Tensor:
    """t [N, at most k], padded with zeros to [N, k]."""
    return torch.nn.functional.pad(t, (0, k - t.shape[1]))


def gather(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """t [...] of every rank, in rank order: [ranks, ...]."""
    count = dist.get_world_size(group)
    out = t.new_empty(count * t.numel())
    newer = hasattr(dist, "all_gather_single")  # the new name, from torch 2.13 on
    with together():
        (dist.all_gather_single if newer else dist.all_gather_into_tensor)(out, t.flatten(), group=group)
    return out.view(count, *t.shape)


def gradients(*inputs: Tensor | None) -> int:
    """1 if the backward pass of a call on these inputs communicates, else 0."""
    return int(torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs))


def digest(*options: object) -> int:
    """A checksum of options, to compare them between ranks."""
    return zlib.crc32(repr(options).encode())


@contextmanager
def together() -> Iterator[None]:
    """Names the likely cause if a collective operation fails: a rank that does not take part."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            "group: not every rank took part in this call; check whether another rank raised an error "
            f"before, and whether all ranks make the same calls ({error})"
        ) from error


def _digest_of_values(t: Tensor) -> int:
    """A checksum of the bits of a tensor, to compare it between ranks."""
    numbers = t.detach().contiguous().view(torch.uint8).flatten().long()
    positions = torch.arange(1, numbers.numel() + 1, device=t.device)
    return int((numbers * (positions * 0x9E3779B1 % 0x7FFFFFFF)).sum())
