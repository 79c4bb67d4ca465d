"""Meta-Rewarding's pairs: responses under length control, and judgments by their battles."""

import torch
from torch import Tensor

from sukhops import _checks
from sukhops.pairs._pairs import Pairs, Reason, check_numbers
from sukhops.pairs.bradley_terry import bradley_terry

PROMPTS = 1 << 15  # chosen together: temporaries stay in cache


def length_controlled_pairs(
    scores: Tensor, lengths: Tensor, rho: float, *, max_length: float | None = None
) -> Pairs:
    """The shortest of the best responses against the longest of the worst, for each prompt.

    Best is who scores at least (1 - rho) * highest + rho * lowest, worst who scores at most
    (1 - rho) * lowest + rho * highest. Of several with that length the one with the more extreme score is
    taken, then the first.

    Args:
        scores: [P, R], mean judgments of R responses to each of P prompts; NaN for one without a score.
        lengths: [P, R], >= 0, in any unit (the published filter counts characters).
        rho: in [0, 0.5); 0 leaves length to break ties.
        max_length: pairs whose chosen response is longer are dropped.

    Returns:
        `Pairs`: chosen, rejected, keep, reason [P]; reason is a `Reason`.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Wu et al., Meta-Rewarding Language Models, 2025. The order of ties is ours.
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
    """[P, R] as float64 [R, P], where numbers of many prompts are next to each other."""
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
    """The least length of a tier [R, P], then the largest score, then the first; and what decided."""
    length = torch.where(tier, lengths, torch.inf)
    score = torch.where(length == length.amin(0), scores, -torch.inf)
    best, index = score.max(0)
    decided = torch.where(tier.sum(0) > 1, int(Reason.LENGTH), int(Reason.SCORE))
    return index, decided.masked_fill_((score == best).sum(0) > 1, int(Reason.ORDER))


def select_judged_response(judgment_scores: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """The response of each prompt whose judgments vary most: the one to learn judging on.

    Args:
        judgment_scores: [P, R, J], J judgments of each response; NaN for one that could not be parsed.
        generator: draws among equal variances; without it the first is taken.

    Returns:
        index [P], int64; -1 where no response has two judgments.

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
    best = variance >= widest * (1 - 1e-12)  # the same judgments in another order differ by rounding
    order = best.double()
    if generator is not None:
        order = order * (
            1 - torch.rand(best.shape, generator=generator, device=best.device, dtype=order.dtype)
        )
    return order.argmax(1).masked_fill_(widest.squeeze(1) < 0, -1)


def battle_matrix(
    results: Tensor, *, smoothing: float = 1.0, per_prompt: bool = False
) -> tuple[Tensor, Tensor]:
    """Weighted wins between judgments, a win in the position that the meta-judge favours counting less.

    A win of the judgment shown first weighs (wins of the second + smoothing) / (all wins + 2 smoothing), and
    the other way round; both weigh 1/2 where there is nothing to count.

    Args:
        results: [P, J, J] in {1, 0, -1}: of the battle with the row's judgment shown first and the column's
            second, 1 if the first won, -1 if the second did, 0 for a tie or one not parsed. The diagonal is
            not read.
        smoothing: >= 0, added to the wins of each position.
        per_prompt: weigh each prompt by its own wins instead of by all of them.

    Returns:
        battles [P, J, J], the weight of wins of the row's judgment over the column's, for `bradley_terry`;
        weights (first, second) [2], with per_prompt [2, P]. Floating results keep their dtype, integers give
        the default one.

    Source: Wu et al., Meta-Rewarding Language Models, 2025. Whether the paper counts wins per prompt or over
    all is not known, and the smoothing is ours.
    """
    _checks.check_tensor("results", results)
    if results.dim() != 3 or results.shape[1] != results.shape[2] or results.shape[1] == 0:
        raise ValueError(f"results: expected [P, J, J] with J > 0, got {list(results.shape)}")
    if not torch.isin(results, torch.tensor([-1, 0, 1], dtype=results.dtype, device=results.device)).all():
        raise ValueError("results: expected 1, 0 and -1 only")
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
    """The judgment with the highest Bradley-Terry score against the one with the lowest, for each prompt.

    Scores closer than 1e-8 are equal; of those the shortest is chosen and the longest rejected.

    Args:
        battles: [P, J, J] as `battle_matrix` gives them.
        lengths: [P, J], >= 0, of the judgments; without them the first of equals is taken.
        max_length: needs lengths; pairs whose chosen judgment is longer are dropped (the meta-judge likes
            long ones).
        ridge: as in `bradley_terry`.

    Returns:
        `Pairs`: chosen, rejected, keep, reason [P]; reason is a `Reason`.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Wu et al., Meta-Rewarding Language Models, 2025. The order of ties is ours.
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
