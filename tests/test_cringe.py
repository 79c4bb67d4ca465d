"""CRINGE: losses on log-probs, sampling of rivals, modules compared with whole logits, properties."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from sukhops import reference
from sukhops.losses import cringe_loss, pairwise_cringe_loss
from sukhops.losses.cringe import sample_rival
from sukhops.nn import CringeLoss, PairwiseCringeLoss
from sukhops.testing import assert_close


def model_batch(b=4, t=6, d=8, v=30, dtype=torch.float64):
    target = torch.randint(0, v, (b, t))
    target[:, :2] = -100
    return {
        "hidden": torch.randn(b, t, d, dtype=dtype).requires_grad_(),
        "weight": torch.randn(v, d, dtype=dtype).requires_grad_(),
        "target": target,
        "bias": torch.randn(v, dtype=dtype).requires_grad_(),
    }


LABEL = torch.tensor([1, 0, -1, 0])


def by_hand(hidden, weight, target, label, bias, alpha):
    """The loss with k = 1, computed from whole logits token by token."""
    logits = hidden @ weight.T + bias
    total, count = 0.0, 0
    for b in range(target.shape[0]):
        for t in range(target.shape[1]):
            y = target[b, t].item()
            if y == -100:
                continue
            count += 1
            x = logits[b, t]
            if label[b] == 0:
                rival = torch.cat([x[:y], x[y + 1 :]]).max()
                total = total + alpha * torch.log(1 + torch.exp(x[y] - rival))
            else:
                total = total - (x[y] - torch.log(torch.exp(x).sum()))
    return total / count


def test_equals_the_formula_on_whole_logits():
    given = model_batch()
    ours = CringeLoss(alpha=0.7)(**given, label=LABEL).loss
    exact = by_hand(**given, label=LABEL, alpha=0.7)
    assert ours.item() == pytest.approx(exact.item(), rel=1e-12)
    leaves = [given[n] for n in ("hidden", "weight", "bias")]
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(exact, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("k", [1, 4])
def test_gradcheck_through_the_head(k, detach):
    given = model_batch(t=4, d=3, v=9)

    def f(hidden, weight, bias):
        fixed = torch.Generator().manual_seed(5)
        changed = {"hidden": hidden, "weight": weight, "bias": bias}
        return CringeLoss(0.8, k)(**(given | changed), label=LABEL, generator=fixed).loss

    assert gradcheck(f, (given["hidden"], given["weight"], given["bias"]))
    loss = CringeLoss(0.8, k, detach_positive=detach)(**given, label=torch.zeros(4, dtype=torch.int64)).loss
    (grad,) = torch.autograd.grad(loss, given["bias"])
    assert (
        grad.sum().abs() < 1e-12
    ) != detach  # the gradient of a row of logits sums to 0 unless detach_positive


def test_sampling_never_takes_the_target_and_follows_the_softmax():
    k, n = 4, 40_000
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -1.0])
    for y in (1, 5):  # one target among the k + 1 largest logits, one not
        values, indices = logits.topk(k + 1)
        index = sample_rival(
            values.expand(n, -1), indices.expand(n, -1), torch.full((n,), y),
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        tokens = indices[index]
        pool = [i for i in indices.tolist() if i != y][:k]
        assert set(tokens.tolist()) == set(pool)
        p = F.softmax(logits[pool].double(), 0)
        counts = torch.tensor([(tokens == i).sum() for i in pool]).double()
        chi2 = ((counts - n * p) ** 2 / (n * p)).sum()
        assert chi2 < 16.3  # 0.999 quantile of chi-square with 3 degrees of freedom


def test_sampling_is_reproducible_and_independent_of_row_order():
    given = model_batch()
    loss = CringeLoss(k=5)

    def run(seed):
        return loss(**given, label=LABEL, generator=torch.Generator().manual_seed(seed)).loss.item()

    assert run(3) == run(3)
    assert len({run(seed) for seed in range(8)}) > 1
    values = torch.randn(50, 5).sort(descending=True).values
    indices, target, noise = torch.arange(5).expand(50, 5), torch.arange(50) % 5, torch.rand(50, 5)
    order = torch.randperm(50)
    whole = sample_rival(values, indices, target, noise)
    assert torch.equal(sample_rival(values[order], indices, target[order], noise[order]), whole[order])


def test_properties_of_the_contrast():
    gap = torch.tensor([[0.0, 3.0, -3.0]], dtype=torch.float64)
    target = torch.zeros(1, 3, dtype=torch.int64)
    zero = torch.zeros_like(gap)
    tie = cringe_loss(zero[:, :1], gap[:, :1], target[:, :1], torch.tensor([0])).loss
    assert tie.item() == pytest.approx(math.log(2))
    ahead = cringe_loss(zero[:, :1], gap[:, 1:2], target[:, :1], torch.tensor([0])).loss
    assert ahead >= 3.0
    given = model_batch()
    logp = reference.linear_logp(**given)
    positive = CringeLoss()(**given, label=torch.ones(4, dtype=torch.int64)).loss
    counted = (given["target"] != -100).sum()
    assert positive.item() == pytest.approx((-logp.sum() / counted).item(), rel=1e-12)
    plain = CringeLoss(alpha=0.0)(**given, label=LABEL).loss
    expected = -(logp[LABEL != 0].sum()) / counted
    assert plain.item() == pytest.approx(expected.item(), rel=1e-12)


def test_negative_token_costs_one_product_and_changes_two_weight_rows():
    given = {n: t.detach().float().requires_grad_(t.requires_grad) if t.is_floating_point() else t
             for n, t in model_batch(v=50).items()}  # fmt: skip
    given["target"][:] = -100
    given["target"][1, 3] = 7
    before = torch.ops.sukhops.product_count()
    loss = CringeLoss(k=5)(**given, label=LABEL).loss
    loss.backward()
    assert torch.ops.sukhops.product_count() - before == 1
    rows = given["weight"].grad.abs().sum(1).nonzero().flatten().tolist()
    assert len(rows) == 2 and 7 in rows
    torch.testing.assert_close(given["weight"].grad.sum(0), torch.zeros(8), rtol=0, atol=1e-6)


@pytest.mark.parametrize("v", [1, 2, 3])
def test_small_vocabularies(v):
    given = model_batch(v=v)
    out = CringeLoss(k=5)(**given, label=LABEL)
    grads = torch.autograd.grad(out.loss, (given["hidden"], given["weight"], given["bias"]))
    assert torch.isfinite(out.loss) and all(torch.isfinite(g).all() for g in grads)
    if v == 1:
        assert out.metrics["ct"] == 0
    if v == 2:
        assert out.loss.item() == pytest.approx(by_hand(**given, label=LABEL, alpha=1.0).item(), rel=1e-12)


@pytest.mark.parametrize("k", [1, 2])
def test_target_is_never_the_rival(k):
    """All other tokens have a logit of -inf, so no margin is large enough."""
    bias, target = torch.tensor([0.0, -torch.inf, -torch.inf]), torch.zeros(4).long()
    out = CringeLoss(k=k)(torch.randn(4, 5), torch.randn(3, 5), target, target, bias=bias)
    assert out.loss == torch.inf and out.metrics["accuracy"] == 0


def test_all_targets_ignored_gives_zero():
    given = model_batch()
    given["target"][:] = -100
    for out in (CringeLoss(k=3)(**given, label=LABEL), PairwiseCringeLoss(k=3)(**given)):
        grads = torch.autograd.grad(out.loss, (given["hidden"], given["weight"]))
        assert out.loss == 0 and all((g == 0).all() for g in grads)
    given = model_batch()
    for label in (0, 1):
        out = CringeLoss()(**given, label=torch.full((4,), label))
        assert torch.isfinite(out.loss) and all(torch.isfinite(m) for m in out.metrics.values())


def test_labels_per_token():
    given = model_batch()
    tokens = LABEL.unsqueeze(1).expand(4, 6)
    loss = CringeLoss()
    assert loss(**given, label=tokens).loss == loss(**given, label=LABEL).loss
    flat = {"hidden": given["hidden"].flatten(0, 1), "target": given["target"].flatten()}
    same = loss(**(given | flat), label=tokens.flatten()).loss
    assert same.item() == pytest.approx(loss(**given, label=LABEL).loss.item(), rel=1e-12)


@pytest.mark.parametrize("detach", [False, True])
def test_pairwise_equals_the_formula_on_whole_logits(detach):
    given = model_batch()
    given["target"][3, 3:] = -100
    loss = PairwiseCringeLoss(0.6, margin=-0.5, temperature=4.0, detach_gate=detach)
    ours = loss(**given).loss
    logits = given["hidden"] @ given["weight"].T + given["bias"]
    target, total = given["target"], 0.0
    for w, rejected in ((0, 2), (1, 3)):
        sums, ce, ct = [], 0.0, 0.0
        for b in (w, rejected):
            keep = [t for t in range(6) if target[b, t] != -100]
            picked = [logits[b, t].log_softmax(0)[target[b, t]] for t in keep]
            sums.append(sum(picked))
            if b == w:
                ce = -sum(picked) / len(keep)
                continue
            for t in keep:
                rest = logits[b, t].clone()
                rest[target[b, t]] = -torch.inf
                ct = ct + F.softplus(logits[b, t, target[b, t]] - rest.max()) / len(keep)
        gate = torch.sigmoid((-0.5 - (sums[0] - sums[1])) / 4.0)
        total = total + (gate.detach() if detach else gate) * (ce + 0.6 * ct) / 2
    assert ours.item() == pytest.approx(total.item(), rel=1e-12)
    leaves = [given[n] for n in ("hidden", "weight", "bias")]
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_pairwise_products_and_packing():
    given = {n: t.detach().float().requires_grad_(t.requires_grad) if t.is_floating_point() else t
             for n, t in model_batch().items()}  # fmt: skip
    rejected = given | {"target": given["target"].clone()}
    rejected["target"][: len(rejected["target"]) // 2] = -100
    # these rows need their softmax only for the gradient of the gate
    for detach, products in ((True, 1), (False, 3)):
        before = torch.ops.sukhops.product_count()
        PairwiseCringeLoss(detach_gate=detach)(**rejected).loss.backward()
        assert torch.ops.sukhops.product_count() - before == products
    given = model_batch()
    packed = given | {"hidden": given["hidden"].flatten(0, 1), "target": given["target"].flatten()}
    cu = torch.arange(0, 25, 6)
    whole, flat = PairwiseCringeLoss()(**given).loss, PairwiseCringeLoss()(**packed, cu_seqlens=cu).loss
    assert flat.item() == pytest.approx(whole.item(), rel=1e-12)


def test_pairwise_gate_closes_and_opens():
    target = torch.zeros(2, 1, dtype=torch.int64)
    gap = torch.zeros(2, 1, dtype=torch.float64)
    for chosen, gate in ((0.0, 1.0), (-2000.0, 0.0)):
        logp = torch.tensor([[-1000.0 - chosen], [-1000.0 + chosen]], dtype=torch.float64)
        out = pairwise_cringe_loss(logp.clamp(max=0), gap, target, temperature=0.5)
        assert torch.isfinite(out.loss)
        assert out.metrics["gate"].item() == pytest.approx(0.5 if chosen == 0 else gate, abs=1e-9)


def test_compiles_fullgraph():
    given = model_batch()
    loss = CringeLoss()
    whole = torch.compile(lambda **g: loss(**g).loss, fullgraph=True)(**given, label=LABEL)
    assert whole.item() == pytest.approx(loss(**given, label=LABEL).loss.item(), rel=1e-12)


def eager(hidden, weight, target, bias, label):
    """The same loss computed from whole logits, k = 1."""
    logp = reference.linear_logp(hidden, weight, target, bias)
    best = reference.linear_topk(hidden, weight, 2, bias)
    rival = torch.where(best.indices[..., 0] == target, best.values[..., 1], best.values[..., 0])
    return cringe_loss(logp, logp + best.lse - rival, target, label).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions(dtype):
    given = model_batch(d=32, v=300)
    given["weight"] = (0.2 * given["weight"].detach()).requires_grad_()
    # far apart, so that rounding does not change their order
    given["bias"] = torch.linspace(-9, 9, 300).flip(0).requires_grad_()
    assert_close(lambda **g: CringeLoss()(**g).loss, eager, given | {"label": LABEL}, dtype)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda g: CringeLoss(alpha=-1.0), "alpha"),
        (lambda g: CringeLoss(k=0), "k"),
        (lambda g: CringeLoss(k=1.5), "k"),
        (lambda g: PairwiseCringeLoss(temperature=0.0), "temperature"),
        (lambda g: PairwiseCringeLoss(margin=math.inf), "margin"),
        (lambda g: CringeLoss()(**g, label=torch.full((4,), 2)), "label"),
        (lambda g: CringeLoss()(**g, label=torch.ones(3, dtype=torch.int64)), "label"),
        (lambda g: CringeLoss()(**(g | {"target": g["target"][:, :5]}), label=LABEL), "target"),
        (
            lambda g: PairwiseCringeLoss()(**{n: t[:3] if t.shape[0] == 4 else t for n, t in g.items()}),
            "target",
        ),
        (lambda g: PairwiseCringeLoss()(**g, cu_seqlens=torch.tensor([0, 4])), "target"),
    ],
)
def test_invalid_arguments(make, name):
    with pytest.raises(ValueError, match=name):
        make(model_batch())


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_no_tokens_give_a_loss_of_zero(shape):
    hidden, target = torch.zeros(*shape, 3), torch.zeros(shape, dtype=torch.int64)
    assert CringeLoss()(hidden, torch.randn(5, 3), target, torch.zeros(shape[0]).long()).loss == 0
    assert PairwiseCringeLoss()(hidden, torch.randn(5, 3), target).loss == 0
