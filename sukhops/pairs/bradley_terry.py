"""Bradley-Terry scores for many small sets of battles at once."""

import math
from typing import Literal, overload

import torch
from torch import Tensor

from sukhops.pairs._pairs import check_numbers

NUMBERS = 1 << 17  # entries of battles in one batch: enough to fill a device, few enough to stay in cache
STEPS = 200  # limit; if a player always wins, scores move apart by about 1 per step to log(battles / ridge)
CONVERGED = 1e-7  # size of the last Newton step; the error after it is about its square


@overload
def bradley_terry(
    battles: Tensor, *, ridge: float = 1e-2, return_errors: Literal[False] = False
) -> Tensor: ...
@overload
def bradley_terry(
    battles: Tensor, *, ridge: float = 1e-2, return_errors: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def bradley_terry(
    battles: Tensor, *, ridge: float = 1e-2, return_errors: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Scores e that maximize sum_mn battles_mn log sigmoid(e_m - e_n) - ridge / 2 |e|^2, for each problem.

    Players that are connected by battles, directly or through others, have mean score 0. The order of the
    players changes only the rounding. The method is Newton's in float64 with steps that always increase the
    likelihood. No gradient flows through it.

    Args:
        battles: [..., J, J], finite and >= 0, with diagonal 0: number (or weight) of the wins of the row's
            player over the column's player. A tie is half a win for each.
        ridge: precision of a Gaussian prior around 0, >= 0. With ridge=0 a player who never loses has no
            finite score, and the call raises.
        return_errors: whether to also return standard errors of the scores, relative to the mean of connected
            players: square roots of the diagonal of the inverse Hessian, without the direction of this mean.

    Returns:
        scores [..., J] in nats (a difference of 1 means odds of e); with return_errors the tuple (scores,
        errors [..., J]). The dtype is that of battles, or the default dtype if battles are integers.

    Raises:
        TypeError, ValueError: battles or ridge are not as above; ridge is 0 and there is no finite maximum.

    Source: Wu et al., Meta-Rewarding Language Models, 2025; Bradley and Terry, 1952. The ridge is this
    library's addition.
    """
    check_numbers("battles", battles)
    if battles.dim() < 2 or battles.shape[-1] != battles.shape[-2] or battles.shape[-1] == 0:
        raise ValueError(f"battles: expected [..., J, J] with J > 0, got {list(battles.shape)}")
    if battles.diagonal(dim1=-2, dim2=-1).any():
        raise ValueError("battles: expected a diagonal of zeros, got a player with a battle against itself")
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge: expected a finite number >= 0, got {ridge}")
    dtype = battles.dtype if battles.is_floating_point() else torch.get_default_dtype()
    flat = battles.detach().flatten(0, -3) if battles.dim() > 2 else battles.detach()[None]
    together = max(1, NUMBERS // battles.shape[-1] ** 2)
    solved = [_solve(part.double(), ridge, return_errors) for part in flat.split(together)]
    scores, errors = (
        torch.cat(parts).view(battles.shape[:-1]).to(dtype) for parts in zip(*solved, strict=True)
    )
    return (scores, errors) if return_errors else scores


def _solve(battles: Tensor, ridge: float, want_errors: bool) -> tuple[Tensor, Tensor]:
    """Scores [P, J] of battles [P, J, J], and their standard errors [P, J] (zeros unless want_errors)."""
    size = battles.shape[-1]
    if size == 1:
        return battles[:, 0] * 0, battles[:, 0] * 0
    prior = ridge * torch.eye(size, dtype=battles.dtype, device=battles.device)
    if want_errors or ridge == 0:
        connected = _reaches(battles + battles.mT > 0)
        means = connected / connected.sum(-1, keepdim=True)  # [P, J, J], projection onto means of components
    if ridge == 0:
        one_sided = (_reaches(battles > 0) != connected).flatten(1).any(1).sum().item()
        if one_sided:
            raise ValueError(
                f"ridge: expected > 0, got 0: {one_sided} of the problems have no finite solution, because a "
                "group of players never lost to the others"
            )
        prior = prior + means  # makes the Hessian invertible; the gradient has no component along the means
    first, second = _players(size, battles.device)
    # from here on problems are the last axis, which is contiguous, and each pair of players appears once
    won, lost = (battles[:, i, j].T.contiguous() for i, j in ((first, second), (second, first)))
    # initial scores: log odds of each player against all others, scaled up; this saves a third of the steps
    wins, losses = battles.sum(2).T, battles.sum(1).T
    some = 0.02 * (wins + losses)
    start = 1.3 * ((wins + some) / (losses + some)).log().nan_to_num(0)  # 0 / 0: a player without battles
    maximum = _newton(won, lost, prior, ridge, start)
    # only the ridge determines the mean, so a small ridge amplifies its rounding error: remove the mean
    if ridge == 0:
        scores = maximum.T - (means @ maximum.T.unsqueeze(2)).squeeze(2)
    else:
        scores = (maximum - maximum.mean(0)).T
    errors = torch.zeros_like(scores)
    if want_errors:
        _, hessian, _ = _derivatives(won, lost, prior, ridge, maximum)
        covariance = torch.linalg.inv(hessian + (means if ridge else 0)) - means / (1 + ridge)
        errors = covariance.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    return scores, errors


def _newton(won: Tensor, lost: Tensor, prior: Tensor, ridge: float, scores: Tensor) -> Tensor:
    """The scores [J, P] at the maximum, for battles [pairs, P], starting from `scores`.

    When few problems are left, only these are continued.
    """
    first, second = _players(len(scores), scores.device)
    for _ in range(STEPS):
        gradient, hessian, gap = _derivatives(won, lost, prior, ridge, scores)
        step = torch.linalg.solve_ex(hessian, gradient.T).result.T  # not finite if the Hessian is singular
        # The curvature of a term falls with |gap|, so a full step can overshoot only if it moves a gap toward
        # 0. There the curvature grows at most by e^|change|. So it is safe to scale a step that moves gaps by
        # at most r toward 0 by log1p(r) / r.
        change = step[first] - step[second]
        inward = (change * gap.sign()).amin(0).neg().clamp(min=0)
        scores = scores + torch.where(inward > 0, inward.log1p() / inward, 1) * step
        unfinished = ~(step.abs() <= CONVERGED).all(0)
        count = unfinished.count_nonzero().item()
        if count == 0:
            return scores
        if 4 * count < len(unfinished):
            rest = unfinished.nonzero().squeeze(1)
            given = (won[:, rest], lost[:, rest], prior[rest] if prior.dim() == 3 else prior)
            return scores.index_copy_(1, rest, _newton(*given, ridge, scores[:, rest]))
    raise ValueError(f"ridge: {ridge} is too small for these battles, no maximum within {STEPS} steps")


def _derivatives(
    won: Tensor, lost: Tensor, prior: Tensor, ridge: float, scores: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient [J, P], negative Hessian [P, J, J] of the penalized log-likelihood, score gaps [pairs, P]."""
    size = len(scores)
    first, second = _players(size, scores.device)
    square = scores.new_zeros(size, size, scores.shape[1])  # for all ordered pairs; the diagonal stays 0

    def spread(upper: Tensor, lower: Tensor) -> Tensor:
        for i, j, values in ((first, second, upper), (second, first, lower)):
            square.flatten(0, 1).index_copy_(0, i * size + j, values)
        return square

    gap = scores[first] - scores[second]
    win, lose = gap.sigmoid(), gap.neg().sigmoid()
    flow = won * lose - lost * win
    gradient = spread(flow, -flow).sum(1) - ridge * scores
    curvature = (won + lost) * win * lose
    hessian = prior - spread(curvature, curvature).permute(2, 0, 1)
    hessian.diagonal(dim1=1, dim2=2).add_(square.sum(1).T)
    return gradient, hessian, gap


def _players(size: int, device: torch.device) -> Tensor:
    """Indices of the first and the second player of each pair: [2, pairs]."""
    return torch.triu_indices(size, size, 1, device=device)


def _reaches(edges: Tensor) -> Tensor:
    """Whether a path leads from node i to node j (or i = j): bool edges [P, J, J] -> float64 0 or 1."""
    size = edges.shape[-1]
    paths = edges.double() + torch.eye(size, dtype=torch.float64, device=edges.device)
    for _ in range((size - 1).bit_length()):
        paths = (paths @ paths).clamp(max=1)
    return paths
