"""DPOLoss: all loss types on the fused head, packed and padded, references, options, invalid arguments."""

import math

import pytest
import torch
from torch.autograd import gradcheck

import sukhops
from sukhops import losses
from sukhops.losses._preference import LOSSES
from sukhops.nn import DPOLoss
from sukhops.testing import assert_close

E = 0.1  # label smoothing of the loss types that require it

NEAR = 256 * torch.finfo(torch.float32).eps  # tolerance to a peer, which sums in float32 in another order


def model_batch(b=2, t=6, d=8, v=40, dtype=torch.float64):
    target = torch.randint(0, v, (2 * b, t))
    target[:, :2] = -100
    target[0, 4:] = -100
    return {
        "hidden": torch.randn(2 * b, t, d, dtype=dtype).requires_grad_(),
        "weight": torch.randn(v, d, dtype=dtype).requires_grad_(),
        "target": target,
        "bias": torch.randn(v, dtype=dtype).requires_grad_(),
        "ref_hidden": torch.randn(2 * b, t, d + 1, dtype=dtype),
        "ref_weight": torch.randn(v, d + 1, dtype=dtype),
        "ref_bias": torch.randn(v, dtype=dtype),
    }


def eager(loss_type="sigmoid", **options):
    """The same loss on log-probs computed from whole logits."""

    def f(hidden, weight, target, bias, ref_hidden=None, ref_weight=None, ref_bias=None):
        logp = sukhops.reference.linear_logp(hidden, weight, target, bias)
        ref = None
        if ref_hidden is not None:
            ref = sukhops.reference.linear_logp(ref_hidden, ref_weight, target, ref_bias)
        return losses.dpo_loss(logp, target, ref, loss_type=loss_type, **options).loss

    return f


def given_for(name, **sizes):
    given = model_batch(**sizes)
    if name in ("simpo", "cpo", "orpo", "sft"):
        given = {n: t for n, t in given.items() if not n.startswith("ref_")}
    return given, {"label_smoothing": E} if name in ("robust", "exo_pair") else {}


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_through_the_head(name):
    given, options = given_for(name, t=4, d=3, v=7)
    loss = DPOLoss(0.4, name, **options)

    def f(hidden, weight, bias):
        return loss(**(given | {"hidden": hidden, "weight": weight, "bias": bias})).loss

    assert gradcheck(f, (given["hidden"], given["weight"], given["bias"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "orpo"])
def test_within_budget(name, dtype):
    given, options = given_for(name, b=12)
    fused = DPOLoss(0.4, name, **options)
    assert_close(per_pair(lambda **g: fused(**g).loss), per_pair(eager(name, beta=0.4)), given, dtype)


def per_pair(loss):
    """Losses per pair: with one number, the reference may be exact by chance and the budget too small."""

    def f(**given):
        rows = {n: t for n, t in given.items() if n in ("hidden", "target", "ref_hidden")}
        pairs = given["target"].shape[0] // 2
        return torch.stack(
            [loss(**(given | {n: t[i::pairs] for n, t in rows.items()})) for i in range(pairs)]
        )

    return f


def packed(given):
    """The batch in packed form, without padding and with cu_seqlens."""
    rows, t = given["target"].shape
    keep = torch.ones(rows, t, dtype=torch.bool)
    keep[0, 4:] = False  # padding
    flat = {n: x[keep] if n in ("hidden", "target", "ref_hidden") else x for n, x in given.items()}
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    return flat | {"cu_seqlens": ends}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ld_alpha": 0.5, "length_alpha": 0.1, "nll_weight": 0.3},
        {"loss_type": "ipo"},
        {"use_weighting": True},
        {"f_divergence": "js"},
        {"loss_type": ["aot", "sft"], "loss_weights": [1.0, 0.5]},
    ],
)
def test_packed_equals_padded(options):
    given = model_batch()
    loss = DPOLoss(0.4, **options)
    padded, flat = loss(**given), loss(**packed(given))
    torch.testing.assert_close(flat, padded)
    leaves = [given[n] for n in ("hidden", "weight", "bias")]
    torch.testing.assert_close(
        torch.autograd.grad(flat.loss, leaves), torch.autograd.grad(padded.loss, leaves)
    )
    torch.testing.assert_close(
        loss(**(packed(given) | {"cu_seqlens": packed(given)["cu_seqlens"].int()})), flat
    )


