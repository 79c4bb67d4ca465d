"""The Triton kernels of adaptive_span without a GPU: interpreted results and ahead-of-time compilation."""

import pytest
import torch
from builds.adaptive_span import FORMS, form
from gpu_build import ARCHITECTURES, SHARED_LIMIT
from sukhops.triton_kernels import adaptive_span as kernels

from sukhops.reference.adaptive_span import adaptive_span_attention as reference
from sukhops.testing import assert_close, compare

WIDTHS = (32, 64, 80, 96, 128, 192, 256)
interpreter = pytest.mark.interpreter


class Attention(torch.autograd.Function):
    """Calls the launchers on CPU tensors, with autograd."""

    @staticmethod
    def forward(ctx, q, k, v, span, rel_pos, key_start, query_start, *options):
        out, *sums = kernels.forward(q, k, v, span, rel_pos, key_start, query_start, *options)
        ctx.save_for_backward(q, k, v, span, rel_pos, key_start, query_start, out, *sums)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, span, rel = ctx.needs_input_grad[:5]
        grads = kernels.backward(grad, *ctx.saved_tensors, *ctx.options, q, k or v, span, rel)
        wanted = (g if need else None for g, need in zip(grads, (q, k, v, span, rel), strict=True))
        return *wanted, *[None] * 6


def in_accumulation_dtype(q, span):
    return span.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


def launchers(q, k, v, span, *, ramp, rel_pos=None, scale=None, include_self=True, max_span=None,
              key_start=None, query_start=None):  # fmt: skip
    if key_start is not None and key_start.dim() == 1:
        key_start = key_start.unsqueeze(1).expand(q.shape[0], q.shape[2])
    scale = q.shape[3] ** -0.5 if scale is None else scale
    span = in_accumulation_dtype(q, span)
    options = ramp, scale, int(not include_self), max_span
    return Attention.apply(q, k, v, span, rel_pos, key_start, query_start, *options)


def exact(q, k, v, span, **options):
    return reference(q, k, v, in_accumulation_dtype(q, span), **options)


@pytest.fixture
def small(monkeypatch):
    """Tiles of 16 rows and keys, so that small shapes have several tiles, the last of them partial."""
    for _, table, _ in FORMS.values():
        monkeypatch.setattr(kernels, table, {})  # empty: the launchers use SMALL_TILES
    monkeypatch.setattr(kernels, "PROGRAMS", 1)


def inputs(b=1, h=2, hkv=1, m=19, n=35, d=16, span=(0.0, 6.5), rel_pos=None, **options):
    span = torch.tensor(span, dtype=torch.float64)
    given = {
        "q": torch.randn(b, h, m, d),
        "k": torch.randn(b, hkv, n, d),
        "v": torch.randn(b, hkv, n, d),
        "span": span,
    }
    if rel_pos is not None:
        given["rel_pos"] = torch.randn(*rel_pos, d)
    for t in given.values():
        t.requires_grad_()
    return given | {"ramp": 7.0} | options


CASES = {
    # the ramp ends at an integer distance (0 + 7); grouped heads, keys before the first query, partial tiles
    "plain": {},
    "float16": dict(dtype=torch.float16, d=24, hkv=2, include_self=False),
    # one head sees no key (its span is less than -ramp), the other sees every key
    "empty, full": dict(span=(-9.0, 50.0), m=20, n=20, ramp=1.0),
    "two parts of a row": dict(d=40, m=17, n=17, scale=0.4),
    "max_span": dict(max_span=5, span=(3.0, 40.0), include_self=False),
    "left padding": dict(b=2, m=12, n=18, key_start=torch.tensor([7, 30])),
    "documents, float16": dict(
        dtype=torch.float16, m=18, n=33, key_start=torch.tensor([[0] * 4 + [20] * 9 + [29] * 4 + [99]])
    ),
    "per token": dict(m=17, n=20, span="rows"),
    "per token, float64": dict(dtype=torch.float64, m=17, n=18, span="rows", key_start=torch.tensor([2])),
    "rel_pos": dict(rel_pos=(40,), m=18),
    "rel_pos of heads": dict(rel_pos=(2, 12), m=18, span="rows", ramp=3.0, include_self=False),
    "cache": dict(b=2, m=20, n=50, query_start=torch.tensor([0, 27])),
    "cache, rel_pos": dict(
        b=2,
        m=17,
        n=40,
        rel_pos=(30,),
        include_self=False,
        query_start=torch.tensor([23, 3]),
        key_start=torch.tensor([5, 0]),
    ),
    "cache, one query": dict(b=2, m=1, n=40, query_start=torch.tensor([39, 3])),
    "rel_pos, float16": dict(
        dtype=torch.float16, rel_pos=(20,), m=17, n=17, max_span=19, key_start=torch.tensor([3])
    ),
}


