"""kto_loss, step_kto_loss and helpers on log-probs: closed forms in plain Python, and properties."""

import math
import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck

from sukhops.losses import Mismatched, kto_loss, mismatched, step_ids, step_kto_loss

BETA = 0.3


def s(x):
    return 1 / (1 + math.exp(-x))


def batch(b=5, t=7, v=40, prompt=2):
    target = torch.randint(0, v, (b, t))
    target[:, :prompt] = -100
    target[0, 5:] = -100
    logp, ref = (-3 * torch.rand(b, t, dtype=torch.float64) for _ in range(2))
    return logp.requires_grad_(), target, torch.arange(b) % 2 == 0, ref


def ratios(logp, target, ref):
    keep = (target != -100).double()
    return ((logp - ref) * keep).sum(1).tolist()


def test_hand_computed_values_and_gradients():
    logp, target, desirable, ref = batch()
    z, good, bad = 0.4, 1.3, 0.7
    out = kto_loss(
        logp, target, desirable, ref, kl=z, beta=BETA, desirable_weight=good, undesirable_weight=bad
    )
    expected, slopes = 0.0, []
    for r, d in zip(ratios(logp, target, ref), desirable.tolist(), strict=True):
        x = BETA * (r - z)
        expected += (good * (1 - s(x)) if d else bad * (1 - s(-x))) / 5
        slopes.append((-good if d else bad) * BETA * s(x) * s(-x) / 5)
    assert out.loss.item() == pytest.approx(expected, rel=1e-12)
    (grad,) = torch.autograd.grad(out.loss, logp)
    wanted = torch.tensor(slopes).double().unsqueeze(1) * (target != -100)
    torch.testing.assert_close(grad, wanted, rtol=1e-6, atol=1e-9)
    r = torch.tensor(ratios(logp, target, ref))
    assert out.metrics["rewards_desirable"].item() == pytest.approx(BETA * r[::2].mean().item(), rel=1e-6)
    assert out.metrics["rewards_undesirable"].item() == pytest.approx(BETA * r[1::2].mean().item(), rel=1e-6)
    assert (out.metrics["count_desirable"], out.metrics["count_undesirable"]) == (3, 2)


def test_policy_equal_to_reference():
    logp, target, desirable, _ = batch()
    kl = Mismatched(target, logp, logp.detach())
    out = kto_loss(logp, target, desirable, logp.detach(), kl=kl, beta=BETA, undesirable_weight=3.0)
    assert out.loss.item() == pytest.approx((3 * 1 + 2 * 3) / 5 / 2) and out.metrics["kl"] == 0
    (grad,) = torch.autograd.grad(out.loss, logp)
    sums = grad.sum(1) / (target != -100).sum(1)
    expected = torch.where(desirable, -BETA / 4, 3 * BETA / 4) / 5
    torch.testing.assert_close(sums, expected.double(), rtol=1e-6, atol=0)


def test_reference_point_is_the_clamped_mean_and_has_no_gradient():
    logp, target, desirable, ref = batch()
    for shift in (2.0, -2.0):  # means above and below 0
        other = (ref + shift).requires_grad_()
        out = kto_loss(logp, target, desirable, ref, kl=Mismatched(target, other, ref), beta=BETA)
        mean = sum(ratios(other, target, ref)) / 5
        assert out.metrics["kl"].item() == pytest.approx(max(0.0, mean), rel=1e-9)
        assert torch.autograd.grad(out.loss, other, allow_unused=True) == (None,)
    given = torch.tensor(-1.0, requires_grad=True)
    out = kto_loss(logp, target, desirable, ref, kl=given)
    assert out.metrics["kl"] == 0 and not out.metrics["kl"].requires_grad
    assert kto_loss(logp, target, desirable, ref, kl=-1).loss == out.loss


def test_label_flip_and_bounds():
    logp, target, desirable, ref = batch()
    zero = torch.zeros_like(ref)
    ratio = logp.detach() - ref
    flipped = kto_loss(-ratio, target, ~desirable, zero, kl=0).loss
    assert flipped.item() == pytest.approx(kto_loss(ratio, target, desirable, zero, kl=0).loss.item())
    assert 0 < flipped < 1


