"""DirectorLoss: compared with an oracle that loops over tokens; gradients, metrics, invalid arguments."""

import math
from itertools import product

import pytest
import torch
from torch.autograd import gradcheck

from sukhops import losses
from sukhops.nn import DirectorLoss
from sukhops.testing import assert_close


def batch(b=5, t=6, d=8, v=40, dtype=torch.float64):
    target = torch.randint(0, v, (b, t))
    target[0, 4:] = -100
    target[-1, 1] = -100
    return {
        "hidden": torch.randn(b, t, d, dtype=dtype).requires_grad_(),
        "lm_weight": torch.randn(v, d, dtype=dtype).requires_grad_(),
        "cls_weight": (0.5 * torch.randn(v, d, dtype=dtype)).requires_grad_(),
        "target": target,
        "label": torch.tensor([1, 0, -1, -1, 1])[:b],
        "lm_bias": torch.randn(v, dtype=dtype).requires_grad_(),
        "cls_bias": torch.randn(v, dtype=dtype).requires_grad_(),
    }


def shared_batch(**options):
    given = batch(**options)
    del given["cls_bias"]
    return given | {"cls_weight": None, "cls_affine": torch.tensor([0.7, -0.3]).double().requires_grad_()}


def oracle(
    hidden,
    lm_weight,
    cls_weight,
    target,
    label,
    *,
    lm_bias,
    cls_bias=None,
    cls_affine=None,
    gamma=0.5,
    norm_weight=0.0,
    class_weight=(1.0, 1.0),
    reduction="mean",
    train_lm_on_positive=False,
):
    """The formulas token by token, from eager logits of both heads."""
    b, t = target.shape
    label = label if label.dim() == 2 else label[:, None].expand(b, t)
    u = hidden @ lm_weight.T + lm_bias
    c = cls_affine[0] * u + cls_affine[1] if cls_affine is not None else hidden @ cls_weight.T + cls_bias
    sums, counts = [], []
    for i in range(b):
        total, count = hidden.new_zeros(()), 0
        for j in range(t):
            y, kind = int(target[i, j]), int(label[i, j])
            if y == -100:
                continue
            if kind == -1 or (kind == 1 and train_lm_on_positive):
                total, count = total - u[i, j].log_softmax(0)[y], count + 1
            if kind >= 0:
                p = torch.sigmoid(c[i, j])
                bce = -torch.log(p[y] if kind == 1 else 1 - p[y])
                others = torch.cat([p[:y], p[y + 1 :]])
                norm = ((others - 0.5) ** 2).mean()
                total, count = total + gamma * (class_weight[kind] * bce + norm_weight * norm), count + 1
        sums.append(total)
        counts.append(count)
    if reduction == "mean":
        return sum(sums) / max(1, sum(counts))
    return sum(s / max(1, n) for s, n in zip(sums, counts, strict=True))


