"""The Triton side of vocab_head without a GPU: numbers in the interpreter."""

import pytest
import torch
from sukhops.triton_kernels import vocab_head as kernels

from sukhops.testing import budget, distance


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias, softcap, scale", [(False, None, 1.0), (True, 4.0, 1.3)])
@pytest.mark.parametrize("kept", [0, 4, 12])
def test_launchers_match_the_cpu(dtype, frozen, bias, softcap, scale, kept, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 16)
    monkeypatch.setattr(kernels, "TILE_BYTES", 4 * 9 * 16 * 3)  # ragged blocks of 48
    n, d, v, k = 12, 5, 107, 3
    hidden, weight = torch.randn(n, d).to(dtype), torch.randn(v, d).to(dtype)
    b = torch.randn(v).to(dtype) if bias else None
    if bias:
        b[::7] = float("-inf")
    target = torch.randint(0, v, (n, 2))
    target[::4] = -100
    target[1, 0] = -100
    options = (softcap, scale, -100)
    need = (True, not frozen, bias and not frozen)
    ours = kernels.forward(hidden, weight, target, b, k, *options, 4 * v * kept, *need)
    exact = torch.ops.sukhops.vocab_head(
        hidden.double(), weight.double(), target, None if b is None else b.double(), k, *options,
        8 * v * kept, *need,
    )  # fmt: skip
    cpu = torch.ops.sukhops.vocab_head(hidden, weight, target, b, k, *options, 4 * v * kept, *need)
    check(ours[:4], cpu[:4], exact[:4])  # mean_weight is rounded to the inputs' dtype before its product
    assert ours[5].shape == cpu[5].shape == exact[5].shape == (0 if frozen else kept, v)
    check(*([x[5][: min(kept, 9)]] for x in (ours, cpu, exact)))  # 9 rows are not dropped

    g_lse, g_target, g_top = torch.randn(n), torch.randn(n, 2), torch.randn(n, k)
    g_lse[5] = 0.0  # a row whose gradient is sparse
    saved = [cpu[3], cpu[0], cpu[4], cpu[5]]
    ours = kernels.backward(hidden, weight, target, b, *saved, g_lse, g_target, g_top, *options, *need)
    cpu = torch.ops.sukhops.vocab_head_backward(
        hidden, weight, target, b, *saved, g_lse, g_target, g_top, *options, *need
    )
    exact = torch.ops.sukhops.vocab_head_backward(
        hidden.double(), weight.double(), target, None if b is None else b.double(),
        exact[3], exact[0], exact[4], exact[5], g_lse.double(), g_target.double(), g_top.double(), *options,
        *need,
    )  # fmt: skip
    check(ours, cpu, exact)


def check(ours, cpu, exact):
    for i, (a, low, b) in enumerate(zip(ours, cpu, exact, strict=True)):
        assert a.shape == b.shape and a.dtype == low.dtype and a.stride() == low.stride(), i
        if a.is_floating_point():
            assert distance(a, b) <= budget(a, low, b), (i, distance(a, b), budget(a, low, b))
        else:
            assert torch.equal(a, b), i


@pytest.mark.interpreter
def test_topk_of_several_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 16)
    monkeypatch.setattr(kernels, "TILE_BYTES", 4 * 6 * 16 * 3)
    given = torch.randn(6, 5), torch.randn(107, 5), torch.empty(6, 0, dtype=torch.int64), None, 4
    options = (None, 1.0, -100, 0, False, False, False)
    ours, cpu = kernels.forward(*given, *options), torch.ops.sukhops.vocab_head(*given, *options)
    exact = torch.ops.sukhops.vocab_head(*(t.double() for t in given[:2]), *given[2:], *options)
    check(ours, cpu, exact)


@pytest.mark.interpreter
def test_target_out_of_range_is_nan():
    hidden, weight = torch.randn(3, 4), torch.randn(7, 4)
    lse, *_ = kernels.forward(
        hidden, weight, torch.tensor([[1], [7], [-5]]), None, 0, None, 1.0, -100, 0, False, False, False
    )
    assert lse.isnan().tolist() == [False, True, True]
