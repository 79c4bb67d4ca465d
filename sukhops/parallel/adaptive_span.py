"""Attention with spans over consecutive parts of every sequence: keys travel as far as a window reaches."""

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from sukhops import _checks
from sukhops.parallel._slices import agreed, digest, gradients, living, together


class Parts(NamedTuple):
    """Parts of `length` positions; rank r needs the keys of the `before[r]` positions before its own."""

    rank: int
    length: int
    before: tuple[int, ...]

    def travels(self, owner: int, reader: int) -> slice:
        """The keys of `owner`, places in its part, that `reader` needs."""
        first, last = (reader * self.length - n - owner * self.length for n in (self.before[reader], 0))
        return slice(*(min(max(x, 0), self.length) for x in (first, last)))

    def readers(self) -> list[tuple[int, slice]]:
        """The ranks that need keys of this one, and which."""
        return self._some((r, self.travels(self.rank, r)) for r in range(self.rank + 1, len(self.before)))

    def owners(self) -> list[tuple[int, slice]]:
        """The ranks whose keys this one needs, and which of theirs."""
        return self._some((r, self.travels(r, self.rank)) for r in range(self.rank))

    @staticmethod
    def _some(found: Iterable[tuple[int, slice]]) -> list[tuple[int, slice]]:
        return [(r, s) for r, s in found if s.start < s.stop]


def attention(
    local: Callable, group: dist.ProcessGroup, q: Tensor, k: Tensor, v: Tensor, span: Tensor, *,
    ramp: float, rel_pos: Tensor | None, include_self: bool, max_span: int | None, key_start: Tensor | None,
    **options: Any,
) -> Tensor:  # fmt: skip
    """`local`, attention of one process, on this rank's part of every sequence; see `ops.adaptive_span`."""
    b, h, m, d = q.shape
    if k.shape[2] != m:
        raise ValueError(f"k: expected M = {m} positions as q with group, got N = {k.shape[2]}")
    rank = dist.get_rank(group) if isinstance(group, dist.ProcessGroup) else 0
    furthest = span.max().item() + ramp if span.numel() else 0.0  # a key there has a gradient yet
    reach = math.floor(furthest) + 1 if math.isfinite(furthest) else rank * m + 1
    for most in (max_span, None if rel_pos is None else rel_pos.shape[-2]):
        reach = reach if most is None else min(reach, most)
    before = min(max(0, reach - int(include_self)), rank * m)
    parts = Parts(
        rank, m,
        agreed(
            group, q, before,
            B=b, H=h, Hkv=k.shape[1], d=d, positions=m, dtype=_checks.FLOATS.index(q.dtype),
            gradients=gradients(k, v),
            options=digest(ramp, include_self, max_span, options, key_start is None,
                           None if rel_pos is None else rel_pos.shape[-2]),
        ),
    )  # fmt: skip
    window = {
        "ramp": ramp, "rel_pos": rel_pos, "include_self": include_self, "max_span": max_span, **options
    }  # fmt: skip

    def part(queries: slice, keys: Tensor, values: Tensor, first: int) -> Tensor:
        """Attention of some of the queries to keys from position `first` of the part on."""
        spans = span if span.dim() == 1 else span[:, :, queries]
        start = key_start
        if start is not None:
            start = (start[:, queries] - (rank * m + first)).clamp(min=0)
        return local(q[:, :, queries], keys, values, spans, key_start=start, **window)

    kv = torch.stack([k, v])  # [2, B, Hkv, M, d]
    pending: list[Travel] = []
    received = _Exchange.apply(kv, parts, group, pending)
    apart = 0 < before < m  # then the later queries see keys of this rank alone, and are computed meanwhile
    later = part(slice(before, m), k, v, 0) if apart else None
    for travel in pending:
        travel.wait()
    early = before if apart else m
    keys, values = torch.cat([*received, kv[..., :early, :]], 3).unbind(0)
    first = part(slice(0, early), keys, values, -before)
    return first if later is None else torch.cat([first, later], 2)


class _Exchange(Function):
    """Keys and values [2, B, Hkv, some, d] of each rank before that has any; their gradients go back to it.

    The forward does not wait for them; it appends its `Travel` to `pending`.
    """

    @staticmethod
    def forward(ctx, kv, parts, group, pending):
        ctx.parts, ctx.group = parts, weakref.ref(group)
        sent = {r: kv[..., s, :].contiguous() for r, s in parts.readers()}
        found = {r: kv.new_empty(*kv.shape[:3], s.stop - s.start, kv.shape[4]) for r, s in parts.owners()}
        pending.append(Travel(sent, found, group))
        none = kv.new_empty(*kv.shape[:3], 0, kv.shape[4])  # the exchange is in the graph of every rank
        return tuple(found.values()) or (none,)

    @staticmethod
    def backward(ctx, *grads):
        parts, like = ctx.parts, grads[0]
        total = like.new_zeros(*like.shape[:3], parts.length, like.shape[4])
        sent = {r: g.contiguous() for (r, _), g in zip(parts.owners(), grads, strict=False)}
        found = {r: torch.empty_like(total[..., s, :]).contiguous() for r, s in parts.readers()}
        Travel(sent, found, living(ctx.group)).wait()
        for r, s in parts.readers():
            total[..., s, :] += found[r]
        return total, None, None, None


class Travel:
    """Tensors on their way to ranks and from ranks; those that are sent stay alive until then."""

    def __init__(self, sent: dict[int, Tensor], found: dict[int, Tensor], group: dist.ProcessGroup):
        ways = [(dist.isend, sent), (dist.irecv, found)]
        steps = [
            dist.P2POp(way, t, group=group, group_peer=r) for way, tensors in ways for r, t in tensors.items()
        ]
        self.sent = sent
        self.works = dist.batch_isend_irecv(steps) if steps else []

    def wait(self) -> None:
        with together():
            for work in self.works:
                work.wait()