def test_weights_are_the_likelihoods_of_the_policy():
    given = model_batch()
    logits = given["hidden"] @ given["weight"].T + given["bias"]
    p = logits.softmax(-1)
    counted = given["target"] != -100
    likely = p.gather(-1, given["target"].clamp(min=0).unsqueeze(-1)).squeeze(-1) / (p**2).sum(-1)
    weights = torch.stack(
        [torch.exp(x[m].log().mean()) for x, m in zip(likely, counted, strict=True)]
    ).detach()
    names = ("hidden", "weight", "target", "bias")
    logp = sukhops.reference.linear_logp(*(given[n] for n in names))
    ref = sukhops.reference.linear_logp(
        given["ref_hidden"], given["ref_weight"], given["target"], given["ref_bias"]
    )
    ratio = (logp - ref).sum(1)
    expected = (weights[:2] * weights[2:] * -torch.log(torch.sigmoid(0.4 * (ratio[:2] - ratio[2:])))).mean()
    ours = DPOLoss(0.4, use_weighting=True)(**given).loss
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, given["weight"]), torch.autograd.grad(expected, given["weight"])
    )


def test_forms_of_the_reference_agree_and_get_no_gradient():
    given = model_batch()
    ref = {n: given.pop(n).requires_grad_() for n in ("ref_hidden", "ref_weight", "ref_bias")}
    per_token = sukhops.linear_logp(ref["ref_hidden"], ref["ref_weight"], given["target"], ref["ref_bias"])
    loss = DPOLoss()
    expected = loss(**given, **ref)
    expected.loss.backward()
    assert all(t.grad is None for t in ref.values())
    for form in (per_token, per_token.sum(1), per_token.detach().float()):
        torch.testing.assert_close(loss(**given, ref_logp=form), expected, rtol=1e-6, atol=1e-6)
    garbage = per_token.detach().masked_fill(given["target"] == -100, math.nan)
    torch.testing.assert_close(loss(**given, ref_logp=garbage), expected)
    loss(**given, ref_logp=per_token).loss.backward()
    assert all(t.grad is None for t in ref.values())


def test_reference_free_equals_reference_log_probs_of_zero():
    given = {n: t for n, t in model_batch().items() if not n.startswith("ref_")}
    free, zero = DPOLoss(reference_free=True)(**given), DPOLoss()(**given, ref_logp=torch.zeros(4))
    torch.testing.assert_close(free, zero)


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_targets_and_empty_batches(name):
    given, options = given_for(name)
    leaves = [given[n] for n in ("hidden", "weight", "bias")]
    loss = DPOLoss(0.4, name, **options)
    nothing = loss(**(given | {"target": torch.full_like(given["target"], -100)})).loss
    assert torch.isfinite(nothing)
    assert all((g == 0).all() for g in torch.autograd.grad(nothing, leaves))
    rejected_empty = given["target"].clone()
    rejected_empty[2:] = -100
    one_sided = loss(**(given | {"target": rejected_empty})).loss
    assert torch.isfinite(one_sided)
    grads = torch.autograd.grad(one_sided, leaves)
    assert all(torch.isfinite(g).all() for g in grads) and (grads[0][2:] == 0).all()
    no_pairs = loss(
        **(given | {n: given[n][:0] for n in ("hidden", "target", "ref_hidden") if n in given})
    ).loss
    assert no_pairs == 0 and torch.isfinite(torch.autograd.grad(no_pairs, leaves)[1]).all()


@pytest.mark.parametrize("options", [{}, {"ld_alpha": 0.5, "use_weighting": True}, {"loss_type": "aot"}])
@pytest.mark.parametrize("pack", [False, True])
def test_compiles_and_is_deterministic(options, pack):
    given = model_batch(dtype=torch.float32)
    given = packed(given) if pack else given
    loss = DPOLoss(**options)
    leaves = [given[n] for n in ("hidden", "weight", "bias")]

    def run(f):
        out = f(**given)
        return [out.loss, *torch.autograd.grad(out.loss, leaves), *out.metrics.values()]

    once, twice = run(loss), run(loss)
    assert all(torch.equal(x, y) for x, y in zip(once, twice, strict=True))
    torch._dynamo.reset()
    torch.testing.assert_close(run(torch.compile(loss, fullgraph=True, backend="aot_eager")), once)


