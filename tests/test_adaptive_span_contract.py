"""adaptive_span_attention: opcheck, compile, determinism, strides, autocast, NaN, invalid arguments."""

import pytest
import torch
import torch.nn.functional as F
from test_adaptive_span import LOW, case, make, plain
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from sukhops import adaptive_span_attention, reference
from sukhops.testing import budget, distance

pytestmark = pytest.mark.every_isa

op = torch.ops.sukhops.adaptive_span


def flat(given, options):
    """Converts arguments of the public function to those of the operator."""
    start = options.get("key_start")
    if start is not None and start.dim() == 1:
        start = start.unsqueeze(1).expand(-1, given["q"].shape[2])
    return (
        *(given[n] for n in ("q", "k", "v", "span")), given.get("rel_pos"), start,
        options.get("query_start"), options.get("ramp", 32.0), 0.3,
        int(not options.get("include_self", True)), options.get("max_span"),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["heads", "all"])
def test_opcheck(name):
    given, options = case(name)
    torch.library.opcheck(op.default, flat(given, options))


@pytest.mark.parametrize("name", ["heads", "all"])
@pytest.mark.parametrize("need", [(True,) * 4, (False, True, False, True), (True, False, True, False)])
def test_opcheck_backward(name, need):
    given, options = case(name)
    tensors = flat({n: t.detach() for n, t in given.items()}, options)
    out, *sums = op(*tensors)
    need = (*need[:3], need[3] and "rel_pos" in given)
    arguments = (torch.randn_like(out), *tensors[:7], out, *sums, *tensors[7:], *need)
    torch.library.opcheck(torch.ops.sukhops.adaptive_span_backward.default, arguments)


@pytest.mark.parametrize("name", ["heads", "all"])
def test_compiled_equals_eager(name):
    given, options = case(name)

    def f(given):
        return adaptive_span_attention(**given, **options)

    eager, compiled = f(given), torch.compile(f, fullgraph=True, backend="aot_eager")(given)
    assert torch.equal(eager, compiled)
    for a, b in zip(
        *(torch.autograd.grad(o.sin().sum(), list(given.values())) for o in (eager, compiled)), strict=True
    ):
        assert torch.equal(a, b)


def test_compiled_once_for_any_length():
    torch._dynamo.reset()
    counter, counts = CompileCounterWithBackend("aot_eager"), []
    f = torch.compile(adaptive_span_attention, fullgraph=True, backend=counter, dynamic=True)
    for n in (9, 19, 33):
        f(*(torch.randn(2, 4, n, 8) for _ in range(3)), torch.full((4,), 5.0))
        counts.append(counter.frame_count)
    assert counts[0] > 0 and len(set(counts)) == 1


def test_checkpointing_gives_the_same_gradients():
    given, options = case("tokens")
    leaves = list(given.values())

    def f(*tensors):
        return adaptive_span_attention(*tensors, **options).sin().sum()

    direct = torch.autograd.grad(f(*leaves), leaves)
    again = torch.autograd.grad(checkpoint(f, *leaves, use_reentrant=False), leaves)
    assert all(torch.equal(a, b) for a, b in zip(direct, again, strict=True))


@pytest.mark.parametrize("dtype", LOW)
def test_bitwise_repeatable(dtype):
    given = make(1, 4, 2, 300, 400, 32, rel=(4, 400))
    given = {n: t.detach().to(torch.float32 if n == "span" else dtype) for n, t in given.items()}
    upstream = torch.randn(given["q"].shape).to(dtype)
    threads = torch.get_num_threads()

    def run(f, cast=None):
        leaves = {n: t.to(cast or t.dtype, copy=True).requires_grad_() for n, t in given.items()}
        out = f(**leaves)
        return [out, *torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype))]

    runs = []
    try:
        for count in (threads, threads, 1):
            torch.set_num_threads(count)
            runs.append(run(adaptive_span_attention))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][:-1], runs[2][:-1], strict=True))
    # threads accumulate the gradient of rel_pos separately, so it depends on their number
    low, exact = (run(reference.adaptive_span_attention, cast)[-1] for cast in (None, torch.float64))
    for ours in (runs[0][-1], runs[2][-1]):
        assert distance(ours, exact) <= budget(ours, low, exact)


