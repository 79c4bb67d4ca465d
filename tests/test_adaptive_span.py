"""adaptive_span_attention: an oracle in plain Python, gradcheck, error budgets, properties from the paper."""

import math

import pytest
import torch
import torch.nn.functional as F

from sukhops import adaptive_span_attention, reference
from sukhops.testing import assert_close, budget, distance

pytestmark = pytest.mark.every_isa

LOW = [torch.float32, torch.bfloat16, torch.float16]
pairs = torch.ops.sukhops.adaptive_span_pairs


def make(b=2, h=4, hkv=2, m=37, n=50, d=12, *, per_token=False, rel=None, seed=0):
    """Leaf tensors; the spans are less than -ramp, 0, not an integer, and longer than the sequence."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    span = torch.tensor([-60.0, 0.0, 6.3, 400.0], dtype=torch.float64).repeat(h)[:h]
    given = {
        "q": normal(b, h, m, d),
        "k": normal(b, hkv, n, d),
        "v": normal(b, hkv, n, d),
        "span": 20 * normal(b, h, m) if per_token else span,
    }
    if rel is not None:
        given["rel_pos"] = normal(*rel, d)
    return {name: t.requires_grad_() for name, t in given.items()}


# inputs, options
CASES = {
    "heads": ({}, {}),
    "tokens": ({"per_token": True}, {"ramp": 9.5}),
    "without self": ({}, {"include_self": False, "ramp": 3.0}),
    "limited": ({}, {"max_span": 11, "scale": 0.7}),
    "padded": ({}, {"key_start": torch.tensor([0, 30])}),
    "packed": ({}, {"key_start": torch.stack([torch.arange(37) // 9 * 9 + 13, torch.zeros(37).long()])}),
    "positions": ({"rel": (60,)}, {"ramp": 7.0}),
    "short positions": ({"rel": (4, 15)}, {"include_self": False}),
    "all": (
        {"per_token": True, "rel": (4, 33)},
        {
            "max_span": 21,
            "key_start": torch.tensor([7, 22]),
            "include_self": False,
            "query_start": torch.tensor([4, 13]),
        },
    ),
    "cache": ({"m": 20}, {"query_start": torch.tensor([0, 17])}),
    "cache, same start": ({"rel": (60,)}, {"query_start": 9}),
    "one query": ({"m": 1, "rel": (50,)}, {}),
    "one query of tokens": (
        {"m": 1, "h": 6, "per_token": True},
        {"key_start": torch.tensor([0, 41]), "include_self": False},
    ),
    "one query, cache": ({"m": 1}, {"query_start": torch.tensor([0, 40]), "max_span": 30}),
    "many keys": ({"b": 1, "h": 2, "hkv": 1, "m": 150, "n": 333, "d": 80}, {}),
}
cases = pytest.mark.parametrize("name", CASES)
small_cases = pytest.mark.parametrize("name", [n for n in CASES if n != "many keys"])


def case(name):
    inputs, options = CASES[name]
    return make(**inputs), options


def spans_as(dtype, f, options):
    """f, with spans cast to the accumulation dtype of `dtype`."""
    low = torch.float64 if dtype == torch.float64 else torch.float32
    return lambda **given: f(**given | {"span": given["span"].to(low)}, **options)


def oracle(
    q, k, v, span, ramp=32.0, rel_pos=None, scale=None, include_self=True, max_span=None, key_start=None,
    query_start=None,
):  # fmt: skip
    """The definition, row by row and key by key, in Python floats."""
    (b, h, m, d), (_, hkv, n, _) = q.shape, k.shape
    scale = d**-0.5 if scale is None else scale
    out = torch.zeros(b, h, m, d, dtype=torch.float64)
    first = torch.as_tensor(n - m if query_start is None else query_start).expand(b).tolist()
    for i_b in range(b):
        for i_h in range(h):
            keys, values = k[i_b, i_h * hkv // h].tolist(), v[i_b, i_h * hkv // h].tolist()
            table = None if rel_pos is None else (rel_pos if rel_pos.dim() == 2 else rel_pos[i_h]).tolist()
            for i in range(m):
                z = span[i_h].item() if span.dim() == 1 else span[i_b, i_h, i].item()
                start = 0 if key_start is None else key_start.reshape(b, -1).expand(b, m)[i_b, i].item()
                query, weights = q[i_b, i_h, i].tolist(), {}
                for j in range(n):
                    x = first[i_b] + i - j - (0 if include_self else 1)
                    if x < 0 or j < start or (max_span is not None and x >= max_span):
                        continue
                    if table is not None and x >= len(table):
                        continue
                    weight = min(1.0, max(0.0, (ramp + z - x) / ramp))
                    if weight > 0:
                        score = sum(a * (c + (table[x][e] if table else 0.0))
                                    for e, (a, c) in enumerate(zip(query, keys[j], strict=True)))  # fmt: skip
                        weights[j] = math.log(weight) + scale * score
                if weights:
                    top = max(weights.values())
                    total = math.fsum(math.exp(s - top) for s in weights.values())
                    for e in range(d):
                        terms = [math.exp(s - top) / total * values[j][e] for j, s in weights.items()]
                        out[i_b, i_h, i, e] = math.fsum(terms)
    return out


def rounding(q, k, v, rel_pos=None, scale=None, **_):
    """First-order bound on the difference of two evaluations in q's dtype, with unit roundoff u.

    A score (d products, one sum, the scale) has an error of (d + 2) u times scale |q| (|k| + |rel_pos|);
    subtracting the row's maximum adds 2 u more. A weight has this as relative error, plus 4 u (exponential,
    ramp, product). Its sums over n keys add n u, in the numerator and in the denominator.
    """
    d, n = q.shape[-1], k.shape[2]
    table = 0.0 if rel_pos is None else rel_pos.norm(dim=-1).max()
    score = (d**-0.5 if scale is None else scale) * q.norm(dim=-1).max() * (k.norm(dim=-1).max() + table)
    each = 2 * ((d + 4) * score.item() + 4 + n)
    return 2 * each * torch.finfo(q.dtype).eps / 2 * v.abs().max().item()


@small_cases
@pytest.mark.parametrize("f", [reference.adaptive_span_attention, adaptive_span_attention])
def test_matches_the_oracle(name, f):
    given, options = case(name)
    given = {n: t.detach() for n, t in given.items()}
    assert distance(f(**given, **options), oracle(**given, **options)) <= rounding(**given, **options)


@small_cases
def test_gradcheck(name):
    inputs, options = CASES[name]
    small = {"b": 2, "h": 4, "hkv": 2, "m": min(5, inputs.get("m", 5)), "n": 8, "d": 2}
    if "rel" in inputs:
        small["rel"] = (*inputs["rel"][:-1], min(9, inputs["rel"][-1]))
    options = options | ({"max_span": 6} if "max_span" in options else {})
    small["per_token"] = inputs.get("per_token", False)
    given = make(**small)
    with torch.no_grad():  # no integers: there the ramp is not differentiable
        given["span"].copy_((given["span"] / 8).floor() + 0.37)
    if "key_start" in options:
        options = options | {"key_start": torch.tensor([0, 5])}
    if "query_start" in options:
        options = options | {"query_start": torch.tensor([0, 2])}
    options = options | {"ramp": 2.0}
    names = list(given)

    def f(*tensors):
        return adaptive_span_attention(**dict(zip(names, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(f, tuple(given.values()))


@cases
@pytest.mark.parametrize("dtype", LOW)
def test_within_budget(name, dtype):
    given, options = case(name)
    op = spans_as(dtype, adaptive_span_attention, options)
    # the spans of the reference are in the same dtype as those of the op
    plain = spans_as(torch.float64, reference.adaptive_span_attention, options)
    assert_close(op, plain, given, dtype)


@pytest.mark.parametrize("need", ["q", "k", "v", "span", "rel_pos"])
def test_a_single_needed_gradient(need):
    given, options = case("all")
    full = torch.autograd.grad(adaptive_span_attention(**given, **options).sin().sum(), given[need])[0]
    alone = {n: t.detach().requires_grad_(n == need) for n, t in given.items()}
    (ours,) = torch.autograd.grad(adaptive_span_attention(**alone, **options).sin().sum(), alone[need])
    assert torch.equal(ours, full)


# ------------------------------------------------------------------ properties (Sukhbaatar et al. 2019)


def plain(given):
    return {n: t.detach().float() for n, t in given.items()}


@pytest.mark.parametrize("include_self", [True, False])
def test_a_long_span_is_windowed_attention(include_self):
    given = plain(make(hkv=4, m=50))
    given["span"].fill_(49.0)
    x = torch.arange(50).unsqueeze(1) - torch.arange(50) - int(not include_self)
    seen = (x >= 0) & (x < 20)
    exact = F.scaled_dot_product_attention(*(given[n].double() for n in "qkv"), attn_mask=seen)
    low = F.scaled_dot_product_attention(*(given[n] for n in "qkv"), attn_mask=seen)
    ours = adaptive_span_attention(**given, max_span=20, include_self=include_self)
    if not include_self:  # the first token sees no key, and its output is 0
        ours, low, exact = ours[:, :, 1:], low[:, :, 1:], exact[:, :, 1:]
    assert distance(ours, exact) <= budget(ours, low, exact)


def test_weights_sum_to_one():
    given = plain(make(per_token=True, rel=(50,)))
    given["v"] = torch.ones_like(given["v"])
    out, low = (f(**given, ramp=5.0) for f in (adaptive_span_attention, reference.adaptive_span_attention))
    exact = (given["span"] > -5.0).double().unsqueeze(-1).expand(out.shape)
    assert distance(out, exact) <= budget(out, low, exact)
    assert not out[given["span"] <= -5.0].any()


@pytest.mark.parametrize("ramp", [1e-6, 1.0])
def test_a_ramp_of_one_token_is_a_hard_window(ramp):
    given = plain(make())
    given["span"] = torch.tensor([0.0, 3.0, 7.0, 12.0])
    for h, z in enumerate([0, 3, 7, 12]):
        one = {n: t[:, h : h + 1] for n, t in given.items() if n == "q"}
        one |= {n: given[n][:, h // 2 : h // 2 + 1] for n in "kv"}
        soft = adaptive_span_attention(**one, span=given["span"][h : h + 1], ramp=ramp)
        hard = adaptive_span_attention(**one, span=torch.tensor([100.0]), max_span=z + 1)
        exact = reference.adaptive_span_attention(
            **{n: t.double() for n, t in one.items()}, span=torch.tensor([100.0]).double(), max_span=z + 1
        )
        assert distance(soft, exact) <= budget(soft, hard, exact)


def test_adding_a_constant_to_all_scores_changes_nothing():
    given = plain(make(d=12))
    given["q"][..., -1] = 1.0
    given["k"][..., -1] = 0.0
    exact = adaptive_span_attention(**{n: t.double() for n, t in given.items()})
    given["k"][..., -1] = 30.0
    ours, low = (f(**given) for f in (adaptive_span_attention, reference.adaptive_span_attention))
    assert distance(ours, exact) <= budget(ours, low, exact)


@pytest.mark.parametrize("m, n", [(40, 60), (3, 2600)])
def test_large_scores_lose_no_precision(m, n):
    """Scores are exact multiples of 1/4 up to 1,000; rounding lse would change each gradient by 1e-4."""
    given = make(m=m, n=n)
    with torch.no_grad():
        for name in "qk":
            given[name].mul_(10).round_()
        given["span"].add_(1.0).clamp_(min=0.0)

    def results(f, dtype):
        cast = {name: t.detach().to(dtype).requires_grad_() for name, t in given.items()}
        out = f(**cast, ramp=4.0, scale=0.25)
        up = torch.linspace(-1, 1, out.shape[-1], dtype=dtype).expand_as(out)
        return out, *torch.autograd.grad(out, list(cast.values()), up)

    exact = results(reference.adaptive_span_attention, torch.float64)
    ours = results(adaptive_span_attention, torch.float32)
    for a, b in zip(ours, exact, strict=True):
        assert distance(a, b) <= 64 * torch.finfo(torch.float32).eps * b.abs().max()


def test_equal_values_give_zero_gradient_of_the_span():
    given = plain(make())
    given["v"] = torch.ones_like(given["v"])
    given["span"].requires_grad_()
    ours, low = (
        torch.autograd.grad(f(**given).sum(), given["span"])[0]
        for f in (adaptive_span_attention, reference.adaptive_span_attention)
    )
    exact = torch.zeros_like(ours)
    assert distance(ours, exact) <= budget(ours, low, exact)


def test_keys_beyond_the_ramp_change_nothing():
    given = make(m=8, rel=(50,))
    with torch.no_grad():
        given["span"].fill_(6.3)
    cut = {n: t[:, :, -18:] if n in "kv" else t for n, t in given.items()}  # 8 queries, 10 keys before them
    results = []
    for inputs in (given, cut):
        out = adaptive_span_attention(**inputs, ramp=4.0)
        grads = torch.autograd.grad(out.sin().sum(), list(given.values()))
        results.append([out, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_blocks_with_a_cache_equal_one_pass():
    given = plain(make(m=50, rel=(50,)))
    whole = adaptive_span_attention(**given)
    start, parts = 0, []
    for size in (1, 16, 30, 3):
        end = start + size
        block = {n: given[n][:, :, start:end] if n == "q" else given[n][:, :, :end] for n in "qkv"}
        parts.append(adaptive_span_attention(**block, span=given["span"], rel_pos=given["rel_pos"]))
        start = end
    exact = reference.adaptive_span_attention(**{n: t.double() for n, t in given.items()})
    ours = torch.cat(parts, 2)
    assert distance(ours, exact) <= budget(ours, whole, exact)


@pytest.mark.parametrize("start", [20, torch.tensor([0, 20]), torch.tensor([7, 7], dtype=torch.int32)])
def test_preallocated_cache_equals_its_filled_part(start):
    """Bitwise, even if the unused part is NaN; its gradient is 0."""
    given = make(m=6, rel=(50,))
    out = adaptive_span_attention(**_hide(given, start, 6), query_start=start)
    grads = torch.autograd.grad(out.sum(), [given["k"], given["v"], given["q"], given["rel_pos"]])
    for b, first in enumerate(torch.as_tensor(start).expand(2).tolist()):
        one = {n: t if n in ("span", "rel_pos") else t[b : b + 1] for n, t in given.items()}
        one |= {n: one[n][:, :, : first + 6] for n in ("k", "v")}
        assert torch.equal(out[b : b + 1], adaptive_span_attention(**one))
        assert all(g[b, :, : first + 6].any() and not g[b, :, first + 6 :].any() for g in grads[:2])
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("m", [1, 3, 30])
def test_keys_of_few_queries_are_split_among_threads(m):
    """The result does not depend on the number of threads, for rows that see any part of the keys."""
    given = make(b=2, h=4, hkv=2, m=m, n=2600, d=16)
    given["span"] = torch.tensor([-40.0, 3.0, 1500.5, 9000.0], dtype=torch.float64, requires_grad=True)
    options = {"key_start": torch.tensor([2450, 700]), "query_start": torch.tensor([2600 - m, 1900])}
    ours = spans_as(torch.float64, adaptive_span_attention, options)(**given)
    exact = reference.adaptive_span_attention(**given, **options)
    up = torch.randn(exact.shape, dtype=torch.float64)
    names = list(given)
    for a, b in zip(
        [ours, *torch.autograd.grad(ours, [given[n] for n in names], up)],
        [exact, *torch.autograd.grad(exact, [given[n] for n in names], up)],
        strict=True,
    ):
        assert distance(a, b) <= 1e-12 * b.abs().max().clamp(min=1)
    for dtype in LOW if m == 3 else []:
        assert_close(
            spans_as(dtype, adaptive_span_attention, options),
            spans_as(dtype, reference.adaptive_span_attention, options), given, dtype,
        )  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = spans_as(torch.float64, adaptive_span_attention, options)(**given)
    torch.set_num_threads(before)
    assert torch.equal(alone, ours)
    given["k"].data[0, 0, 2599] = torch.nan  # seen by the first two heads of one sequence
    hit = spans_as(torch.float64, adaptive_span_attention, options)(**given).isnan()
    assert hit[0, 1, -1].all() and not hit[1].any() and not hit[0, 2:].any()


def _hide(given, start, m):
    """Sets keys and values after the last query to NaN."""
    last = torch.as_tensor(start).expand(2).view(2, 1, 1, 1) + m
    hidden = torch.arange(given["k"].shape[2]).view(-1, 1) >= last
    return given | {n: given[n].masked_fill(hidden, torch.nan) for n in ("k", "v")}


def test_gradient_includes_both_ends_of_the_ramp():
    """Keys at x = span (weight 1) and x = span + ramp (weight 0) contribute to the span's gradient."""
    for n, expected in ((4, 2), (5, 3), (7, 5)):  # ramp 3, span 1, n keys: x = 1..4 contribute
        q, span = torch.zeros(1, 1, 1, 1), torch.tensor([1.0], requires_grad=True)
        v = torch.arange(n).float().square().view(1, 1, n, 1)
        ours, low = (
            torch.autograd.grad(f(q, torch.zeros_like(v), v, span, ramp=3.0).sum(), span)[0]
            for f in (adaptive_span_attention, reference.adaptive_span_attention)
        )
        x = torch.arange(n - 1, -1, -1, dtype=torch.float64)
        weight = ((4 - x) / 3).clamp(0, 1)
        inside = (x >= 1) & (x <= 4)
        values = v.flatten().double()
        slope = (values - (weight * values).sum() / weight.sum()) / weight.sum() / 3
        exact = slope[inside].sum().unsqueeze(0)
        assert distance(ours, exact) <= budget(ours, low, exact)
        assert inside.sum() == min(4, expected + 1)