@interpreter
@pytest.mark.parametrize("name", CASES)
def test_launchers_match_the_reference(name, small):
    case = dict(CASES[name])
    dtype = case.pop("dtype", torch.float32)
    if case.get("span") == "rows":
        case["span"] = (torch.rand(1, 2, case["m"]) * 16 - 4).tolist()
        case["span"][0][1][:3] = [-50.0, 5.0, 1000.0]
    assert_close(launchers, exact, inputs(**case), dtype)


@interpreter
@pytest.mark.full
@pytest.mark.parametrize("rel_pos", [None, (150,)])
@pytest.mark.parametrize("hkv", [1, 2])
@pytest.mark.parametrize("d", WIDTHS)
def test_production_tiles_at_every_width(d, hkv, rel_pos):
    given = inputs(hkv=hkv, m=70, n=150, d=d, span=(3.0, 66.5), rel_pos=rel_pos)
    assert_close(launchers, exact, given, torch.float16)


@interpreter
@pytest.mark.parametrize("hkv, m, rel_pos", [(2, 1, None), (4, 3, None), (1, 1, (30,)), (2, 1, (4, 30)),
                                             (4, 20, (30,))])  # fmt: skip
def test_keys_of_few_queries_are_split_among_programs(hkv, m, rel_pos, small, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 16)
    given = inputs(h=4, hkv=hkv, m=m, n=50, span=(-8.0, 0.0, 17.5, 99.0), rel_pos=rel_pos)
    with torch.no_grad():
        rows = compare(launchers, exact, {k: v.detach() if isinstance(v, torch.Tensor) else v
                                          for k, v in given.items()}, torch.float32)  # fmt: skip
    assert all(r.ok for r in rows), rows


