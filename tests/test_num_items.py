"""num_items: losses of micro-batches, each divided by the count of the whole batch, add up to its loss."""

import pytest
import torch
from ranks import on_ranks

from sukhops import losses, nn

D, V, T = 6, 11, 5
# three steps, each with sums over rows, tokens and vocabulary
ROUNDING = 3 * 8 * T * V * torch.finfo(torch.float64).eps


def hidden(rows):
    return torch.randn(rows, T, D, dtype=torch.float64)


def targets(rows):
    target = torch.randint(0, V, (rows, T))
    target[:, 0] = -100
    target[rows // 2 :, 3:] = -100  # the parts have different counts
    return target


def pairs_in(batch, part, parts):
    """The chosen and rejected sequences of one part of the pairs."""
    pair = torch.arange(len(batch) // 2).chunk(parts)[part]
    return batch[torch.cat([pair, pair + len(batch) // 2])]


def rows_in(batch, part, parts):
    return batch.chunk(parts)[part]


def units(rows):
    ids = torch.randint(0, V, (rows, T, 2))
    ids[:, ::2, 1] = -1
    return ids


def labels(rows):
    return torch.arange(rows) % 2


def tokens(given):
    return (given["target"] != -100).sum()


def half(given):
    return len(given["target"]) // 2


def completions(given):
    return len(given["target"])


def symbols(given):
    return given["unit_ids"].shape[0] * T


# loss, other tensors of the batch, function that splits it, function that counts its items
CASES = {
    "dpo": (nn.DPOLoss(), lambda: {"target": targets(8), "ref_logp": -torch.rand(8)}, pairs_in, half),
    "kto": (
        nn.KTOLoss(),
        lambda: {"target": targets(8), "desirable": labels(8) == 1, "ref_logp": -torch.rand(8)},
        rows_in, completions,
    ),
    "cringe": (nn.CringeLoss(), lambda: {"target": targets(8), "label": labels(8)}, rows_in, tokens),
    "pairwise cringe": (nn.PairwiseCringeLoss(), lambda: {"target": targets(8)}, pairs_in, half),
    "director": (nn.DirectorLoss(), lambda: {"target": targets(8), "label": labels(8) - 1}, rows_in, tokens),
    "segmentation": (nn.SegmentationLoss(), lambda: {"unit_ids": units(8)}, rows_in, symbols),
    "flat": (nn.SegmentationLoss(flat=True), lambda: {"unit_ids": units(8)}, rows_in, symbols),
}  # fmt: skip
STEPS = {
    "target": targets(4), "desirable": labels(4), "step_ids": torch.zeros(4, T, dtype=torch.int64),
    "step_labels": labels(4)[:, None], "ref_logp": -torch.rand(4, T), "kl": 0.1,
}  # fmt: skip


def call(name, weights, batch, num_items=None):
    """The loss of a batch; Director takes two weights, KTO a reference point."""
    extra = {"kl": 0.1} if name == "kto" else {}
    rest = {n: t for n, t in batch.items() if n != "hidden"}
    if name == "director":
        return CASES[name][0](batch["hidden"], *weights, **rest, num_items=num_items)
    return CASES[name][0](batch["hidden"], weights[0], **rest, **extra, num_items=num_items)


def make(name):
    torch.manual_seed(3)
    _, batch, cut, count = CASES[name]
    given = {"hidden": hidden(8), **batch()}
    weights = [
        torch.randn(V, D, dtype=torch.float64, requires_grad=True) for _ in range(1 + (name == "director"))
    ]
    return given, weights, cut, int(count(given))


def steps(weights, gradients):
    """Three steps of gradient descent."""
    for _ in range(3):
        found = gradients(weights)
        weights = [(w - 0.3 * g).detach().requires_grad_() for w, g in zip(weights, found, strict=True)]
    return weights


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_micro_batches_train_like_the_whole_batch(name, parts):
    given, weights, cut, count = make(name)

    def whole(weights):
        return torch.autograd.grad(call(name, weights, given).loss, weights)

    def accumulated(weights):
        total = 0
        for part in range(parts):
            batch = {n: cut(t, part, parts) for n, t in given.items()}
            total = total + call(name, weights, batch, num_items=torch.tensor(count)).loss
        return torch.autograd.grad(total, weights)

    for a, b in zip(steps(weights, whole), steps(weights, accumulated), strict=True):
        torch.testing.assert_close(a, b, rtol=ROUNDING, atol=ROUNDING)


def averaged(rank, name):
    """Trains on one of two ranks whose gradients are averaged."""
    given, weights, cut, count = make(name)
    batch = {n: cut(t, rank, 2) for n, t in given.items()}

    def mean(weights):
        found = torch.autograd.grad(call(name, weights, batch, num_items=count / 2).loss, weights)
        for g in found:
            torch.distributed.all_reduce(g)
        return [g / 2 for g in found]

    return [w.detach() for w in steps(weights, mean)]


@pytest.mark.parametrize("name", ["dpo", "cringe"])
def test_two_ranks_train_as_one(name):
    given, weights, *_ = make(name)
    alone = steps(weights, lambda w: torch.autograd.grad(call(name, w, given).loss, w))
    for result in on_ranks(2, averaged, name):
        for a, b in zip(result, alone, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", CASES)
def test_metrics_do_not_depend_on_num_items(name):
    given, weights, _, count = make(name)
    alone, part = call(name, weights, given), call(name, weights, given, num_items=2 * count)
    torch.testing.assert_close(part.loss, alone.loss / 2)
    for key, value in alone.metrics.items():
        torch.testing.assert_close(part.metrics[key], value)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "wrong, error",
    [(0, ValueError), (-3, ValueError), (float("nan"), ValueError), (True, TypeError), ("9", TypeError),
     (torch.ones(2), ValueError)],
)  # fmt: skip
def test_invalid_num_items_raise(name, wrong, error):
    given, weights, *_ = make(name)
    with pytest.raises(error, match="num_items"):
        call(name, weights, given, num_items=wrong)


def test_losses_with_two_counts_raise():
    given, weights, *_ = make("dpo")
    for loss in (nn.DPOLoss(nll_weight=1.0), nn.DPOLoss(loss_type=["sigmoid", "sft"])):
        with pytest.raises(ValueError, match="num_items"):
            loss(given["hidden"], *weights, given["target"], ref_logp=given["ref_logp"], num_items=4)
    with pytest.raises(ValueError, match="num_items"):
        nn.DPOLoss(loss_type="orpo")(given["hidden"], *weights, given["target"], num_items=4)
    logp = -torch.rand(8, T)
    with pytest.raises(ValueError, match="num_items"):
        losses.director_loss(
            logp,
            logp,
            targets(8),
            -torch.ones(8, T, dtype=torch.int64),
            reduction="sum_of_means",
            num_items=3,
        )
    with pytest.raises(ValueError, match="num_items"):
        nn.StepKTOLoss()(hidden(4), *weights, **STEPS, num_items=4)
    alone = nn.StepKTOLoss(step_weight=0.0)(hidden(4).zero_(), *weights, **STEPS)
    part = nn.StepKTOLoss(step_weight=0.0)(hidden(4).zero_(), *weights, **STEPS, num_items=8)
    torch.testing.assert_close(part.loss, alone.loss / 2)
