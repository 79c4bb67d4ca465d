"""Every loss on slices of the vocabulary, compared with one process; invalid arguments."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks, outcomes

from sukhops import linear_logp, linear_topk, nn, testing

V, D, S, T = 53, 6, 4, 5
SIZES = {2: [30, 23], 3: [20, 0, 33]}


def make(rank, sizes):
    """Inputs of a rank with its slice of the weights; rank None has the whole vocabulary."""
    g = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    shared = {"hidden": normal(S, T, D), "ref_hidden": normal(S, T, D), "kl_hidden": normal(S, T, D)}
    sliced = {n: normal(V, D) for n in ("weight", "ref_weight", "cls_weight")}
    sliced |= {n: normal(V) for n in ("bias", "ref_bias", "cls_bias")}
    target = torch.randint(0, V, (S, T), generator=g)
    target[:, 0] = -100
    if rank is not None:
        start = sum(sizes[:rank])
        sliced = {n: t[start : start + sizes[rank]].clone() for n, t in sliced.items()}
    given = shared | sliced
    for name in ("hidden", "weight", "cls_weight", "bias", "cls_bias"):
        given[name].requires_grad_()
    return given, target


def preference(loss):
    def call(x, target, **group):
        names = ("ref_hidden", "ref_weight", "ref_bias", "bias")
        return loss(x["hidden"], x["weight"], target, **{n: x[n] for n in names}, **group)

    return call


def kto(loss, *more):
    def call(x, target, **group):
        names = ("ref_hidden", "ref_weight", "ref_bias", "bias", "kl_hidden")
        return loss(
            x["hidden"], x["weight"], target, torch.tensor([1, 0, 1, -1]), *more, kl_target=target.flip(0),
            kl_ref_hidden=x["ref_hidden"], **{n: x[n] for n in names}, **group,
        )  # fmt: skip

    return call


def cringe(loss, *label):
    def call(x, target, **group):
        generator = torch.Generator().manual_seed(2)
        return loss(x["hidden"], x["weight"], target, *label, bias=x["bias"], generator=generator, **group)

    return call


def director(loss, **options):
    def call(x, target, **group):
        label = torch.tensor([1, 0, -1, 1])
        if options:
            pair = (torch.tensor(1.3, dtype=torch.float64), torch.tensor(-0.2, dtype=torch.float64))
            return loss(x["hidden"], x["weight"], None, target, label, cls_affine=pair, **group)
        biases = {"lm_bias": x["bias"], "cls_bias": x["cls_bias"]}
        return loss(x["hidden"], x["weight"], x["cls_weight"], target, label, **biases, **group)

    return call


def segmentation(loss):
    def call(x, target, **group):
        units = torch.randint(-1, V, (S, T, 3), generator=torch.Generator().manual_seed(4))
        units[..., 0] = units[..., 0].abs()
        lengths = torch.tensor([5, 3, 0, 4])
        return loss(x["hidden"], x["weight"], units, bias=x["bias"], lengths=lengths, **group)

    return call


IDS, JUDGED = (
    (torch.arange(T) // 2).expand(S, T),
    torch.tensor([[1, 0, 1], [0, -1, 1], [1, 1, 0], [-1, 0, 1]]),
)
LOSSES = {
    "dpo": preference(nn.DPOLoss()),
    "dpo, weighted": preference(nn.DPOLoss(use_weighting=True)),
    "kto": kto(nn.KTOLoss()),
    "step kto": kto(nn.StepKTOLoss(), IDS, JUDGED),
    "cringe": cringe(nn.CringeLoss(), torch.tensor([1, 0, -1, 0])),
    "cringe, k = 4": cringe(nn.CringeLoss(k=4), torch.tensor([1, 0, -1, 0])),
    "cringe, k > V": cringe(nn.CringeLoss(k=100), torch.tensor([1, 0, -1, 0])),
    "pairwise cringe": cringe(nn.PairwiseCringeLoss(k=3)),
    "director": director(nn.DirectorLoss()),
    "director with its norm": director(nn.DirectorLoss(norm_weight=0.3)),
    "director, shared": director(nn.DirectorLoss(norm_weight=0.3), shared=True),
    "segmentation": segmentation(nn.SegmentationLoss()),
}


def outcome(call, given, target, **group):
    loss, metrics = call(given, target, **group)
    leaves = {n: t for n, t in given.items() if t.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {"loss": loss.detach()} | metrics
    return found | {n: g for n, g in zip(leaves, grads, strict=True) if g is not None}


def losses(rank):
    given, target = make(rank, SIZES[dist.get_world_size()])
    return {n: outcome(call, given, target, group=dist.group.WORLD) for n, call in LOSSES.items()}


ranks = outcomes(losses, SIZES)


@pytest.mark.parametrize("name", LOSSES)
def test_loss(ranks, name):
    given, target = make(None, None)
    whole = outcome(LOSSES[name], given, target)
    for key, exact in whole.items():
        parts = [r[name][key] for r in ranks]
        if key in ("weight", "bias", "cls_weight", "cls_bias"):
            assert testing.distance(torch.cat(parts), exact) < 1e-10, key
        else:
            assert all(torch.equal(p, parts[0]) for p in parts), key
            assert testing.distance(parts[0], exact) < 1e-10, key


# ------------------------------------------------------------------ invalid arguments


def bad(rank, case):
    """A call that must raise on every rank; `case` is the argument that is invalid on one or all ranks."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 4, generator=g), torch.randn(5, 4, generator=g)
    target, group = torch.randint(0, 10, (6,), generator=g), dist.group.WORLD
    odd = rank == 1
    if case == "D":
        return linear_logp(
            hidden[:, :3] if odd else hidden, weight[:, :3] if odd else weight, target, group=group
        )
    if case == "dtype":
        dtype = torch.float64 if odd else torch.float32
        return linear_logp(hidden.to(dtype), weight.to(dtype), target, group=group)
    if case == "rows":
        return linear_logp(hidden[: 5 if odd else 6], weight, target[: 5 if odd else 6], group=group)
    if case == "target":
        return linear_logp(hidden, weight, target + 9, group=group)
    if case == "k":
        return linear_topk(hidden, weight, 11, group=group)
    if case == "empty":
        return linear_logp(hidden, weight[:0], target, group=group)
    if case == "values":
        with testing.compared_ranks():
            return linear_logp(hidden + 1e-6 * odd, weight, target, group=group)
    if case == "label":
        label = torch.full((6,), 2)
        return nn.DirectorLoss()(hidden, weight, weight, target, label, group=group)
    if case == "generator":
        return nn.CringeLoss(k=2)(hidden, weight, target, torch.ones(6).long(), group=group)
    if case == "not in it":
        alone = dist.new_group([0])
        return linear_logp(hidden, weight, target % 5, group=alone)
    return linear_logp(hidden, weight, target, group="world")


