"""KTOLoss and StepKTOLoss: compared with whole logits, references, invalid arguments."""

import pytest
import torch
from torch.autograd import gradcheck

import sukhops
from sukhops import losses, reference
from sukhops.nn import KTOLoss, StepKTOLoss
from sukhops.testing import assert_close

NEAR = 256 * torch.finfo(torch.float32).eps  # tolerance to a peer, which sums in float32 in another order


def model_batch(b=4, t=6, d=8, v=40, dtype=torch.float64):
    target = torch.randint(0, v, (b, t))
    target[:, :2] = -100

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype)

    return {
        "hidden": normal(b, t, d).requires_grad_(),
        "weight": normal(v, d).requires_grad_(),
        "target": target,
        "bias": normal(v).requires_grad_(),
        "ref_hidden": normal(b, t, d + 1),
        "ref_weight": normal(v, d + 1),
        "ref_bias": normal(v),
        "kl_hidden": normal(b, t, d).requires_grad_(),
        "kl_target": losses.mismatched(target),
        "kl_ref_hidden": normal(b, t, d + 1),
        "desirable": torch.arange(b) % 2 == 0,
    }


def steps(b=4, t=6):
    ids = (torch.arange(t) // 2 - 1).expand(b, t)
    return {
        "step_ids": ids,
        "step_labels": torch.tensor([[1, 0], [0, -1], [1, 1], [-1, 0]])[:b],
        "kl_step_ids": ids,
    }


def eager(step=False):
    """The same loss on log-probs computed from whole logits."""

    def f(hidden, weight, target, bias, ref_hidden, ref_weight, ref_bias, kl_hidden, kl_target, kl_ref_hidden,
          desirable, step_ids=None, step_labels=None, kl_step_ids=None):  # fmt: skip
        logp = reference.linear_logp(hidden, weight, target, bias)
        ref = reference.linear_logp(ref_hidden, ref_weight, target, ref_bias)
        kl = losses.Mismatched(
            kl_target,
            reference.linear_logp(kl_hidden, weight, kl_target, bias),
            reference.linear_logp(kl_ref_hidden, ref_weight, kl_target, ref_bias),
            None,
            kl_step_ids,
        )
        if step:
            return losses.step_kto_loss(logp, target, desirable, step_ids, step_labels, ref, kl=kl).loss
        return losses.kto_loss(logp, target, desirable, ref, kl=kl).loss

    return f


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", [False, True])
def test_equals_whole_logits(step, dtype):
    given = model_batch(d=32, v=300) | (steps() if step else {})
    given = {n: (t * 0.3).detach().requires_grad_(t.requires_grad) if t.is_floating_point() else t
             for n, t in given.items()}  # fmt: skip
    given["kl_hidden"] = given["kl_hidden"].detach()  # has no gradient
    loss = StepKTOLoss() if step else KTOLoss()
    assert_close(lambda **g: loss(**g).loss, eager(step), given, dtype)


@pytest.mark.parametrize("step", [False, True])
def test_gradcheck_through_the_head(step):
    given = model_batch(t=4, d=3, v=7) | (steps(t=4) if step else {})
    loss = StepKTOLoss() if step else KTOLoss()

    frozen = (
        loss(**given).metrics["kl"].item()
    )  # the reference point depends on the weight, but has no gradient
    del given["kl_hidden"], given["kl_target"], given["kl_ref_hidden"]
    given.pop("kl_step_ids", None)

    def at_fixed_point(hidden, weight, bias):
        return loss(**(given | {"hidden": hidden, "weight": weight, "bias": bias, "kl": frozen})).loss

    assert gradcheck(at_fixed_point, (given["hidden"], given["weight"], given["bias"]))


def test_mismatched_batch_has_no_gradient():
    given = model_batch()
    out = KTOLoss()(**given)
    assert out.metrics["kl"] > 0
    assert torch.autograd.grad(out.loss, given["kl_hidden"], allow_unused=True) == (None,)


def test_number_of_products():
    """Three for the policy (its logits are kept); one for each of the reference and two mismatched passes."""
    given = {n: t.detach().float().requires_grad_(t.requires_grad) if t.is_floating_point() else t
             for n, t in model_batch().items()}  # fmt: skip
    before = torch.ops.sukhops.product_count()
    KTOLoss()(**given).loss.backward()
    assert torch.ops.sukhops.product_count() - before == 6


def test_compiles_fullgraph():
    given = model_batch() | steps()
    loss = StepKTOLoss()
    whole = torch.compile(lambda **g: loss(**g).loss, fullgraph=True, backend="aot_eager")(**given)
    assert whole.item() == pytest.approx(loss(**given).loss.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"kl": 0.1}, "kl"),
        ({"kl_hidden": None}, "kl"),
        ({"kl_hidden": None, "kl_target": None, "kl_ref_hidden": None}, "kl"),
        ({"kl_ref_hidden": None}, "kl_ref_logp"),
        ({"kl_hidden": torch.zeros(4, 2, 1, dtype=torch.float64)}, "kl_hidden"),
        ({"kl_ref_hidden": torch.zeros(4, 1, 2, dtype=torch.float64)}, "kl_ref_hidden"),
        ({"kl_ref_logp": torch.zeros(4)}, "kl_ref_logp"),
        ({"ref_hidden": None, "ref_weight": None, "ref_bias": None}, "kl_ref_hidden|ref_logp"),
        ({"ref_logp": torch.zeros(4)}, "ref_logp"),
        ({"ref_weight": None}, "ref_weight"),
        ({"desirable": torch.full((4,), 3)}, "desirable"),
    ],
)
def test_invalid_arguments(change, name):
    with pytest.raises(ValueError, match=name):
        KTOLoss()(**(model_batch() | change))


