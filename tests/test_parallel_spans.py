"""Attention with sequences split among ranks, compared with one process."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks, outcomes

from sukhops import adaptive_span_attention, nn, testing
from sukhops.parallel import adaptive_span as parallel

B, H, D, LENGTH = 2, 4, 16, 48
CASES = {
    "within a part": dict(span=[3.0, -2.0, 0.5, 5.0], ramp=4.0),
    "a whole part": dict(span=[1.0, 8.0, 20.0, 30.0], ramp=4.0),
    "several parts": dict(span=[1.0, 8.0, 40.0, 47.0], ramp=4.0),
    "edge of the ramp": dict(span=[4.0, 4.0, 8.0, 8.0], ramp=4.0),
    "max_span": dict(span=[50.0, 8.0, 20.0, 30.0], ramp=4.0, max_span=7),
    "without self": dict(span=[1.0, 8.0, 2.0, 3.0], ramp=2.0, include_self=False),
    "rel_pos": dict(span=[9.0, 8.0, 2.0, 3.0], ramp=2.0, rel=9),
    "grouped keys, rel_pos": dict(span=[9.0, 8.0, 25.0, 3.0], ramp=2.0, rel=30, kv=2),
    "padding": dict(span=[9.0, 8.0, 25.0, 3.0], ramp=2.0, start="sequence"),
    "documents": dict(span=[9.0, 8.0, 25.0, 3.0], ramp=2.0, start="token", kv=1),
    "a span per token": dict(span=None, ramp=3.0),
    "queries alone": dict(span=[9.0, 8.0, 2.0, 3.0], ramp=2.0, frozen=True),
}


def make(name, rank, dtype):
    case, g = dict(CASES[name]), torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    kv = case.pop("kv", H)
    sequences = {"q": normal(B, H, LENGTH, D), "k": normal(B, kv, LENGTH, D), "v": normal(B, kv, LENGTH, D)}
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    span = case.pop("span")
    span = 12 * torch.rand(B, H, LENGTH, generator=g) if span is None else torch.tensor(span)
    span = span.to(acc)
    rel, start = case.pop("rel", None), case.pop("start", None)
    options = case | {"rel_pos": None if rel is None else normal(rel, D).requires_grad_()}
    key_start = None
    if start == "sequence":
        key_start = torch.tensor([0, 19])
    elif start == "token":
        key_start = (torch.arange(LENGTH) // 11 * 11).expand(B, LENGTH)
    frozen = options.pop("frozen", False)
    if rank is not None:
        m = LENGTH // dist.get_world_size()
        mine = slice(rank * m, (rank + 1) * m)
        sequences = {n: t[:, :, mine].clone() for n, t in sequences.items()}
        span = span if span.dim() == 1 else span[:, :, mine].clone()
        key_start = key_start[:, mine] if key_start is not None and key_start.dim() == 2 else key_start
    for n, t in sequences.items():
        t.requires_grad_(n == "q" or not frozen)
    return sequences | {"span": span.requires_grad_(not frozen)}, options | {"key_start": key_start}


def outcome(name, rank, dtype, **group):
    given, options = make(name, rank, dtype)
    out = adaptive_span_attention(**given, **options, **group)
    upstream = torch.randn(B, H, LENGTH, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    if rank is not None:
        m = out.shape[2]
        upstream = upstream[:, :, rank * m : (rank + 1) * m]
    leaves = {n: t for n, t in (given | options).items() if isinstance(t, torch.Tensor) and t.requires_grad}
    grads = torch.autograd.grad(out, list(leaves.values()), upstream.to(out))
    return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))


def attend(rank):
    found = {}
    for name in CASES:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            runs = [outcome(name, rank, dtype, group=dist.group.WORLD) for _ in range(2)]
            assert all(torch.equal(a, b) for a, b in zip(*(r.values() for r in runs), strict=True))
            found[name, dtype] = runs[0]
    return found


ranks = outcomes(attend, [2, 4])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_attention(ranks, name, dtype):
    exact, low = outcome(name, None, torch.float64), outcome(name, None, dtype)
    for key, true in exact.items():
        parts = [r[name, dtype][key] for r in ranks]
        shares = key == "rel_pos" or (key == "span" and true.dim() == 1)
        ours = sum(p.double() for p in parts).to(parts[0]) if shares else torch.cat(parts, 2)
        if dtype == torch.float64:
            assert testing.distance(ours, true) < 1e-10, key
        else:
            assert testing.distance(ours, true) <= testing.budget(ours, low[key], true), key


@pytest.mark.parametrize("ranks, length, window", [(4, 12, 5), (4, 12, 12), (4, 12, 30), (3, 7, 100)])
def test_keys_are_received_once_from_their_owners(ranks, length, window):
    """Each rank receives the last `window` keys before its part, or all if fewer, each once."""
    before = tuple(min(window, r * length) for r in range(ranks))
    for rank in range(ranks):
        parts = parallel.Parts(rank, length, before)
        found = [r * length + x for r, s in parts.owners() for x in range(s.start, s.stop)]
        assert found == list(range(rank * length - before[rank], rank * length))
        for reader, s in parts.readers():
            assert (rank, s) in parallel.Parts(reader, length, before).owners()


def layer(rank):
    torch.manual_seed(0)
    attention = nn.AdaptiveSpanAttention(H * D, H, 20, ramp=4.0, init=0.3)
    x = torch.randn(B, LENGTH, H * D)
    whole, _ = attention(x)
    m = LENGTH // dist.get_world_size()
    part, cache = attention(x[:, rank * m : (rank + 1) * m], group=dist.group.WORLD)
    with pytest.raises(ValueError, match="cache: expected None with group"):
        attention(x[:, :m], cache=attention(x[:, :m])[1], group=dist.group.WORLD)
    return cache is None, (part - whole[:, rank * m : (rank + 1) * m]).abs().max().item()


def unequal(rank):
    q = torch.zeros(1, 1, 5 + rank, 8)
    return adaptive_span_attention(q, q, q, torch.zeros(1), group=dist.group.WORLD)


def more_keys(rank):
    q = torch.zeros(1, 1, 5, 8)
    return adaptive_span_attention(q[:, :, :2], q, q, torch.zeros(1), group=dist.group.WORLD)


def test_layer_and_invalid_parts():
    assert all(no_cache and error < 1e-5 for no_cache, error in on_ranks(2, layer))
    for found in on_ranks(2, unequal):
        assert found == "ValueError: group: expected the same positions on all ranks, got [5, 6] by rank"
    for found in on_ranks(2, more_keys):
        assert found == "ValueError: k: expected M = 2 positions as q with group, got N = 5"
