"""The formulas of the DPO family, one function per loss type, on quantities of B pairs."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pairs(NamedTuple):
    """What a formula may use; [B] each, the options beside them."""

    a: Tensor  # log-ratio of the chosen completion, policy to reference (log-prob without a reference)
    b: Tensor  # of the rejected one
    score_a: Tensor  # the f-divergence's scores of a and b
    score_b: Tensor
    u: Tensor  # beta * (score_a - score_b) + length_alpha * (n_w - n_l)
    policy_w: Tensor  # log-probs of the policy
    policy_l: Tensor
    ref_w: Tensor  # log-probs of the reference, 0 without one
    ref_l: Tensor
    n_w: Tensor  # tokens, at least 1
    n_l: Tensor
    said: Tensor  # bool: neither completion is empty
    nll: Tensor  # []: token mean over the chosen completions
    beta: float
    smoothing: float
    margin: float
    tau: float


def smoothed(x: Tensor, smoothing: float) -> Tensor:
    """-log sigmoid(x) where a label is wrong with probability `smoothing` (cDPO)."""
    return -(1 - smoothing) * F.logsigmoid(x) - smoothing * F.logsigmoid(-x)


def sigmoid(p: Pairs) -> Tensor:
    return smoothed(p.u, p.smoothing)


def robust(p: Pairs) -> Tensor:
    e = p.smoothing
    return (-(1 - e) * F.logsigmoid(p.u) + e * F.logsigmoid(-p.u)) / (1 - 2 * e)


def hinge(p: Pairs) -> Tensor:
    return F.relu(1 - p.u)


def ipo(p: Pairs) -> Tensor:
    return (p.score_a / p.n_w - p.score_b / p.n_l - 1 / (2 * p.beta)) ** 2


def ipo_sum(p: Pairs) -> Tensor:
    return (p.score_a - p.score_b - 1 / (2 * p.beta)) ** 2


def exo_pair(p: Pairs) -> Tensor:
    e, log_q, log_not_q = p.smoothing, F.logsigmoid(p.u), F.logsigmoid(-p.u)
    return log_q.exp() * (log_q - math.log1p(-e)) + log_not_q.exp() * (log_not_q - math.log(e))


def nca_pair(p: Pairs) -> Tensor:
    chosen, rejected = p.beta * p.score_a, p.beta * p.score_b
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(p: Pairs) -> Tensor:
    return -F.logsigmoid(p.beta * p.score_a) - F.logsigmoid(-p.beta * p.score_b)


def sppo_hard(p: Pairs) -> Tensor:
    half = 1 / (2 * p.beta)
    return (p.score_a - half) ** 2 + (p.score_b + half) ** 2


def apo_zero(p: Pairs) -> Tensor:
    return torch.sigmoid(-p.beta * p.a) + torch.sigmoid(p.beta * p.b)


def apo_down(p: Pairs) -> Tensor:
    return torch.sigmoid(p.beta * p.a) + torch.sigmoid(-p.u)


def discopop(p: Pairs) -> Tensor:
    x = p.u / p.tau  # exp(-u) and its factor sigmoid(x) in one exponent: alone they overflow
    return -F.logsigmoid(p.u) * torch.sigmoid(-x) + torch.exp(F.logsigmoid(x) - p.u)


def sigmoid_norm(p: Pairs) -> Tensor:
    return -F.logsigmoid(p.beta * (p.score_a / p.n_w - p.score_b / p.n_l))


def aot(p: Pairs) -> Tensor:
    policy, reference = p.policy_w - p.policy_l, p.ref_w - p.ref_l
    return smoothed(p.beta * (policy.sort().values - reference.sort().values), p.smoothing)


def aot_unpaired(p: Pairs) -> Tensor:
    return smoothed(p.beta * (p.a.sort().values - p.b.sort().values), p.smoothing)


def simpo(p: Pairs) -> Tensor:
    return smoothed(p.beta * (p.policy_w / p.n_w - p.policy_l / p.n_l) - p.margin, p.smoothing)


def cpo(p: Pairs) -> Tensor:
    return smoothed(p.beta * (p.policy_w - p.policy_l), p.smoothing)


def orpo(p: Pairs) -> Tensor:
    odds = [log_odds(s / n, p.said) for s, n in ((p.policy_w, p.n_w), (p.policy_l, p.n_l))]
    return p.nll - p.beta * F.logsigmoid(odds[0] - odds[1])


def at_most(x: Tensor, limit: float) -> Tensor:
    """min(x, limit) with gradient 1 at the limit, where that of clamp depends on torch's version."""
    return x.masked_fill(x > limit, limit)


def log_odds(logp: Tensor, said: Tensor) -> Tensor:
    """log(p / (1 - p)) of probabilities given as logs; 0 where nothing was said."""
    logp = at_most(logp, -torch.finfo(logp.dtype).tiny)  # certainty has infinite odds
    safe = logp.where(said, -1.0)
    return (safe - torch.log(-torch.expm1(safe))).where(said, 0.0)


def sft(p: Pairs) -> Tensor:
    return p.nll.expand_as(p.a)


LOSSES: dict[str, Callable[[Pairs], Tensor]] = {
    f.__name__: f
    for f in (sigmoid, robust, hinge, ipo, ipo_sum, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero,
              apo_down, discopop, sigmoid_norm, aot, aot_unpaired, simpo, cpo, orpo, sft)
}  # fmt: skip
REFERENCE = frozenset(LOSSES) - {"simpo", "cpo", "orpo", "sft"}  # types that compare with a reference
PER_TOKEN = frozenset({"ipo", "sigmoid_norm", "simpo", "orpo", "sft"})  # types that divide by lengths
SORTED = frozenset({"aot", "aot_unpaired"})  # types that pair values of different pairs
SMOOTHED = frozenset({"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "simpo", "cpo"})
OF_MARGIN = frozenset({"sigmoid", "robust", "hinge", "exo_pair", "discopop"})  # functions of u alone
