"""dpo_loss compared with the step of TRL's DPOTrainer on the same log-probs, and known differences."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from sukhops import losses

B, T, BETA, SMOOTHING = 4, 7, 0.3, 0.1
NEAR = 64 * torch.finfo(torch.float32).eps  # float32 sums of a dozen terms in two orders
KINDS = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip


def batch():
    """Log-probs per token of policy and reference, 0 where the target is -100, and the target."""
    target = torch.zeros(2 * B, T, dtype=torch.int64)
    lengths = torch.tensor([3, 5, 2, 5, 4, 1, 5, 3])
    position = torch.arange(T) - 2
    target = target.masked_fill((position < 0) | (position >= lengths.unsqueeze(1)), -100)
    logp, ref = (-torch.rand(2 * B, T).masked_fill(target == -100, 0.0) for _ in range(2))
    return logp.requires_grad_(), ref, target


def trl(logp, ref, target, kinds, squares=None, **options):
    """The loss and the logged metrics of DPOTrainer's step."""
    trainer = pytest.importorskip("trl").DPOTrainer
    counted = F.pad(target != -100, (1, 0)).long()
    zero = torch.zeros_like(logp)
    outputs = SimpleNamespace(
        log_probs=logp.where(target != -100, 0.0),
        log_sum_sq_probs=squares,
        entropy=zero,
        mean_logits=zero,
        is_top1=zero.bool(),
    )
    unchanged = SimpleNamespace(device=logp.device, gather=lambda t: t, gather_for_metrics=lambda t: t)
    state = {
        "model": SimpleNamespace(training=False), "accelerator": unchanged, "beta": BETA, "loss_types": kinds,
        "loss_weights": [1.0] * len(kinds), "label_smoothing": SMOOTHING, "ld_alpha": None,
        "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5,
        "use_weighting": squares is not None,
        "precompute_ref_logps": True, "aux_loss_enabled": False, "_total_train_tokens": 0,
        "args": SimpleNamespace(discopop_tau=0.05), "_metrics": defaultdict(lambda: defaultdict(list)),
    }  # fmt: skip
    state = SimpleNamespace(**(state | options))
    given = {"input_ids": torch.zeros_like(counted), "completion_mask": counted}
    given["ref_chosen_logps"], given["ref_rejected_logps"] = ref.sum(1).chunk(2)
    loss = trainer._compute_loss(state, lambda **_: outputs, given, False)
    return loss, {name: values[-1] for name, values in state._metrics["eval"].items()}


def agree(ours, theirs, logp):
    torch.testing.assert_close(ours, theirs, rtol=NEAR, atol=NEAR)
    gradients = [torch.autograd.grad(loss, logp)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=NEAR, atol=NEAR)


def ours(logp, ref, target, kind, **options):
    if kind == "sft":
        return losses.dpo_loss(logp, target, loss_type=kind, beta=BETA, **options)
    if kind in ("exo_pair", "robust", "aot", "aot_unpaired"):
        options["label_smoothing"] = SMOOTHING
    return losses.dpo_loss(logp, target, ref, loss_type=kind, beta=BETA, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_type_agrees(kind):
    logp, ref, target = batch()
    theirs, _ = trl(logp, ref, target, [kind])
    agree(ours(logp, ref, target, kind).loss, theirs, logp)


@pytest.mark.parametrize(
    "theirs, options",
    [
        ({"f_divergence_type": "forward_kl"}, {"f_divergence": "forward_kl"}),
        ({"f_divergence_type": "js_divergence"}, {"f_divergence": "js"}),
        ({"f_divergence_type": "alpha_divergence"}, {"f_divergence": "alpha", "f_alpha": 0.5}),
    ],
)
def test_divergences_agree(theirs, options):
    logp, ref, target = batch()
    expected, _ = trl(logp, ref, target, ["sigmoid"], **theirs)
    agree(ours(logp, ref, target, "sigmoid", **options).loss, expected, logp)


def test_weighting_agrees():
    logp, ref, target = batch()
    squares = -torch.rand(2 * B, T)
    theirs, _ = trl(logp, ref, target, ["sigmoid"], squares)
    found = ours(logp, ref, target, "sigmoid", use_weighting=True, log_sum_squares=squares)
    agree(found.loss, theirs, logp)


def test_metrics_agree():
    logp, ref, target = batch()
    _, theirs = trl(logp, ref, target, ["sigmoid"])
    found = ours(logp, ref, target, "sigmoid").metrics
    names = {
        "rewards_chosen": "rewards/chosen", "rewards_rejected": "rewards/rejected",
        "margin": "rewards/margins", "accuracy": "rewards/accuracies",
        "logp_chosen": "logps/chosen", "logp_rejected": "logps/rejected",
    }  # fmt: skip
    for mine, peer in names.items():
        assert found[mine].item() == pytest.approx(theirs[peer], rel=NEAR), mine


def test_label_smoothing_gives_cdpo_and_trl_ignores_it():
    logp, ref, target = batch()
    chosen, rejected = (logp - ref).sum(1).chunk(2)
    u = BETA * (chosen - rejected)
    cdpo = -((1 - SMOOTHING) * F.logsigmoid(u) + SMOOTHING * F.logsigmoid(-u)).mean()
    found = ours(logp, ref, target, "sigmoid", label_smoothing=SMOOTHING).loss
    torch.testing.assert_close(found, cdpo)
    theirs, _ = trl(logp, ref, target, ["sigmoid"])
    torch.testing.assert_close(theirs, -F.logsigmoid(u).mean())


def test_discopop_is_finite_where_trl_is_nan():
    """At u = -100 the loss is 100; TRL multiplies inf by 0."""
    target = torch.zeros(2, 1, dtype=torch.int64)
    ref = torch.zeros(2, 1)
    logp = torch.tensor([[-100 / BETA], [0.0]])
    theirs, _ = trl(logp, ref, target, ["discopop"])
    assert theirs.isnan()
    assert ours(logp, ref, target, "discopop").loss.item() == pytest.approx(100.0, rel=NEAR)
