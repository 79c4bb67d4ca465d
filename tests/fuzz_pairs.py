"""Fuzz cases of sukhops.pairs, compared with plain Python or with conditions that the result must satisfy."""

import math

import torch
from fuzz_inputs import Source, memory_of, named
from torch import Tensor

from sukhops import pairs
from sukhops.pairs import Reason


def twice(call, **given):
    """The result of a call; asserts that a second call gives the same and that no argument changes."""
    before = memory_of(named(given))
    found, again = call(**given), call(**given)
    after = memory_of(named(given))
    assert all(torch.equal(before[n], after[n]) for n in before), "the call changed an argument"
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, again)), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), "a second call gives different numbers"
    return found


def responses(s: Source, *shape: int) -> Tensor:
    """Scores with ties and gaps, exact in every dtype."""
    t = s.whole(0, s.pick("different scores", 5, 1, 40), *shape).to(s.dtype)
    t[s.uniform(*shape) < s.pick("unscored", 0.0, 0.3, 1.0)] = torch.nan
    return s.laid_out("scores", t)


def length_controlled_pairs(s: Source) -> None:
    p, r, rho = s.size("P", 40), s.size("R", 9, 1), s.pick("rho", 0.0, 0.25, 0.125)
    scores, lengths = (
        responses(s, p, r),
        s.integers("lengths", s.whole(0, s.pick("different lengths", 3, 50), p, r)),
    )
    most = s.pick("max_length", None, 1, 25.0)
    found = twice(pairs.length_controlled_pairs, scores=scores, lengths=lengths, rho=rho, max_length=most)
    for row, size, *chosen in zip(
        scores.tolist(), lengths.tolist(), *(t.tolist() for t in found), strict=True
    ):
        expected = one_prompt(row, size, rho, most)
        assert chosen[2] == (expected[2] <= Reason.ORDER) and chosen[3] == expected[2], (
            f"{chosen}, not {expected}"
        )
        assert all(0 <= i < r for i in chosen[:2])
        if chosen[2]:
            assert tuple(chosen[:2]) == expected[:2], f"{chosen}, not {expected}"


def one_prompt(
    scores: list[float], lengths: list[int], rho: float, most: float | None
) -> tuple[int, int, Reason]:
    known = [i for i, x in enumerate(scores) if not math.isnan(x)]
    if len(known) < 2:
        return 0, 0, Reason.UNSCORED
    high, low = max(scores[i] for i in known), min(scores[i] for i in known)
    good = [i for i in known if scores[i] >= high - rho * (high - low)]
    poor = [i for i in known if scores[i] <= low + rho * (high - low)]
    chosen = min(good, key=lambda i: (lengths[i], -scores[i], i))
    rejected = min(poor, key=lambda i: (-lengths[i], scores[i], i))
    if high == low:
        return chosen, rejected, Reason.EQUAL
    if most is not None and lengths[chosen] > most:
        return chosen, rejected, Reason.TOO_LONG
    kinds = [Reason.SCORE if len(tier) == 1 else Reason.LENGTH for tier in (good, poor)]
    for n, (tier, best) in enumerate(((good, chosen), (poor, rejected))):
        if sum((lengths[i], scores[i]) == (lengths[best], scores[best]) for i in tier) > 1:
            kinds[n] = Reason.ORDER
    return chosen, rejected, max(kinds)


def select_judged_response(s: Source) -> None:
    scores = responses(s, s.size("P", 20), s.size("R", 6, 1), s.size("J", 7, 1))
    index = twice(pairs.select_judged_response, judgment_scores=scores)
    for table, chosen in zip(scores.tolist(), index.tolist(), strict=True):
        spreads = [variance([x for x in row if not math.isnan(x)]) for row in table]
        best = max(spreads)
        first = next(i for i, x in enumerate(spreads) if x >= best - 1e-9) if best >= 0 else -1
        assert chosen == first, f"{chosen}, not {first} of variances {spreads}"


def variance(values: list[float]) -> float:
    mean = math.fsum(values) / max(1, len(values))
    return math.fsum((x - mean) ** 2 for x in values) / len(values) if len(values) > 1 else -math.inf


def battle_matrix(s: Source) -> None:
    p, j, smoothing, each = (
        s.size("P", 12),
        s.size("J", 6, 1),
        s.pick("smoothing", 1.0, 0.0, 2.5),
        s.flag("per_prompt"),
    )
    results = s.integers("results", s.whole(-1, 2, p, j, j))
    battles, weights = twice(pairs.battle_matrix, results=results, smoothing=smoothing, per_prompt=each)
    rows = results.tolist()
    groups = [[row] for row in rows] if each else [rows]
    expected = [weights_of(group, smoothing) for group in groups]
    found = (weights.T if each else weights.unsqueeze(0)).double()
    near = 4 * torch.finfo(torch.float32).eps
    assert (found - torch.tensor(expected, dtype=torch.float64).view(-1, 2)).abs().le(near).all(), (
        f"{weights}"
    )
    for i, row in enumerate(rows):
        first, second = expected[i if each else 0]
        for a in range(j):
            for b in range(j):
                wins = 0.0 if a == b else first * (row[a][b] == 1) + second * (row[b][a] == -1)
                assert abs(battles[i, a, b].item() - wins) <= near, f"{battles[i]}"


