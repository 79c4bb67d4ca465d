"""linear_token_stats, temperature, and accuracy of log-probs when all logits share an offset."""

import math

import pytest
import torch
import torch.nn.functional as F
from budgets import logits_budget
from torch.autograd import gradcheck

import sukhops
from sukhops import (
    director_logp,
    director_topk,
    linear_logp,
    linear_token_stats,
    linear_topk,
    reference,
    testing,
)
from sukhops.ops.vocab_head import TokenStats
from sukhops.testing import assert_close

pytestmark = pytest.mark.every_isa

ALL = TokenStats._fields
CURVES = [{}, {"softcap": 5.0, "scale": 1.7, "temperature": 0.6}, {"temperature": 2.5}]


def make(n=37, d=19, v=5003, bias=False, frozen=False, dtype=torch.float32):
    """Inputs whose V spans several tiles. A quarter of the rows is ignored; a bias makes some logits -inf."""
    target = torch.randint(0, v // 7, (n,)) * 7 + 1  # targets never have bias -inf
    target[::4] = -100
    inputs = {
        "hidden": torch.randn(n, d, dtype=dtype).requires_grad_(),
        "weight": (0.3 * torch.randn(v, d, dtype=dtype)).requires_grad_(not frozen),
        "target": target,
    }
    if bias:
        inputs["bias"] = torch.randn(v, dtype=dtype)
        inputs["bias"][::7] = -torch.inf
        inputs["bias"].requires_grad_(not frozen)
    return inputs


def products(call):
    before = torch.ops.sukhops.product_count()
    result = call()
    return torch.ops.sukhops.product_count() - before, result


# ------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("bias", [False, True])
def test_within_budget(dtype, frozen, curve, bias):
    inputs = make(bias=bias, frozen=frozen) | curve | {"outputs": ALL}
    assert_close(linear_token_stats, reference.linear_token_stats, inputs, dtype)


@pytest.mark.parametrize("nbytes", [0, 11 * 4 * 5003, 1 << 30])
def test_within_budget_with_any_logits_budget(nbytes):
    with logits_budget(nbytes):
        assert_close(
            linear_token_stats, reference.linear_token_stats, make() | {"outputs": ALL}, torch.float32
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("curve", CURVES)
def test_topk_and_logp_take_a_temperature(dtype, curve):
    assert_close(linear_logp, reference.linear_logp, make() | curve | {"return_lse": True}, dtype)
    bias = torch.zeros(5003)
    bias[::1000] = 20.0 + 10.0 * torch.arange(6)  # far apart, so that rounding does not change their order
    inputs = make(frozen=True)
    del inputs["target"]
    wide = {"softcap": 200.0} if "softcap" in curve else {}
    assert_close(linear_topk, reference.linear_topk, inputs | {"k": 4, "bias": bias} | curve | wide, dtype)


@pytest.mark.parametrize("curve", CURVES)
def test_top1_equals_the_reference(curve):
    given = make(n=200, v=901, dtype=torch.float64)
    best = (given["hidden"] @ given["weight"].T).argmax(1)
    given["target"][1::2] = best[1::2]
    given["target"][::8] = -100
    ours, theirs = (
        f(**given, **curve, outputs=("top1",)).top1
        for f in (linear_token_stats, reference.linear_token_stats)
    )
    assert ours.dtype == theirs.dtype == torch.bool
    assert torch.equal(ours, theirs) and 90 < ours.sum() < 110


def test_equals_torch_categorical():
    given = make(dtype=torch.float64)
    kept = given["target"] != -100
    logits = F.linear(given["hidden"], given["weight"])[kept] / 1.3
    stats = linear_token_stats(**given, outputs=ALL, temperature=1.3)
    expected = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(stats.entropy[kept], expected.entropy())
    torch.testing.assert_close(stats.log_sum_sq[kept], expected.probs.square().sum(1).log())
    torch.testing.assert_close(stats.mean_logit[kept], logits.mean(1))
    torch.testing.assert_close(stats.lse[kept], logits.logsumexp(1))
    torch.testing.assert_close(stats.logp[kept], expected.log_prob(given["target"][kept]))
    assert torch.equal(stats.top1[kept], logits.argmax(1) == given["target"][kept])
    for t in stats:
        assert not t[~kept].any()
    theirs = torch.autograd.grad(expected.entropy().square().sum(), (given["hidden"], given["weight"]))
    ours = torch.autograd.grad(stats.entropy.square().sum(), (given["hidden"], given["weight"]))
    torch.testing.assert_close(ours, theirs)


def test_hand_computed_table():
    """Logits log 1, log 2, log 1, log 4 and -inf: p = 1/8, 1/4, 1/8, 1/2, 0."""
    bias = torch.tensor([1.0, 2.0, 1.0, 4.0, 0.0], dtype=torch.float64).log()
    zero = torch.zeros(2, 1, dtype=torch.float64)
    stats = linear_token_stats(zero, bias.new_zeros(5, 1), torch.tensor([3, 1]), bias, outputs=ALL)
    assert stats.entropy.tolist() == pytest.approx([1.75 * math.log(2)] * 2)
    assert stats.log_sum_sq.tolist() == pytest.approx([math.log(11 / 32)] * 2)
    assert stats.mean_logit.tolist() == [-torch.inf] * 2
    assert stats.logp.tolist() == pytest.approx([math.log(1 / 2), math.log(1 / 4)])
    assert stats.top1.tolist() == [True, False]


def test_top1_breaks_ties_by_lowest_index():
    """If all logits are equal, only index 0 is top1, across tiles and threads."""
    v = 70_001
    target = torch.tensor([0, 1, 1023, 1024, v - 1])
    stats = linear_token_stats(torch.zeros(5, 2), torch.zeros(v, 2), target, outputs=("top1",))
    assert stats.top1.tolist() == [True, False, False, False, False]
    bias = torch.zeros(v)
    bias[[1024, v - 1]] = 1.0
    stats = linear_token_stats(torch.zeros(5, 2), torch.zeros(v, 2), target, bias, outputs=("top1",))
    assert stats.top1.tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("frozen", [False, True])
def test_gradcheck(curve, frozen):
    given = make(n=5, d=4, v=9, bias=True, frozen=frozen, dtype=torch.float64)
    target = given.pop("target").clamp(max=8)
    names = list(given)

    def f(*tensors):
        arguments = dict(zip(names, tensors, strict=True))
        stats = linear_token_stats(target=target, outputs=ALL, **arguments, **curve)
        return stats.logp, stats.lse, stats.entropy

    assert gradcheck(f, tuple(given.values()))


@pytest.mark.parametrize("bad", [torch.nan, 1e38])
def test_nan_and_overflow_stay_in_their_row(bad):
    given = make(bias=False)
    hidden = given["hidden"].detach().clone()
    hidden[5] = bad
    hidden.requires_grad_()
    stats = linear_token_stats(hidden, given["weight"], given["target"], outputs=ALL)
    others = torch.arange(37) != 5
    (grad,) = torch.autograd.grad((stats.logp + stats.entropy).sum(), hidden)
    assert grad[5].isnan().any() and not grad[others].isnan().any()
    for name, t in stats._asdict().items():
        if name == "top1":
            assert not t[5]
        else:
            assert t[5].isnan() and not t[others].isnan().any()


# ------------------------------------------------------------------ an offset that all logits share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1e3, -1e4, 1e6, -1e30])
@pytest.mark.parametrize("frozen", [False, True])
def test_offset_of_all_logits_changes_nothing(offset, dtype, frozen):
    """Logits are integers plus an offset that is exact in float32: results are those without the offset."""
    v = 3001
    small = torch.arange(v) % 7
    weight = torch.stack([small, torch.ones(v)], 1).to(dtype).requires_grad_(not frozen)
    hidden = torch.tensor([[1.0, offset]]).to(dtype).requires_grad_()
    target = torch.tensor([4])
    logits = (hidden.detach().float() @ weight.detach().float().T).double().requires_grad_()
    exact = logits.log_softmax(1)
    stats = linear_token_stats(hidden, weight, target, outputs=ALL)
    entropy = -(exact.exp() * exact).sum()
    assert abs(stats.logp.item() - exact[0, 4].item()) <= 1e-6
    assert abs(stats.entropy.item() - entropy.item()) <= 4e-6
    assert abs(stats.log_sum_sq.item() - (2 * exact).logsumexp(1).item()) <= 4e-6
    (p,) = torch.autograd.grad(exact[0, 4] + 0.5 * entropy, logits)
    loss = stats.logp.sum() + 0.5 * stats.entropy.sum()
    if frozen:
        (dh,) = torch.autograd.grad(loss, hidden)
        assert abs(dh[0, 0].item() - (p @ small.double()).item()) <= 1e-5 * 7 + 0.01 * (
            dtype != torch.float32
        )
        return
    (dw,) = torch.autograd.grad(loss, weight)
    expected = p[0] if dtype == torch.float32 else p[0].to(dtype)
    torch.testing.assert_close(
        dw[:, 0].double(), expected.double(), rtol=4e-6 if dtype == torch.float32 else 0.01, atol=1e-9
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_gradient_of_one_row_is_as_accurate_as_of_two(threads):
    """BLAS may sum the many terms of a product with a single row sequentially, which loses accuracy."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    hidden, weight = torch.randn(1, 8), torch.randn(32768, 8)
    weight[:, 0] = 1.0
    target = torch.tensor([3])

    def gradient(op, dtype, rows):
        h = hidden.to(dtype).expand(rows, -1).clone().requires_grad_()
        w = weight.to(dtype).requires_grad_()
        return torch.autograd.grad(op(h, w, target.expand(rows)).sum(), h)[0][:1]

    exact = gradient(reference.linear_logp, torch.float64, 1)
    two = gradient(reference.linear_logp, torch.float32, 2)
    one = gradient(linear_logp, torch.float32, 1)
    torch.set_num_threads(before)
    assert testing.distance(one, exact) <= testing.budget(one, two, exact)


def test_log_probs_of_equal_logits_of_any_size():
    for size in (-4e30, 1e4, 3e38):
        weight = torch.full((9, 1), size)
        logp = linear_logp(torch.ones(1, 1), weight, torch.tensor([3]))
        assert abs(logp.item() + math.log(9)) < 4e-7


@pytest.mark.parametrize("offset", [1e3, -1e4, 1e6, -1e30])
def test_director_with_an_offset(offset):
    v = 3001
    lm = torch.stack([torch.arange(v) % 7, torch.ones(v)], 1).float().requires_grad_()
    cls = torch.zeros(v, 2)
    hidden = torch.tensor([[1.0, offset]])
    exact = (hidden @ lm.detach().T).double().log_softmax(1)
    logp = director_logp(hidden, lm, cls)
    assert (logp - exact).abs().max() <= 1e-6
    assert (director_topk(hidden, lm.detach(), cls, 3).values - exact.max()).abs().max() <= 1e-6
    (dw,) = torch.autograd.grad(logp[0, 4], lm)
    expected = -exact[0].exp()
    expected[4] += 1
    torch.testing.assert_close(dw[:, 0].double(), expected, rtol=4e-6, atol=1e-9)


# ------------------------------------------------------------------ cost of each output


def test_outputs_not_requested_are_none():
    given = make()
    for name in ALL:
        stats = linear_token_stats(**given, outputs=(name,))
        assert [n for n, t in stats._asdict().items() if t is not None] == [name]
    only = linear_token_stats(**given).logp
    assert torch.equal(only, linear_logp(**given))
    everything = linear_token_stats(**given, outputs=list(ALL))
    assert torch.equal(only, everything.logp)  # bitwise: log-probs do not depend on the other outputs
    assert not everything.log_sum_sq.requires_grad and not everything.mean_logit.requires_grad


def test_number_of_products():
    given = make(v=700)
    hidden, weight, target = given.values()

    def count(h, w, loss):
        forward, stats = products(lambda: linear_token_stats(h, w, target, outputs=ALL))
        return forward, products(lambda: loss(stats).sum().backward())[0]

    assert count(hidden, weight, lambda s: s.logp + s.entropy) == (1, 2)
    assert count(hidden, weight, lambda s: s.entropy) == (1, 2)
    with logits_budget(0):
        assert count(hidden, weight, lambda s: s.logp + s.entropy) == (1, 3)
    frozen = weight.detach()
    assert count(hidden, frozen, lambda s: s.logp) == (2, 0)
    assert count(hidden, frozen, lambda s: s.logp + 0 * s.entropy) == (2, 0)
    assert count(hidden, frozen, lambda s: s.entropy) == (2, 2)
    for names in (("top1",), ("log_sum_sq", "mean_logit")):  # outputs without gradient
        taken, stats = products(lambda n=names: linear_token_stats(hidden, frozen, target, outputs=n))
        assert taken == 1 and not any(t is not None and t.requires_grad for t in stats)


def test_dpo_with_use_weighting_needs_no_extra_product():
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(4, 6, 8, generator=g), torch.randn(40, 8, generator=g).requires_grad_()
    target, ref = torch.randint(0, 40, (4, 6), generator=g), -4 * torch.rand(4, 6, generator=g)
    counts = [
        products(lambda w=w: sukhops.nn.DPOLoss(use_weighting=w)(hidden, weight, target, ref_logp=ref))[0]
        for w in (False, True)
    ]
    assert counts == [1, 1]


def test_bitwise_deterministic_and_close_with_other_threads():
    given = make(n=300, v=20_011)

    def run():
        stats = linear_token_stats(**given, outputs=ALL)
        loss = (stats.logp + stats.entropy).sum()
        return [*(t.detach() for t in stats), *torch.autograd.grad(loss, (given["hidden"], given["weight"]))]

    first = run()
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.testing.assert_close(run(), first)
    finally:
        torch.set_num_threads(threads)


def test_compile_equals_eager():
    given = make(n=9, v=300)

    def call(hidden, weight, target):
        stats = linear_token_stats(hidden, weight, target, outputs=ALL, temperature=0.7)
        return stats.logp + stats.entropy, stats.top1

    compiled = torch.compile(call, fullgraph=True)
    (ours, top1), (plain, expected) = compiled(**given), call(**given)
    assert torch.equal(ours, plain) and torch.equal(top1, expected)
    inputs = (given["hidden"], given["weight"])
    grads = [torch.autograd.grad(x.sum(), inputs) for x in (ours, plain)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ------------------------------------------------------------------ edge cases and invalid arguments


def test_no_rows_and_vocabulary_of_one():
    none = linear_token_stats(
        torch.zeros(0, 3), torch.randn(7, 3), torch.zeros(0, dtype=torch.int64), outputs=ALL
    )
    assert all(t.shape == (0,) for t in none)
    one = linear_token_stats(torch.randn(3), torch.randn(1, 3), torch.tensor(0), outputs=ALL)
    assert (one.logp, one.entropy, one.log_sum_sq) == (0, 0, 0) and one.top1
    ignored = make()
    ignored["target"][:] = -100
    count, stats = products(lambda: linear_token_stats(**ignored, outputs=ALL))
    assert count == 0 and not any(t.any() for t in stats)


H, W, T = torch.randn(6, 4), torch.randn(9, 4), torch.zeros(6, dtype=torch.int64)
BAD = {
    "outputs: expected some of logp, lse, .*, got \\(\\)": dict(outputs=()),
    "outputs: expected some of .*, got \\('logp', 'kl'\\)": dict(outputs=("logp", "kl")),
    "outputs: expected some of .*, got 'logp'": dict(outputs="logp"),
    "outputs: expected some of .*, got None": dict(outputs=None),
    "outputs: expected some of .*, got <generator": dict(outputs=(n for n in ("logp",))),
    "outputs: expected some of .*, got \\[\\['logp'\\]\\]": dict(outputs=[["logp"]]),
    "temperature: expected a finite number > 0, got None": dict(temperature=None),
    "temperature: expected a finite number > 0, got '1'": dict(temperature="1"),
    "temperature: expected a finite number > 0, got nan": dict(temperature=float("nan")),
    "temperature: expected a finite number > 0, got 0": dict(temperature=0),
    "temperature: expected a finite number > 0, got -1.0": dict(temperature=-1.0),
    "temperature: expected a finite number > 0, got inf": dict(temperature=float("inf")),
    "target: expected shape \\[6\\] \\(one per row of hidden\\)": dict(target=T.unsqueeze(1)),
    "target: expected values in \\[0, 9\\)": dict(target=T + 9),
    "hidden: expected last axis D = 4": dict(hidden=torch.randn(6, 5)),
}


@pytest.mark.parametrize("message", BAD)
def test_invalid_arguments(message):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        linear_token_stats(**({"hidden": H, "weight": W, "target": T} | BAD[message]))


@pytest.mark.parametrize("temperature", [0, -2.0, float("nan")])
def test_invalid_temperature_of_topk(temperature):
    with pytest.raises(ValueError, match="temperature: expected a finite number > 0"):
        linear_topk(H, W, 2, temperature=temperature)
