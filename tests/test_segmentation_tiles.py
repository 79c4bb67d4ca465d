"""Scores around every bound of the CPU kernels' plain tiles, which are computed without exponents.

Results must not depend on how a tile is computed: they are within budget on both sides of each bound, and
bitwise equal if the same problem can be computed both with and without plain tiles.
"""

import math

import pytest
import torch
from segmentation_sums import covered, exact_sums, walk

from sukhops import (
    reference,
    segmentation_entropy,
    segmentation_logz,
    segmentation_marginals,
    segmentation_sample,
    segmentation_viterbi,
)
from sukhops.testing import budget, distance

pytestmark = pytest.mark.every_isa

DTYPES = [torch.float32, torch.float64]
# allowed exponents in a plain tile: of scores, and of sums relative to the largest sum at the tile's start
LOWEST, HIGHEST = {torch.float32: -48, torch.float64: -384}, {torch.float32: 15, torch.float64: 127}
FALL, RISE = {torch.float32: -124, torch.float64: -980}, {torch.float32: 34, torch.float64: 400}
LARGE = 5e6  # scores up to LARGE / max(16, K) are computed in float32, larger ones in float64 if needed
BOUND = 2**52 * math.log(2)  # up to this sum of scores, exponents are exact in float64
# tiles have 8 rows: less than one tile, whole tiles, whole tiles and a partial one
TIMES = [1, 7, 8, 9, 17, 64, 300]


def around(bounds):
    """Scores on both sides of each bound of the rounded exponent."""
    steps = (-1.0, -0.51, -0.5, -0.49, 0.0, 0.49, 0.5, 0.51, 1.0)
    return [(b + s) * math.log(2) for b in bounds for s in steps]


def edges(dtype):
    return [
        *around((LOWEST[dtype], HIGHEST[dtype])),
        -20.0,
        -10.0,
        -0.3,
        0.0,
        0.3,
        5.0,
        10.3,
        10.4,
        10.5,
        11.1,
    ]


def drifts(dtype):
    """Scores per position with which sums exceed their bounds after one to eight rows."""
    return [s for rows in (1, 2, 4, 8) for s in around((FALL[dtype] / rows, RISE[dtype] / rows))]


def problems(t, k, dtype, missing=0.0):
    """Scores [B, T, K]: constant, with a drift, near the bounds in random order, and mixed with huge ones."""
    steady = torch.tensor(edges(dtype)).double()
    drift = torch.tensor(drifts(dtype)).double()
    huge = torch.tensor([-1e4, 1e4]).double()
    length = torch.arange(1, k + 1)
    scores = [
        # slightly different, so that rounding errors do not all have the same sign
        steady.view(-1, 1, 1)
        + (1e-3 * torch.randn(len(steady), t, k).double() if k > 1 else torch.zeros(t, 1)),
        drift.view(-1, 1, 1) * length + torch.randn(len(drift), t, k).double(),
    ]
    scores.append(torch.randn(12, t, k).double())
    for values in (steady, torch.cat([steady, huge])):
        scores.append(values[torch.randint(len(values), (12, t, k))])
    # rarely a huge score, so that plain and other tiles alternate
    mostly = steady[torch.randint(len(steady), (12, t, k))]
    rare = huge[torch.randint(2, (12, t, k))]
    scores.append(rare.where(torch.rand(12, t, k) < 1 / (20 * k), mostly))
    scores = torch.cat(scores).to(dtype)
    return scores.masked_fill(torch.rand(scores.shape) < missing, -torch.inf)


def within_budget(ours, low, exact):
    """Compares each sequence separately, because the budget grows with the largest number."""
    for i, (one, plain, truth) in enumerate(zip(ours, low, exact, strict=True)):
        error, most = distance(one, truth), budget(one, plain, truth)
        assert error <= most, f"sequence {i}: error {error:.3g} over budget {most:.3g}"


def test_unreachable_boundary_before_a_huge_score():
    """A plain tile ends with an impossible boundary; a huge score starts there in the next tile."""
    scores = torch.full((1, 40, 2), -torch.inf)
    scores[0, :, 0] = 0.0
    scores[0, 7, 1] = scores[0, 8, 0] = -torch.inf  # no segment ends at 9
    scores[0, 8, 1] = 0.0
    scores[0, 9, 0] = 1e4
    assert segmentation_logz(scores).item() == 0
    assert segmentation_marginals(scores)[0].sum() == 39 and segmentation_marginals(scores)[0, 9].sum() == 0