OPTIONS = [
    {"gamma": g, "norm_weight": n, "class_weight": w, "reduction": r, "train_lm_on_positive": p}
    for (g, n, w), r, p in product(
        [(0.5, 0.0, (1.0, 1.0)), (3.0, 0.8, (2.0, 0.5))], ["mean", "sum_of_means"], [False, True]
    )
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("make", [batch, shared_batch])
def test_matches_the_token_by_token_formula(make, options):
    given = make()
    leaves = [t for t in given.values() if t is not None and t.requires_grad]
    ours, expected = DirectorLoss(**options)(**given).loss, oracle(**given, **options)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("make", [batch, shared_batch])
def test_gradcheck(make):
    given = make(b=3, t=2, d=3, v=7)
    names = [n for n, t in given.items() if t is not None and t.requires_grad]
    loss = DirectorLoss(norm_weight=0.3)

    def f(*tensors):
        return loss(**(given | dict(zip(names, tensors, strict=True)))).loss

    assert gradcheck(f, tuple(given[n] for n in names))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_weight", [0.0, 0.5])
def test_low_precision_within_budget(dtype, norm_weight):
    def ours(**given):
        return DirectorLoss(norm_weight=norm_weight)(**given).loss

    def eager(**given):
        precise = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
        if given["hidden"].dtype == torch.float64:
            return oracle(**precise, norm_weight=norm_weight)
        return oracle(**given, norm_weight=norm_weight).float()

    assert_close(ours, eager, batch(), dtype)


def test_labels_per_token_and_packed_rows():
    given = batch()
    per_token = given | {"label": given["label"][:, None].expand(5, 6)}
    loss = DirectorLoss(norm_weight=0.2)
    packed = per_token | {
        n: per_token[n].reshape(30, *per_token[n].shape[2:]) for n in ("hidden", "target", "label")
    }
    expected = loss(**given).loss
    torch.testing.assert_close(loss(**per_token).loss, expected)
    torch.testing.assert_close(loss(**packed).loss, expected)
    torch.testing.assert_close(
        loss(**(given | {"target": given["target"].int(), "label": given["label"].int()})).loss, expected
    )


@pytest.mark.parametrize("reduction", ["mean", "sum_of_means"])
@pytest.mark.parametrize("label, ignored", [([1, 0], False), ([-1, -1], False), ([1, -1], True)])
def test_one_kind_of_rows_or_no_tokens_are_finite(reduction, label, ignored):
    given = batch(b=2) | {"label": torch.tensor(label)}
    if ignored:
        given["target"] = torch.full((2, 6), -100)
    out = DirectorLoss(norm_weight=0.2, reduction=reduction)(**given)
    out.loss.backward()
    assert out.loss.isfinite() and all(m.isfinite() for m in out.metrics.values())
    for name, t in given.items():
        if t.is_floating_point():
            assert t.grad.isfinite().all()
            only = "lm" if label == [-1, -1] else "cls"
            if ignored or (name.startswith(("lm", "cls")) and not name.startswith(only)):
                assert not t.grad.any(), name
    if ignored:
        assert out.loss == 0


def test_one_sequence_without_targets():
    given = batch()
    given["target"][1] = -100
    options = {"reduction": "sum_of_means"}
    torch.testing.assert_close(DirectorLoss(**options)(**given).loss, oracle(**given, **options))


def test_frozen_decoder():
    given = batch()
    out = DirectorLoss(detach_hidden=True)(**given)
    out.loss.backward()
    assert given["hidden"].grad is None and given["cls_weight"].grad.any() and given["lm_weight"].grad.any()


def test_extreme_logits_are_finite():
    given = {n: t.detach().float() if t.is_floating_point() else t for n, t in batch().items()}
    given["hidden"] = 1e4 * given["hidden"]
    given = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in given.items()}
    out = DirectorLoss(norm_weight=1.0)(**given)
    out.loss.backward()
    assert out.loss.isfinite() and given["hidden"].grad.isfinite().all()


def test_metrics_by_hand():
    logit = torch.tensor([2.0, -1.0, 3.0, -2.0, 1.0, 0.0])
    label = torch.tensor([1, 1, 0, 0, 0, -1])
    out = losses.director_loss(
        torch.tensor([0.0] * 5 + [-2.5]), logit, torch.zeros(6).long(), label, gamma=2.0
    )
    bce = [math.log1p(math.exp(x)) for x in (-2.0, 1.0, 3.0, -2.0, 1.0)]
    expected = {
        "lm_loss": 2.5,
        "cls_loss": sum(bce) / 5,
        "lm_tokens": 1,
        "cls_tokens": 5,
        "accuracy": 2 / 5,
        "accuracy_positive": 1 / 2,
        "accuracy_negative": 1 / 3,
        "f1_positive": 2 / (2 + 3),
        "f1_negative": 2 / (3 + 2),
    }
    assert {n: pytest.approx(m.item()) for n, m in out.metrics.items()} == expected
    assert out.loss.item() == pytest.approx((2.5 + 2.0 * sum(bce)) / 6)
    assert not any(m.requires_grad for m in out.metrics.values())


def test_sparse_gradient_of_the_classifier():
    given = batch()
    (grad,) = torch.autograd.grad(DirectorLoss()(**given).loss, given["cls_weight"])
    used = given["target"][given["label"] >= 0]
    assert set(grad.abs().sum(1).nonzero().flatten().tolist()) == set(used[used >= 0].tolist())


def test_number_of_products():
    given = batch()
    count = torch.ops.sukhops.product_count
    before = count()
    loss = DirectorLoss()(**given).loss
    assert count() - before == 1  # logits of the language-model rows
    loss.backward()
    assert count() - before == 3  # two gradients; the logits were kept