def test_strides_do_not_matter():
    given = {n: t.detach() for n, t in make().items()}
    base = adaptive_span_attention(**given)
    rows = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in given.items() if t.dim() == 4}
    assert torch.equal(adaptive_span_attention(**given | rows), base)
    columns = {n: t.mT.contiguous().mT for n, t in given.items() if t.dim() == 4}
    assert torch.equal(adaptive_span_attention(**given | columns), base)
    wide = {n: torch.randn(2, 4, 99, 12, dtype=torch.float64)[:, : t.shape[1], -t.shape[2] :].copy_(t)
            for n, t in given.items() if t.dim() == 4}  # fmt: skip
    assert torch.equal(adaptive_span_attention(**given | wide), base)
    steps = given["span"].repeat_interleave(2)[::2]
    assert torch.equal(adaptive_span_attention(**given | {"span": steps}), base)


def test_autocast_casts_all_but_the_span():
    given = plain(make(rel=(50,)))
    with torch.autocast("cpu", torch.bfloat16):
        out = adaptive_span_attention(**given)
    half = {n: t if n == "span" else t.bfloat16() for n, t in given.items()}
    assert torch.equal(out, adaptive_span_attention(**half))


def test_no_rows_and_no_batch():
    given = make(m=0)
    out = adaptive_span_attention(**given)
    assert out.shape == (2, 4, 0, 12)
    out.sum().backward()
    assert not given["k"].grad.any() and not given["span"].grad.any()
    assert adaptive_span_attention(**make(b=0)).shape == (0, 4, 37, 12)
    one = {n: torch.ones(1, 1, 1, 5) for n in "qkv"}
    assert torch.equal(adaptive_span_attention(**one, span=torch.zeros(1)), one["v"])


def test_rows_that_see_no_key_are_zero_and_have_no_gradient():
    given = make()
    with torch.no_grad():
        given["span"].copy_(
            torch.tensor([-32.0, -33.0, 0.0, -1e30])
        )  # with span = -ramp, the only visible key has weight 0
    # in the second sequence, queries before position 45 see no key
    key_start = torch.tensor([0, 45]).unsqueeze(1).expand(2, 37)
    out = adaptive_span_attention(**given, key_start=key_start)
    assert not out[:, [0, 1, 3]].any() and not out[1, 2, :32].any() and out[1, 2, 32:].all()
    grads = torch.autograd.grad(out.sum(), list(given.values()))
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][:, [0, 1, 3]].any() and not grads[3][[0, 1, 3]].any()


