"""dpo_loss on log-probs, compared with published formulas and derivatives in plain Python."""

import math
from itertools import pairwise

import pytest
import torch

from sukhops import losses
from sukhops.losses._preference import at_most
from sukhops.losses.dpo import EXPONENT_LIMIT

BETA, E = 0.3, 0.1


def s(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def log_s(x):
    return -math.log1p(math.exp(-x)) if x > -700 else x


def ds(x):
    return s(x) * s(-x)


def exo(u):
    q = s(u)
    return q * math.log(q / (1 - E)) + (1 - q) * math.log((1 - q) / E)


def discopop(u):
    m = s(u / 0.05)
    return -log_s(u) * (1 - m) + math.exp(-u) * m


def d_discopop(u):
    m = s(u / 0.05)
    slope = (math.exp(-u) + log_s(u)) * m * (1 - m) / 0.05
    return -s(-u) * (1 - m) - math.exp(-u) * m + slope


def cdpo(u):
    return -(1 - E) * log_s(u) - E * log_s(-u)


# functions of log-ratios a and b and lengths n and m of a pair: loss, d loss / da, d loss / db
H = 1 / (2 * BETA)
TABLE = {
    "sigmoid": (lambda a, b, n, m: -log_s(BETA * (a - b)),
                lambda a, b, n, m: -BETA * s(-BETA * (a - b)),
                lambda a, b, n, m: BETA * s(-BETA * (a - b))),
    "cdpo": (lambda a, b, n, m: cdpo(BETA * (a - b)),
             lambda a, b, n, m: BETA * (s(BETA * (a - b)) - (1 - E)),
             lambda a, b, n, m: -BETA * (s(BETA * (a - b)) - (1 - E))),
    "robust": (lambda a, b, n, m: (E * log_s(BETA * (b - a)) - (1 - E) * log_s(BETA * (a - b))) / (1 - 2 * E),
               lambda a, b, n, m: -BETA * ((1 - E) * s(BETA * (b - a)) + E * s(BETA * (a - b))) / (1 - 2 * E),
               lambda a, b, n, m: BETA * ((1 - E) * s(BETA * (b - a)) + E * s(BETA * (a - b))) / (1 - 2 * E)),
    "hinge": (lambda a, b, n, m: max(0.0, 1 - BETA * (a - b)),
              lambda a, b, n, m: -BETA * (BETA * (a - b) < 1),
              lambda a, b, n, m: BETA * (BETA * (a - b) < 1)),
    "ipo_sum": (lambda a, b, n, m: (a - b - H) ** 2,
                lambda a, b, n, m: 2 * (a - b - H),
                lambda a, b, n, m: -2 * (a - b - H)),
    "ipo": (lambda a, b, n, m: (a / n - b / m - H) ** 2,
            lambda a, b, n, m: 2 * (a / n - b / m - H) / n,
            lambda a, b, n, m: -2 * (a / n - b / m - H) / m),
    "exo_pair": (lambda a, b, n, m: exo(BETA * (a - b)),
                 lambda a, b, n, m: BETA * ds(BETA * (a - b)) * (BETA * (a - b) - math.log((1 - E) / E)),
                 lambda a, b, n, m: -BETA * ds(BETA * (a - b)) * (BETA * (a - b) - math.log((1 - E) / E))),
    "nca_pair": (lambda a, b, n, m: -log_s(BETA * a) - 0.5 * log_s(-BETA * a) - 0.5 * log_s(-BETA * b),
                 lambda a, b, n, m: BETA * (1.5 * s(BETA * a) - 1),
                 lambda a, b, n, m: 0.5 * BETA * s(BETA * b)),
    "bco_pair": (lambda a, b, n, m: -log_s(BETA * a) - log_s(-BETA * b),
                 lambda a, b, n, m: -BETA * s(-BETA * a),
                 lambda a, b, n, m: BETA * s(BETA * b)),
    "sppo_hard": (lambda a, b, n, m: (a - H) ** 2 + (b + H) ** 2,
                  lambda a, b, n, m: 2 * (a - H),
                  lambda a, b, n, m: 2 * (b + H)),
    "apo_zero": (lambda a, b, n, m: 1 - s(BETA * a) + s(BETA * b),
                 lambda a, b, n, m: -BETA * ds(BETA * a),
                 lambda a, b, n, m: BETA * ds(BETA * b)),
    "apo_down": (lambda a, b, n, m: s(BETA * a) + 1 - s(BETA * (a - b)),
                 lambda a, b, n, m: BETA * (ds(BETA * a) - ds(BETA * (a - b))),
                 lambda a, b, n, m: BETA * ds(BETA * (a - b))),
    "discopop": (lambda a, b, n, m: discopop(BETA * (a - b)),
                 lambda a, b, n, m: BETA * d_discopop(BETA * (a - b)),
                 lambda a, b, n, m: -BETA * d_discopop(BETA * (a - b))),
    "sigmoid_norm": (lambda a, b, n, m: -log_s(BETA * (a / n - b / m)),
                     lambda a, b, n, m: -BETA * s(-BETA * (a / n - b / m)) / n,
                     lambda a, b, n, m: BETA * s(-BETA * (a / n - b / m)) / m),
}  # fmt: skip
SMOOTHING = {"cdpo": E, "robust": E, "exo_pair": E}


def batch(b=3, t=6, dtype=torch.float64):
    """Log-probs of 2b sequences of different lengths, policy and reference."""
    target = torch.zeros(2 * b, t, dtype=torch.int64)
    for i in range(2 * b):
        target[i, : 1 + i % 2] = -100
        target[i, t - i % 3 :] = -100
    logp = (-2 * torch.rand(2 * b, t, dtype=dtype)).masked_fill(target == -100, 0)
    ref = (-2 * torch.rand(2 * b, t, dtype=dtype)).masked_fill(target == -100, 0)
    return logp.requires_grad_(), target, ref


def ratios(logp, target, ref):
    """(a, b, n, m) of every pair, in Python floats."""
    sums = (logp.detach() - ref).sum(1).tolist()
    counts = (target != -100).sum(1).tolist()
    half = len(sums) // 2
    return list(zip(sums[:half], sums[half:], counts[:half], counts[half:], strict=True))


@pytest.mark.parametrize("name", TABLE)
def test_values_and_derivatives_match_the_formulas(name):
    logp, target, ref = batch()
    kind = "sigmoid" if name == "cdpo" else name
    out = losses.dpo_loss(
        logp, target, ref, beta=BETA, loss_type=kind, label_smoothing=SMOOTHING.get(name, 0.0)
    )
    (grad,) = torch.autograd.grad(out.loss, logp)
    value, by_a, by_b = TABLE[name]
    pairs = ratios(logp, target, ref)
    assert out.loss.item() == pytest.approx(sum(value(*p) for p in pairs) / 3, rel=1e-12)
    expected = torch.tensor([by_a(*p) / 3 for p in pairs] + [by_b(*p) / 3 for p in pairs]).double()
    expected = expected[:, None].expand_as(grad).masked_fill(target == -100, 0)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-9)