@pytest.mark.parametrize("k", [1, 5, 16, 17, 64, 128])
@pytest.mark.parametrize("factor", [1, 1.01, 2, 1000])
def test_scores_around_the_exponents_of_float32(k, factor):
    signs = torch.randn(6, 150, k).sign()
    signs[1], signs[2], signs[3, :, 1:] = 1.0, -1.0, -1.0
    signs[4:] = signs[4:].masked_fill(torch.rand(2, 150, k) < 0.5, -torch.inf)
    scores = factor * LARGE / max(16, k) * (signs * (1 - 1e-6 * torch.rand(6, 150, k)))
    low, exact = reference.segmentation_marginals(scores), segmentation_marginals(scores.double())
    within_budget(segmentation_marginals(scores), low, exact)
    logz = segmentation_logz(scores.double())
    within_budget(segmentation_logz(scores), reference.segmentation_logz(scores), logz)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "size, t, k",
    [
        (312_500, 150, 16), (312_500, 20, 16), (312_500, 40, 16), (312_500, 60, 16), (300_000, 600, 16),
        (290_000, 150, 16), (250_000, 600, 16), (100_000, 5000, 16), (312_500, 150, 15), (312_500, 150, 8),
        (312_500, 150, 4), (294_117, 150, 17), (150_000, 1000, 32), (LARGE / 32, 1000, 32),
        (LARGE / 64, 1000, 64), (1_000_000, 150, 1), (1e9, 150, 1), (1e12, 150, 16),
    ],
)  # fmt: skip
def test_large_scores_cover_every_position(size, t, k, sign):
    scores = sign * size * (1 - 1e-6 * torch.rand(1, t, k))
    once = covered(segmentation_marginals(scores))[:, :t]
    assert (once - 1).abs().max() <= walk(t, k, torch.float32)


def test_large_difference_between_separate_sums():
    """Sums at even positions grow, at odd ones shrink, beyond float32; only odd ones reach the end."""
    scores = torch.full((1, 2001, 2), -torch.inf)
    scores[0, ::2, 1], scores[0, 1::2, 1] = 5e4, -5e4
    scores[0, 0, 0] = 1.0
    scores[0, -1] = -torch.inf
    odd = torch.zeros_like(scores)
    odd[0, 0, 0] = odd[0, 1::2, 1] = 1
    assert torch.equal(segmentation_marginals(scores), odd)
    assert segmentation_logz(scores).item() == pytest.approx(1 - 1000 * 5e4, rel=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("factor", [0.9, 1.01, 2, 1000])
@pytest.mark.parametrize("k", [1, 4, 16, 17])
def test_sums_beyond_float64_are_nan_or_correct(k, factor, sign, dtype):
    t = 150
    best = t if sign > 0 or k == 1 else -(-t // k)  # number of segments of the best segmentation
    scores = sign * factor * BOUND / best * (1 - 1e-3 * torch.rand(1, t, k, dtype=dtype))
    found = segmentation_viterbi(scores).segments
    only = torch.nn.functional.one_hot(found, k + 1)[..., 1:]  # all other segmentations have probability 0
    logz, posterior = segmentation_logz(scores), segmentation_marginals(scores)
    if factor < 1:
        assert torch.equal(posterior, only.to(dtype)) and logz.isfinite().all()
    elif not posterior.isnan().all():
        assert torch.equal(posterior, only.to(dtype))
        assert logz.item() == pytest.approx((scores * only)[only > 0].sum().item(), rel=1e-6)
    else:
        assert segmentation_entropy(scores).isnan().all()
        with pytest.raises(RuntimeError, match="sums too large"):
            segmentation_sample(scores, 1)


@pytest.mark.parametrize("factor", [1.01, 1000])
def test_samples_of_large_scores(factor):
    scores = factor * LARGE / 16 * (1 - 1e-6 * torch.rand(2, 150, 16))
    scores[1] *= -1
    samples = segmentation_sample(scores, 3)
    assert (samples[:, 0] == 1).all() and (samples.sum(-1) == 150).all()
    total = torch.where(
        samples > 0, scores.gather(2, (samples - 1).clamp(min=0).movedim(0, 2)).movedim(2, 0), 0
    )
    best = segmentation_viterbi(scores.double()).score
    assert (total.double().sum(-1) - best >= -40 * 1e-6 * factor * LARGE).all()


# ------------------------------------------------------------------ a single segmentation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", TIMES)
def test_single_segmentation_has_probability_one(t, dtype):
    scores = problems(t, 1, dtype).requires_grad_()
    logz = segmentation_logz(scores)
    (gradient,) = torch.autograd.grad(logz.sum(), scores)
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert torch.equal(segmentation_marginals(scores.detach()), gradient)
    exact = torch.tensor([math.fsum(s) for s in scores.flatten(1).tolist()]).double()
    within_budget(logz, reference.segmentation_logz(scores), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [2, 8, 17])
def test_single_possible_segmentation(k, dtype):
    """Segments of random lengths form one chain; all others are -inf."""
    chains = problems(200, 1, dtype)[:, :, 0]
    scores = torch.full((len(chains), 200, k), -torch.inf, dtype=dtype)
    there = torch.zeros(200, k, dtype=torch.bool)
    t = 0
    while t < 200:
        length = min(200 - t, torch.randint(1, k + 1, ()).item())
        there[t, length - 1] = True
        t += length
    scores = torch.where(there, chains.unsqueeze(-1), scores).requires_grad_()
    logz = segmentation_logz(scores)
    (gradient,) = torch.autograd.grad(logz.sum(), scores)
    assert torch.equal(gradient, there.to(dtype).expand_as(gradient))
    starts = there.any(-1)
    exact = torch.tensor([math.fsum(s) for s in chains[:, starts].tolist()]).double()
    within_budget(logz, reference.segmentation_logz(scores), exact)


# ------------------------------------------------------------------ many segmentations


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [2, 3, 8, 16, 17, 64])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_within_budget_around_the_bounds(k, dtype, missing):
    t = 50
    scores = problems(t, k, dtype, missing).requires_grad_()
    ours, low = segmentation_logz(scores), reference.segmentation_logz(scores)
    logz, posterior = exact_sums(scores.detach())
    within_budget(ours, low, logz)
    (gradient,) = torch.autograd.grad(ours.sum(), scores)
    (plain,) = torch.autograd.grad(low.sum(), scores)
    within_budget(gradient, plain, posterior)
    assert not gradient[scores == -torch.inf].any()
    reached = logz > -torch.inf
    once = covered(gradient[reached])[:, :t]
    assert (once - 1).abs().max() <= walk(t, k, dtype) if reached.any() else True
    assert not gradient[~reached].any()


# ------------------------------------------------------------------ same bits with and without plain tiles


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3, 4, 8, 16, 17, 32, 48, 136])
def test_kept_exponentials_do_not_change_the_gradient(k, dtype):
    """The gradient is computed from the scores with retain_graph, otherwise from the exponentials that the
    forward kept (as is a posterior without gradient). All have the same bits.
    """
    scores = problems(100, k, dtype, missing=0.1).requires_grad_()
    lengths = torch.randint(101, (len(scores),))
    logz = segmentation_logz(scores, lengths)
    total = logz.where(logz > -torch.inf, 0.0).sum()
    first = torch.autograd.grad(total, scores, retain_graph=True)[0]
    assert torch.equal(segmentation_marginals(scores, lengths), first)
    assert torch.equal(segmentation_marginals(scores.detach(), lengths), first)
    assert torch.equal(torch.autograd.grad(total, scores)[0], first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_keeps_exponentials_of_complete_rows_in_plain_tiles(dtype):
    scores, length = torch.randn(2, 100, 16, dtype=dtype), 90
    scores[1, 50, 3] = 1e4
    *_, kept = torch.ops.sukhops.segmentation_logz_kept(scores, torch.tensor([length, length]))
    rows = kept[:, :length, 0] >= 0
    assert rows[0].nonzero().flatten().tolist() == list(range(length - 16 + 1))
    assert rows[1, :48].all() and not rows[1, 48:56].any()  # the tile with the huge score
    given = scores[:, :length][rows]
    within_budget(kept[:, :length][rows], given.exp(), given.double().exp())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 8, 16, 17, 33])
