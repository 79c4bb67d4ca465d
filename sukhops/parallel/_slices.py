"""What operators on slices share: where each rank's slice is, what travels, gradients over the group."""

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
    numbers = {n: x for n, x in equal.items() if not isinstance(x, Tensor)}
    if testing.ranks_are_compared():
        tensors = {"hidden": hidden} | {n: x for n, x in equal.items() if isinstance(x, Tensor)}
        numbers |= {f"values of {name}": _digest_of_values(t) for name, t in tensors.items()}
    sizes = agreed(
        group, hidden, weight.shape[0], D=weight.shape[1], dtype=_checks.FLOATS.index(weight.dtype),
        **{"rows of hidden": hidden.shape[:-1].numel()}, **numbers,
    )  # fmt: skip
    if not sum(sizes):
        raise ValueError("weight: expected at least one row on some rank, every slice is empty")
    return Slices(group, dist.get_rank(group), sizes)


def agreed(group: dist.ProcessGroup, like: Tensor, own: int, **equal: int) -> tuple[int, ...]:
    """`own` of every rank; raises on every rank if the numbers in `equal` are not the same on all of them."""
    if not isinstance(group, dist.ProcessGroup):
        outside = group is dist.GroupMember.NON_GROUP_MEMBER
        got = "one that this process is not in" if outside else type(group).__name__
        raise ValueError(f"group: expected a torch.distributed.ProcessGroup, got {got}")
    found = gather(torch.tensor([own, *equal.values()], device=like.device), group).T.tolist()
    for name, values in zip(equal, found[1:], strict=True):
        if len(set(values)) > 1:
            raise ValueError(f"group: expected the same {name} on all ranks, got {values} by rank")
    return tuple(found[0])


def one_row(t: Given, where: Slices) -> Given:
    """t, or for an empty slice one row whose results are dropped, so that every rank's graph holds hidden."""
    return t if t is None or where.size else torch.cat([t, t.new_zeros(1, *t.shape[1:])])


def living(group: weakref.ref) -> dist.ProcessGroup:
    """The group of a graph. A graph does not own it: gloo aborts where a group outlives its destruction."""
    found = group()
    if found is None:
        raise RuntimeError("group: it was destroyed before the backward of a call that it took part in")
    return found


def whole_gradient(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """t itself, whose gradient is then summed over the group."""
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
    """The sum over the ranks. Its gradient is passed on to each rank's summand."""

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
    """Of slices [ranks, N]: the maximum [N], each slice's log of its share, and the log of the sum [N]."""
    top = maximum.amax(0)
    sums = (maximum - top.masked_fill(top == -torch.inf, 0.0)) + log_sum
    whole = sums.logsumexp(0)
    return top, sums - whole, whole


def best(values: list[Tensor], bits: list[Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of the ranks' values, the lower index first among equals; indices; places in the row."""
    joined = torch.cat(values, 1)
    joined, order = joined.sort(dim=1, descending=True, stable=True)
    indices = torch.cat(bits, 1).view(torch.int64 if joined.dtype == torch.float64 else torch.int32)
    return joined[:, :k], indices.long().gather(1, order[:, :k]), order[:, :k]


def index_bits(index: Tensor, where: Slices, like: Tensor, k: int) -> Tensor:
    """Indices [N, at most k], then of the whole vocabulary, as bits of like's dtype to travel with it."""
    wide = torch.int64 if like.dtype == torch.float64 else torch.int32
    return widened((index + where.start).to(wide).view(like.dtype), k)


def widened(t: Tensor, k: int) -> Tensor:
    """t [N, at most k] with columns to k."""
    return torch.nn.functional.pad(t, (0, k - t.shape[1]))


def gather(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...] in rank order."""
    count = dist.get_world_size(group)
    out = t.new_empty(count * t.numel())
    newer = hasattr(dist, "all_gather_single")  # its name from torch 2.13 on
    with together():
        (dist.all_gather_single if newer else dist.all_gather_into_tensor)(out, t.flatten(), group=group)
    return out.view(count, *t.shape)


def gradients(*inputs: Tensor | None) -> int:
    """1 where the backward of a call on these will communicate."""
    return int(torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs))


def digest(*options: object) -> int:
    """A number that tells options apart."""
    return zlib.crc32(repr(options).encode())


@contextmanager
def together() -> Iterator[None]:
    """Names the cause where a collective fails because a rank is missing."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            "group: not every rank took part in this call: see what another raised before, or whether all "
            f"make the same calls ({error})"
        ) from error


def _digest_of_values(t: Tensor) -> int:
    """A number that tells tensors apart, the same for the same bits."""
    numbers = t.detach().contiguous().view(torch.uint8).flatten().long()
    places = torch.arange(1, numbers.numel() + 1, device=t.device)
    return int((numbers * (places * 0x9E3779B1 % 0x7FFFFFFF)).sum())