def by_hand(name, logp, target, **options):
    """Losses without a reference model, computed from the sum of each sequence."""
    sums = logp.masked_fill(target == -100, 0).sum(1)
    n = (target != -100).sum(1)
    half = len(sums) // 2
    w, r, nw, nr = sums[:half], sums[half:], n[:half], n[half:]
    nll = -w.sum() / nw.sum()
    if name == "simpo":
        return -torch.log(torch.sigmoid(BETA * (w / nw - r / nr) - options["margin"])).mean()
    if name == "cpo":
        return -torch.log(torch.sigmoid(BETA * (w - r))).mean() + options["nll_weight"] * nll
    if name == "orpo":
        odds = [p / (1 - p) for p in (torch.exp(w / nw), torch.exp(r / nr))]
        return nll - BETA * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1]))).mean()
    return nll


@pytest.mark.parametrize(
    "name, options", [("simpo", {"margin": 0.4}), ("cpo", {"nll_weight": 1.0}), ("orpo", {}), ("sft", {})]
)
def test_losses_without_a_reference(name, options):
    logp, target, _ = batch()
    ours = losses.dpo_loss(logp, target, beta=BETA, loss_type=name, **options).loss
    expected = by_hand(name, logp, target, **options)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, logp), torch.autograd.grad(expected, logp))


def test_aot_sorts_differences_of_policy_and_reference():
    logp, target, ref = batch()
    policy, base = logp.masked_fill(target == -100, 0).sum(1), ref.sum(1)

    def smooth(x):
        return (-(1 - E) * torch.log(torch.sigmoid(x)) - E * torch.log(torch.sigmoid(-x))).mean()

    expected = {
        "aot": smooth(BETA * ((policy[:3] - policy[3:]).sort()[0] - (base[:3] - base[3:]).sort()[0])),
        "aot_unpaired": smooth(BETA * ((policy - base)[:3].sort()[0] - (policy - base)[3:].sort()[0])),
    }
    for name, value in expected.items():
        ours = losses.dpo_loss(logp, target, ref, beta=BETA, loss_type=name, label_smoothing=E).loss
        torch.testing.assert_close(ours, value)
        torch.testing.assert_close(
            torch.autograd.grad(ours, logp), torch.autograd.grad(value, logp, retain_graph=True)
        )
    one = [x[[0, 3]] for x in (logp, target, ref)]
    aot, plain = (losses.dpo_loss(*one, loss_type=t, label_smoothing=E).loss for t in ("aot", "sigmoid"))
    torch.testing.assert_close(aot, plain)  # for a single pair, aot equals sigmoid


