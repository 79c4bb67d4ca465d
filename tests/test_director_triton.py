"""The Triton kernels of Director in the interpreter, compared with the CPU operators."""

import pytest
import torch
from sukhops.triton_kernels import director as kernels
from sukhops.triton_kernels import vocab_head

from sukhops.testing import budget, distance

ops = torch.ops.sukhops


def arguments(n, dtype, attributes, bias, d=21, v=203):
    def near(*shape):
        return torch.randn(*shape).to(dtype)

    classifiers = [near(v, d) for _ in range(attributes)]
    cls_bias = [near(v) if bias and a == 0 else torch.empty(0, dtype=dtype) for a in range(attributes)]
    gamma = 2 * torch.rand(max(1, attributes), n)
    gamma[:, 0] = 0.0
    if cls_bias and bias:
        cls_bias[0][5] = float("-inf")
    affine = None if attributes else torch.tensor([1.3, -0.2])
    return [near(n, d), near(v, d), classifiers, gamma, near(v) if bias else None, cls_bias, affine]


def double(x):
    if isinstance(x, list):
        return [double(t) for t in x]
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def check(ours, cpu, exact):
    def flat(x):
        return [t for y in x for t in (y if isinstance(y, list) else [y])]

    for i, (a, low, b) in enumerate(zip(flat(ours), flat(cpu), flat(exact), strict=True)):
        assert a.shape == b.shape and a.dtype == low.dtype and a.stride() == low.stride(), i
        if a.is_floating_point():
            assert distance(a, b) <= budget(a, low, b), (i, distance(a, b), budget(a, low, b))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n, attributes, bias", [(3, 1, False), (70, 1, True), (5, 2, True), (4, 0, True)])
def test_decoding_matches_the_cpu(dtype, n, attributes, bias, monkeypatch):
    monkeypatch.setattr(kernels, "SPLITS", 3)
    monkeypatch.setattr(kernels, "FEW_ROWS", (16, 16, 16, 4, 3))
    monkeypatch.setattr(kernels, "MANY_ROWS", (32, 32, 16, 4, 3))
    given = arguments(n, dtype, attributes, bias)
    check(kernels.logp(*given), ops.director(*given), ops.director(*double(given)))
    if n > 10:
        return
    for k in (1, 7):
        ours, cpu, exact = (
            kernels.topk(*given, k),
            ops.director_topk(*given, k),
            ops.director_topk(*double(given), k),
        )
        check(ours, cpu, exact)
        assert torch.equal(ours[1], exact[1])
    many = kernels.topk(*given, 100)
    check(many, ops.director_topk(*given, 100), ops.director_topk(*double(given), 100))


@pytest.mark.interpreter
def test_topk_ties_take_the_lower_index(monkeypatch):
    monkeypatch.setattr(kernels, "SPLITS", 3)
    monkeypatch.setattr(kernels, "FEW_ROWS", (16, 16, 16, 4, 3))
    given = [
        torch.zeros(2, 4),
        torch.zeros(90, 4),
        [torch.zeros(90, 4)],
        torch.ones(1, 2),
        None,
        [torch.empty(0)],
        None,
    ]
    assert (kernels.topk(*given, 5)[1] == torch.arange(5)).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("offset", [-1e4, 1e6])
def test_offset_of_all_scores_does_not_change_log_probs(offset, monkeypatch):
    monkeypatch.setattr(kernels, "SPLITS", 3)
    monkeypatch.setattr(kernels, "FEW_ROWS", (16, 16, 16, 4, 3))
    hidden, lm = torch.tensor([[1.0, offset]]), torch.stack([torch.arange(90.0) % 5, torch.ones(90)], 1)
    given = [hidden, lm, [torch.zeros(90, 2)], torch.ones(1, 1), None, [torch.empty(0)], None]
    exact = (hidden @ lm.T).double().log_softmax(1)
    assert (kernels.logp(*given)[0] - exact).abs().max() < 1e-6
    assert (kernels.topk(*given, 4)[0] - exact.max()).abs().max() < 1e-6