def test_compiled_equals_eager():
    loss = DirectorLoss(norm_weight=0.3)
    given = batch()
    eager = loss(**given)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(**given)
    torch.testing.assert_close(eager.loss, compiled.loss)
    torch.testing.assert_close(eager.metrics, compiled.metrics)
    leaves = [t for t in given.values() if t.is_floating_point()]
    torch.testing.assert_close(
        torch.autograd.grad(eager.loss, leaves), torch.autograd.grad(compiled.loss, leaves)
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gamma": -1.0}, "gamma"),
        ({"gamma": float("nan")}, "gamma"),
        ({"norm_weight": -1.0}, "norm_weight"),
        ({"class_weight": (1.0,)}, "class_weight"),
        ({"class_weight": (1.0, -1.0)}, "class_weight"),
        ({"reduction": "sum"}, "reduction: expected one of"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        DirectorLoss(**options)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"label": torch.tensor([1, 0, 2, -1, 1])}, RuntimeError, "label: expected 1, 0 or -1, got 2"),
        ({"label": torch.tensor([1, 0])}, ValueError, "label: expected shape"),
        ({"label": torch.tensor([1.0, 0, 0, 0, 0])}, TypeError, "label"),
        ({"cls_weight": torch.randn(39, 8).double()}, ValueError, "cls_weight: expected shape \\[40, 8\\]"),
        ({"cls_affine": (1.0, 0.0)}, ValueError, "cls_affine.*both"),
        ({"cls_weight": None}, ValueError, "cls_affine.*neither"),
        ({"cls_weight": None, "cls_affine": (1.0, 0.0)}, ValueError, "cls_bias"),
        ({"target": torch.full((5, 6), 40)}, RuntimeError, "target"),
        ({"target": torch.zeros(5, 5).long()}, ValueError, "target: expected shape"),
    ],
)
def test_invalid_arguments(change, error, message):
    with pytest.raises(error, match=message):
        DirectorLoss()(**(batch() | change))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_log_probs_are_summed_in_float32(dtype):
    logp = torch.full((64, 64), -20.0, dtype=dtype)
    target = torch.ones(64, 64).long()
    out = losses.director_loss(logp, logp * 0, target, -target)
    assert out.loss == 20 and out.loss.dtype == torch.float32


def test_nan_gives_nan_metrics():
    logit, target = torch.tensor([1.0, torch.nan]), torch.zeros(2).long()
    for label in (0, 1):
        metrics = losses.director_loss(logit * 0, logit, target, target + label).metrics
        assert all(metrics[n].isnan() for n in ("cls_loss", "accuracy", "accuracy_positive", "f1_negative"))
    assert losses.director_loss(logit, logit, target, target - 1).metrics["accuracy"] == 0


def test_labels_of_ignored_tokens_are_not_checked():
    logp, target, label = torch.zeros(3), torch.tensor([1, -100, 2]), torch.tensor([1, -100, 0])
    assert losses.director_loss(logp, logp, target, label).metrics["cls_tokens"] == 2
    with pytest.raises(ValueError, match="label: expected 1, 0 or -1, got -100"):
        losses.director_loss(logp, logp, target.abs(), label)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"label": torch.tensor([[1, 0], [2, 0]])}, ValueError, "label: expected 1, 0 or -1, got 2"),
        ({"label": torch.tensor([1, 0])}, ValueError, r"label: expected shape \[2, 2\]"),
        ({"label": torch.zeros(2, 2)}, TypeError, "label: expected bool or integers"),
        ({"target": torch.zeros(2, 2)}, TypeError, "target: expected int64 or int32"),
        ({"lm_logp": torch.zeros(2)}, ValueError, r"lm_logp: expected shape \[2, 2\]"),
        ({"cls_logit": torch.zeros(2, 1)}, ValueError, r"cls_logit: expected shape \[2, 2\]"),
    ],
)
def test_invalid_arguments_of_director_loss(change, error, message):
    zeros = torch.zeros(2, 2)
    given = {"lm_logp": zeros, "cls_logit": zeros, "target": zeros.long(), "label": zeros.long()}
    with pytest.raises(error, match=message):
        losses.director_loss(**(given | change))


def test_invalid_options_of_director_loss():
    logp, label = torch.zeros(3), torch.tensor([1, 0, -1])
    for options, message in (
        ({"norm_weight": 1.0}, "norm"),
        ({"norm": torch.zeros(3)}, "norm"),
        ({"reduction": "sum_of_means"}, "reduction"),
        ({"reduction": "x"}, "reduction"),
    ):
        with pytest.raises(ValueError, match=message):
            losses.director_loss(logp, logp, label.clamp(min=0), label, **options)