EQUAL = {
    "sigmoid": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": 1 / (4 * BETA**2),
    "ipo_sum": 1 / (4 * BETA**2), "nca_pair": 2 * math.log(2), "bco_pair": 2 * math.log(2),
    "sppo_hard": 1 / (2 * BETA**2), "apo_zero": 1.0, "apo_down": 1.0, "sigmoid_norm": math.log(2),
    "aot": math.log(2), "aot_unpaired": math.log(2), "exo_pair": -math.log(2) - 0.5 * math.log(E * (1 - E)),
}  # fmt: skip


@pytest.mark.parametrize("name", EQUAL)
def test_policy_equal_to_reference(name):
    logp, target, _ = batch()
    smoothing = E if name in ("robust", "exo_pair") else 0.0
    out = losses.dpo_loss(logp, target, logp, beta=BETA, loss_type=name, label_smoothing=smoothing)
    assert out.loss.item() == pytest.approx(EQUAL[name], rel=1e-12)
    assert out.metrics["margin"] == 0 and out.metrics["accuracy"] == 0


def at(u, name, dtype=torch.float64, **options):
    """The loss of one pair of single tokens with margin u, and its derivative with respect to u."""
    logp = torch.tensor([[u], [0.0]], dtype=dtype).requires_grad_()
    out = losses.dpo_loss(
        logp,
        torch.zeros(2, 1, dtype=torch.int64),
        torch.zeros_like(logp),
        beta=1.0,
        loss_type=name,
        **options,
    )
    (grad,) = torch.autograd.grad(out.loss, logp)
    return out.loss.item(), grad[0, 0].item()


@pytest.mark.parametrize("u", [-3.0, 0.2, 5.0])
def test_robust_is_unbiased_and_cdpo_swaps(u):
    mixed = (1 - E) * at(u, "robust", label_smoothing=E)[0] + E * at(-u, "robust", label_smoothing=E)[0]
    assert mixed == pytest.approx(at(u, "sigmoid")[0], rel=1e-12)
    swapped = at(-u, "sigmoid", label_smoothing=1 - E)[0]
    assert at(u, "sigmoid", label_smoothing=E)[0] == pytest.approx(swapped, rel=1e-12)


def test_gradients_at_kinks_do_not_depend_on_the_torch_version():
    assert at(1.0, "hinge") == (0.0, 0.0)
    x = torch.tensor([79.0, EXPONENT_LIMIT, 81.0, math.nan], requires_grad=True)
    y = at_most(x, EXPONENT_LIMIT)
    assert torch.equal(y[:3].detach(), torch.tensor([79.0, 80.0, 80.0])) and y[3].isnan()
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.tensor([1.0, 1.0, 0.0, 1.0]))
    # the score of the chosen sequence is exactly at the limit, where the gradient still passes
    value, slope = at(-EXPONENT_LIMIT, "sigmoid", f_divergence="forward_kl")
    assert value == pytest.approx(math.exp(80)) and slope == pytest.approx(-math.exp(80))


def test_stationary_points():
    u = math.log((1 - E) / E)
    assert at(u, "sigmoid", label_smoothing=E)[1] == pytest.approx(0, abs=1e-12)
    assert at(u, "exo_pair", label_smoothing=E) == pytest.approx((0, 0), abs=1e-12)
    assert at(50.0, "robust", label_smoothing=E)[0] < -5  # unbounded below
    assert at(50.0, "sigmoid")[1] < 0


@pytest.mark.parametrize("name", ["sigmoid", "discopop", "exo_pair", "hinge", "apo_down", "bco_pair"])
@pytest.mark.parametrize("u", [-1e4, -100.0, 100.0, 1e4])
def test_large_margins_stay_finite_in_float32(name, u):
    smoothing = E if name == "exo_pair" else 0.0
    value, slope = at(u, name, torch.float32, label_smoothing=smoothing)
    assert math.isfinite(value) and math.isfinite(slope)
    if name == "discopop" and u == -100:
        assert value == 100.0 and slope == -1.0


def test_constant_added_to_both_references_of_a_pair_cancels():
    logp, target, ref = batch()
    base = ref.sum(1)
    shifted = base + torch.tensor([1.5, -2.0, 0.3]).double().repeat(2)
    for name, same in (("sigmoid", True), ("ipo_sum", True), ("nca_pair", False), ("apo_zero", False)):
        x, y = (losses.dpo_loss(logp, target, r, loss_type=name).loss for r in (base, shifted))
        assert torch.allclose(x, y, rtol=1e-12, atol=0) == same