def test_reference_log_probs_equal_reference_heads():
    given = model_batch()
    whole = KTOLoss()(**given).loss
    ref = sukhops.linear_logp(given["ref_hidden"], given["ref_weight"], given["target"], given["ref_bias"])
    kl_ref = sukhops.linear_logp(
        given["kl_ref_hidden"], given["ref_weight"], given["kl_target"], given["ref_bias"]
    )
    for name in ("ref_hidden", "ref_weight", "ref_bias", "kl_ref_hidden"):
        del given[name]
    assert KTOLoss()(**given, ref_logp=ref, kl_ref_logp=kl_ref).loss.item() == pytest.approx(whole.item())
    summed = KTOLoss()(**given, ref_logp=ref.sum(1), kl_ref_logp=kl_ref.sum(1)).loss
    assert summed.item() == pytest.approx(whole.item())


def test_options_are_checked_and_shown():
    with pytest.raises(ValueError, match="beta"):
        KTOLoss(-1.0)
    with pytest.raises(ValueError, match="step_reduction"):
        StepKTOLoss(step_reduction="sum")
    assert "beta=0.1" in repr(KTOLoss()) and "step_weight=1.0" in repr(StepKTOLoss())


def liger(given, kl, **options):
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    peer = chunked.LigerFusedLinearKTOLoss(beta=0.1, compiled=False, use_ref_model=True, **options)
    return peer(
        given["hidden"], given["weight"], given["target"], given["bias"], given["desirable"],
        ref_input=given["ref_hidden"], ref_weight=given["ref_weight"], ref_bias=given["ref_bias"], kl=kl,
    )  # fmt: skip


def batch_without_kl():
    return {n: t for n, t in model_batch(dtype=torch.float32).items() if not n.startswith("kl_")}


def test_agrees_with_liger_at_one_reference_point():
    given = batch_without_kl()
    expected, _ = liger(given, torch.tensor([0.3]))
    found = KTOLoss()(**given, kl=0.3).loss
    torch.testing.assert_close(found, expected, rtol=NEAR, atol=NEAR)
    leaves = [given[n] for n in ("hidden", "weight", "bias")]
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=NEAR, atol=NEAR)


def test_liger_with_one_reference_point_per_sequence_differs():
    """With one kl per sequence, as its documentation says, Liger returns B times the mean over the batch."""
    given = batch_without_kl()
    logp = reference.linear_logp(*(given[n] for n in ("hidden", "weight", "target", "bias")))
    ref = reference.linear_logp(*(given[n] for n in ("ref_hidden", "ref_weight", "target", "ref_bias")))
    sign = 2.0 * given["desirable"] - 1
    mean = torch.sigmoid(-0.1 * sign * ((logp - ref).sum(-1) - 0.3)).mean()
    torch.testing.assert_close(KTOLoss()(**given, kl=0.3).loss, mean, rtol=NEAR, atol=NEAR)
    theirs, _ = liger(given, torch.full((4,), 0.3))
    torch.testing.assert_close(theirs, 4 * mean, rtol=NEAR, atol=NEAR)
    with pytest.raises(ValueError, match=r"^kl"):
        KTOLoss()(**given, kl=torch.full((4,), 0.3))