BAD_OPTIONS = [
    ({"loss_type": "dop"}, "loss_type.*sigmoid"),
    ({"loss_type": []}, "loss_weights"),
    ({"beta": 0.0}, "beta"),
    ({"beta": -1.0}, "beta"),
    ({"beta": math.nan}, "beta"),
    ({"label_smoothing": 1.5}, "label_smoothing"),
    ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing"),
    ({"loss_type": "exo_pair"}, "label_smoothing"),
    ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing.*hinge"),
    ({"loss_weights": [1.0, 2.0]}, "loss_weights"),
    ({"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}, "loss_weights"),
    ({"ld_alpha": 2.0}, "ld_alpha"),
    ({"loss_type": "ipo", "ld_alpha": 0.5}, "ld_alpha"),
    ({"loss_type": "nca_pair", "length_alpha": 0.5}, "length_alpha"),
    ({"loss_type": ["sigmoid", "ipo"], "length_alpha": 0.5}, "length_alpha.*ipo"),
    ({"nll_weight": -1.0}, "nll_weight"),
    ({"loss_type": "orpo", "nll_weight": 1.0}, "nll_weight"),
    ({"f_divergence": "kl"}, "f_divergence"),
    ({"loss_type": "aot", "f_divergence": "js"}, "f_divergence"),
    ({"f_divergence": "js", "reference_free": True}, "f_divergence"),
    ({"f_alpha": 0.3}, "f_alpha"),
    ({"loss_type": "simpo", "use_weighting": True}, "use_weighting"),
    ({"margin": 0.5}, "margin"),
    ({"tau": 0.1}, "tau"),
    ({"loss_type": "discopop", "tau": 0.0}, "tau"),
    ({"loss_type": "orpo", "reference_free": True}, "reference_free"),
]


@pytest.mark.parametrize("options, message", BAD_OPTIONS)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        DPOLoss(**options)


BAD_INPUT = [
    (lambda g: g | {"ref_logp": torch.zeros(4)}, {}, ValueError, "ref_logp"),
    (lambda g: {n: t for n, t in g.items() if not n.startswith("ref_")}, {}, ValueError, "ref_logp"),
    (lambda g: {n: t for n, t in g.items() if n != "ref_weight"}, {}, ValueError, "ref_weight"),
    (lambda g: g, {"reference_free": True}, ValueError, "ref_logp"),
    (lambda g: g, {"loss_type": "simpo"}, ValueError, "ref_logp"),
    (lambda g: g | {n: g[n][:3] for n in ("hidden", "target", "ref_hidden")}, {}, ValueError, "target.*even"),
    (lambda g: g | {"target": g["target"].float()}, {}, TypeError, "target"),
    (lambda g: g | {"ref_hidden": g["ref_hidden"][:, :3]}, {}, ValueError, "ref_hidden: .*per target"),
    (lambda g: g | {"ref_hidden": g["ref_hidden"].repeat(1, 1, 2)}, {}, ValueError, "ref_hidden.*last axis"),
    (lambda g: g | {"ref_weight": g["ref_weight"].half()}, {}, TypeError, "ref_weight"),
    (lambda g: g | {"cu_seqlens": torch.tensor([0, 3])}, {}, ValueError, "target"),
    (lambda g: packed(g) | {"cu_seqlens": torch.tensor([0, 9, 5, 12, 22])}, {}, ValueError, "cu_seqlens"),
    (lambda g: packed(g) | {"cu_seqlens": torch.tensor([0, 5, 9, 12, 21])}, {}, ValueError, "cu_seqlens"),
    (lambda g: packed(g) | {"cu_seqlens": torch.tensor([0.0, 5, 9, 12, 22])}, {}, TypeError, "cu_seqlens"),
    (lambda g: {n: t for n, t in g.items() if not n.startswith("ref_")} | {"ref_logp": torch.zeros(4)},
     {"ld_alpha": 0.5}, ValueError, "ref_logp"),
    (lambda g: {n: t for n, t in g.items() if not n.startswith("ref_")} | {"ref_logp": torch.zeros(3)},
     {}, ValueError, "ref_logp"),
]  # fmt: skip


@pytest.mark.parametrize("change, options, error, message", BAD_INPUT)
def test_invalid_arguments(change, options, error, message):
    given = change(model_batch())
    with pytest.raises(error, match=f"^{message}"):
        DPOLoss(**options)(**given)


@pytest.mark.parametrize("kind", ["sigmoid", "apo_zero", "apo_down", "sppo_hard", "nca_pair"])
def test_agrees_with_liger(kind):
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    given = model_batch(dtype=torch.float32)
    peer = chunked.LigerFusedLinearDPOLoss(beta=0.4, loss_type=kind, compiled=False)
    theirs, _ = peer(
        given["weight"], given["hidden"], given["target"], given["bias"],
        ref_input=given["ref_hidden"], ref_weight=given["ref_weight"], ref_bias=given["ref_bias"],
    )  # fmt: skip
    torch.testing.assert_close(DPOLoss(0.4, kind)(**given).loss, theirs, rtol=NEAR, atol=NEAR)


@pytest.mark.parametrize(
    "kind, theirs, ours",
    [
        ("SimPO", {"gamma": 0.7, "compute_nll_loss": False}, {"margin": 0.7}),
        ("CPO", {"alpha": 1.0}, {"nll_weight": 1.0}),
        ("ORPO", {}, {}),
    ],
)
def test_agrees_with_liger_without_a_reference(kind, theirs, ours):
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    given = {n: t for n, t in model_batch(dtype=torch.float32).items() if not n.startswith("ref_")}
    peer = getattr(chunked, f"LigerFusedLinear{kind}Loss")(beta=0.4, compiled=False, **theirs)
    expected, _ = peer(given["weight"], given["hidden"], given["target"], given["bias"])
    found = DPOLoss(0.4, kind.lower(), **ours)(**given).loss
    torch.testing.assert_close(found, expected, rtol=NEAR, atol=NEAR)
    leaves = [given[n] for n in ("hidden", "weight", "bias")]
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=NEAR, atol=NEAR)
