"""Meta-Rewarding's pairs: responses chosen under length control, and judgments chosen by their battles."""

import torch
from torch import Tensor

from sukhops import _checks
from sukhops.pairs._pairs import Pairs, Reason, check_numbers
from sukhops.pairs.bradley_terry import bradley_terry

PROMPTS = 1 << 15  # number of prompts in one batch, so that temporaries stay in cache


def length_controlled_pairs(
    scores: Tensor, lengths: Tensor, rho: float, *, max_length: float | None = None
) -> Pairs:
    """Pairs the shortest of the best responses with the longest of the worst responses, for each prompt.

    The best responses score at least (1 - rho) * highest + rho * lowest; the worst score at most
    (1 - rho) * lowest + rho * highest. Among responses of equal length the one with the more extreme score is
    taken, then the first.

    Args:
        scores: [P, R], mean judgments of R responses to each of P prompts; NaN for a response without score.
        lengths: [P, R], >= 0, in any unit (the published filter counts characters).
        rho: width of the ranges of best and worst scores, in [0, 0.5). With 0, length only breaks ties.
        max_length: pairs whose chosen response is longer are dropped. None: no limit.

    Returns:
        `Pairs` (chosen, rejected, keep, reason), each [P]; reason is a `Reason`.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Wu et al., Meta-Rewarding Language Models, 2025. The rules that break ties are this library's.
    """
    check_numbers("scores", scores, nan=True, negative=True)
    check_numbers("lengths", lengths)
    if scores.dim() != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores: expected [P, R] with R > 0 responses, got {list(scores.shape)}")
    _checks.check_shape("lengths", lengths, scores.shape, "as scores")
    _checks.check_device("scores", scores, "lengths", lengths)
    if not 0 <= rho < 0.5:
        raise ValueError(f"rho: expected in [0, 0.5), got {rho}")
    if max_length is not None and not max_length >= 0:
        raise ValueError(f"max_length: expected >= 0, got {max_length}")
    parts = zip(scores.split(PROMPTS), lengths.split(PROMPTS), strict=True)
    found = [
        _length_controlled(_responses_first(some), _responses_first(their), rho, max_length)
        for some, their in parts
    ]
    return Pairs(*(torch.cat(columns) for columns in zip(*found, strict=True)))


def _responses_first(part: Tensor) -> Tensor:
    """[P, R] as contiguous float64 [R, P], so that reductions over R run along many prompts at once."""
    return part.T.to(torch.float64, copy=True, memory_format=torch.contiguous_format)


def _length_controlled(scores: Tensor, lengths: Tensor, rho: float, max_length: float | None) -> Pairs:
    """Pairs of scores and lengths [R, P]."""
    highest = scores.nan_to_num(nan=-torch.inf).amax(0)
    lowest = scores.nan_to_num(nan=torch.inf).amin(0)
    slack = rho * (highest - lowest)
    chosen, chosen_by = _shortest(highest - scores <= slack, lengths, scores)
    rejected, rejected_by = _shortest(scores - lowest <= slack, -lengths, -scores)
    reason = torch.maximum(chosen_by, rejected_by)
    if max_length is not None:
        reason[_at(lengths, chosen) > max_length] = Reason.TOO_LONG
    reason[~(_at(scores, chosen) > _at(scores, rejected))] = Reason.EQUAL
    reason[scores.isnan().logical_not_().sum(0) < 2] = Reason.UNSCORED
    return Pairs(chosen, rejected, reason <= Reason.ORDER, reason)


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(0, index.unsqueeze(0)).squeeze(0)