@pytest.mark.parametrize("d", [1, 12, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_key_alone_has_no_gradient(dtype, d):
    given = {n: t.detach().to(dtype).requires_grad_() for n, t in make(d=d).items() if n != "span"}
    span = torch.zeros(4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    out = adaptive_span_attention(**given, span=span, max_span=1)
    grad_q, grad_k = torch.autograd.grad(out, [given["q"], given["k"]], torch.randn_like(out))
    assert torch.equal(out[:, ::2], given["v"][:, :, -out.shape[2] :])
    assert grad_q.count_nonzero() == 0 and grad_k.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
@pytest.mark.parametrize("name", ["q", "k", "v", "span", "rel_pos"])
def test_nan_propagates(dtype, name):
    given = make(rel=(50,))
    spans = torch.float64 if dtype == torch.float64 else torch.float32
    given = {n: t.detach().to(spans if n == "span" else dtype) for n, t in given.items()}
    given["span"].fill_(10.0)
    if name == "span":
        given["span"][2] = torch.nan
    elif name == "rel_pos":
        given["rel_pos"][3] = torch.nan
    else:
        given[name][:, 1, 20] = torch.nan
    leaves = {n: t.requires_grad_() for n, t in given.items()}
    out = adaptive_span_attention(**leaves)
    bad = {
        "q": lambda o: o[:, 1, 20],  # query 20 of head 1
        "k": lambda o: o[:, 2:, 7:37],  # key 20 is seen by queries 7 and later of the heads that share it
        "v": lambda o: o[:, 2:, 7:37],
        "span": lambda o: o[:, 2],
        "rel_pos": lambda o: o,
    }[name]
    assert bad(out).isnan().all()
    if name in ("q", "span"):
        assert out.isnan().sum() == bad(out).numel()
    grads = dict(zip(leaves, torch.autograd.grad(out.float().sum(), list(leaves.values())), strict=True))
    # dv does not depend on v
    assert all(g.isnan().any() for n, g in grads.items() if n != "v" or name != "v")


@pytest.mark.parametrize("span", [1e30, torch.inf])
def test_huge_spans_equal_causal_attention(span):
    given = plain(make(hkv=4, m=50)) | {"span": torch.full((4,), span)}
    ours = adaptive_span_attention(**given)
    low, exact = (F.scaled_dot_product_attention(*(given[n].to(dtype) for n in "qkv"), is_causal=True)
                  for dtype in (torch.float32, torch.float64))  # fmt: skip
    assert distance(ours, exact) <= budget(ours, low, exact)


def test_large_scores():
    given = plain(make())
    given["q"] *= 1e4
    exact = reference.adaptive_span_attention(**{n: t.double() for n, t in given.items()})
    low = reference.adaptive_span_attention(**given)
    ours = adaptive_span_attention(**given)
    assert distance(ours, exact) <= budget(ours, low, exact)


def test_second_derivatives_and_vmap_raise():
    given = make()
    (grad,) = torch.autograd.grad(adaptive_span_attention(**given).sum(), given["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.vmap(lambda q: adaptive_span_attention(q, *(given[n] for n in ("k", "v", "span"))))(
            given["q"].unsqueeze(0)
        )


# ------------------------------------------------------------------ invalid arguments

BAD = {
    "q rank": (lambda g: g.update(q=g["q"][0]), ValueError, r"q: expected shape \[B, H, M, d\]"),
    "q dtype": (lambda g: g.update(q=g["q"].long()), TypeError, "q: expected float32"),
    "q type": (lambda g: g.update(q=[1.0]), TypeError, "q: expected a torch.Tensor"),
    "v missing": (lambda g: g.update(v=None), TypeError, "v: expected a torch.Tensor, got NoneType"),
    "k heads": (
        lambda g: g.update(k=g["k"][:, :1].expand(-1, 3, -1, -1)), ValueError, "k: .*multiple of Hkv"),
    "k width": (lambda g: g.update(k=g["k"][..., :5]), ValueError, "k: expected shape"),
    "k dtype": (lambda g: g.update(k=g["k"].double()), TypeError, "k: expected torch.float32 like q"),
    "k short": (lambda g: g.update(k=g["k"][:, :, :30], v=g["v"][:, :, :30]), ValueError, "k: .*M = 37"),
    "v shape": (lambda g: g.update(v=g["v"][:, :, 1:]), ValueError, "v: expected shape"),
    "span shape": (lambda g: g.update(span=g["span"][:3]), ValueError, r"span: expected shape \[H = 4\]"),
    "span dtype": (lambda g: g.update(span=g["span"].bfloat16()), TypeError, "span: expected torch.float32"),
    "span number": (lambda g: g.update(span=3.0), TypeError, "span: expected a torch.Tensor"),
    "ramp zero": (lambda g: g.update(ramp=0.0), ValueError, "ramp: expected"),
    "ramp nan": (lambda g: g.update(ramp=float("nan")), ValueError, "ramp: expected"),
    "scale": (lambda g: g.update(scale=torch.ones(())), TypeError, "scale: expected a number or None"),
    "max_span": (lambda g: g.update(max_span=0), ValueError, "max_span: expected an int >= 1"),
    "max_span float": (lambda g: g.update(max_span=3.5), ValueError, "max_span: expected an int"),
    "rel_pos width": (lambda g: g.update(rel_pos=torch.randn(9, 5)), ValueError, "rel_pos: expected shape"),
    "rel_pos heads": (
        lambda g: g.update(rel_pos=torch.randn(3, 9, 12)), ValueError, "rel_pos: expected shape"),
    "rel_pos short": (
        lambda g: g.update(rel_pos=torch.randn(9, 12), max_span=10),
        ValueError, "rel_pos: .*max_span = 10 distances, got 9"),
    "rel_pos empty": (lambda g: g.update(rel_pos=torch.randn(0, 12)), ValueError, "rel_pos: expected S"),
    "key_start dtype": (lambda g: g.update(key_start=torch.zeros(2)), TypeError, "key_start: expected int64"),
    "key_start shape": (
        lambda g: g.update(key_start=torch.zeros(3).long()),
        ValueError, r"key_start: expected shape \[B = 2\]"),
    "query_start late": (lambda g: g.update(query_start=14), ValueError, "query_start: .*N - M = 13, got 14"),
    "query_start early": (lambda g: g.update(query_start=-1), ValueError, "query_start: .*, got -1"),
    "query_start type": (
        lambda g: g.update(query_start=[1, 2]), TypeError, "query_start: expected an int, .* got list"),
    "query_start bool": (
        lambda g: g.update(query_start=True), TypeError, "query_start: expected an int, .* got bool"),
    "query_start shape": (
        lambda g: g.update(query_start=torch.tensor([1])),
        ValueError, r"query_start: expected shape \[2\] \(one per sequence, or an int\)"),
    "query_start values": (
        lambda g: g.update(query_start=torch.tensor([0, 14])),
        RuntimeError, "query_start: expected 0 to N - M = 13, got 14 of sequence 1"),
    "device": (lambda g: g.update(span=g["span"].to("meta")), ValueError, "span: expected on cpu"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    given = plain(make())
    change(given)
    with pytest.raises(error, match=message):
        adaptive_span_attention(**given)
