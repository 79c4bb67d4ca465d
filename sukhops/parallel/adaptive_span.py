"""Sequence-parallel attention with spans: a rank has a part of every sequence and receives earlier keys."""

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
    """Parts of `length` positions; rank r needs the keys of the `before[r]` positions before its part."""

    rank: int
    length: int
    before: tuple[int, ...]

    def travels(self, owner: int, reader: int) -> slice:
        """The keys of `owner` that `reader` needs, as positions in the part of `owner`."""
        first, last = (reader * self.length - n - owner * self.length for n in (self.before[reader], 0))
        return slice(*(min(max(x, 0), self.length) for x in (first, last)))

    def readers(self) -> list[tuple[int, slice]]:
        """The ranks that need keys of this rank, each with the positions that it needs."""
        return self._some((r, self.travels(self.rank, r)) for r in range(self.rank + 1, len(self.before)))

    def owners(self) -> list[tuple[int, slice]]:
        """The ranks whose keys this rank needs, each with the positions in its part."""
        return self._some((r, self.travels(r, self.rank)) for r in range(self.rank))

    @staticmethod
    def _some(found: Iterable[tuple[int, slice]]) -> list[tuple[int, slice]]:
        return [(r, s) for r, s in found if s.start < s.stop]


def attention(
    local: Callable, group: dist.ProcessGroup, q: Tensor, k: Tensor, v: Tensor, span: Tensor, *,
    ramp: float, rel_pos: Tensor | None, include_self: bool, max_span: int | None, key_start: Tensor | None,
    **options: Any,
) -> Tensor:  # fmt: skip
    """Attention of this rank's part of every sequence; `local` is the attention of one process.

    Arguments are those of `sukhops.adaptive_span_attention`.
    """
    b, h, m, d = q.shape
    if k.shape[2] != m:
        raise ValueError(f"k: expected M = {m} positions as q with group, got N = {k.shape[2]}")
    rank = dist.get_rank(group) if isinstance(group, dist.ProcessGroup) else 0
    furthest = span.max().item() + ramp if span.numel() else 0.0  # a key at this distance has a gradient
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
        """Attention of some queries to keys that start at position `first` of this part (may be negative)."""
        spans = span if span.dim() == 1 else span[:, :, queries]
        start = key_start
        if start is not None:
            start = (start[:, queries] - (rank * m + first)).clamp(min=0)
        return local(q[:, :, queries], keys, values, spans, key_start=start, **window)

    kv = torch.stack([k, v])  # [2, B, Hkv, M, d]
    pending: list[Travel] = []
    received = _Exchange.apply(kv, parts, group, pending)
    overlaps = 0 < before < m  # later queries see only keys of this rank: compute them while keys arrive
    later = part(slice(before, m), k, v, 0) if overlaps else None
    for travel in pending:
        travel.wait()
    early = before if overlaps else m
    keys, values = torch.cat([*received, kv[..., :early, :]], 3).unbind(0)
    first = part(slice(0, early), keys, values, -before)
    return first if later is None else torch.cat([first, later], 2)


class _Exchange(Function):
    """Receives keys and values [2, B, Hkv, n, d] from earlier ranks; the backward returns their gradients.

    The forward does not wait for them. It appends a `Travel` to `pending`, on which the caller waits.
    """

    @staticmethod
    def forward(ctx, kv, parts, group, pending):
        ctx.parts, ctx.group = parts, weakref.ref(group)
        sent = {r: kv[..., s, :].contiguous() for r, s in parts.readers()}
        found = {r: kv.new_empty(*kv.shape[:3], s.stop - s.start, kv.shape[4]) for r, s in parts.owners()}
        pending.append(Travel(sent, found, group))
        none = kv.new_empty(*kv.shape[:3], 0, kv.shape[4])  # keeps the exchange in every rank's graph
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
    """Tensors that are being sent to and received from other ranks. It keeps sent tensors alive."""

    def __init__(self, sent: dict[int, Tensor], found: dict[int, Tensor], group: dist.ProcessGroup):
        transfers = [(dist.isend, sent), (dist.irecv, found)]
        operations = [
            dist.P2POp(operation, t, group=group, group_peer=r)
            for operation, tensors in transfers
            for r, t in tensors.items()
        ]
        self.sent = sent
        self.works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> None:
        with together():
            for work in self.works:
                work.wait()