def _shortest(tier: Tensor, lengths: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Index [P] of the shortest response in tier [R, P] (then best score, then first), and its Reason [P]."""
    length = torch.where(tier, lengths, torch.inf)
    score = torch.where(length == length.amin(0), scores, -torch.inf)
    best, index = score.max(0)
    decided = torch.where(tier.sum(0) > 1, int(Reason.LENGTH), int(Reason.SCORE))
    return index, decided.masked_fill_((score == best).sum(0) > 1, int(Reason.ORDER))


def select_judged_response(judgment_scores: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """The response of each prompt whose judgments vary most, which is the one to train the judge on.

    Args:
        judgment_scores: [P, R, J], J judgments of each response; NaN for a judgment that could not be parsed.
        generator: random generator that chooses among equal variances. None: the first is taken.

    Returns:
        Indices [P], int64; -1 if no response has two judgments.

    Raises:
        TypeError, ValueError: judgment_scores is not as above.

    Source: Wu et al., Meta-Rewarding Language Models, 2025.
    """
    check_numbers("judgment_scores", judgment_scores, nan=True, negative=True)
    if judgment_scores.dim() != 3 or 0 in judgment_scores.shape[1:]:
        raise ValueError(
            f"judgment_scores: expected [P, R, J] with R, J > 0, got {list(judgment_scores.shape)}"
        )
    scores = judgment_scores.double()
    variance = (scores - scores.nanmean(-1, keepdim=True)).square().nanmean(-1)
    variance[scores.isnan().logical_not_().sum(-1) < 2] = -torch.inf
    widest = variance.amax(1, keepdim=True)
    best = variance >= widest * (1 - 1e-12)  # equal judgments in another order may differ by rounding
    order = best.double()
    if generator is not None:
        order = order * (
            1 - torch.rand(best.shape, generator=generator, device=best.device, dtype=order.dtype)
        )
    return order.argmax(1).masked_fill_(widest.squeeze(1) < 0, -1)


def battle_matrix(
    results: Tensor, *, smoothing: float = 1.0, per_prompt: bool = False
) -> tuple[Tensor, Tensor]:
    """Weighted wins between judgments; wins in the position that the meta-judge favors weigh less.

    A win of the judgment shown first has the weight (wins of second + smoothing) / (all wins + 2 smoothing).
    A win of the judgment shown second has the same weight with the wins of the first. Both weights are 1/2 if
    there are no wins and smoothing is 0.

    Args:
        results: [P, J, J] in {1, 0, -1}: results of the battles in which the row's judgment is shown first
            and the column's second: 1 if the first won, -1 if the second won, 0 for a tie or a result that
            could not be parsed. The diagonal is ignored.
        smoothing: number added to the wins of each position, >= 0.
        per_prompt: whether to compute the weights from the wins of each prompt instead of all wins.

    Returns:
        The tuple (battles, weights). battles [P, J, J] holds the weighted wins of the row's judgment over the
        column's, for `bradley_terry`; weights is (first, second) [2], or [2, P] with per_prompt. The dtype is
        that of results, or the default dtype if results are integers.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Wu et al., Meta-Rewarding Language Models, 2025. The paper does not say whether it counts wins per
    prompt or over all prompts. The smoothing is this library's addition.
    """
    _checks.check_tensor("results", results)
    if results.dtype == torch.bool or results.is_complex():
        raise TypeError(f"results: expected integers or floating-point numbers, got {results.dtype}")
    if results.dim() != 3 or results.shape[1] != results.shape[2] or results.shape[1] == 0:
        raise ValueError(f"results: expected [P, J, J] with J > 0, got {list(results.shape)}")
    if not torch.isin(results, torch.tensor([-1, 0, 1], dtype=results.dtype, device=results.device)).all():
        raise ValueError("results: expected only 1, 0 and -1, got other values")
    if not 0 <= smoothing < float("inf"):
        raise ValueError(f"smoothing: expected a finite number >= 0, got {smoothing}")
    dtype = results.dtype if results.is_floating_point() else torch.get_default_dtype()
    itself = torch.eye(results.shape[1], dtype=torch.bool, device=results.device)
    first, second = ((results == who) & ~itself for who in (1, -1))
    wins = torch.stack([first.sum((1, 2)), second.sum((1, 2))]).double()  # [2, P]
    if not per_prompt:
        wins = wins.sum(1, keepdim=True)
    wins = wins + smoothing
    weights = torch.where(wins.sum(0) > 0, wins.flip(0) / wins.sum(0), 0.5).to(dtype)
    battles = weights[0, :, None, None] * first + weights[1, :, None, None] * second.mT
    return battles, weights if per_prompt else weights[:, 0]


def judge_pairs(
    battles: Tensor, lengths: Tensor | None = None, *, max_length: float | None = None, ridge: float = 1e-2
) -> Pairs:
    """Pairs the judgment with the highest Bradley-Terry score with the one with the lowest, for each prompt.

    Scores are rounded to 1e-8. Among equal scores the shortest judgment is chosen and the longest rejected.

    Args:
        battles: [P, J, J], from `battle_matrix`.
        lengths: [P, J], >= 0, lengths of the judgments. None: the first of equal judgments is taken.
        max_length: pairs whose chosen judgment is longer are dropped, because the meta-judge favors long
            ones; needs lengths. None: no limit.
        ridge: as in `bradley_terry`.

    Returns:
        `Pairs` (chosen, rejected, keep, reason), each [P]; reason is a `Reason`.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Wu et al., Meta-Rewarding Language Models, 2025. The rules that break ties are this library's.
    """
    _checks.check_tensor("battles", battles)
    if battles.dim() != 3:
        raise ValueError(f"battles: expected [P, J, J], got {list(battles.shape)}")
    if lengths is None and max_length is not None:
        raise ValueError("max_length: needs lengths")
    scores = bradley_terry(battles.double(), ridge=ridge).round(decimals=8)
    if lengths is None:
        lengths = torch.zeros_like(scores)
    return length_controlled_pairs(scores, lengths, 0.0, max_length=max_length)