@interpreter
def test_strided_inputs_give_the_same_bits(small):
    given = inputs(b=2, h=2, hkv=2, m=5, n=9)
    q, k, v, span = (given[n].detach() for n in ("q", "k", "v", "span"))
    options = (None, None, None, 7.0, 0.25, 0, None)
    plain = kernels.forward(q, k, v, span.float(), *options)
    packed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]  # views of [B, T, H, d]
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain, kernels.forward(*packed, span.float(), *options), strict=True)
    )
    grad = torch.randn(2, 2, 5, 1).expand(q.shape)  # the last axis has stride 0
    need = (True, True, True, False)
    first = kernels.backward(grad, q, k, v, span.float(), *options[:3], *plain, *options[3:], *need)
    again = kernels.backward(
        grad.contiguous(), *packed, span.float(), *options[:3], *plain, *options[3:], *need
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@interpreter
@pytest.mark.parametrize("rel_pos", [None, (9,)])
def test_nan_span_gives_nan(rel_pos, small):
    given = inputs(m=6, n=6, span=(2.0, float("nan")), rel_pos=rel_pos)
    tensors = [given[n] for n in ("q", "k", "v")]
    span = given["span"].float()
    out = launchers(*tensors, span, ramp=7.0, rel_pos=given.get("rel_pos"))
    dq, dspan = torch.autograd.grad(out, (tensors[0], span), torch.randn(out.shape))
    assert out[:, 1].isnan().all() and dq[:, 1].isnan().all()
    assert out[:, 0].isfinite().all() and dq[:, 0].isfinite().all()
    assert dspan.isnan().tolist() == [False, True]


@interpreter
@pytest.mark.parametrize("m, rel_pos", [(6, None), (6, (9,)), (1, None), (1, (9,))])
def test_keys_after_the_queries_are_not_read(m, rel_pos, small, monkeypatch):
    """Even if they are NaN. If query_start is out of range, the output of that sequence is NaN."""
    monkeypatch.setattr(kernels, "PROGRAMS", 16)
    start = torch.tensor([0, 11])
    given = inputs(b=2, m=m, n=40, rel_pos=rel_pos)
    hidden = torch.arange(40).view(-1, 1) >= (start + m).view(-1, 1, 1, 1)
    leaves = {n: t for n, t in given.items() if n != "ramp"}
    for n in "kv":
        leaves[n] = leaves[n].detach().masked_fill(hidden, torch.nan).requires_grad_()
    leaves["span"] = leaves["span"].detach().float().requires_grad_()
    out = launchers(**leaves, ramp=7.0, query_start=start)
    grads = dict(zip(leaves, torch.autograd.grad(out.sum(), list(leaves.values())), strict=True))
    assert out.isfinite().all() and all(g.isfinite().all() for g in grads.values())
    assert not any(grads[n][hidden.expand(grads[n].shape)].any() for n in "kv")
    outside = torch.tensor([40 - m + 1, -1])
    assert launchers(**leaves, ramp=7.0, query_start=outside).isnan().all()


@interpreter
def test_rows_that_see_no_key_are_zero(small):
    given = inputs(m=6, n=6, span=(-7.0, -8.0), ramp=7.0)
    q, k, v, span = (given[n].detach() for n in ("q", "k", "v", "span"))
    options = (None, None, None, 7.0, 0.25, 0, None)
    out, *sums = kernels.forward(q, k, v, span.float(), *options)
    assert (out == 0).all() and (sums[1] == 0).all()
    need = (True, True, True, False)
    grads = kernels.backward(
        torch.ones_like(out), q, k, v, span.float(), None, None, None, out, *sums, *options[3:], *need
    )
    assert all((g == 0).all() for g in grads)


@interpreter
def test_only_the_needed_gradients_are_computed(small):
    given = inputs(m=4, n=4)
    q, k, v, span = (given[n].detach() for n in ("q", "k", "v", "span"))
    options = (None, None, None, 7.0, 0.25, 0, None)
    out, *sums = kernels.forward(q, k, v, span.float(), *options)
    saved, whole = (None, None, None, out, *sums), None
    for need in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        grads = kernels.backward(
            torch.ones_like(out), q, k, v, span.float(), *saved, *options[3:], *need, False
        )
        whole = whole or grads
        for g, want, like in zip(grads[:4], (need[0], need[1], need[1], need[2]), whole[:4], strict=True):
            assert torch.equal(g, like) if want else g.shape == (0,)


def products(monkeypatch, run):
    """The number of multiply-adds in the matrix products of `run`."""
    from triton.runtime.interpreter import InterpreterBuilder

    count, dot = [0], InterpreterBuilder.create_dot

    def counted(self, a, b, *rest):
        count[0] += a.data.size * b.data.shape[-1]
        return dot(self, a, b, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", counted)
        run()
    return count[0]


@interpreter
def test_work_is_proportional_to_the_spans(small, monkeypatch):
    """A head's cost per query is proportional to span + ramp, independent of N and of the other heads."""
    m, n, d, ramp, options = 32, 96, 16, 4.0, (None, None, None, 4.0, 0.25, 0, None)

    def cost(spans):
        q, k, v = torch.randn(1, len(spans), m, d), torch.randn(1, 1, n, d), torch.randn(1, 1, n, d)
        span, need = torch.tensor(spans), (True, True, True, False)

        def run():
            out, *sums = kernels.forward(q, k, v, span, *options)
            saved = None, None, None, out, *sums
            kernels.backward(torch.ones_like(out), q, k, v, span, *saved, *options[3:], *need)

        return products(monkeypatch, run) / (m * d)

    spans = (0.0, 44.0)
    alone = [cost((s,)) for s in spans]
    assert cost(spans) == sum(alone)
    for s, pairs in zip(spans, alone, strict=True):
        # products: 2 forward, 3 for q, 4 for k and v; with tiles of 16, a row visits at most 32 more keys
        assert 9 * (s + ramp) <= pairs <= 9 * (s + ramp + 32)


def test_too_wide_heads_raise():
    q = torch.empty(1, 1, 1, 288)
    with pytest.raises(NotImplementedError, match=r"q: .* 288"):
        kernels.forward(q, q, q, torch.zeros(1), None, None, None, 32.0, 1.0, 0, None)


# ------------------------------------------------------------------ compiled ahead of time


def check_build(name, arch, dtype, d):
    built = form(name, dtype, d).build(arch)
    assert built.spills == 0 or dtype in ("float32", "float64"), built
    assert built.shared <= SHARED_LIMIT[arch]
    if dtype in ("bfloat16", "float16"):
        assert built.tensor_core > 0


@pytest.mark.full
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", FORMS)
def test_every_width_compiles_within_the_limits(name, arch, d):
    check_build(name, arch, "bfloat16", d)


@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", [name for name in FORMS if not name.startswith("rel")])
def test_other_dtypes_compile(name, arch):
    for dtype in ("float32", "float64"):
        check_build(name, arch, dtype, 64)