def test_saturated_and_missing_classes():
    logp, target, desirable, ref = batch()
    extreme = (ref + torch.where(desirable, 1e4, -1e4).unsqueeze(1)).requires_grad_()
    out = kto_loss(extreme, target, desirable, ref, kl=0)
    assert out.loss == 0 and torch.autograd.grad(out.loss, extreme)[0].abs().max() == 0
    for only in (torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)):
        out = kto_loss(logp, target, only, ref, kl=0.1)
        assert all(torch.isfinite(m) for m in out.metrics.values()) and out.loss > 0
    one = kto_loss(logp[:1], target[:1], desirable[:1], ref[:1], kl=0.1)
    assert torch.isfinite(one.loss)
    none = kto_loss(logp[:0], target[:0], desirable[:0], ref[:0], kl=0.1)
    assert none.loss == 0
    unlabeled = kto_loss(logp, target, torch.full((5,), -1), ref, kl=0.1)
    assert unlabeled.loss == 0 and torch.autograd.grad(unlabeled.loss, logp)[0].abs().max() == 0
    empty = target.clone()
    empty[1] = -100
    out = kto_loss(logp, empty, desirable, ref, kl=0.0)
    assert torch.isfinite(out.loss) and torch.autograd.grad(out.loss, logp)[0][1].abs().max() == 0


def test_packed_equals_padded_and_sums_equal_tokens():
    logp, target, desirable, ref = batch()
    whole = kto_loss(logp, target, desirable, ref, kl=0.2)
    cu = torch.arange(0, 36, 7)
    packed = kto_loss(logp.flatten(), target.flatten(), desirable, ref.flatten(), kl=0.2, cu_seqlens=cu)
    assert packed.loss.item() == pytest.approx(whole.loss.item(), rel=1e-12)
    summed = (ref * (target != -100)).sum(1)
    assert kto_loss(logp, target, desirable, summed, kl=0.2).loss.item() == pytest.approx(whole.loss.item())