@pytest.mark.parametrize("low", [-1e5, -1e9])
def test_large_negative_scores_equal_infinite_ones_bitwise(k, dtype, low):
    """Tiles with -inf stay plain, tiles with a large negative score do not."""
    scores = torch.randn(8, 200, k, dtype=dtype) * torch.tensor([0.5, 1.0, 3.0, 5.0]).repeat(2)[:, None, None]
    masked = torch.rand(8, 200, k) < 0.4
    masked[..., 0] = False
    masked[:4, 50:] = False  # here both have plain tiles
    first, second = (scores.masked_fill(masked, x).requires_grad_() for x in (-torch.inf, low))
    one, two = segmentation_logz(first), segmentation_logz(second)
    assert torch.equal(one, two)
    (a,), (b,) = torch.autograd.grad(one.sum(), first), torch.autograd.grad(two.sum(), second)
    counts = torch.finfo(dtype).smallest_normal  # smaller numbers may be 0 in one of the two
    assert torch.equal(a.where(a >= counts, 0), b.where(b >= counts, 0)) and not b[masked].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("k", [1, 3, 8, 16, 17, 33])
def test_nan_and_infinity_stay_in_their_sequence(k, bad, dtype):
    scores = torch.randn(5, 40, k, dtype=dtype)
    lengths = torch.tensor([40, 33, 40, 16, 40])

    def run(s):
        s = s.clone().requires_grad_()
        logz = segmentation_logz(s, lengths)
        return logz.detach(), torch.autograd.grad(logz.sum(), s)[0]

    clean = run(scores)
    others = torch.tensor([0, 1, 3, 4])
    for t in range(40):
        dirty = scores.clone()
        dirty[2, t, t % min(k, 40 - t)] = bad
        logz, gradient = run(dirty)
        assert logz[2].isnan() and gradient[2].isnan().any()
        assert not gradient[2].nan_to_num(0.0, 0.0, 0.0).any()  # no finite nonzero number
        assert torch.equal(logz[others], clean[0][others])
        assert torch.equal(gradient[others], clean[1][others])
