"""AdaptiveSpan: the ratio, its gradient at the bounds, its precision, the report."""

import math

import pytest
import torch
from torch import nn

from sukhops.nn import AdaptiveSpan
from sukhops.testing import budget, distance

BAD = [
    ("num_heads", 0), ("max_span", 0), ("max_span", 2.5), ("ramp", 0.0), ("ramp", math.inf), ("init", -0.1),
    ("init", 1.1), ("init", math.nan),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_options_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name}:"):
        AdaptiveSpan(**({"num_heads": 4, "max_span": 20} | {name: value}))


def test_span_and_penalty():
    spans = AdaptiveSpan(4, 1000, init=0.25)
    assert spans.span().dtype == torch.float32 and spans.span().tolist() == [250.0] * 4
    loss = spans.penalty(2e-3)
    loss.backward()
    assert loss.item() == pytest.approx(0.5)  # coef * mean span
    exact = torch.full((4,), 2e-3 * 1000 / 4, dtype=torch.float64)  # SPEC: coef * S / H
    assert distance(spans.ratio.grad, exact) <= budget(spans.ratio.grad, exact, exact)
    assert "max_span=1000" in repr(spans) and "ramp=32" in repr(spans)


PASSES = [
    (0.0, -1.0, True), (-0.3, -1.0, True), (1.0, 1.0, True), (1.2, 1.0, True),  # toward [0, 1]
    (0.5, 1.0, True), (0.5, -1.0, True),
    (-0.3, 1.0, False), (1.2, -1.0, False),
    (0.0, 1.0, True), (-0.005, 1.0, True),  # at or slightly outside a bound, every gradient passes
    (-0.3, math.nan, True),  # so that a gradient scaler detects it
]  # fmt: skip


@pytest.mark.parametrize(("ratio", "grad", "passes"), PASSES)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_passes_toward_the_bounds(ratio, grad, passes, compiled):
    spans = AdaptiveSpan(1, 100)
    spans.ratio.data.fill_(ratio)
    span = (torch.compile(spans.span, fullgraph=True, backend="aot_eager") if compiled else spans.span)()
    assert span.item() == 100 * min(max(spans.ratio.item(), 0.0), 1.0)
    span.backward(torch.tensor([grad]))
    assert distance(spans.ratio.grad, torch.tensor([100 * grad if passes else 0.0])) == 0


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
@pytest.mark.parametrize("bound", [0, 1])
def test_ratio_stays_at_a_bound_and_returns(optimizer, bound):
    """Two losses push in opposite directions: the sum decides; no call after optimizer.step() is needed."""
    spans = AdaptiveSpan(1, 100, init=0.5)
    options = {"lr": 1e-5 if optimizer is torch.optim.SGD else 0.05}
    step = optimizer(spans.parameters(), **options)
    outward = 1.0 if bound == 0 else -1.0

    def train(steps, out, back):
        for _ in range(steps):
            step.zero_grad()
            (outward * out * spans.span().sum()).backward()
            (-outward * back * spans.span().sum()).backward()
            step.step()

    train(2000, 3.0, 1.0)
    at_bound = []
    for _ in range(50):
        train(1, 3.0, 1.0)
        at_bound.append(spans.span().item())
    assert at_bound == [100.0 * bound] * 50
    train(400, 1.0, 3.0)
    assert abs(spans.span().item() - 100 * bound) > 10


def test_half_precision_models_keep_their_ratios():
    spans = nn.Sequential(AdaptiveSpan(3, 8192, init=0.3))
    spans[0].ratio.data.copy_(torch.tensor([0.1234567, 0.7654321, 0.9999999]))
    exact = spans[0].ratio.detach().clone()
    for cast in (nn.Module.bfloat16, nn.Module.half, lambda m: m.to(torch.bfloat16), nn.Module.float):
        cast(spans)
        assert torch.equal(spans[0].ratio, exact) and spans[0].ratio.requires_grad
    assert spans.double()[0].span().dtype == torch.float64
    assert spans.bfloat16()[0].ratio.dtype == torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert AdaptiveSpan(3, 8192).ratio.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
    assert AdaptiveSpan(3, 8192, dtype=torch.float16).ratio.dtype == torch.float32


def test_nan_propagates():
    spans = AdaptiveSpan(2, 100)
    spans.ratio.data[0] = math.nan
    assert spans.span().isnan().tolist() == [True, False]


def test_report():
    spans = AdaptiveSpan(4, 20, ramp=5.0)
    spans.ratio.data.copy_(torch.tensor([0.0, 0.3125, 0.84375, 0.125]))
    report = spans.report()
    assert report.tokens == pytest.approx([0.0, 6.25, 16.875, 2.5])
    assert report.keys == [5, 12, 20, 8]  # ceil(span + ramp), at most max_span
    assert report.share == pytest.approx(45 / 80)
