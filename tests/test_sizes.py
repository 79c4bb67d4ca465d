"""Tensors of more than 2^31 elements: the last results equal those of a small call. Run by make test-large.

Calls with rows * vocabulary > 2^31, which allocate no such tensor, are in test_vocab_head.py.
"""

import os

import pytest
import torch

import sukhops
from sukhops import testing
from sukhops.ops.director import classifier_terms

MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(MEMORY < 20 * 2**30, reason="needs 20 GiB of memory"),
]
EPS = torch.finfo(torch.float32).eps


def close(ours, alone, eps=EPS):
    """Asserts equality up to a few roundings, because a small call may sum in another order."""
    assert testing.distance(ours, alone) <= 64 * eps * max(1.0, testing.finite_max(alone))


def test_vocabulary_by_width():
    """A weight of 2^31 + 2^13 elements, and its gradient."""
    v, d = 2**18 + 1, 2**13
    weight = torch.empty(v, d, dtype=torch.bfloat16).normal_(std=d**-0.5).requires_grad_()
    hidden = torch.randn(3, d, dtype=torch.bfloat16, requires_grad=True)
    target = torch.tensor([v - 1, v - 2, 5])
    logp = sukhops.linear_logp(hidden, weight, target)
    logp.sum().backward()
    logits = torch.cat([(hidden.float() @ part.float().T) for part in weight.detach().split(2**14)], 1)
    expected = logits.log_softmax(-1)
    close(logp, expected.gather(1, target[:, None])[:, 0])
    share = -expected.detach()[:, -2:].exp()
    share[0, 1] += 1
    share[1, 0] += 1
    close(weight.grad[-2:], (share.T @ hidden.detach().float()), torch.finfo(torch.bfloat16).eps)


def test_director():
    """Log-probs of 2^31 + 2^19 elements, and as many logits in the classifier's norm, never stored."""
    n, v, d = 2**13 + 2, 2**18, 8
    hidden, lm, cls = torch.randn(n, d), torch.randn(v, d), torch.randn(v, d)
    target, label = torch.randint(0, v, (n,)), torch.ones(n, dtype=torch.int64)
    logp, alone = sukhops.director_logp(hidden, lm, cls), sukhops.director_logp(hidden[-2:], lm, cls)
    close(logp[-2:], alone)
    del logp
    top = sukhops.director_topk(hidden, lm, cls, 3)
    assert torch.equal(top.indices[-2:], alone.topk(3).indices)
    given = [t.requires_grad_() for t in (hidden, cls)]
    terms = classifier_terms(*given, target, label)
    grads = torch.autograd.grad(v * terms.norm[-1] + terms.logit[-1], given)
    few = hidden.detach()[-1:].requires_grad_()
    last = classifier_terms(few, cls, target[-1:], label[-1:])
    for ours, own in zip(terms, last, strict=True):
        close(ours[-1:], own)
    of_few, of_weight = torch.autograd.grad(v * last.norm.sum() + last.logit.sum(), (few, cls))
    close(grads[0][-1:], of_few)
    close(grads[1], of_weight)


def test_attention():
    """Queries, results and gradients of 2^31 + 2^19 elements; all heads share a key head."""
    b, h, t, d = 64, 64, 2**13 + 2, 64
    q = torch.empty(b, h, t, d, dtype=torch.bfloat16).normal_().requires_grad_()
    k, v = torch.randn(2, b, 1, t, d, dtype=torch.bfloat16)
    span = torch.full((h,), 8.0)
    out = sukhops.adaptive_span_attention(q, k, v, span, ramp=8.0, max_span=16)
    last = out[-1:, -1:, -5:]
    (grad,) = torch.autograd.grad(last.float().sum(), q)
    few = q.detach()[-1:, -1:].clone().requires_grad_()
    alone = sukhops.adaptive_span_attention(few, k[-1:], v[-1:], span[-1:], ramp=8.0, max_span=16)
    (own,) = torch.autograd.grad(alone[:, :, -5:].float().sum(), few)
    eps = torch.finfo(torch.bfloat16).eps
    close(last, alone[:, :, -5:], eps)
    close(grad[-1:, -1:, -5:], own[:, :, -5:], eps)


@pytest.mark.parametrize("lengths", [False, True])
def test_segmentations(lengths):
    """Scores and marginals of 2^31 + 2^16 elements."""
    b, t, k = 2**10, 2**16 + 2, 32
    scores = torch.empty(b, t, k).normal_().sub_(3.0)
    given = torch.full((b,), t - 7) if lengths else None
    marginals = sukhops.segmentation_marginals(scores, given)
    last = scores[-1:].clone(), None if given is None else given[-1:]
    close(marginals[-1:], sukhops.segmentation_marginals(*last))
    close(sukhops.segmentation_logz(scores, given)[-1:], sukhops.segmentation_logz(*last))
