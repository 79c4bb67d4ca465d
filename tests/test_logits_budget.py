"""Logits that the forward keeps for the backward: gradients are the same; only needed logits are kept."""

import pytest
import torch
from budgets import logits_budget
from director_inputs import labeled
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

import sukhops
from sukhops import linear_logp, linear_topk, reference
from sukhops.ops.director import classifier_terms
from sukhops.testing import assert_close

pytestmark = pytest.mark.every_isa

N, D, V = 37, 19, 5003  # the vocabulary spans two tiles
BUDGETS = [0, 4 * V * 10, 4 * V * N]  # nothing, ten rows, all rows in float32


def make(dtype=torch.float32, v=V, bias=True):
    target = torch.randint(0, v, (N, 2))
    target[::4] = -100
    return {
        "hidden": torch.randn(N, D, dtype=dtype).requires_grad_(),
        "weight": (0.3 * torch.randn(v, D, dtype=dtype)).requires_grad_(),
        "target": target,
        "bias": torch.randn(v, dtype=dtype).requires_grad_() if bias else None,
    }


def kept(call):
    """Bytes of the [.., V] tensors that a call saves for the backward, and its result."""
    saved = []

    def pack(t):
        if t.dim() == 2 and t.shape[1] == V:
            saved.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    return sum(saved), result


@pytest.mark.parametrize("nbytes", BUDGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "scale": 1.7}])
def test_within_budget(nbytes, dtype, options):
    with logits_budget(nbytes):
        assert_close(linear_logp, reference.linear_logp, make() | options, dtype)


@pytest.mark.parametrize("nbytes", BUDGETS)
def test_rows_with_sparse_gradients_are_skipped(nbytes):
    """Some kept and some recomputed rows have a gradient only for the logit of their target."""
    logit_alone = torch.rand(N).round()

    def mixed(f):
        def call(**given):
            logp, lse = f(**given, return_lse=True)
            return logp + lse * logit_alone

        return call

    given = make() | {"target": torch.randint(0, V, (N,))}
    with logits_budget(nbytes):
        assert_close(mixed(linear_logp), mixed(reference.linear_logp), given, torch.float32)


@pytest.mark.parametrize("rows", [0, 7, N])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"affine": torch.tensor([0.8, 0.3]).requires_grad_()}])
def test_classifier_norm_within_budget(rows, dtype, options):
    """Every third row has no upstream gradient, so its products are kept and not read."""
    counts = torch.arange(N) % 3 > 0

    def some(f):
        return lambda **given: f(**given).norm * counts

    with logits_budget(4 * 4 * V * rows):
        given = labeled(N, D, V, bias=True) | {"label": torch.arange(N) % 2} | options
        assert_close(some(classifier_terms), some(reference.director.classifier_terms), given, dtype)


@pytest.mark.parametrize("rows, products", [(0, 3), (7, 3), (N, 2)])
def test_kept_products_of_the_norm_are_not_computed_again(rows, products):
    given = labeled(N, D, V) | {"label": torch.ones(N).long()}
    with logits_budget(4 * 4 * V * rows):
        before = torch.ops.sukhops.product_count()
        norm = classifier_terms(**given).norm.sum()
        between = torch.ops.sukhops.product_count()
        torch.autograd.grad(norm, [given["hidden"], given["weight"]])
    assert between - before == 1 and torch.ops.sukhops.product_count() - between == products


@pytest.mark.parametrize("rows", [3, 20, 37])
def test_gradcheck(rows):
    given = make(torch.float64, v=60)
    with logits_budget(8 * 60 * rows):
        assert gradcheck(lambda h, w, b: linear_logp(h, w, given["target"], b, softcap=3.0),
                         (given["hidden"], given["weight"], given["bias"]))  # fmt: skip


@pytest.mark.parametrize("nbytes", BUDGETS)
def test_second_backward_gives_the_same_bits(nbytes):
    given = make(torch.bfloat16)
    with logits_budget(nbytes):
        logp = linear_logp(**given)
        inputs = [given[n] for n in ("hidden", "weight", "bias")]
        first = torch.autograd.grad(logp.sum(), inputs, retain_graph=True)
        second = torch.autograd.grad(logp.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_needed_logits_are_kept():
    given = make()
    frozen = given | {"weight": given["weight"].detach(), "bias": given["bias"].detach()}
    assert kept(lambda: linear_logp(**given))[0] == 4 * V * N
    assert kept(lambda: linear_topk(given["hidden"], given["weight"], 3))[0] == 4 * V * N
    assert kept(lambda: linear_logp(**frozen))[0] == 0
    for nbytes, rows in ((0, 0), (4 * V - 1, 0), (4 * V, 1), (40 * V + 5, 10), (1 << 60, N), (1 << 80, N)):
        with logits_budget(nbytes):
            assert kept(lambda: linear_logp(**given))[0] == 4 * V * rows
    rows = labeled(N, D, V)
    frozen = rows | {"weight": rows["weight"].detach()}
    for nbytes, expected in ((0, 0), (48 * V, 3), (1 << 60, N), (1 << 80, N)):
        with logits_budget(nbytes):
            assert kept(lambda: classifier_terms(**rows))[0] == 4 * V * expected
            assert kept(lambda: classifier_terms(**frozen))[0] == 0
    none = (False, None, 1.0, 1.0, -100, 1 << 30, False, False, False)
    flat = [given[n].detach() for n in ("hidden", "weight", "target")]
    assert torch.ops.sukhops.vocab_head(*flat, None, 0, *none)[-1].shape == (0, V)


def test_compiled_call_follows_changes_of_the_budget():
    given = make(bias=False)
    compiled = torch.compile(lambda h, w, t: linear_logp(h, w, t).sum(), fullgraph=True)
    inputs = [given["hidden"], given["weight"]]
    expected = torch.autograd.grad(linear_logp(**given).sum(), inputs)
    for nbytes in BUDGETS:
        with logits_budget(nbytes):
            found = torch.autograd.grad(compiled(*inputs, given["target"]), inputs)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_checkpoint_and_export():
    given = make(bias=False)
    inputs = [given["hidden"], given["weight"]]
    expected = torch.autograd.grad(linear_logp(**given).sum(), inputs)
    again = checkpoint(lambda h, w: linear_logp(h, w, given["target"]).sum(), *inputs, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(again, inputs), expected, strict=True))

    class Head(torch.nn.Module):
        def forward(self, h, w, t):
            return linear_logp(h, w, t)

    program = torch.export.export(Head(), (*inputs, given["target"]))
    assert torch.equal(program.module()(*inputs, given["target"]), linear_logp(**given))


def test_set_returns_the_previous_budget():
    assert sukhops.get_logits_budget() == 64 << 20
    assert sukhops.set_logits_budget(5) == 64 << 20
    assert sukhops.get_logits_budget() == 5
    assert sukhops.set_logits_budget(64 << 20) == 5


@pytest.mark.parametrize("bad", [-1, 1.5, "64 MiB", None, True])
def test_invalid_budget_raises(bad):
    with pytest.raises((TypeError, ValueError), match="nbytes: expected"):
        sukhops.set_logits_budget(bad)
    assert sukhops.get_logits_budget() == 64 << 20