def test_small_beta():
    logp, target, ref = batch()
    out = losses.dpo_loss(logp, target, ref, beta=1e-6)
    assert out.loss.item() == pytest.approx(math.log(2), rel=1e-5)
    (grad,) = torch.autograd.grad(out.loss, logp)
    assert grad[0, 3].item() == pytest.approx(-1e-6 / 2 / 3, rel=1e-5)


def test_length_terms():
    logp, target, ref = batch()
    pairs = ratios(logp, target, ref)
    ours = losses.dpo_loss(logp, target, ref, beta=BETA, length_alpha=0.05).loss
    expected = sum(-log_s(BETA * (a - b) + 0.05 * (n - m)) for a, b, n, m in pairs) / 3
    assert ours.item() == pytest.approx(expected, rel=1e-12)

    def weighted(row, shorter):
        kept = (target[row] != -100).nonzero().flatten().tolist()
        return sum(
            (logp[row, i] - ref[row, i]).item() * (1 if position < shorter else 0.25)
            for position, i in enumerate(kept)
        )

    expected = 0.0
    for i, (_, _, n, m) in enumerate(pairs):
        expected += -log_s(BETA * (weighted(i, min(n, m)) - weighted(i + 3, min(n, m)))) / 3
    out = losses.dpo_loss(logp, target, ref, beta=BETA, ld_alpha=0.25)
    assert out.loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name, alpha", [("forward_kl", 0.5), ("js", 0.5), ("alpha", 0.3), ("alpha", 1.0)])
def test_divergences(name, alpha):
    logp, target, ref = batch()

    def f(r):
        if name == "forward_kl":
            return -math.exp(-r)
        if name == "js":
            return log_s(r)
        return r if alpha == 1 else math.exp((alpha - 1) * r) / (alpha - 1)

    options = {"f_alpha": alpha} if name == "alpha" else {}
    out = losses.dpo_loss(logp, target, ref, beta=BETA, f_divergence=name, **options)
    expected = sum(-log_s(BETA * (f(a) - f(b))) for a, b, *_ in ratios(logp, target, ref)) / 3
    assert out.loss.item() == pytest.approx(expected, rel=1e-12)
    far = losses.dpo_loss(1e4 * logp.float(), target, ref.float(), f_divergence=name, **options).loss
    assert torch.isfinite(far) and torch.isfinite(torch.autograd.grad(far, logp)[0]).all()


def test_several_types_and_the_nll():
    logp, target, ref = batch()
    mixed = losses.dpo_loss(
        logp, target, ref, loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]
    ).loss
    single = [losses.dpo_loss(logp, target, ref, loss_type=t).loss for t in ("sigmoid", "bco_pair")]
    nll = losses.dpo_loss(logp, target, loss_type="sft").loss
    torch.testing.assert_close(mixed, 0.8 * single[0] + 0.2 * single[1] + nll)
    torch.testing.assert_close(losses.dpo_loss(logp, target, ref, nll_weight=0.5).loss, single[0] + 0.5 * nll)


def test_metrics_match_a_loop():
    logp, target, ref = batch()
    metrics = losses.dpo_loss(logp, target, ref, beta=BETA).metrics
    pairs = ratios(logp, target, ref)
    sums = logp.detach().sum(1)
    expected = {
        "rewards_chosen": sum(BETA * a for a, *_ in pairs) / 3,
        "rewards_rejected": sum(BETA * b for _, b, *_ in pairs) / 3,
        "margin": sum(BETA * (a - b) for a, b, *_ in pairs) / 3,
        "accuracy": sum(a > b for a, b, *_ in pairs) / 3,
        "logp_chosen": sums[:3].mean().item(),
        "logp_rejected": sums[3:].mean().item(),
    }
    assert {n: v.item() for n, v in metrics.items()} == pytest.approx(expected, rel=1e-12)
    assert not any(v.requires_grad for v in metrics.values())


def test_packed_sequences_of_different_lengths():
    lengths = [0, 3, 1, 0, 5, 2]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    logp = torch.randn(11, dtype=torch.float64)
    target = torch.zeros(11, dtype=torch.int64)
    out = losses.dpo_loss(logp, target, torch.zeros(6).double(), cu_seqlens=ends, beta=1.0)
    sums = [logp[i:j].sum().item() for i, j in pairwise(ends.tolist())]
    expected = sum(-log_s(w - r) for w, r in zip(sums[:3], sums[3:], strict=True)) / 3
    assert out.loss.item() == pytest.approx(expected, rel=1e-12)


def test_use_weighting_requires_log_sum_squares():
    logp, target, ref = batch()
    with pytest.raises(ValueError, match=r"^log_sum_squares"):
        losses.dpo_loss(logp, target, ref, use_weighting=True)
    with pytest.raises(ValueError, match=r"^log_sum_squares"):
        losses.dpo_loss(logp, target, ref, log_sum_squares=logp)
