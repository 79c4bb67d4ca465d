"""The formulas of the DPO family, one function per loss type. Each maps B pairs to their losses [B].

`sukhops.losses.dpo_loss` names the papers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pairs(NamedTuple):
    """Inputs of the formulas for B pairs; tensors are [B] unless noted. w: chosen, l: rejected completion."""

    a: Tensor  # log-ratio of policy and reference for the chosen completion (log-prob without a reference)
    b: Tensor  # the same for the rejected completion
    score_a: Tensor  # score of a under the f-divergence
    score_b: Tensor  # score of b under the f-divergence
    u: Tensor  # beta * (score_a - score_b) + length_alpha * (n_w - n_l)
    policy_w: Tensor  # log-prob of the chosen completion under the policy
    policy_l: Tensor  # log-prob of the rejected completion under the policy
    ref_w: Tensor  # log-prob of the chosen completion under the reference, 0 without a reference
    ref_l: Tensor  # log-prob of the rejected completion under the reference, 0 without a reference
    n_w: Tensor  # number of tokens of the chosen completion, at least 1
    n_l: Tensor  # number of tokens of the rejected completion, at least 1
    nonempty: Tensor  # bool, whether both completions have tokens
    nll: Tensor  # [], negative log-likelihood per token of all chosen completions
    beta: float
    smoothing: float
    margin: float
    tau: float


def smoothed(x: Tensor, smoothing: float) -> Tensor:
    """-log sigmoid(x) for labels that are wrong with probability `smoothing` (cDPO): shaped as x."""
    return -(1 - smoothing) * F.logsigmoid(x) - smoothing * F.logsigmoid(-x)


def sigmoid(p: Pairs) -> Tensor:
    """DPO, with label smoothing cDPO: [B]."""
    return smoothed(p.u, p.smoothing)


def robust(p: Pairs) -> Tensor:
    """Robust DPO, unbiased for labels that are wrong with probability `smoothing`: [B]."""
    e = p.smoothing
    return (-(1 - e) * F.logsigmoid(p.u) + e * F.logsigmoid(-p.u)) / (1 - 2 * e)


def hinge(p: Pairs) -> Tensor:
    """Hinge loss of SLiC: [B]."""
    return F.relu(1 - p.u)


def ipo(p: Pairs) -> Tensor:
    """IPO on scores per token: [B]."""
    return (p.score_a / p.n_w - p.score_b / p.n_l - 1 / (2 * p.beta)) ** 2


def ipo_sum(p: Pairs) -> Tensor:
    """IPO on scores of whole completions: [B]."""
    return (p.score_a - p.score_b - 1 / (2 * p.beta)) ** 2


def exo_pair(p: Pairs) -> Tensor:
    """EXO for pairs, a reverse KL to the smoothed labels: [B]."""
    e, log_q, log_not_q = p.smoothing, F.logsigmoid(p.u), F.logsigmoid(-p.u)
    return log_q.exp() * (log_q - math.log1p(-e)) + log_not_q.exp() * (log_not_q - math.log(e))


def nca_pair(p: Pairs) -> Tensor:
    """NCA for pairs: [B]."""
    chosen, rejected = p.beta * p.score_a, p.beta * p.score_b
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(p: Pairs) -> Tensor:
    """BCO for pairs, without the reward shift: [B]."""
    return -F.logsigmoid(p.beta * p.score_a) - F.logsigmoid(-p.beta * p.score_b)


def sppo_hard(p: Pairs) -> Tensor:
    """SPPO with hard labels: [B]."""
    half = 1 / (2 * p.beta)
    return (p.score_a - half) ** 2 + (p.score_b + half) ** 2


def apo_zero(p: Pairs) -> Tensor:
    """APO-zero: [B]."""
    return torch.sigmoid(-p.beta * p.a) + torch.sigmoid(p.beta * p.b)


def apo_down(p: Pairs) -> Tensor:
    """APO-down: [B]."""
    return torch.sigmoid(p.beta * p.a) + torch.sigmoid(-p.u)


def discopop(p: Pairs) -> Tensor:
    """DiscoPOP, a blend of the logistic and the exponential loss: [B]."""
    x = p.u / p.tau  # exp(-u) * sigmoid(x) is computed as one exponential, because exp(-u) may overflow
    return -F.logsigmoid(p.u) * torch.sigmoid(-x) + torch.exp(F.logsigmoid(x) - p.u)


def sigmoid_norm(p: Pairs) -> Tensor:
    """DPO on scores per token: [B]."""
    return -F.logsigmoid(p.beta * (p.score_a / p.n_w - p.score_b / p.n_l))


def aot(p: Pairs) -> Tensor:
    """AOT on pairs: sorted differences of the policy against sorted differences of the reference: [B]."""
    policy, reference = p.policy_w - p.policy_l, p.ref_w - p.ref_l
    return smoothed(p.beta * (policy.sort().values - reference.sort().values), p.smoothing)


def aot_unpaired(p: Pairs) -> Tensor:
    """AOT on unpaired data: sorted log-ratios of the chosen against those of the rejected: [B]."""
    return smoothed(p.beta * (p.a.sort().values - p.b.sort().values), p.smoothing)


def simpo(p: Pairs) -> Tensor:
    """SimPO, on log-probs per token without a reference: [B]."""
    return smoothed(p.beta * (p.policy_w / p.n_w - p.policy_l / p.n_l) - p.margin, p.smoothing)


def cpo(p: Pairs) -> Tensor:
    """CPO, on log-probs without a reference: [B]."""
    return smoothed(p.beta * (p.policy_w - p.policy_l), p.smoothing)


def orpo(p: Pairs) -> Tensor:
    """ORPO, the NLL plus an odds-ratio term on log-probs per token: [B]."""
    odds = [log_odds(s / n, p.nonempty) for s, n in ((p.policy_w, p.n_w), (p.policy_l, p.n_l))]
    return p.nll - p.beta * F.logsigmoid(odds[0] - odds[1])


def at_most(x: Tensor, limit: float) -> Tensor:
    """min(x, limit), shaped as x, with gradient 1 at the limit (that of clamp depends on torch's version)."""
    return x.masked_fill(x > limit, limit)


def log_odds(logp: Tensor, nonempty: Tensor) -> Tensor:
    """log(p / (1 - p)) of log-probs [B], 0 unless `nonempty`: [B]."""
    logp = at_most(logp, -torch.finfo(logp.dtype).tiny)  # keeps the odds finite for probability 1
    safe = logp.where(nonempty, -1.0)
    return (safe - torch.log(-torch.expm1(safe))).where(nonempty, 0.0)


def sft(p: Pairs) -> Tensor:
    """Negative log-likelihood per token of the chosen completions: [B], all equal."""
    return p.nll.expand_as(p.a)


LOSSES: dict[str, Callable[[Pairs], Tensor]] = {
    f.__name__: f
    for f in (sigmoid, robust, hinge, ipo, ipo_sum, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero,
              apo_down, discopop, sigmoid_norm, aot, aot_unpaired, simpo, cpo, orpo, sft)
}  # fmt: skip
REFERENCE = frozenset(LOSSES) - {"simpo", "cpo", "orpo", "sft"}  # types that use a reference
PER_TOKEN = frozenset({"ipo", "sigmoid_norm", "simpo", "orpo", "sft"})  # types that divide by lengths
SORTED = frozenset({"aot", "aot_unpaired"})  # types whose loss of a pair depends on other pairs
SMOOTHED = frozenset({"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "simpo", "cpo"})
OF_MARGIN = frozenset({"sigmoid", "robust", "hinge", "exo_pair", "discopop"})  # functions of u alone
