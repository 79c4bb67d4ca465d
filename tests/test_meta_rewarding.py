"""Meta-Rewarding's pairs: compared with loops in exact arithmetic, and properties."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sukhops.pairs import (
    Reason,
    battle_matrix,
    bradley_terry,
    judge_pairs,
    length_controlled_pairs,
    select_judged_response,
)

NAN = math.nan


def choose(scores, lengths, rho):
    """The definition for one prompt, in exact fractions: (chosen, rejected) or None."""
    scored = [k for k, s in enumerate(scores) if not math.isnan(s)]
    exact = {k: Fraction(scores[k]) for k in scored}
    if len(scored) < 2 or len(set(exact.values())) == 1:
        return None
    high, low = max(exact.values()), min(exact.values())
    top = [k for k in scored if exact[k] >= (1 - rho) * high + rho * low]
    bottom = [k for k in scored if exact[k] <= (1 - rho) * low + rho * high]
    chosen = min(top, key=lambda k: (lengths[k], -exact[k], k))
    rejected = min(bottom, key=lambda k: (-lengths[k], exact[k], k))
    return chosen, rejected


judged = st.one_of(st.integers(0, 8).map(float), st.just(NAN))
prompts = st.integers(1, 6).flatmap(
    lambda responses: st.lists(
        st.tuples(
            st.lists(judged, min_size=responses, max_size=responses),
            st.lists(st.integers(0, 4), min_size=responses, max_size=responses),
        ),
        min_size=1, max_size=5,
    )
)  # fmt: skip


@given(prompts, st.sampled_from([Fraction(0), Fraction(1, 8), Fraction(1, 4), Fraction(3, 8)]))
@settings(deadline=None, max_examples=300)
def test_length_control_matches_the_definition(found, rho):
    scores, lengths = (torch.tensor(columns) for columns in zip(*found, strict=True))
    pairs = length_controlled_pairs(scores, lengths, float(rho))
    for row, (s, n) in enumerate(found):
        expected = choose(s, n, rho)
        assert pairs.keep[row].item() == (expected is not None)
        if expected:
            assert (pairs.chosen[row].item(), pairs.rejected[row].item()) == expected


def test_many_prompts_give_the_same_as_one():
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 9, (70_000, 4), generator=g).float()
    lengths = torch.randint(0, 5, (70_000, 4), generator=g)
    pairs = length_controlled_pairs(scores, lengths, 0.25)
    for row in range(0, 70_000, 997):
        few = length_controlled_pairs(scores[row : row + 1], lengths[row : row + 1], 0.25)
        assert [column[row].item() for column in pairs] == [column.item() for column in few]
    assert all(len(column) == 0 for column in length_controlled_pairs(scores[:0], lengths[:0], 0.25))


def test_properties_of_length_control():
    g = torch.Generator().manual_seed(1)
    scores, lengths = torch.rand(500, 7, generator=g), torch.randint(1, 3000, (500, 7), generator=g)
    before = None
    for rho in (0.0, 0.1, 0.32, 0.4, 0.49, 0.4999999999999999):
        pairs = length_controlled_pairs(scores, lengths, rho)
        chosen, rejected = pairs.chosen.unsqueeze(1), pairs.rejected.unsqueeze(1)
        assert pairs.keep.all() and (scores.gather(1, chosen) > scores.gather(1, rejected)).all()
        if rho == 0:
            assert torch.equal(pairs.chosen, scores.argmax(1))
            assert torch.equal(pairs.rejected, scores.argmin(1))
        now = lengths.gather(1, chosen), lengths.gather(1, rejected)
        if before:
            assert (now[0] <= before[0]).all() and (now[1] >= before[1]).all()
        before = now


@given(prompts, st.sampled_from([0.0, 0.125, 0.375]), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=100)
def test_order_scale_and_unit_do_not_matter(found, rho, random):
    """Order of responses, scale of scores (powers of two, which are exact) and unit of lengths."""
    for s, n in found:
        scores, lengths = torch.tensor([s]), torch.tensor([n])
        pairs = length_controlled_pairs(scores, lengths, rho)
        other = length_controlled_pairs(4 * scores + 8, 3 * lengths, rho)
        assert all(torch.equal(a, b) for a, b in zip(pairs, other, strict=True))
        order = list(range(len(s)))
        random.shuffle(order)
        moved = length_controlled_pairs(scores[:, order], lengths[:, order], rho)
        assert moved.reason == pairs.reason
        if pairs.keep and pairs.reason != Reason.ORDER:
            assert order[moved.chosen] == pairs.chosen and order[moved.rejected] == pairs.rejected


def test_reasons_of_pairs():
    scores = torch.tensor(
        [[1, 5, 3], [1, 5, 5], [1, 5, 5], [1, 4.6, 5], [2, 2, 2], [NAN, NAN, 4], [NAN, 4, 5], [1, 5, 3]]
    )
    lengths = torch.tensor(
        [[9, 9, 9], [9, 5, 4], [9, 5, 5], [9, 5, 7], [1, 2, 3], [1, 1, 1], [1, 8, 1], [2, 30, 2]]
    )
    pairs = length_controlled_pairs(scores, lengths, 0.2, max_length=20)
    assert pairs.columns() == {
        "chosen": [1, 2, 1, 1, 0, 2, 2, 1],
        "rejected": [0, 0, 0, 0, 2, 2, 1, 0],
        "keep": [True, True, True, True, False, False, True, False],
        "reason": ["score", "length", "order", "length", "equal", "unscored", "score", "too_long"],
    }
    assert pairs.reason.tolist()[-1] == Reason.TOO_LONG
    alone = length_controlled_pairs(torch.tensor([[3.0]]), torch.tensor([[5]]), 0)
    assert alone.columns() == {"chosen": [0], "rejected": [0], "keep": [False], "reason": ["unscored"]}


def test_invalid_arguments_of_length_control():
    scores, lengths = torch.rand(2, 3), torch.ones(2, 3)
    for rho in (-0.1, 0.5, NAN):
        with pytest.raises(ValueError, match=r"^rho: "):
            length_controlled_pairs(scores, lengths, rho)
    for bad in (scores * math.inf, scores[0], scores[:, :0]):
        with pytest.raises(ValueError, match=r"^scores: "):
            length_controlled_pairs(bad, lengths, 0)
    for bad in (-lengths, lengths * NAN, lengths[:, :2], lengths[:1]):
        with pytest.raises(ValueError, match=r"^lengths: "):
            length_controlled_pairs(scores, bad, 0)
    with pytest.raises(ValueError, match=r"^max_length: "):
        length_controlled_pairs(scores, lengths, 0, max_length=-1)
    with pytest.raises(TypeError, match=r"^scores: "):
        length_controlled_pairs([[1, 2]], lengths, 0)


def test_selects_the_response_with_the_largest_variance():
    judged = torch.tensor(
        [
            [[3, 3, 3.0], [1, 5, NAN], [1, 5, 4]],
            [[3, NAN, NAN], [2, 2, 2], [NAN, NAN, NAN]],
            [[3, NAN, NAN], [NAN, NAN, NAN], [NAN, 1, NAN]],
        ]
    )
    assert select_judged_response(judged).tolist() == [1, 1, -1]
    g = torch.Generator().manual_seed(0)
    judged = torch.randint(1, 6, (200, 4, 11), generator=g)
    variance = 11 * judged.square().sum(-1) - judged.sum(-1).square()  # 121 * variance, an exact integer
    assert torch.equal(select_judged_response(judged.float()), variance.argmax(1))


def test_equal_variances_are_sampled_with_a_generator():
    scores = torch.tensor([[1.0, 4, 2], [1, 2, 4], [1, 1, 1], [4, 2, 1]]).expand(3000, 4, 3)
    assert (select_judged_response(scores) == 0).all()
    drawn = [select_judged_response(scores, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*drawn)
    counts = drawn[0].bincount(minlength=4)
    assert counts[2] == 0 and (counts[[0, 1, 3]] > 900).all()


def battle_loop(results, smoothing):
    """The definition for one prompt or all together: battles and both position weights."""
    first = sum(r == 1 for one in results for i, row in enumerate(one) for j, r in enumerate(row) if i != j)
    second = sum(r == -1 for one in results for i, row in enumerate(one) for j, r in enumerate(row) if i != j)
    wins = first + second + 2 * smoothing
    weights = ((second + smoothing) / wins, (first + smoothing) / wins) if wins else (0.5, 0.5)
    battles = [
        [
            [weights[0] * (one[m][n] == 1) + weights[1] * (one[n][m] == -1) if m != n else 0
             for n in range(len(one))]
            for m in range(len(one))
        ]
        for one in results
    ]  # fmt: skip
    return battles, weights


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 5), st.sampled_from([0.0, 1.0, 2.5]))
@settings(deadline=None, max_examples=100)
def test_battles_match_the_definition(seed, prompts, judgments, smoothing):
    g = torch.Generator().manual_seed(seed)
    results = torch.randint(-1, 2, (prompts, judgments, judgments), generator=g)
    battles, (first, second) = battle_matrix(results.double(), smoothing=smoothing)
    expected, weights = battle_loop(results.tolist(), smoothing)
    assert torch.equal(battles, torch.tensor(expected, dtype=torch.float64).view_as(battles))
    assert (first.item(), second.item()) == weights
    battles, weights = battle_matrix(results.double(), smoothing=smoothing, per_prompt=True)
    for row, one in enumerate(results.tolist()):
        expected, both = battle_loop([one], smoothing)
        assert torch.equal(battles[row], torch.tensor(expected[0], dtype=torch.float64).view_as(battles[row]))
        assert tuple(weights[:, row].tolist()) == both
    assert battle_matrix(results)[0].dtype == torch.float32


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
@pytest.mark.parametrize("favored", [1, -1])
def test_judge_that_sees_only_positions_has_no_preference(smoothing, favored):
    results = torch.full((4, 5, 5), favored)
    battles, weights = battle_matrix(results, smoothing=smoothing)
    assert torch.equal(battles, battles.mT)
    assert (battles == 0).all() == (smoothing == 0)
    assert weights[(1 - favored) // 2] < weights[(1 + favored) // 2]
    pairs = judge_pairs(battles)
    assert not pairs.keep.any() and (pairs.reason == Reason.EQUAL).all()


def test_position_weights_correct_position_bias():
    g = torch.Generator().manual_seed(0)
    quality = torch.rand(400, 6, generator=g)
    better = torch.sigmoid(4 * (quality[:, :, None] - quality[:, None, :]) + 2.0)  # biased toward the first
    results = torch.where(torch.rand(better.shape, generator=g) < better, 1, -1)
    battles, (first, second) = battle_matrix(results)
    assert first < 0.3 and second > 0.7 and abs(first + second - 1) < 1e-6
    pairs = judge_pairs(battles)
    chosen, rejected = (quality.gather(1, i[:, None]) for i in (pairs.chosen, pairs.rejected))
    assert ((chosen > rejected).squeeze(1) & pairs.keep).float().mean() > 0.95


def test_judge_pairs():
    g = torch.Generator().manual_seed(0)
    battles, _ = battle_matrix(torch.randint(-1, 2, (200, 5, 5), generator=g))
    scores = bradley_terry(battles.double())
    pairs = judge_pairs(battles)
    clear = pairs.reason == Reason.SCORE
    assert clear.sum() > 100
    assert torch.equal(pairs.chosen[clear], scores.argmax(1)[clear])
    assert torch.equal(pairs.rejected[clear], scores.argmin(1)[clear])
    # players 0 and 1 are equal and best, 2 and 3 equal and worst
    one = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0.0]]])
    assert judge_pairs(one).columns() == {
        "chosen": [0], "rejected": [2], "keep": [True], "reason": ["order"],
    }  # fmt: skip
    lengths = torch.tensor([[8, 7, 3, 4]])
    for limit, keep, reason in ((None, True, "length"), (7, True, "length"), (6, False, "too_long")):
        assert judge_pairs(one, lengths, max_length=limit).columns() == {
            "chosen": [1], "rejected": [3], "keep": [keep], "reason": [reason],
        }  # fmt: skip


def test_invalid_arguments_of_judging():
    results = torch.zeros(2, 3, 3)
    for bad in (results + 2, results + 0.5, results * NAN, results[0], results[:, :2], results[:, :0, :0]):
        with pytest.raises(ValueError, match=r"^results: "):
            battle_matrix(bad)
    with pytest.raises(ValueError, match=r"^smoothing: "):
        battle_matrix(results, smoothing=-1)
    for bad in (torch.rand(3), torch.rand(2, 3, 0), torch.rand(2, 3, 4) * math.inf):
        with pytest.raises(ValueError, match=r"^judgment_scores: "):
            select_judged_response(bad)
    for bad in (results[0], results + 1, results * NAN):
        with pytest.raises(ValueError, match=r"^battles: "):
            judge_pairs(bad)
    with pytest.raises(ValueError, match=r"^lengths: "):
        judge_pairs(results, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"^max_length: needs lengths"):
        judge_pairs(results, max_length=3)