def weights_of(group: list, smoothing: float) -> tuple[float, float]:
    wins = [smoothing, smoothing]
    for row in group:
        for a, line in enumerate(row):
            for b, x in enumerate(line):
                wins[0] += a != b and x == 1
                wins[1] += a != b and x == -1
    return (wins[1] / sum(wins), wins[0] / sum(wins)) if sum(wins) else (0.5, 0.5)


def battles_of(s: Source) -> Tensor:
    shape = s.pick("problems", (3,), (), (2, 2), (0,))
    j = s.size("J", 9, 1)
    t = s.pick("size", 1.0, 30.0, 1e-3) * s.uniform(*shape, j, j)
    t[s.uniform(*shape, j, j) < s.pick("never met", 0.0, 0.5, 1.0)] = 0.0
    t.diagonal(dim1=-2, dim2=-1).zero_()
    return s.laid_out("battles", t.to(s.dtype))


def bradley_terry(s: Source) -> None:
    """The gradient of the likelihood is 0 at its maximum, up to the Hessian times the error of the scores."""
    battles, ridge = battles_of(s), s.pick("ridge", 1e-2, 1.0, 1e-4)
    scores = twice(pairs.bradley_terry, battles=battles, ridge=ridge)
    assert scores.dtype == battles.dtype and scores.isfinite().all()
    b, e = battles.double(), scores.double()
    gap = e.unsqueeze(-1) - e.unsqueeze(-2)
    slope = (b * torch.sigmoid(-gap) - b.mT * torch.sigmoid(gap)).sum(-1) - ridge * e
    curvature = 2 * (0.25 * (b + b.mT).sum(-1) + ridge)  # bounds the absolute row sums of the Hessian
    size = e.abs().amax(-1, keepdim=True).clamp(min=1)
    # error of a score: tolerance of the solver and rounding
    off = 1e-7 + 4 * torch.finfo(scores.dtype).eps * size
    assert (slope.abs() <= curvature * off).all(), f"slope {slope} at {scores}"
    assert (e.mean(-1, keepdim=True).abs() <= off).all(), f"mean of {scores}"


def judge_pairs(s: Source) -> None:
    battles, ridge = battles_of(s), 1e-2
    battles = battles.reshape(-1, *battles.shape[-2:])
    lengths = s.integers("lengths", s.whole(0, 30, *battles.shape[:2])) if s.flag("lengths") else None
    found = twice(pairs.judge_pairs, battles=battles, lengths=lengths, ridge=ridge)
    scores = pairs.bradley_terry(battles.double(), ridge=ridge)
    best, worst = (scores.gather(1, i.unsqueeze(1)).squeeze(1) for i in (found.chosen, found.rejected))
    near = 2e-8
    assert (best >= scores.amax(1) - near)[found.keep].all() and (worst <= scores.amin(1) + near)[
        found.keep
    ].all()
    apart = scores.amax(1) - scores.amin(1)
    assert found.keep[apart > near].all() and not found.keep[apart < 1e-9].any(), f"{found} of {scores}"


def lift(s: Source) -> None:
    shape = s.rows(30)
    a, b, limit = (s.integers(name, s.whole(0, 9, *shape)) for name in ("chosen", "rejected", "limit"))
    label = twice(pairs.lift_relabel, len_chosen=a, len_rejected=b, limit=limit)
    expected = [
        1 if x <= z else -1 if y <= z else 0
        for x, y, z in zip(*(t.flatten().tolist() for t in (a, b, limit)), strict=True)
    ]
    assert label.flatten().tolist() == expected
    if a.numel():
        long = [x > z for x, z in zip(a.flatten().tolist(), limit.flatten().tolist(), strict=True)]
        rate = twice(pairs.violation_rate, lengths=a, limit=limit)
        assert abs(rate.item() - sum(long) / len(long)) < 1e-12
        wins = s.pick("win", 0.0, 0.5, 1.0) * torch.ones(shape)
        won = twice(pairs.length_instructed_win_rate, wins=wins, lengths=a, limit=limit)
        right = sum(0 if over else w for over, w in zip(long, wins.flatten().tolist(), strict=True)) / len(
            long
        )
        assert abs(won.item() - right) < 1e-12


TARGETS = {
    f"pairs.{f.__name__}": f
    for f in (
        length_controlled_pairs,
        select_judged_response,
        battle_matrix,
        bradley_terry,
        judge_pairs,
        lift,
    )
}
