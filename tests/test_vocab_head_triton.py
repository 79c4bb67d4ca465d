"""The Triton kernels of vocab_head in the interpreter, compared with the CPU operator."""

import pytest
import torch
from sukhops.triton_kernels import vocab_head as kernels

from sukhops.testing import budget, distance


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias, curve", [(False, (None, 1.0, 1.0)), (True, (4.0, 1.3, 0.7))])
@pytest.mark.parametrize("kept, statistics", [(0, True), (4, True), (12, False)])
def test_launchers_match_the_cpu(dtype, frozen, bias, curve, kept, statistics, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 16)
    monkeypatch.setattr(kernels, "TILE_BYTES", 4 * 9 * 16 * 3)  # blocks of 48 columns, the last one partial
    n, d, v, k = 12, 5, 107, 3
    hidden, weight = torch.randn(n, d).to(dtype), torch.randn(v, d).to(dtype)
    b = torch.randn(v).to(dtype) if bias else None
    if bias:
        b[::7] = float("-inf")
    target = torch.randint(0, v, (n, 2))
    target[::4] = -100
    target[1, 0] = -100
    options = (*curve, -100)
    need = (True, not frozen, bias and not frozen)
    given = (hidden, weight, target, b)
    double = (hidden.double(), weight.double(), target, None if b is None else b.double())
    forward = (k, statistics, *options)
    ours = kernels.forward(*given, *forward, 4 * v * kept, *need)
    exact = torch.ops.sukhops.vocab_head(*double, *forward, 8 * v * kept, *need)
    cpu = torch.ops.sukhops.vocab_head(*given, *forward, 4 * v * kept, *need)
    check(ours[:8], cpu[:8], exact[:8])  # mean_weight is left out: its factor is rounded to the inputs' dtype
    assert ours[9].shape == cpu[9].shape == exact[9].shape == (0 if frozen else kept, v)
    check(*([x[9][: min(kept, 9)]] for x in (ours, cpu, exact)))  # only 9 rows are not ignored

    def saved(outputs):
        maximum, log_sum, _, _, index, entropy, _, _, mean, logits = outputs
        return index, maximum, log_sum, entropy, mean, logits

    upstream = [torch.randn(n), torch.randn(n, 2), torch.randn(n, k), torch.randn(n) if statistics else None]
    upstream[0][5] = 0.0  # without entropy, the gradient of this row is sparse
    backward = (*upstream, *options, *need)
    ours = kernels.backward(*given, *saved(cpu), *backward)
    upstream = [None if g is None else g.double() for g in upstream]
    exact = torch.ops.sukhops.vocab_head_backward(*double, *saved(exact), *upstream, *options, *need)
    cpu = torch.ops.sukhops.vocab_head_backward(*given, *saved(cpu), *backward)
    check(ours, cpu, exact)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mean_of_huge_weights(dtype):
    hidden, weight = (
        torch.zeros(2, 3, dtype=dtype),
        torch.full((107, 3), torch.finfo(dtype).max / 2, dtype=dtype),
    )
    given = (hidden, weight, torch.zeros(2, 1, dtype=torch.int64), None)
    mean = kernels.forward(*given, 0, False, None, 1.0, 1.0, -100, 0, True, False, False)[8]
    torch.testing.assert_close(mean, weight[:2].float(), rtol=1e-6, atol=0)


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
    options = (False, None, 1.0, 1.0, -100, 0, False, False, False)
    ours, cpu = kernels.forward(*given, *options), torch.ops.sukhops.vocab_head(*given, *options)
    exact = torch.ops.sukhops.vocab_head(*(t.double() for t in given[:2]), *given[2:], *options)
    check(ours, cpu, exact)


@pytest.mark.interpreter
def test_all_rows_ignored():
    given = torch.randn(3, 4), torch.randn(7, 4), torch.full((3, 1), -100), None, 2, True
    options = (None, 1.0, 1.0, -100, 1 << 20, True, True, False)
    ours, cpu = kernels.forward(*given, *options), torch.ops.sukhops.vocab_head(*given, *options)
    assert [t.shape for t in ours] == [t.shape for t in cpu] and not any(t.any() for t in ours[:8])


