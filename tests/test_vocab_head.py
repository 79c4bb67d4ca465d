"""linear_logp and linear_topk: the reference and float64, number of products, torch features."""

import pytest
import torch
import torch.nn.functional as F
from budgets import logits_budget
from torch.autograd import forward_ad, gradcheck

import sukhops
from sukhops import linear_logp, linear_topk, reference
from sukhops.testing import assert_close

pytestmark = pytest.mark.every_isa

LOW = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [{}, {"softcap": 5.0, "scale": 1.7}, {"scale": 0.8, "temperature": 1.9}]


def make(n=37, d=19, v=5003, k=None, bias=False, frozen=False, dtype=torch.float32):
    """Inputs of linear_logp; V spans two tiles. A quarter of the rows is ignored, and one single target."""
    target = torch.randint(0, v, (n,) if k is None else (n, k))
    target[::4] = -100
    if k and k > 1:
        target[1, 0] = -100
    inputs = {
        "hidden": torch.randn(n, d, dtype=dtype).requires_grad_(),
        "weight": (0.3 * torch.randn(v, d, dtype=dtype)).requires_grad_(not frozen),
        "target": target,
    }
    if bias:
        inputs["bias"] = torch.randn(v, dtype=dtype).requires_grad_(not frozen)
    return inputs


def separated(n=21, d=11, v=300, k=4, dtype=torch.float64):
    """Inputs of linear_topk where small changes do not change the order of the top k."""
    bias = 0.01 * torch.randn(v, dtype=dtype)
    bias[torch.randperm(v)[:k]] = 20 + 10 * torch.arange(k, dtype=dtype)
    return {
        "hidden": torch.randn(n, d, dtype=dtype).requires_grad_(),
        "weight": (0.3 * torch.randn(v, d, dtype=dtype)).requires_grad_(),
        "k": k,
        "bias": bias.requires_grad_(),
    }


def products(call):
    """The number of matrix products of a call, and its result."""
    before = torch.ops.sukhops.product_count()
    result = call()
    return torch.ops.sukhops.product_count() - before, result


# ------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("k, bias", [(None, False), (3, True), (1, True)])
def test_logp_within_budget(dtype, frozen, options, k, bias):
    inputs = make(k=k, bias=bias, frozen=frozen) | options | {"return_lse": True}
    assert_close(linear_logp, reference.linear_logp, inputs, dtype)


@pytest.mark.parametrize("dtype", LOW)
def test_topk_within_budget(dtype):
    assert_close(linear_topk, reference.linear_topk, separated(), dtype)
    ours, theirs = (f(**separated(dtype=torch.float64)) for f in (linear_topk, reference.linear_topk))
    assert ours.values.shape == theirs.values.shape == (21, 4)


def test_topk_of_all_entries_equals_sort():
    given = make(n=5, v=70, dtype=torch.float64)
    top = linear_topk(given["hidden"], given["weight"], 70)
    values, indices = (given["hidden"] @ given["weight"].T).sort(descending=True)
    torch.testing.assert_close(top.values, values)
    assert torch.equal(top.indices, indices)


def test_topk_breaks_ties_by_lower_index_also_for_minus_infinity():
    bias = torch.tensor([1.0, 3.0, 3.0, -torch.inf, -torch.inf])
    top = linear_topk(torch.zeros(1, 2), torch.zeros(5, 2), 5, bias)
    assert top.indices.tolist() == [[1, 2, 0, 3, 4]]
    assert top.values.tolist() == [[3.0, 3.0, 1.0, -torch.inf, -torch.inf]]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("k, bias", [(None, False), (3, True)])
def test_logp_gradcheck(options, frozen, k, bias):
    given = make(n=5, d=4, v=9, k=k, bias=bias, frozen=frozen, dtype=torch.float64)
    target = given.pop("target")
    names = list(given)

    def f(*tensors):
        arguments = dict(zip(names, tensors, strict=True))
        return tuple(linear_logp(target=target, return_lse=True, **arguments, **options))

    assert gradcheck(f, tuple(given.values()))


def test_topk_gradcheck():
    given = separated(n=3, d=4, v=12, k=3)

    def f(hidden, weight, bias):
        top = linear_topk(hidden, weight, 3, bias, softcap=60.0, temperature=1.6)
        return top.values, top.lse

    assert gradcheck(f, (given["hidden"], given["weight"], given["bias"]))


