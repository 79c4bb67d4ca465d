"""linear_logp and linear_topk: edge cases, NaN, huge numbers and invalid arguments."""

import pytest
import torch
from test_vocab_head import LOW, make

from sukhops import linear_logp, linear_topk

pytestmark = pytest.mark.every_isa


# ------------------------------------------------------------------ edge cases


def test_no_rows_one_row_and_vocabulary_of_one():
    weight = torch.randn(7, 3).requires_grad_()
    logp, lse = linear_logp(torch.zeros(0, 3), weight, torch.zeros(0, dtype=torch.int64), return_lse=True)
    assert logp.shape == lse.shape == (0,)
    logp.sum().backward()
    assert not weight.grad.any()
    one = linear_logp(torch.randn(3), weight, torch.tensor(2))
    assert one.shape == () and one < 0
    assert (
        linear_logp(torch.randn(4, 3), torch.randn(1, 3), torch.zeros(4, dtype=torch.int32)).abs().max() == 0
    )
    assert linear_logp(torch.randn(2, 3), weight, torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0)


def test_other_ignore_index_and_int32():
    given = make(v=50)
    target = given.pop("target").int()
    moved = torch.where(target == -100, 7, target)
    torch.testing.assert_close(
        linear_logp(**given, target=moved, ignore_index=7),
        linear_logp(**given, target=torch.where(target == 7, -100, target)),
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
def test_nan_and_infinity_propagate(value, dtype):
    given = make(v=300, dtype=dtype)
    hidden = given["hidden"].detach()
    hidden[5, 0] = value
    logp, lse = linear_logp(hidden, given["weight"], given["target"], return_lse=True)
    assert not torch.isfinite(logp[5]) and not torch.isfinite(lse[5])
    others = torch.arange(len(hidden)) != 5
    assert torch.isfinite(logp[others]).all()
    top = linear_topk(hidden, given["weight"], 3)
    assert not torch.isfinite(top.lse[5]) and torch.isfinite(top.values[others]).all()
    if value != value:
        assert top.values[5].isnan().all()
    (grad,) = torch.autograd.grad(logp.sum(), given["weight"])
    assert grad.isnan().any()


def test_masked_vocabulary():
    """A bias of -inf removes entries (their gradients are 0); without any entry, the result is NaN."""
    given = make(v=300, bias=True, dtype=torch.float64)
    given["bias"].data[:200] = -torch.inf
    given["target"] = given["target"].clamp(min=200)
    linear_logp(**given).sum().backward()
    assert not given["weight"].grad[:200].any() and not given["bias"].grad[:200].any()
    kept = linear_logp(given["hidden"], given["weight"][200:], given["target"] - 200, given["bias"][200:])
    torch.testing.assert_close(linear_logp(**given), kept)
    given["bias"].data[:] = -torch.inf
    assert linear_logp(**given).isnan().all()


def test_huge_logits():
    hidden = torch.full((2, 1), 1e4)
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    logp = linear_logp(hidden, weight, torch.tensor([0, 1]))
    assert logp.tolist() == [0.0, -2e4]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_huge_weights(dtype, frozen):
    """The gradient of hidden, a mean of weights, is finite: sums of V weights would not be."""
    given = make(v=3000, frozen=frozen, dtype=dtype)
    with torch.no_grad():
        given["hidden"][:, 0] = 0
        given["weight"][:, 0] = torch.finfo(dtype).max / 2
    lse = linear_logp(**given, return_lse=True)[1]
    grad = torch.autograd.grad(lse.sum(), given["hidden"])[0][lse != 0, 0].double()
    expected = given["weight"][0, 0].double().expand_as(grad)
    torch.testing.assert_close(grad, expected, rtol=1e-6 if dtype.itemsize > 2 else 1e-2, atol=0)


# ------------------------------------------------------------------ invalid arguments

H, W, T = torch.randn(6, 4), torch.randn(9, 4), torch.zeros(6, dtype=torch.int64)
BAD = {
    "hidden: expected a torch.Tensor": dict(hidden=[1.0]),
    "hidden: expected float32": dict(hidden=H.int()),
    "hidden: expected last axis D = 4": dict(hidden=torch.randn(6, 5)),
    r"hidden: .*, got \[\]": dict(hidden=torch.tensor(1.0)),
    "weight: expected torch.float32 like hidden": dict(weight=W.bfloat16()),
    "weight: expected shape \\[V, D\\]": dict(weight=torch.randn(9)),
    "weight: expected shape \\[V, D\\] with V >= 1": dict(weight=torch.randn(0, 4)),
    "weight: expected on cpu": dict(weight=W.to("meta")),
    "bias: expected shape \\[9\\]": dict(bias=torch.randn(8)),
    "bias: expected torch.float32": dict(bias=torch.randn(9).double()),
    "target: expected int64": dict(target=T.float()),
    "target: expected shape \\[6\\]": dict(target=T[:5]),
    "target: expected shape \\[6\\] .* got \\[5, 6\\]": dict(target=torch.zeros(5, 6, dtype=torch.int64)),
    "target: expected values in \\[0, 9\\).* got 9 at row 2": dict(target=torch.tensor([0, 1, 9, 2, 3, 4])),
    "target: expected values in \\[0, 9\\).* got -1 at row 0": dict(target=torch.tensor([-1, 1, 0, 2, 3, 4])),
    "softcap: expected a finite number > 0": dict(softcap=0.0),
    "softcap: expected a finite number > 0 or None, got nan": dict(softcap=float("nan")),
    "scale: expected a finite number": dict(scale=float("inf")),
    "temperature: expected a finite number > 0, got 0.0": dict(temperature=0.0),
    "temperature: expected a finite number > 0, got nan": dict(temperature=float("nan")),
}


@pytest.mark.parametrize("message", BAD)
def test_invalid_arguments(message):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        linear_logp(**({"hidden": H, "weight": W, "target": T} | BAD[message]))


@pytest.mark.parametrize("k", [0, 10, 2.0])
def test_invalid_k(k):
    with pytest.raises(ValueError, match=r"k: expected an int in \[1, V = 9\]"):
        linear_topk(H, W, k)


def test_other_devices_raise():
    with pytest.raises((NotImplementedError, ValueError)):
        linear_logp(H.to("meta"), W, T)