@pytest.mark.interpreter
def test_invalid_rows_are_nan():
    given = arguments(3, torch.float32, 1, False)
    given[3] = torch.tensor([[1.0, -1.0, float("nan")]])
    logp, top = kernels.logp(*given)[0], kernels.topk(*given, 2)
    assert logp.isnan().all(1).tolist() == top[0].isnan().all(1).tolist() == [False, True, True]
    target, label = torch.tensor([1, 300, 2, -100]), torch.tensor([1, 0, 2, 5])
    hidden, weight = torch.randn(4, 21), torch.randn(203, 21)
    for out in (
        kernels.dot(hidden, weight, target, label, None),
        *kernels.norm(hidden, weight, target, label, None, None, 0)[:2],
    ):
        assert out.isnan().tolist() == [False, True, True, False]


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("attributes, bias", [(1, True), (2, True), (0, True), (1, False)])
def test_backward_matches_the_cpu(dtype, attributes, bias, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 64)
    monkeypatch.setattr(kernels, "TILE_BYTES", 4 * 6 * 64)
    given = arguments(6, dtype, attributes, bias)
    logp, grad = ops.director(*double(given))[0], torch.randn(6, 203)
    if bias and attributes:
        grad[:, 5] = 0.0  # the token whose classifier bias is -inf
    need = (True, True, True, True)
    for elsewhere in (None, torch.randn(6)):
        ours = kernels.backward(grad, elsewhere, logp.float(), *given, *need)
        cpu = ops.director_backward(grad, elsewhere, logp.float(), *given, *need)
        elsewhere = None if elsewhere is None else elsewhere.double()
        check(ours, cpu, ops.director_backward(grad.double(), elsewhere, logp, *double(given), *need))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shared, captured", [(0, ""), (1, ""), (1, "fb"), (1, "f"), (1, "b")])
@pytest.mark.parametrize("kept", [0, 2, 9])
def test_classifier_matches_the_cpu(dtype, shared, captured, kept, monkeypatch):
    """captured: the passes, forward or backward, that run in a CUDA graph; there all rows are computed."""

    def enter(direction):
        for module in (kernels, vocab_head):
            monkeypatch.setattr(module, "_captured", lambda t: direction in captured)

    monkeypatch.setattr(kernels, "CHUNK", 64)
    monkeypatch.setattr(kernels, "TILE_BYTES", 4 * 6 * 64)
    hidden, weight, bias = (
        torch.randn(9, 21).to(dtype),
        torch.randn(203, 21).to(dtype),
        torch.randn(203).to(dtype),
    )
    target, label = torch.randint(0, 203, (9,)), torch.arange(9) % 3 - 1
    target[::4] = -100
    target[1] = target[2]
    hidden[4] = float("nan")  # an ignored row
    affine = torch.tensor([0.8, 0.3]) if shared else None
    grad, grad_logit = torch.randn(2, 9)
    need, rows = (True, True, True), [hidden, weight, target, label]
    dot, norm = [*rows, bias], [*rows, bias, affine]
    enter("f")
    check([kernels.dot(*dot)], [ops.director_dot(*dot)], [ops.director_dot(*double(dot))])
    given = [grad, *rows]
    enter("b")
    check(
        kernels.dot_backward(*given, *need), ops.director_dot_backward(*given, *need),
        ops.director_dot_backward(*double(given), *need),
    )  # fmt: skip

    nbytes = 4 * 203 * kept
    enter("f")
    forward = (
        kernels.norm(*norm, nbytes), ops.director_norm(*norm, nbytes),
        ops.director_norm(*double(norm), 2 * nbytes),
    )  # fmt: skip
    check(*(f[:2] for f in forward))
    ours, cpu, exact = (f[2] for f in forward)
    assert ours.shape == cpu.shape == exact.shape == (kept, 203)
    given = [grad, grad_logit, *norm]
    enter("b")
    check(
        kernels.norm_backward(*given, ours, *need), ops.director_norm_backward(*given, cpu, *need),
        ops.director_norm_backward(*double(given), exact, *need),
    )  # fmt: skip