@pytest.mark.parametrize("n, d, v", [(64, 705, 97), (203, 33, 5003), (1500, 16, 33), (127, 1409, 64)])
def test_products_of_ragged_shapes(n, d, v):
    """Sizes that leave partial register tiles, packed depths and row blocks."""
    assert_close(linear_logp, reference.linear_logp, make(n=n, d=d, v=v), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nbytes", [0, 64 << 20])
def test_many_rows_need_several_row_tiles(dtype, nbytes):
    inputs = make(n=70_001, d=4, v=300, bias=True)
    with logits_budget(nbytes):
        assert_close(linear_logp, reference.linear_logp, inputs, dtype)


def test_more_than_two_to_the_31_logits():
    n, v = 70_000, 32_768
    hidden = torch.randn(n, 2).requires_grad_()
    weight = torch.randn(v, 2).requires_grad_()
    target = torch.full((n,), -100)
    target[-3:] = torch.tensor([0, 5, v - 1])
    target[:-3] = torch.randint(0, v, (n - 3,))
    logp = linear_logp(hidden, weight, target)
    logp.sum().backward()
    rows = hidden.detach()[-3:].clone().requires_grad_()
    expected = reference.linear_logp(rows, weight.detach(), target[-3:])
    expected.sum().backward()
    torch.testing.assert_close(logp[-3:], expected)
    torch.testing.assert_close(hidden.grad[-3:], rows.grad)


def test_slices_of_a_vocabulary_combine():
    """The result is computed from the maximum, log-sum and target logit of each slice of the vocabulary."""
    given = make(v=101, dtype=torch.float64)
    hidden, weight, target = given["hidden"], given["weight"], given["target"].clamp(min=0)
    maximum, log_sum, logit = [], [], 0.0
    for lo, hi in [(0, 40), (40, 101)]:
        inside = (target >= lo) & (target < hi)
        local = torch.where(inside, target - lo, 0)
        part = sukhops.ops.vocab_head.vocab_head(hidden, weight[lo:hi], local.unsqueeze(1))
        maximum.append(part.maximum)
        log_sum.append(part.log_sum)
        logit = logit + torch.where(inside, part.target_logit.squeeze(1), 0.0)
    top = torch.stack(maximum).amax(0)
    joined = (logit - top) - (torch.stack(log_sum) + (torch.stack(maximum) - top)).logsumexp(0)
    whole = linear_logp(hidden, weight, target)
    torch.testing.assert_close(joined, whole)
    ours = torch.autograd.grad(joined.sum(), (hidden, weight))
    torch.testing.assert_close(ours, torch.autograd.grad(whole.sum(), (hidden, weight)))


# ------------------------------------------------------------------ number of products


def test_number_of_products_by_needed_gradients():
    """The vocabulary fits in one tile, so each product is counted once."""
    given = make(v=700)
    hidden, weight, target = given.values()
    frozen = weight.detach()

    def count(h, w):
        forward, logp = products(lambda: linear_logp(h, w, target))
        return forward, products(lambda: logp.sum().backward())[0] if logp.requires_grad else 0

    with logits_budget(0):
        assert count(hidden, weight) == (1, 3)
        assert count(hidden.detach(), weight) == (1, 2)
    assert count(hidden, weight) == (1, 2)
    assert count(hidden.detach(), weight) == (1, 1)
    assert count(hidden, frozen) == (2, 0)
    assert count(hidden.detach(), frozen) == (1, 0)
    with torch.no_grad():
        assert count(hidden, weight) == (1, 0)


def test_gradients_of_topk_values_need_no_product():
    given = separated()
    top = linear_topk(**given)
    assert products(lambda: top.values.sum().backward())[0] == 0
    assert given["weight"].grad.abs().sum(1).count_nonzero() <= 21 * 4


def test_ignored_rows_are_dropped():
    given = make(v=700)
    given["target"][:] = -100
    count, (logp, lse) = products(lambda: linear_logp(**given, return_lse=True))
    assert count == 0
    assert not logp.any() and not lse.any()
    (logp.sum() + lse.sum()).backward()
    assert not given["hidden"].grad.any() and not given["weight"].grad.any()


# ------------------------------------------------------------------ torch features


def test_bitwise_deterministic_and_close_with_one_thread():
    inputs = make(n=300, v=5003)

    def run():
        logp = linear_logp(**inputs)
        return logp, *torch.autograd.grad(logp.sum(), (inputs["hidden"], inputs["weight"]))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert_close(linear_logp, reference.linear_logp, inputs, torch.float32)
    finally:
        torch.set_num_threads(before)


def test_backward_twice_accumulates():
    given = make(v=300)
    logp = linear_logp(**given)
    logp.sum().backward(retain_graph=True)
    once = given["weight"].grad.clone()
    logp.sum().backward()
    torch.testing.assert_close(given["weight"].grad, 2 * once)


def test_tied_embedding_and_strided_hidden():
    weight = torch.randn(50, 8, dtype=torch.float64).requires_grad_()
    tokens = torch.randint(0, 50, (3, 10))

    def loss(f):
        hidden = torch.tanh(F.embedding(tokens, weight))
        return f(hidden[:, :-1], weight, tokens[:, 1:]).sum()

    ours, theirs = (torch.autograd.grad(loss(f), weight) for f in (linear_logp, reference.linear_logp))
    torch.testing.assert_close(ours, theirs)
    hidden = torch.randn(8, 30, dtype=torch.float64).T
    target = torch.randint(0, 50, (30,))
    torch.testing.assert_close(
        linear_logp(hidden, weight.T.contiguous().T, target), reference.linear_logp(hidden, weight, target)
    )


def test_autocast():
    given = make(v=300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = linear_logp(**given)
        mixed = linear_logp(given["hidden"].bfloat16(), given["weight"], given["target"])
    assert logp.dtype == torch.float32
    low = linear_logp(given["hidden"].bfloat16(), given["weight"].bfloat16(), given["target"])
    assert torch.equal(logp, low) and torch.equal(mixed, low)
    logp.sum().backward()
    assert given["weight"].grad.dtype == torch.float32


def test_compiles_to_a_full_graph():
    given = make(v=300, bias=True)

    def f(hidden, weight, target, bias):
        logp, lse = linear_logp(hidden, weight, target, bias, softcap=9.0, return_lse=True)
        top = linear_topk(hidden, weight, 2)
        return (logp * 2 + 0.1 * lse + top.values.sum(-1)).sum()

    leaves = (given["hidden"], given["weight"], given["bias"])
    arguments = (given["hidden"], given["weight"], given["target"], given["bias"])
    eager, compiled = f(*arguments), torch.compile(f, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(eager, compiled)
    torch.testing.assert_close(torch.autograd.grad(eager, leaves), torch.autograd.grad(compiled, leaves))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(*arguments)
        torch.testing.assert_close(f(*arguments), compiled)


def test_activation_checkpointing():
    given = make(v=300)
    plain = torch.autograd.grad(linear_logp(**given).sum(), given["hidden"])

    def head(hidden):
        return linear_logp(hidden, given["weight"], given["target"])

    again = torch.utils.checkpoint.checkpoint(head, given["hidden"], use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.sum(), given["hidden"]), plain)


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_opcheck(frozen, statistics):
    given = make(n=6, d=5, v=11, k=2, bias=True, frozen=frozen)
    need = (True, not frozen, not frozen)
    arguments = (
        given["hidden"], given["weight"], given["target"], given["bias"], 3, statistics, 4.0, 0.5, 0.7, -100,
        132, *need,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.sukhops.vocab_head.default, arguments)
    maximum, log_sum, _, value, index, entropy, _, _, mean, logits = torch.ops.sukhops.vocab_head(*arguments)
    detached = [t.detach() for t in arguments[:4]]
    upstream = (
        torch.ones_like(log_sum),
        None,
        torch.ones_like(value),
        entropy.detach() if statistics else None,
    )
    torch.library.opcheck(
        torch.ops.sukhops.vocab_head_backward.default,
        (*detached, index, maximum, log_sum.detach(), entropy.detach(), mean, logits, *upstream, 4.0, 0.5,
         0.7, -100, *need),
    )  # fmt: skip


def test_unsupported_transforms_raise():
    given = make(v=30)
    hidden, weight = given["hidden"].detach(), given["weight"].detach()

    def loss(h):
        return linear_logp(h, weight, given["target"]).sum()

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian, torch.vmap):
        with pytest.raises(
            NotImplementedError, match=r"hidden: torch.func transforms .* torch.autograd.grad"
        ):
            transform(loss)(hidden)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        loss(forward_ad.make_dual(hidden, hidden))
    (grad,) = torch.autograd.grad(linear_logp(**given).sum(), given["hidden"], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()
