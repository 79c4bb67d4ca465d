"""Errors of public functions that no other test raises, and texts that modules print."""

import importlib.util
import sys
from importlib import metadata

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import sukhops
from sukhops import __main__, _library, lexicon, losses, nn, pairs
from sukhops.ops.director import classifier_logit
from sukhops.parallel._slices import together

HIDDEN, WEIGHT, TARGET = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2).long()
SCORES = torch.zeros(1, 4, 2)
GROUP = object()  # raises before it is used
LOGP, TOKENS = torch.zeros(2, 4), torch.zeros(2, 4).long()


def kto(**more):
    return nn.KTOLoss()(
        torch.zeros(2, 4, 3), WEIGHT, TOKENS, desirable=torch.tensor([True, False]), ref_logp=LOGP, **more
    )


def step_kto(**more):
    steps = {"step_ids": torch.zeros(2, 4).long(), "step_labels": torch.zeros(2, 1).long()}
    kl = losses.Mismatched(TOKENS, LOGP, LOGP, step_ids=steps["step_ids"])
    return losses.step_kto_loss(
        LOGP, TOKENS, torch.tensor([True, False]), ref_logp=LOGP, **steps, kl=kl, **more
    )


CALLS = {
    "a weight of one axis": (
        lambda: classifier_logit(HIDDEN, WEIGHT[0], TARGET, TARGET),
        ValueError,
        r"weight: expected shape \[V, D\]",
    ),
    "a DTensor": (
        lambda: sukhops.segmentation_logz(with_mesh(SCORES)),
        TypeError,
        "scores: expected a plain tensor, got a DTensor",
    ),
    "targets of one axis": (
        lambda: losses.dpo_loss(LOGP[0], TOKENS[0], LOGP[0]),
        ValueError,
        r"or \[N\] with cu_seqlens, got \[4\]",
    ),
    "cu_seqlens of two axes": (
        lambda: losses.dpo_loss(LOGP[0], TOKENS[0], LOGP[0], cu_seqlens=TOKENS),
        ValueError,
        r"cu_seqlens: .*\[2, 4\]",
    ),
    "log-probs of integers": (
        lambda: losses.dpo_loss(TOKENS, TOKENS, LOGP),
        TypeError,
        "logp: expected a floating dtype",
    ),
    "infinite weights": (
        lambda: nn.DPOLoss(loss_type=["sigmoid", "hinge"], loss_weights=[1.0, float("inf")]),
        ValueError,
        "loss_weights: expected finite numbers",
    ),
    "an unused reference": (
        lambda: losses.dpo_loss(LOGP, TOKENS, LOGP, loss_type="cpo"),
        ValueError,
        "ref_logp: expected None",
    ),
    "step_kl given twice": (
        lambda: step_kto(step_kl=0.1),
        ValueError,
        "step_kl: expected None with kl_step_ids",
    ),
    "no reference head": (
        lambda: kto(kl_hidden=torch.zeros(2, 4, 3), kl_target=TOKENS, kl_ref_hidden=torch.zeros(2, 4, 3)),
        ValueError,
        "kl_ref_hidden: expected ref_weight",
    ),
    "a cache with group": (
        lambda: layer()(torch.zeros(1, 2, 8), cache=layer()(torch.zeros(1, 2, 8))[1], group=GROUP),
        ValueError,
        "cache: expected None with group",
    ),
    "query_start with group": (
        lambda: sukhops.adaptive_span_attention(
            *torch.zeros(3, 1, 1, 2, 4), torch.ones(1), query_start=0, group=GROUP
        ),
        ValueError,
        "query_start: expected None with group",
    ),
    "samples that differ between ranks": (
        lambda: nn.CringeLoss(k=2)(HIDDEN, WEIGHT, TARGET, TARGET, group=GROUP),
        ValueError,
        "generator: expected one in the same state on every rank",
    ),
    "too few biases": (
        lambda: sukhops.director_logp(HIDDEN, WEIGHT, [WEIGHT, WEIGHT], cls_bias=[None]),
        ValueError,
        "cls_bias: expected 2, one per cls_weight, got 1",
    ),
    "an affine of vectors": (
        lambda: sukhops.director_logp(HIDDEN, WEIGHT, None, cls_affine=(torch.ones(2), 0.0)),
        ValueError,
        r"cls_affine: expected scalars, got shape \[2\]",
    ),
    "an affine of texts": (
        lambda: sukhops.director_logp(HIDDEN, WEIGHT, None, cls_affine=("1", 0.0)),
        TypeError,
        "cls_affine: expected numbers or scalar tensors, got str",
    ),
    "a tensor as scale": (
        lambda: sukhops.linear_topk(HIDDEN, WEIGHT, 2, scale=torch.tensor(2.0, requires_grad=True)),
        TypeError,
        "scale: expected a number, got a tensor",
    ),
    "a tensor as softcap": (
        lambda: sukhops.linear_logp(HIDDEN, WEIGHT, TARGET, softcap=torch.tensor(2.0)),
        TypeError,
        "softcap: expected a number, got a tensor",
    ),
    "an infinite softcap": (
        lambda: sukhops.linear_logp(HIDDEN, WEIGHT, TARGET, softcap=float("inf")),
        ValueError,
        "softcap: expected a finite number > 0 or None",
    ),
    "a tangent of a span": (
        lambda: with_tangent(
            lambda x: sukhops.adaptive_span_attention(*torch.zeros(3, 1, 1, 2, 4), x.reshape(1))
        ),
        NotImplementedError,
        "span: forward-mode AD",
    ),
    "a tangent of gamma": (
        lambda: with_tangent(lambda x: sukhops.director_logp(HIDDEN, WEIGHT, WEIGHT, gamma=x)),
        NotImplementedError,
        "gamma: forward-mode AD",
    ),
    "a tangent of an affine": (
        lambda: with_tangent(lambda x: sukhops.director_logp(HIDDEN, WEIGHT, None, cls_affine=(x, 0.0))),
        NotImplementedError,
        "cls_affine: forward-mode AD",
    ),
    "bool results of battles": (
        lambda: pairs.battle_matrix(torch.zeros(1, 3, 3, dtype=torch.bool)),
        TypeError,
        "results: expected integers or floating-point numbers, got torch.bool",
    ),
    "complex scores": (
        lambda: pairs.bradley_terry(torch.zeros(1, 3, 3, dtype=torch.complex64)),
        TypeError,
        "expected real numbers, got torch.complex64",
    ),
}


