"""Slices of a vocabulary on several ranks against one process that has the whole."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from sukhops import linear_logp, linear_token_stats, linear_topk, testing
from sukhops.ops.vocab_head import TokenStats

V, D, N = 101, 7, 23
SIZES = {2: [60, 41], 3: [40, 0, 61], 4: [1, 50, 0, 50]}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
CURVE = {"softcap": 5.0, "scale": 1.7, "temperature": 0.6}


def head(rank, sizes, dtype, bias=False, frozen=False):
    """This rank's inputs; rank None has the whole vocabulary."""
    g = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    given = {"hidden": normal(N, D), "weight": normal(V, D)}
    if bias:
        given["bias"] = normal(V)
        given["bias"][sizes[0] // 2 :: 3] = -torch.inf
        if sizes[0] == 1:
            given["bias"][0] = -torch.inf  # a slice without a finite logit
    target = torch.randint(0, V, (N,), generator=g)
    target[::5] = -100
    if rank is not None:
        start = sum(sizes[:rank])
        given |= {n: given[n][start : start + sizes[rank]].clone() for n in ("weight", "bias") if n in given}
    for name, t in given.items():
        t.requires_grad_(name == "hidden" or not frozen)
    return given, target


def several(target):
    """Two more targets for each row, one of them ignored."""
    return torch.stack([target, (target + 40).clamp(min=0) % V, torch.full_like(target, -100)], 1)


def logp(given, target, **group):
    return linear_logp(**given, target=target, return_lse=True, **group)


def several_logp(given, target, **group):
    return linear_logp(**given, target=several(target), **CURVE, **group)


def stats(given, target, **group):
    return linear_token_stats(**given, target=target, outputs=TokenStats._fields, **CURVE, **group)


def topk(given, target, **group):
    return linear_topk(given["hidden"], given["weight"], 5, given.get("bias"), temperature=0.7, **group)


HEADS = {
    "logp": (logp, {}),
    "logp, bias": (logp, {"bias": True}),
    "logp, frozen": (logp, {"frozen": True}),
    "several targets": (several_logp, {"bias": True}),
    "statistics": (stats, {}),
    "statistics, bias": (stats, {"bias": True}),
    "statistics, frozen": (stats, {"frozen": True}),
    "top k": (topk, {}),
    "top k, bias": (topk, {"bias": True}),
}


def outcome(out, given):
    """Results, and gradients of the inputs under an upstream gradient that is the same on every rank."""
    out = out if isinstance(out, tuple) else (out,)
    g = torch.Generator().manual_seed(11)
    found = {f"result {i}": t.detach() for i, t in enumerate(out)}
    upstream = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t) for t in out if t.requires_grad]
    leaves = {n: t for n, t in given.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    grads = torch.autograd.grad([t for t in out if t.requires_grad], list(leaves.values()), upstream)
    return found | dict(zip(leaves, grads, strict=True))


def heads(rank):
    sizes, found = SIZES[dist.get_world_size()], {}
    for name, (call, options) in HEADS.items():
        for dtype in DTYPES:
            given, target = head(rank, sizes, dtype, **options)
            runs = [outcome(call(given, target, group=dist.group.WORLD), given) for _ in range(2)]
            assert all(
                torch.equal(a.nan_to_num(7), b.nan_to_num(7))
                for a, b in zip(*(r.values() for r in runs), strict=True)
            )
            found[name, dtype] = runs[0]
    return found


@pytest.fixture(scope="module", params=SIZES)
def ranks(request):
    """Every case of every rank: the processes are started once."""
    found = on_ranks(request.param, heads)
    assert all(isinstance(r, dict) for r in found), found
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HEADS)
def test_head(ranks, name, dtype):
    sizes = SIZES[len(ranks)]
    call, options = HEADS[name]

    def alone(of):
        given, target = head(None, sizes, dtype, **options)
        given = {n: t.detach().to(of).requires_grad_(t.requires_grad) for n, t in given.items()}
        return outcome(call(given, target), given)

    exact, low = alone(torch.float64), alone(dtype)
    for part in ranks:
        mine = part[name, dtype]
        for key, t in mine.items():
            if key in ("weight", "bias"):
                continue
            assert torch.equal(t.nan_to_num(7), ranks[0][name, dtype][key].nan_to_num(7)), (
                key,
                "differs between ranks",
            )
    whole = dict(ranks[0][name, dtype])
    for key in {"weight", "bias"} & set(whole):
        whole[key] = torch.cat([part[name, dtype][key] for part in ranks])
    for key, t in whole.items():
        assert t.shape == exact[key].shape and t.dtype == low[key].dtype
        if not t.is_floating_point():
            assert torch.equal(t, exact[key] if dtype == torch.float64 else low[key]), key
        elif dtype == torch.float64:
            assert testing.distance(t, exact[key]) < 1e-10, key
        else:
            assert testing.distance(t, exact[key]) <= testing.budget(t, low[key], exact[key]), key