def test_large_scores_outside_the_span_do_not_matter():
    """Masking after the softmax would leave weights of 1e-19 here, or 0 / 0."""
    for dtype in LOW:
        q = torch.ones(1, 1, 1, 8, dtype=dtype)
        k = torch.zeros(1, 1, 60, 8, dtype=dtype)
        k[:, :, :5] = 50.0
        v = torch.ones_like(k)
        out = adaptive_span_attention(q, k, v, torch.tensor([10.0]), ramp=4.0)
        assert torch.equal(out, torch.ones_like(out))


def test_work_is_proportional_to_the_spans():
    """Visited pairs are linear in T: at most each head's window plus one block; as many in the backward."""
    spans = torch.tensor([16.0, 64.0, 160.0, 700.0])
    counts = []
    for t in (1024, 2048, 4096):
        q, k, v = (torch.randn(1, 4, t, 16, requires_grad=True) for _ in range(3))
        before = pairs()
        out = adaptive_span_attention(q, k, v, spans)
        counts.append(pairs() - before)
        assert counts[-1] <= t * (spans + 32 + 64).sum()
        out.sum().backward()
        assert pairs() - before == 2 * counts[-1]
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])  # linear in T
    full = torch.full((4,), 1e6)
    before = pairs()
    adaptive_span_attention(q, k, v, full)
    assert (pairs() - before) >= 4 * 4096 * 4096 // 2


def test_work_follows_spans_per_token():
    q, k, v = (torch.randn(1, 1, 2048, 16) for _ in range(3))
    short = torch.full((1, 1, 2048), 8.0)
    long = short.clone()
    long[..., 1024:1040] = 1000.0
    counts = []
    for span in (short, long):
        before = pairs()
        adaptive_span_attention(q, k, v, span, ramp=8.0)
        counts.append(pairs() - before)
    blocks = 64 * 2048  # longer spans use larger query blocks: up to 64 more keys per query
    assert counts[0] < counts[1] < counts[0] + 64 * 1100 + blocks