@pytest.mark.interpreter
def test_target_out_of_range_is_nan():
    hidden, weight = torch.randn(3, 4), torch.randn(7, 4)
    need = (False, False, False)
    outputs = kernels.forward(
        hidden, weight, torch.tensor([[1], [7], [-5]]), None, 1, True, None, 1.0, 1.0, -100, 0, *need
    )
    for number in (outputs[i] for i in (1, 3, 5, 6, 7)):  # log_sum, topk_value, the statistics
        assert number.flatten().isnan().tolist() == [False, True, True]


@pytest.mark.interpreter
@pytest.mark.parametrize("offset", [0.0, -1e4, 1e6, -1e30])
def test_offset_of_all_logits_does_not_change_log_probs(offset, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 16)
    monkeypatch.setattr(kernels, "TILE_BYTES", 4 * 16 * 3)
    weight = torch.stack([torch.arange(107.0) % 5, torch.ones(107)], 1)
    hidden, target = torch.tensor([[1.0, offset]]), torch.tensor([[4]])
    options, need = (None, 1.0, 1.0, -100), (True, True, False)
    outputs = kernels.forward(hidden, weight, target, None, 1, True, *options, 0, *need)
    maximum, log_sum, logit, _, index, entropy, log_sum_sq, _, mean, logits = outputs
    exact = (hidden @ weight.T).double().log_softmax(1)
    assert ((logit - maximum) - log_sum - exact[0, 4]).abs() < 1e-6
    assert (entropy + (exact.exp() * exact).sum()).abs() < 2e-6
    assert (log_sum_sq - (2 * exact).logsumexp(1)).abs() < 2e-6
    saved = (index, maximum, log_sum, entropy, mean, logits)
    upstream = (torch.ones(1), None, None, None)
    *_, dw, _ = kernels.backward(hidden, weight, target, None, *saved, *upstream, *options, *need)
    torch.testing.assert_close(dw[:, :1], exact.exp().T.float(), rtol=1e-6, atol=0)


@pytest.mark.interpreter
@pytest.mark.parametrize("kept", [4, 12])
@pytest.mark.parametrize("bias, statistics", [(False, False), (True, True)])
@pytest.mark.parametrize("forward_captured, backward_captured", [(True, True), (True, False), (False, True)])
def test_captured_passes_match(forward_captured, backward_captured, bias, statistics, kept, monkeypatch):
    """In a CUDA graph all rows are computed; either pass may be captured without the other."""
    monkeypatch.setattr(kernels, "CHUNK", 16)
    monkeypatch.setattr(kernels, "TILE_BYTES", 4 * 9 * 16 * 3)
    n, v, k = 12, 55, 2
    hidden, weight, target = torch.randn(n, 5), torch.randn(v, 5), torch.randint(0, v, (n, 1))
    target[[0, 1, 4, 11]] = -100
    hidden[1], hidden[4] = float("nan"), 1e30  # ignored rows
    given = hidden, weight, target, torch.randn(v).index_fill_(0, torch.tensor(3), 200.0) if bias else None
    options, need = (None, 1.0, 1.0, -100), (True, True, bias)
    upstream = [torch.randn(n), torch.randn(n, 1), torch.randn(n, k), torch.randn(n) if statistics else None]
    upstream[0][5] = 0.0  # without entropy, the gradient of this row is sparse

    def run(first, second):
        monkeypatch.setattr(kernels, "_captured", lambda t: first)
        outputs = kernels.forward(*given, k, statistics, *options, 4 * v * kept, *need)
        maximum, log_sum, _, _, index, entropy, _, _, mean, logits = outputs
        monkeypatch.setattr(kernels, "_captured", lambda t: second)
        saved = index, maximum, log_sum, entropy, mean, logits
        return *outputs[:9], *kernels.backward(*given, *saved, *upstream, *options, *need)

    for ours, expected in zip(run(forward_captured, backward_captured), run(False, False), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