BAD = {
    "D": "ValueError: group: expected the same D on all ranks, got [4, 3] by rank",
    "dtype": "ValueError: group: expected the same dtype on all ranks",
    "rows": "ValueError: group: expected the same rows of hidden on all ranks, got [6, 5] by rank",
    "target": "RuntimeError: target: expected values in [0, 10) or ignore_index (-100), got",
    "k": "ValueError: k: expected an int in [1, V = 10], got 11",
    "empty": "ValueError: weight: expected at least one row on some rank",
    "values": "ValueError: group: expected the same values of hidden on all ranks",
    "label": "RuntimeError: label: expected 1, 0 or -1",
    "generator": "ValueError: generator: expected one in the same state on every rank (group",
    "str": "ValueError: group: expected a torch.distributed.ProcessGroup, got str",
}


def bad_calls(rank):
    def attempt(case):
        try:
            return bad(rank, case)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    return {case: attempt(case) for case in [*BAD, "not in it"]}


def test_invalid_arguments_raise_on_every_rank():
    for rank, found in enumerate(on_ranks(2, bad_calls)):
        for case, message in BAD.items():
            assert str(found[case]).startswith(message), (rank, case, found[case])
        assert rank == 0 or "that this process is not in" in found["not in it"], found["not in it"]


def one_fails(rank):
    if rank == 1:
        raise ValueError("an error on this rank only")
    return linear_logp(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2).long(), group=dist.group.WORLD)


def test_failed_rank_does_not_hang_the_others():
    waiting, failed = on_ranks(2, one_fails)
    assert failed == "ValueError: an error on this rank only"
    assert waiting.startswith("RuntimeError: group: not every rank took part in this call")


def backward_without_group(rank):
    hidden = torch.randn(2, 3, requires_grad=True)
    group = dist.new_group([0, 1])
    logp = linear_logp(hidden, torch.randn(4, 3), torch.zeros(2).long(), group=group)
    dist.destroy_process_group(group)
    del group
    logp.sum().backward()


def test_backward_after_the_group_was_destroyed_raises():
    for found in on_ranks(2, backward_without_group):
        assert "group: it was destroyed before the backward" in found
