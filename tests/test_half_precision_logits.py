"""On every CPU, logits of half-precision heads are float32 sums, as accurate as with float32 inputs."""

import pytest
import torch

from sukhops import linear_logp, linear_topk, reference
from sukhops.ops.director import classifier_logit, classifier_terms
from sukhops.reference import director as plain
from sukhops.testing import budget, distance

pytestmark = pytest.mark.every_isa


def confident(dtype, n=96, d=576, v=4000):
    """Inputs whose largest logit per row is about 30, as in a trained model."""
    weight = torch.randn(v, d)
    best = torch.randint(0, v, (n,))
    hidden = torch.randn(n, d)
    direction = weight[best] / weight[best].norm(dim=1, keepdim=True)
    hidden += direction * (30 - (hidden * direction).sum(1, keepdim=True))
    return (hidden / d**0.25).to(dtype), (weight / weight.norm(dim=1, keepdim=True) * d**0.25).to(dtype), best


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 40, 96])
def test_log_probs(dtype, rows):
    hidden, weight, best = confident(dtype)
    hidden, target = hidden[:rows], torch.stack([best, best.roll(1)], 1)[:rows]
    logits = hidden.double() @ weight.double().T
    assert 25 < logits.amax(1).mean() < 35
    exact = logits.log_softmax(1).gather(1, target)
    single = reference.linear_logp(hidden.float(), weight.float(), target)
    for grad in (False, True):  # without gradients, and with gradients, where logits are kept
        ours = linear_logp(hidden.requires_grad_(grad), weight.requires_grad_(grad), target).detach()
        assert distance(ours, exact) <= budget(ours, single, exact)
        assert rows < 40 or (ours - exact).abs().mean() <= 3e-6
    top, best = linear_topk(hidden, weight, 3).values.detach(), logits.topk(3).values
    assert distance(top, best) <= budget(top, (hidden.float() @ weight.float().T).topk(3).values, best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, 4, 5, 9, 16, 31])
@pytest.mark.parametrize("d", [39, 4100])
def test_streamed_weight(dtype, rows, d):
    """One and several passes over the rows, groups of both sizes, depths that end inside a cache line."""
    hidden, weight, _ = confident(dtype, rows, d, v=61)
    exact = (hidden.double() @ weight.double().T).sort(descending=True).values
    single = reference.linear_topk(hidden.float(), weight.float(), 61).values
    ours = linear_topk(hidden, weight, 61).values
    assert distance(ours, exact) <= budget(ours, single, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_at_least_as_accurate_as_with_rounded_logits(dtype):
    hidden, weight, best = confident(dtype)

    def gradients(f, dtype):
        given = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
        return torch.autograd.grad(f(*given, best).sum(), given)

    exact = gradients(reference.linear_logp, torch.float64)
    for ours, low, e in zip(
        gradients(linear_logp, dtype), gradients(reference.linear_logp, dtype), exact, strict=True
    ):
        assert (ours - e).norm() <= (low - e).norm() + torch.finfo(dtype).eps * e.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_classifier_norm_and_logit(dtype):
    hidden, weight, target = confident(dtype)
    label = torch.ones_like(target)

    def both(dtype):
        given = hidden.to(dtype), weight.to(dtype), target, label
        return *plain.classifier_terms(*given), plain.classifier_logit(*given)

    given = hidden, weight, target, label
    ours = *classifier_terms(*given), classifier_logit(*given)
    for one, single, exact in zip(ours, both(torch.float32), both(torch.float64), strict=True):
        assert distance(one, exact) <= budget(one, single, exact)
