import torch
import pytest
from sukhops import linear_logp, linear_topk, reference
from sukhops.testing import assert_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(n=37, d=19, v=5003, k=None, bias=False, frozen=False):
    target = torch.randint(0, v, (n,) if k is None else (n, k))
    target[::4] = -100
    inputs = {
        "hidden": torch.randn(n, d).requires_grad_(),
        "weight": (0.3 * torch.randn(v, d)).requires_grad_(not frozen),
        "target": target,
        "return_lse": True,
    }
    if bias:
        inputs["bias"] = torch.randn(v).requires_grad_(not frozen)
    return inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("k, bias, options", [
    (None, False, {}), (3, True, {"softcap": 5.0, "scale": 1.7}), (1, True, {}),
])  # fmt: skip
def test_logp_within_budget(dtype, frozen, k, bias, options):
    assert_close(linear_logp, reference.linear_logp, make(k=k, bias=bias, frozen=frozen) | options, dtype)
