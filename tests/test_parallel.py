"""Operators on slices of the vocabulary on several ranks, compared with one process."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks, outcomes

from sukhops import director_logp, director_topk, linear_logp, linear_token_stats, linear_topk, testing
from sukhops.ops.director import classifier_logit, classifier_terms
from sukhops.ops.vocab_head import TokenStats

V, D, N = 101, 7, 23
SIZES = {2: [60, 41], 3: [40, 0, 61], 4: [1, 50, 0, 50]}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
CURVE = {"softcap": 5.0, "scale": 1.7, "temperature": 0.6}


def head(rank, sizes, dtype, bias=False, frozen=False, more=(), unused=()):
    """Inputs of a rank with its slice of the vocabulary; rank None has the whole vocabulary."""
    g = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    given = {"hidden": normal(N, D), "weight": normal(V, D)}
    if bias:
        given["bias"] = normal(V)
        given["bias"][sizes[0] // 2 :: 3] = -torch.inf
        if sizes[0] == 1:
            given["bias"][0] = -torch.inf  # a slice without a finite logit
    others = {"second": normal(V, D), "gamma": normal(N).abs(), "affine": normal(2), "shift": normal(V)}
    given = {n: t for n, t in given.items() if n not in unused} | {n: others[n] for n in more}
    target = torch.randint(0, V, (N,), generator=g)
    target[::5] = -100
    if rank is not None:
        start = sum(sizes[:rank])
        given |= {n: given[n][start : start + sizes[rank]].clone() for n in SLICED if n in given}
    for name, t in given.items():
        t.requires_grad_(name not in SLICED or not frozen)
    return given, target


def several(target):
    """Two more targets for each row, one of them ignored."""
    return torch.stack([target, (target + 40).clamp(min=0) % V, torch.full_like(target, -100)], 1)


def logp(given, target, **group):
    return linear_logp(**given, target=target, return_lse=True, **group)


def several_logp(given, target, **group):
    return linear_logp(**given, target=several(target), **CURVE, **group)


def ignoring(index):
    """linear_logp with an ignore_index that is a token of rank 0 and a local index on the other ranks."""

    def call(given, target, **group):
        moved = target.where(target != -100, index)
        return linear_logp(**given, target=moved, ignore_index=index, return_lse=True, **group)

    return call


def offset(given, target, **group):
    return linear_logp(given["hidden"], given["weight"], target, given["bias"] + 1e4, **group)


def stats(given, target, **group):
    return linear_token_stats(**given, target=target, outputs=TokenStats._fields, **CURVE, **group)


def topk(given, target, **group):
    return linear_topk(given["hidden"], given["weight"], 5, given.get("bias"), temperature=0.7, **group)


def director(op, *arguments):
    def call(given, target, **group):
        return op(
            given["hidden"], given["weight"], given["second"], *arguments, gamma=given["gamma"],
            lm_bias=given.get("bias"), cls_bias=given.get("shift"), **group,
        )  # fmt: skip

    return call


def shared_director(given, target, **group):
    return director_logp(given["hidden"], given["weight"], None, cls_affine=given["affine"], **group)


def labels(target):
    return torch.arange(N) % 4 % 3 - 1  # 2 in 4 train the classifier


def classifier(op, *arguments):
    def call(given, target, **group):
        bias = given.get("bias")
        return op(given["hidden"], given["second"], target, labels(target), bias, *arguments, **group)

    return call


def shared_terms(given, target, **group):
    return classifier_terms(
        given["hidden"], given["weight"], target, labels(target), None, given["affine"], **group
    )


HEADS = {
    "logp": (logp, {}),
    "logp, bias": (logp, {"bias": True}),
    "logp, frozen": (logp, {"frozen": True}),
    "several targets": (several_logp, {"bias": True}),
    "ignore_index 0": (ignoring(0), {}),
    "ignore_index 3": (ignoring(3), {}),
    "offset": (offset, {"bias": True}),
    "statistics": (stats, {}),
    "statistics, bias": (stats, {"bias": True}),
    "statistics, frozen": (stats, {"frozen": True}),
    "top k": (topk, {}),
    "top k, bias": (topk, {"bias": True}),
    "director": (director(director_logp), {"more": ("second", "gamma")}),
    "director, bias": (director(director_logp), {"more": ("second", "gamma", "shift"), "bias": True}),
    "director, shared": (shared_director, {"more": ("affine",)}),
    "director top k": (director(director_topk, 5), {"more": ("second", "gamma"), "frozen": True}),
    "director top k, bias": (
        director(director_topk, 5),
        {"more": ("second", "gamma", "shift"), "frozen": True, "bias": True},
    ),
    "classifier": (classifier(classifier_logit), {"more": ("second",), "unused": ("weight",)}),
    "classifier terms": (classifier(classifier_terms), {"more": ("second",), "unused": ("weight",)}),
    "classifier terms, shared": (shared_terms, {"more": ("affine",)}),
}
SLICED = ("weight", "bias", "second", "shift", "columns")


def outcome(name, call, given, target, rank=None, sizes=None, **group):
    """Results, and gradients of the inputs for an upstream gradient that is equal on every rank.

    For director_logp, the result and its upstream gradient have only the columns of this rank.
    """
    inference = name.startswith("director top k")
    with torch.set_grad_enabled(not inference):
        out = call(given, target, **group)
    out = out if isinstance(out, tuple) else (out,)
    columns = name.startswith("director") and not inference
    g = torch.Generator().manual_seed(11)
    found = {"columns" if columns else f"result {i}": t.detach() for i, t in enumerate(out)}
    upstream = []
    for t in out:
        shape = (*t.shape[:-1], V) if columns else t.shape
        whole = torch.randn(shape, generator=g, dtype=torch.float64).to(t)
        if columns and rank is not None:
            start = sum(sizes[:rank])
            whole = whole[:, start : start + sizes[rank]]
        upstream.append(whole)
    paths = [t.requires_grad for t in out]
    if not any(paths):
        return found
    leaves = {n: t for n, t in given.items() if t.requires_grad}
    pick = [[x for x, path in zip(xs, paths, strict=True) if path] for xs in (out, upstream)]
    return found | dict(
        zip(leaves, torch.autograd.grad(pick[0], list(leaves.values()), pick[1]), strict=True)
    )


def heads(rank):
    sizes, found = SIZES[dist.get_world_size()], {}
    for name, (call, options) in HEADS.items():
        for dtype in DTYPES:
            given, target = head(rank, sizes, dtype, **options)
            world = dist.group.WORLD
            runs = [outcome(name, call, given, target, rank, sizes, group=world) for _ in range(2)]
            assert all(
                torch.equal(a.nan_to_num(7), b.nan_to_num(7))
                for a, b in zip(*(r.values() for r in runs), strict=True)
            )
            found[name, dtype] = runs[0]
    return found


ranks = outcomes(heads, SIZES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HEADS)
def test_head(ranks, name, dtype):
    sizes = SIZES[len(ranks)]
    call, options = HEADS[name]

    def alone(of):
        given, target = head(None, sizes, dtype, **options)
        given = {n: t.detach().to(of).requires_grad_(t.requires_grad) for n, t in given.items()}
        return outcome(name, call, given, target)

    exact, low = alone(torch.float64), alone(dtype)
    for part in ranks:
        mine = part[name, dtype]
        for key, t in mine.items():
            if key in SLICED:
                continue
            assert torch.equal(t.nan_to_num(7), ranks[0][name, dtype][key].nan_to_num(7)), (
                key,
                "differs between ranks",
            )
    whole = dict(ranks[0][name, dtype])
    for key in set(SLICED) & set(whole):
        whole[key] = torch.cat([part[name, dtype][key] for part in ranks], 1 if key == "columns" else 0)
    for key, t in whole.items():
        assert t.shape == exact[key].shape and t.dtype == low[key].dtype
        if not t.is_floating_point():
            assert torch.equal(t, exact[key] if dtype == torch.float64 else low[key]), key
        elif dtype == torch.float64:
            assert testing.distance(t, exact[key]) < 1e-10, key
        else:
            assert testing.distance(t, exact[key]) <= testing.budget(t, low[key], exact[key]), key


# ------------------------------------------------------------------ communication, special calls


def entropy(given, target, **options):
    return linear_token_stats(**given, target=target, outputs=("logp", "entropy"), **options).entropy


def traffic(rank):
    """Bytes of all-gathers and all-reduces in the forward and in the backward."""
    gathered, reduced = [], []
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    plain_gather, plain_reduce = getattr(dist, gather), dist.all_reduce

    def counted_gather(out, t, **options):
        gathered.append(t.numel() * t.element_size())
        return plain_gather(out, t, **options)

    def counted_reduce(t, **options):
        reduced.append(t.numel() * t.element_size())
        return plain_reduce(t, **options)

    setattr(dist, gather, counted_gather)
    dist.all_reduce = counted_reduce
    found = {}
    for name in ("logp", "several targets", "top k", "logp, frozen", "entropy"):
        call, options = HEADS.get(name, (entropy, {}))
        given, target = head(rank, SIZES[2], torch.float32, **options)
        gathered.clear(), reduced.clear()
        out = call(given, target, group=dist.group.WORLD)
        forward = list(gathered), list(reduced)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        found[name] = (*forward, list(gathered)[len(forward[0]) :], list(reduced))
    return found


def test_bytes_sent():
    """Forward: at most 16 bytes per row and target, and per top-k entry. Backward: the gradient of hidden."""
    for found in on_ranks(2, traffic):
        for name, (gathered, reduced, more, summed) in found.items():
            compared, numbers = gathered
            targets, k = {"several targets": 3, "top k": 0}.get(name, 1), 5 * (name == "top k")
            assert compared < 200 and numbers == N * 4 * (2 + targets + 2 * k + (name == "entropy"))
            assert numbers <= N * 16 * (targets + k)
            assert reduced == more == [] and summed == [N * D * 4], name


def special_calls(rank):
    world, found = dist.group.WORLD, {}
    given, target = head(rank, SIZES[2], torch.float32)
    empty = {"hidden": torch.zeros(0, D), "weight": given["weight"]}
    rows = linear_token_stats(**empty, target=target[:0], outputs=TokenStats._fields, group=world)
    found["no rows"] = [t.shape for t in rows] + [linear_topk(**empty, k=3, group=world).values.shape]

    def call(hidden, weight):
        return linear_logp(hidden, weight, target, group=world).sum()

    inputs = (given["hidden"], given["weight"])
    plain, compiled = (
        torch.autograd.grad(f(*inputs), inputs) for f in (call, torch.compile(call, backend="aot_eager"))
    )
    found["compiled"] = all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))
    again = torch.utils.checkpoint.checkpoint(call, *inputs, use_reentrant=False)
    found["checkpoint"] = all(
        torch.equal(a, b) for a, b in zip(plain, torch.autograd.grad(again, inputs), strict=True)
    )
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = linear_logp(*inputs, target, group=world).dtype == torch.float32
    wrong = {
        "gradient": lambda: linear_logp(
            given["hidden"].detach().requires_grad_(rank == 0), given["weight"], target, group=world
        ),
        "temperature": lambda: linear_logp(*inputs, target, temperature=1.0 + rank, group=world),
        "bias": lambda: linear_logp(*inputs, target, given["weight"][:, 0] if rank else None, group=world),
        "top k": lambda: linear_topk(*inputs, 10**6, group=world),
        "director top k": lambda: director_topk(*inputs, inputs[1], 10**6, group=world),
    }
    for name, attempt in wrong.items():
        try:
            attempt()
        except ValueError as error:
            found[name] = str(error)
    return found


def test_special_calls():
    for found in on_ranks(2, special_calls):
        assert isinstance(found, dict), found
        assert found["no rows"] == [(0,)] * 6 + [(0, 3)]
        assert found["compiled"] and found["checkpoint"] and found["autocast"]
        assert found["gradient"] == "group: expected the same gradients on all ranks, got [1, 0] by rank"
        for name in ("top k", "director top k"):
            assert found[name] == f"k: expected an int in [1, V = {V}], got 1000000"
        for name in ("temperature", "bias"):
            assert found[name].startswith("group: expected the same options on all ranks"), name