def with_mesh(t):
    t = t.clone()
    t.device_mesh = None
    return t


def with_tangent(call):
    with forward_ad.dual_level():
        return call(forward_ad.make_dual(torch.ones(()), torch.ones(())))


def layer():
    return nn.AdaptiveSpanAttention(8, 2, max_span=4, rel_pos=False)


@pytest.mark.parametrize("name", CALLS)
def test_raises(name):
    call, error, message = CALLS[name]
    with pytest.raises(error, match=message):
        call()


def test_another_device():
    with FakeTensorMode(), pytest.raises(NotImplementedError, match="expected a cpu or cuda tensor, got xpu"):
        sukhops.segmentation_logz(torch.empty(1, 4, 2, device="xpu"))


@pytest.mark.skipif(_library.has_cuda_library, reason="the CUDA kernels are built")
def test_segmentations_without_cuda_kernels():
    with (
        FakeTensorMode(),
        pytest.raises(NotImplementedError, match="the CUDA kernels of segmentation are not"),
    ):
        sukhops.segmentation_logz(torch.empty(1, 4, 2, device="cuda"))


@pytest.mark.parametrize(
    "logz", [sukhops.segmentation_logz, lambda x: torch.ops.sukhops.segmentation_logz(x, None, True)[0]]
)
def test_a_gradient_that_autograd_drops(logz):
    """A later function without a gradient gives none here."""

    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    scores = SCORES.clone().requires_grad_()
    (Drop.apply(logz(scores)).sum() + 0 * scores.sum()).backward()
    assert not scores.grad.any()


def test_memory_errors_keep_their_type():
    with pytest.raises(torch.OutOfMemoryError), together():
        raise torch.OutOfMemoryError


def test_modules_print_their_options():
    assert "rel_pos=False" in repr(layer())
    assert "gamma=0.5" in repr(nn.DirectorLoss())
    assert "flat=False" in repr(nn.SegmentationLoss())


def test_backends_and_missing_packages(monkeypatch, capsys):
    def missing(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", missing)
    assert __main__.info() == 0
    assert "triton    not installed" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert __main__.backend("vocab_head", "cuda") == "Triton"
    monkeypatch.setattr(__main__.util, "find_spec", lambda name: None)
    assert __main__.backend("vocab_head", "cuda") == "Triton is not installed"
    monkeypatch.setattr(_library, "launched", set())
    assert __main__.backend("vocab_head", "cuda") == "CUDA C++"


def test_check_fails_if_a_result_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    name, operators, op, ref, make = __main__.OPS[0]
    for shift, code, last in ((0.0, 0, "all 12 pass"), (1.0, 1, "3 of 12 FAILED")):
        shifted = [(name, operators, lambda shift=shift, **given: op(**given) + shift, ref, make)]
        monkeypatch.setattr(__main__, "OPS", shifted)
        assert __main__.check() == code
        assert capsys.readouterr().out.splitlines()[-1] == last


def test_libraries_that_are_missing_or_do_not_load(tmp_path, monkeypatch):
    monkeypatch.setattr(_library, "_HERE", tmp_path)
    assert not _library._load("_C_cuda")
    with pytest.raises(ImportError, match=r"sukhops is not built: .*_C\.so is missing. Build it: pip"):
        _library._load("_C", required=True)
    (tmp_path / "_C.so").write_bytes(b"not a library")
    with pytest.raises(ImportError, match=r"_C\.so does not load with torch .*Rebuild it: pip"):
        _library._load("_C", required=True)
    monkeypatch.setitem(sys.modules, "sukhops._lexicon", None)
    spec = importlib.util.spec_from_file_location("lexicon_again", lexicon.__file__)
    with pytest.raises(ImportError, match="is not built for this Python"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