def test_gradcheck():
    logp, target, desirable, ref = batch()
    ids = (torch.arange(7) // 3).expand(5, 7).clone()
    labels = torch.tensor([[1, 0, -1], [0, 0, 1], [-1, -1, -1], [1, 1, 1], [0, 1, 0]])
    assert gradcheck(lambda x: kto_loss(x, target, desirable, ref, kl=0.2).loss, logp)
    for reduction in ("batch", "sequence"):

        def f(x, reduction=reduction):
            options = {"kl": 0.2, "step_kl": 0.1, "step_reduction": reduction}
            return step_kto_loss(x, target, desirable, ids, labels, ref, **options).loss

        assert gradcheck(f, logp)


def test_step_terms_match_a_loop():
    logp, target, desirable, ref = batch()
    ids = torch.tensor([-1, -1, 0, 0, 1, 1, 3]).expand(5, 7)
    labels = torch.tensor([[1, 0, 1, 1], [0, 1, 1, -1], [-1, -1, -1, -1], [1, 1, 1, 0], [0, 0, 0, 0]])
    outcome = kto_loss(logp, target, desirable, ref, kl=0.3, beta=BETA, undesirable_weight=2.0).loss
    per_row = []
    for b in range(5):
        row = []
        for step in range(4):
            tokens = [t for t in range(7) if ids[b, t] == step and target[b, t] != -100]
            if labels[b, step] == -1 or not tokens:
                continue
            r = sum((logp[b, t] - ref[b, t]).item() for t in tokens)
            x = 0.8 * (r - 0.1)
            row.append(1 - s(x) if labels[b, step] == 1 else 2.0 * (1 - s(-x)))
        per_row.append(row)
    every = [x for row in per_row for x in row]
    means = [sum(row) / len(row) for row in per_row if row]
    for reduction, mean in (("batch", sum(every) / len(every)), ("sequence", sum(means) / len(means))):
        out = step_kto_loss(
            logp, target, desirable, ids, labels, ref, kl=0.3, step_kl=0.1, beta=BETA, step_beta=0.8,
            step_weight=0.5, step_reduction=reduction, undesirable_weight=2.0,
        )  # fmt: skip
        assert out.loss.item() == pytest.approx(outcome.item() + 0.5 * mean, rel=1e-9)
        assert out.metrics["step_loss"].item() == pytest.approx(mean, rel=1e-9)
        assert out.metrics["right_steps"] + out.metrics["wrong_steps"] == len(every)


def test_step_kto_properties():
    logp, target, desirable, ref = batch()
    ids, labels = torch.zeros(5, 7, dtype=torch.int64), desirable.long().unsqueeze(1)
    kto = kto_loss(logp, target, desirable, ref, kl=0.3).loss.item()
    without = step_kto_loss(logp, target, desirable, ids, labels, ref, kl=0.3, step_weight=0.0)
    assert without.loss.item() == kto
    whole = step_kto_loss(logp, target, desirable, ids, labels, ref, kl=0.3)
    assert whole.loss.item() == pytest.approx(2 * kto, rel=1e-12)
    skipped = step_kto_loss(logp, target, torch.full((5,), -1), ids, -torch.ones_like(labels), ref, kl=0.3)
    assert skipped.loss == 0 and torch.autograd.grad(skipped.loss, logp)[0].abs().max() == 0
    steps_only = step_kto_loss(logp, target, torch.full((5,), -1), ids, labels, ref, kl=0.3)
    assert steps_only.loss.item() == pytest.approx(kto, rel=1e-12)
    two = (torch.arange(7) >= 4).long().expand(5, 7)
    split = step_kto_loss(logp, target, desirable, two, labels.expand(5, 2), ref, kl=0.3)
    assert split.loss.item() != pytest.approx(whole.loss.item(), rel=1e-6)  # two steps are not equal to one


def test_step_reference_point_from_the_mismatched_batch():
    logp, target, desirable, ref = batch()
    ids = torch.tensor([-1, -1, 0, 0, 1, 1, 3]).expand(5, 7)
    labels = torch.ones(5, 4, dtype=torch.int64)
    kl = Mismatched(target, ref + 1.0, ref, None, ids)
    out = step_kto_loss(logp, target, desirable, ids, labels, ref, kl=kl)
    counts = [
        sum(1 for t in range(7) if ids[b, t] == i and target[b, t] != -100)
        for b in range(5)
        for i in (0, 1, 3)
    ]
    counts = [c for c in counts if c]
    assert out.metrics["step_kl"].item() == pytest.approx(sum(counts) / len(counts), rel=1e-9)
    cu = torch.arange(0, 36, 7)
    flat = Mismatched(target.flatten(), (ref + 1.0).flatten(), ref.flatten(), cu, ids.flatten())
    packed = step_kto_loss(
        logp.flatten(),
        target.flatten(),
        desirable,
        ids.flatten(),
        labels,
        ref.flatten(),
        kl=flat,
        cu_seqlens=cu,
    )
    assert packed.loss.item() == pytest.approx(out.loss.item(), rel=1e-12)


def test_mismatched_combines_each_prompt_with_the_next_completion():
    target = torch.tensor([[-100, 1, 2, -100], [-100, -100, 3, 4], [5, 6, 7, -100]])
    ids = torch.tensor([[90, 91, 1, 2], [80, 81, 82, 3], [70, 5, 6, 7]])
    kl_ids, kl_target = mismatched(target, ids, pad_id=0)
    assert kl_target.tolist() == [[-100, 3, 4, -100, -100], [-100, -100, 5, 6, 7], [1, 2, -100, -100, -100]]
    assert kl_ids.tolist() == [[90, 91, 3, 0, 0], [80, 81, 82, 5, 6], [70, 1, 0, 0, 0]]
    same = torch.tensor([[-100, 1, 2], [-100, 3, 4], [-100, 5, 6]])
    assert torch.equal(mismatched(same), same.roll(-1, 0))
    with pytest.raises(ValueError, match="target"):
        mismatched(target[:1])
    with pytest.raises(ValueError, match="ids"):
        mismatched(target, ids[:, :2])
    none = torch.full((2, 3), -100)
    assert torch.equal(mismatched(none), none)


def test_mismatched_equals_a_loop():
    g = torch.Generator().manual_seed(3)
    for _ in range(20):
        b, t = 4, 9
        target, ids = torch.full((b, t), -100), torch.zeros(b, t, dtype=torch.int64)
        prompts, answers = [], []
        for i in range(b):
            p, n = (int(torch.randint(1, 5, (), generator=g)) for _ in range(2))
            prompts.append(torch.randint(100, 200, (p,), generator=g).tolist())
            answers.append(torch.randint(1, 99, (n,), generator=g).tolist())
            row = prompts[i] + answers[i]
            ids[i, : len(row) - 1] = torch.tensor(row[:-1])
            target[i, p - 1 : p - 1 + n] = torch.tensor(answers[i])
        kl_ids, kl_target = mismatched(target, ids)
        for i in range(b):
            row = prompts[i] + answers[(i + 1) % b]
            assert kl_ids[i, : len(row) - 1].tolist() == row[:-1]
            assert kl_target[i, len(prompts[i]) - 1 : len(row) - 1].tolist() == answers[(i + 1) % b]
            assert (kl_target[i] != -100).sum() == len(answers[(i + 1) % b])


def test_step_ids_from_tokens_and_characters():
    target = torch.tensor([[-100, 1, 2, 3, 4], [5, 6, 7, -100, -100]])
    spans = [[(0, 2), (2, 4)], [(1, 3)]]
    assert step_ids(spans, target).tolist() == [[-1, 0, 1, 1, -1], [-1, 0, 0, -1, -1]]
    offsets = torch.tensor(
        [[[0, 3], [3, 5], [5, 9], [9, 10], [10, 12]], [[0, 1], [1, 4], [4, 8], [8, 8], [8, 8]]]
    )
    found = step_ids([[(0, 5), (5, 10)], [(1, 8)]], target, offsets)
    assert found.tolist() == [[-1, 0, 1, 1, -1], [-1, 0, 0, -1, -1]]
    for bad in ([[(2, 1)], []], [[(0, 3), (2, 4)], []], [[(0, 6)], []], [[]]):
        with pytest.raises(ValueError, match="spans"):
            step_ids(bad, target)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"beta": 0.0}, "beta", ValueError),
        ({"beta": math.nan}, "beta", ValueError),
        ({"desirable_weight": -1.0}, "desirable_weight", ValueError),
        ({"kl": torch.zeros(5)}, "kl", ValueError),
        ({"kl": "0"}, "kl", TypeError),
        ({"desirable": torch.full((5,), 2)}, "desirable", ValueError),
        ({"desirable": torch.ones(5)}, "desirable", TypeError),
        ({"desirable": torch.ones(4, dtype=torch.bool)}, "desirable", ValueError),
        ({"ref_logp": torch.zeros(4)}, "ref_logp", ValueError),
        ({"logp": torch.zeros(5, 6)}, "logp", ValueError),
        ({"cu_seqlens": torch.tensor([0, 5])}, "target", ValueError),
        ({"gamma": 1.0}, "gamma", TypeError),
    ],
)
def test_invalid_arguments(change, name, error):
    logp, target, desirable, ref = batch()
    given = {"logp": logp, "target": target, "desirable": desirable, "ref_logp": ref, "kl": 0.1}
    with pytest.raises(error, match=name):
        kto_loss(**(given | change))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"step_labels": torch.full((5, 2), 2)}, "step_labels"),
        ({"step_labels": torch.ones(4, 2, dtype=torch.int64)}, "step_labels"),
        ({"step_ids": torch.full((5, 7), 2)}, "step_ids"),
        ({"step_ids": torch.full((5, 7), -2)}, "step_ids"),
        ({"step_ids": torch.zeros(5, 6, dtype=torch.int64)}, "step_ids"),
        ({"ref_logp": torch.zeros(5, dtype=torch.float64)}, "ref_logp"),
        ({"step_beta": 0.0}, "step_beta"),
        ({"step_weight": -1.0}, "step_weight"),
        ({"step_reduction": "mean"}, "step_reduction"),
    ],
)
def test_invalid_step_arguments(change, name):
    logp, target, desirable, ref = batch()
    given = {
        "logp": logp, "target": target, "desirable": desirable, "ref_logp": ref, "kl": 0.1,
        "step_ids": torch.zeros(5, 7, dtype=torch.int64), "step_labels": torch.ones(5, 2, dtype=torch.int64),
    }  # fmt: skip
    with pytest.raises(ValueError, match=name):
        step_kto_loss(**(given | change))


RANK = """
import sys, torch
from sukhops import losses

store, rank = sys.argv[1], int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
target, ref = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1)
kl = losses.Mismatched(target, ref + (3.0 if rank == 0 else -1.0), ref)
print(losses.kto_loss(ref, target, torch.tensor([True, False]), ref, kl=kl).metrics["kl"].item())
torch.distributed.destroy_process_group()
"""


def test_kl_is_averaged_over_ranks_before_the_clamp(tmp_path):
    """Ranks with means 3 and -1 both get the reference point 1."""
    command = [sys.executable, "-c", RANK, str(tmp_path / "store")]
    ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    assert [r.communicate(timeout=120)[0].strip() for r in ranks] == ["1.0", "1.0"]


def test_mismatched_empty_sequences():
    ids = torch.zeros(2, 0, dtype=torch.int64)
    assert mismatched(ids).shape == (2, 0)
    assert [t.shape for t in mismatched(ids, ids)] == [(2, 0), (2, 0)]
