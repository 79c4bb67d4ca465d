"""The segmentation operators: compared with enumeration and the reference; properties."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from segmentation_oracle import Sequence, problems, sequences, upstream_like
from segmentation_sums import covered, exact_sums, walk
from torch.autograd import gradcheck, gradgradcheck

import sukhops
from sukhops import reference
from sukhops.testing import assert_close, budget, compare, distance, finite_max

pytestmark = pytest.mark.every_isa

NAMES = ("logz", "marginals", "entropy")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# values of K that select every register layout: part of a register, one, several, several and a part
WIDTHS = [1, 3, 4, 5, 8, 13, 16, 17, 64, 70]
EXAMPLES = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def op(name):
    return getattr(sukhops, f"segmentation_{name}")


def plain(name):
    return getattr(reference, f"segmentation_{name}")


def make(b=5, t=40, k=6, dtype=torch.float64, missing=0.0, size=1.0, ragged=True):
    scores = size * torch.randn(b, t, k, dtype=torch.float64)
    scores[torch.rand(b, t, k) < missing] = -torch.inf
    lengths = torch.randint(0, t + 1, (b,)) if ragged else torch.full((b,), t)
    return {"scores": scores.to(dtype).requires_grad_(), "lengths": lengths}


# ------------------------------------------------------------------ enumeration


def close(ours, low, exact, terms=0):
    """Asserts error <= budget plus `terms` roundings, because the reference may be exact by chance."""
    exact = torch.as_tensor(exact, dtype=torch.float64)
    rounded = terms * torch.finfo(ours.dtype).eps * max(1.0, finite_max(exact))
    assert distance(ours, exact) <= budget(ours, low, exact) + rounded, (ours, exact)


def rounded(x):
    """Bound on the difference of x and the same number computed differently in the same precision."""
    return budget(x, x, x)


def gradient(x, s):
    """The gradient of x, or zeros if x does not depend on s (the reference with T = 0)."""
    return torch.autograd.grad(x, s, retain_graph=True)[0] if x.requires_grad else torch.zeros_like(s)


@EXAMPLES
@given(problems())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_enumeration(dtype, problem):
    scores, lengths = problem[0].to(dtype), problem[1]
    every = sequences(scores, lengths)
    upstream = upstream_like(scores)

    def results(module):
        s = scores.clone().requires_grad_()
        found = {name: getattr(module, f"segmentation_{name}")(s, lengths) for name in NAMES}
        found["gradient"] = gradient(found["logz"].sum(), s)
        found["covariance"] = gradient((found["marginals"] * upstream).sum(), s)
        found["entropy's gradient"] = gradient(found["entropy"].sum(), s)
        found["best"] = module.segmentation_viterbi(s, lengths).score
        return found

    exact = {
        "logz": [e.logz for e in every],
        "marginals": torch.stack([e.marginals() for e in every]),
        "entropy": [e.entropy() for e in every],
        "gradient": torch.stack([e.marginals() for e in every]),
        "covariance": torch.stack([e.covariance(u) for e, u in zip(every, upstream, strict=True)]),
        "entropy's gradient": torch.stack([e.entropy_gradient() for e in every]),
        "best": [e.best for e in every],
    }
    ours, low = results(sukhops), results(reference)
    for name, value in exact.items():
        close(ours[name], low[name], value, terms=scores.shape[1])  # a sum over positions
    assert not (ours["gradient"][scores == -torch.inf]).any()


@EXAMPLES
@given(problems())
def test_viterbi_returns_a_best_segmentation(problem):
    scores, lengths = problem
    found = sukhops.segmentation_viterbi(scores, lengths)
    assert torch.equal(found.segments, reference.segmentation_viterbi(scores, lengths).segments)
    for e, segments in zip(sequences(scores, lengths), found.segments.tolist(), strict=True):
        best = [e.encoded(p) for p, s in zip(e.parts, e.scores, strict=True) if float(s) == e.best]
        assert segments in best if e.parts else not any(segments)


@EXAMPLES
@given(problems())
def test_samples_are_possible_segmentations(problem):
    scores, lengths = problem
    drawn = sukhops.segmentation_sample(scores, 5, lengths, torch.Generator().manual_seed(1))
    for b, e in enumerate(sequences(scores, lengths)):
        possible = [e.encoded(p) for p in e.parts] or [[0] * e.t]
        assert all(s in possible for s in drawn[:, b].tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [2, 8, 11])
def test_sampling_frequencies(dtype, k):
    """Chi-square statistic of 20,000 samples is within six standard deviations of its mean."""
    scores = torch.randn(2, 6, k, dtype=dtype)
    scores[0, 2, 1] = -torch.inf
    lengths = torch.tensor([6, 5])
    for sample in (sukhops.segmentation_sample,):
        drawn = sample(scores, 20_000, lengths, torch.Generator().manual_seed(3))
        for b, e in enumerate(sequences(scores, lengths)):
            counts = {tuple(e.encoded(p)): 0 for p in e.parts}
            for s in drawn[:, b].tolist():
                counts[tuple(s)] += 1
            expected = [20_000 * float(p) for p in e.p]
            common = [(c, x) for c, x in zip(counts.values(), expected, strict=True) if x >= 5]
            statistic = sum((c - x) ** 2 / x for c, x in common)
            assert abs(statistic - len(common)) < 6 * math.sqrt(2 * len(common))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampling_frequencies_of_long_sequences(dtype):
    """The frequency of each segment equals its posterior, over several tiles of the sampler.

    The bounds on the counts (Bernstein) fail by chance with probability 1e-6 in total.
    """
    n, k = 4000, 16
    scores = torch.randn(2, 150, k, dtype=dtype)
    scores[torch.rand(scores.shape) < 0.1] = -torch.inf
    lengths = torch.tensor([150, 131])
    drawn = op("sample")(scores, n, lengths, torch.Generator().manual_seed(3))
    counts = torch.stack([(drawn == i).sum(0) for i in range(1, k + 1)], -1)  # [B, T, K]
    p = op("marginals")(scores, lengths).double()
    unlikely = math.log(2 * p.count_nonzero() / 1e-6)
    bound = unlikely / 3 + (unlikely**2 / 9 + 2 * unlikely * n * p * (1 - p)).sqrt()
    assert ((counts - n * p).abs() <= bound).all() and not counts[p == 0].any()


def test_sampling_frequencies_of_the_reference():
    scores = torch.randn(1, 4, 3, dtype=torch.float64)
    drawn = reference.segmentation_sample(scores, 400, None, torch.Generator().manual_seed(3))
    (e,) = sequences(scores, None)
    for parts, p in zip(e.parts, e.p, strict=True):
        count = (drawn[:, 0] == torch.tensor(e.encoded(parts))).all(-1).sum().item()
        assert abs(count - 400 * float(p)) < 6 * math.sqrt(400 * float(p))


# ------------------------------------------------------------------ compared with the reference


@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_within_budget_at_every_width(name, k):
    assert_close(op(name), plain(name), make(b=4, k=k, t=70), torch.float32)
    assert_close(op(name), plain(name), make(k=k, t=30, missing=0.5), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0.1, 20.0, 1e4])
def test_within_budget_at_every_dtype_and_size(name, dtype, size):
    if dtype != torch.float64:
        assert_close(op(name), plain(name), make(b=9, t=60, size=size, missing=0.1), dtype)
    else:
        inputs = make(b=3, t=30, size=min(size, 20.0))
        for row in compare(op(name), plain(name), inputs, dtype):
            posterior = (name, row.name) in (("logz", "grad of scores"), ("marginals", "result"))
            order = 0 if (name, row.name) == ("logz", "result") else 1 if posterior else 2
            assert row.error <= rounding(order, **inputs), row


def rounding(order, scores, lengths):
    """First-order error bound of the reference in float64, with unit roundoff u.

    The log-sum at a boundary is at most a = T max|score|. Each of the K terms is a sum, and the log-sum-exp
    adds K + 4 roundings. After T boundaries the error is e = T (3 a + K + 4) u: absolute in logz (order 0),
    relative in a posterior (order 1), where the upstream gradient is at most 6. Means over segmentations
    (entropy, or of a random gradient) have this error times their size, covariances times both (order 2).
    """
    _, t, k = scores.shape
    a = t * scores.abs().max().item()
    e = t * (3 * a + k + 4) * torch.finfo(scores.dtype).eps / 2
    return e * (1, 6, (1 + a) * 6 * t)[order]


@pytest.mark.parametrize("k", [1, 3, 9])
def test_gradcheck(k):
    inputs = make(3, 7, k, missing=0.1)
    s, lengths = inputs["scores"], torch.tensor([7, 4, 0])
    s = s.detach().where(s > -torch.inf, 0.3).requires_grad_()
    assert gradcheck(lambda x: op("logz")(x, lengths), (s,))
    assert gradgradcheck(lambda x: op("logz")(x, lengths), (s,))
    assert gradcheck(lambda x: op("marginals")(x, lengths), (s,))
    assert gradcheck(lambda x: op("entropy")(x, lengths), (s,))


def test_gradcheck_with_impossible_segments():
    s = make(2, 6, 4)["scores"].detach()
    missing = torch.rand(2, 6, 4) < 0.3
    free = s[~missing].requires_grad_()

    def build(x):
        return torch.full_like(s, -torch.inf).masked_scatter(~missing, x)

    assert gradcheck(lambda x: op("logz")(build(x)), (free,))
    assert gradgradcheck(lambda x: op("logz")(build(x)), (free,))
    assert gradcheck(lambda x: op("entropy")(build(x)), (free,))


# ------------------------------------------------------------------ properties


def test_all_zero_scores_count_segmentations():
    counts = [1]
    for j in range(1, 41):
        counts.append(sum(counts[max(0, j - 4) : j]))
    assert counts[10] == 401
    for t in (1, 2, 5, 10, 40):
        few, all_ = torch.zeros(1, t, 4).double(), torch.zeros(1, t, t + 3).double()
        close(op("logz")(few), plain("logz")(few), [math.log(counts[t])])
        close(op("logz")(all_), plain("logz")(all_), [(t - 1) * math.log(2)])
        close(op("entropy")(few), plain("entropy")(few), [math.log(counts[t])])
    (e,) = sequences(torch.zeros(1, 7, 4), None)
    assert len(e.parts) == 56


@pytest.mark.parametrize("size", [1.0, 1e4])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_every_position_is_covered_once(size, missing):
    given = make(6, 500, 7, torch.float64, missing, size)
    scores, lengths = given["scores"].detach().float(), given["lengths"]
    scores[..., 0] = scores[..., 0].where(scores[..., 0] > -torch.inf, 0.0)  # make every boundary possible
    posterior = op("marginals")(scores, lengths).double()
    once = covered(posterior)
    inflow = torch.zeros(6, 508, dtype=torch.float64)
    for k in range(7):
        inflow[:, k + 1 : k + 501] += posterior[:, :, k]
    outflow = posterior.sum(-1)
    for b, n in enumerate(lengths.tolist()):
        assert n == 0 or (once[b, :n] - 1).abs().max() <= walk(n, 7, torch.float32)
        assert not once[b, n:].any()
        assert n < 2 or (inflow[b, 1:n] - outflow[b, 1:n]).abs().max() <= walk(1, 7, torch.float32)
        assert n == 0 or abs(outflow[b, 0] - 1) <= walk(n, 7, torch.float32)


def test_constants_added_to_scores():
    given = make(4, 30, 5)
    scores, lengths = given["scores"].detach(), given["lengths"]
    base = op("logz")(scores, lengths)
    by_length = scores + 0.7 * torch.arange(1, 6)
    close(op("logz")(by_length, lengths), plain("logz")(by_length, lengths), base + 0.7 * lengths)
    posterior = op("marginals")(scores, lengths)
    close(op("marginals")(by_length, lengths), plain("marginals")(by_length, lengths), posterior)
    moved, step = scores.clone(), 2.0**-20
    moved[..., 2] += step
    slope = (op("logz")(moved, lengths) - base) / step
    most = lengths.max().item() // 3  # number of segments of length 3; its variance is at most most**2 / 4
    assert distance(slope, posterior[..., 2].sum(1)) <= step / 2 * most**2 / 4 + 2 * rounded(base) / step


def test_logz_is_between_best_score_and_best_plus_log_count():
    given = make(6, 8, 3)
    scores, lengths = given["scores"].detach(), given["lengths"]
    best, logz = op("viterbi")(scores, lengths).score, op("logz")(scores, lengths)
    count = torch.tensor([max(1, len(e.parts)) for e in sequences(scores, lengths)])
    assert (best <= logz + rounded(logz)).all()
    assert (logz <= best + count.double().log() + rounded(logz)).all()


def test_segments_of_length_one_give_the_sum_of_scores():
    scores = torch.randn(3, 50, 6, dtype=torch.float64)
    scores[..., 1:] = -torch.inf
    lengths = torch.tensor([50, 20, 0])
    for s in (scores, scores[..., :1]):
        s = s.clone().requires_grad_()
        logz = op("logz")(s, lengths)
        expected = torch.stack([s[b, :n, 0].sum() for b, n in enumerate(lengths)])
        close(logz, plain("logz")(s, lengths), expected)
        (gradient,) = torch.autograd.grad(logz.sum(), s)
        assert torch.equal(gradient[..., 0], (torch.arange(50) < lengths.unsqueeze(1)).double())
        assert not gradient[..., 1:].any()


def test_entropy_of_equal_choices_is_the_log_of_their_number():
    scores = torch.full((1, 60, 2), -torch.inf).double()
    scores[:, ::2] = 1e4 * torch.randn(1, 30, 2).double()
    scores[:, ::2, 0] = scores[:, ::2, 1] - 3e3
    scores[:, 1::2, 0] = 3e3
    close(op("entropy")(scores), plain("entropy")(scores), [30 * math.log(2)])


# ------------------------------------------------------------------ size


@pytest.mark.parametrize("k", [2, 16])
def test_hundred_thousand_positions(k):
    """logz of zero scores is known; random scores are compared with long double."""
    t = 100_000
    root = 2.0
    for _ in range(200):  # growth rate of the number of segmentations: the largest root of 1 = sum_k x**-k
        f = sum(root**-i for i in range(1, k + 1)) - 1
        root -= f / sum(-i * root ** -(i + 1) for i in range(1, k + 1))
    logz = op("logz")(torch.zeros(1, t, k, dtype=torch.float64))
    shorter = op("logz")(torch.zeros(1, t - 1000, k, dtype=torch.float64))
    assert abs((logz - shorter).item() - 1000 * math.log(root)) <= 2 * rounded(logz)
    scores = torch.tensor([1.0, 1e4])[:, None, None] * torch.randn(2, t, k)
    logz, posterior = exact_sums(scores)
    for s in (scores, scores.double()):
        best = op("viterbi")(s)
        assert (best.segments.sum(1) == t).all()
        for ours, exact, score in zip(op("logz")(s), logz, best.score, strict=True):
            assert distance(ours, exact) <= budget(ours, exact, exact)  # assumes an exact reference
            assert score <= ours + rounded(ours)
        once = covered(op("marginals")(s))
        assert (once[:, :t] - 1).abs().max() <= walk(t, k, s.dtype) and not once[:, t:].any()
    assert distance(op("marginals")(scores), posterior) <= walk(t, k, torch.float32)


def test_long_sequence_within_budget():
    scores = torch.randn(1, 10_000, 3)
    exact, _ = exact_sums(scores)
    for s in (scores, scores.double()):
        close(op("logz")(s), reference.segmentation_logz(s), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_negative_scores_act_like_infinite_ones(dtype):
    scores = torch.randn(2, 12, 4, dtype=dtype)
    masked = torch.rand(2, 12, 4) < 0.4
    masked[..., 0] = False
    exact = op("marginals")(scores.masked_fill(masked, -torch.inf))
    for low in (-1e5, -1e9, -1e30, torch.finfo(dtype).min):
        posterior = op("marginals")(scores.masked_fill(masked, low))
        assert torch.equal(posterior, exact)
    only = torch.full((1, 1, 1), -1e9, dtype=dtype)
    close(op("logz")(only), only, only)
    assert isinstance(sequences(scores, None)[0], Sequence)
