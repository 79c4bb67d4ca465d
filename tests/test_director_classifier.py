"""The classifier's part of Director's training: one logit per row, and the norm of the others."""

import pytest
import torch
from director_inputs import LOW, labeled
from torch.autograd import gradcheck

from sukhops.ops.director import classifier_logit, classifier_norm, classifier_terms
from sukhops.reference import director as plain
from sukhops.testing import assert_close

pytestmark = pytest.mark.every_isa


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("bias", [False, True])
def test_classifier_logit_within_budget(dtype, bias):
    assert_close(classifier_logit, plain.classifier_logit, labeled(bias=bias), dtype)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("options", [{}, {"affine": torch.tensor([0.8, 0.3]).requires_grad_()}])
@pytest.mark.parametrize("n", [37, 3000])
def test_classifier_terms_within_budget(dtype, options, n):
    inputs = labeled(n, v=5003 if n == 37 else 503, bias=True) | options
    assert_close(classifier_terms, plain.classifier_terms, inputs, dtype)


@pytest.mark.parametrize("op", [classifier_logit, classifier_norm, classifier_terms])
@pytest.mark.parametrize("shared", [False, True])
def test_classifier_gradcheck(op, shared):
    given = labeled(7, 3, 9, torch.float64, bias=True)
    target, label = given.pop("target"), given.pop("label")
    if shared:
        if op is classifier_logit:
            pytest.skip("classifier_logit has no affine: the loss applies it")
        given["affine"] = torch.tensor([0.8, 0.3], dtype=torch.float64).requires_grad_()

    def f(*tensors):
        return op(target=target, label=label, **dict(zip(given, tensors, strict=True)))

    assert gradcheck(f, tuple(given.values()))


def test_only_targets_of_classifier_rows_get_a_gradient():
    given = labeled()
    (grad,) = torch.autograd.grad(classifier_logit(**given).sum(), given["weight"])
    used = given["target"][(given["target"] >= 0) & (given["label"] >= 0)].unique()
    assert torch.equal(grad.abs().sum(1).nonzero().squeeze(1), used)


def test_norm_is_zero_for_zero_logits_and_at_most_a_quarter():
    given = labeled()
    given["weight"] = torch.zeros(503, 19).requires_grad_()
    norm = classifier_norm(**given)
    assert not norm.any()
    assert not torch.autograd.grad(norm.sum(), given["weight"])[0].any()
    given["weight"] = 1e3 * torch.randn(503, 19)
    assert 0.2 < classifier_norm(**given).max() <= 0.25 + 1e-6
    one = classifier_norm(torch.randn(2, 3), torch.randn(1, 3), torch.zeros(2).long(), torch.ones(2).long())
    assert not one.any()  # there is no other token


@pytest.mark.parametrize("op", [classifier_logit, classifier_norm])
def test_invalid_targets_and_labels(op):
    given = labeled()
    for name, value, message in (
        ("label", 2, "label: expected 1, 0 or -1, got 2"),
        ("label", -100, "label"),
        ("target", 503, "target: expected values in"),
    ):
        bad = given | {name: given[name].clone()}
        bad[name][1] = value
        with pytest.raises(RuntimeError, match=message):
            op(**bad)
    with pytest.raises(ValueError, match="label: expected shape"):
        op(**(given | {"label": given["label"][:3]}))
