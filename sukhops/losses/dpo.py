"""The DPO family on log-probs: options, sums over sequences, and the loss function."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sukhops.losses._output import LossOutput, average, indicator
from sukhops.losses._preference import (
    LOSSES,
    OF_MARGIN,
    PER_TOKEN,
    REFERENCE,
    SMOOTHED,
    SORTED,
    Pairs,
    at_most,
)
from sukhops.losses._sequences import (
    IGNORE,
    as_scores,
    check_sequences,
    per_token,
    position_in_sequence,
    sequence_sum,
    sums,
)

EXPONENT_LIMIT = 80.0  # keeps exp finite in float32
DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")


class Options(NamedTuple):
    """The options of `dpo_loss`, which documents them."""

    beta: float = 0.1
    loss_type: str | Sequence[str] = "sigmoid"
    loss_weights: Sequence[float] | None = None
    label_smoothing: float = 0.0
    reference_free: bool = False
    length_alpha: float = 0.0
    ld_alpha: float = 1.0
    nll_weight: float = 0.0
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    use_weighting: bool = False
    margin: float = 0.0
    tau: float = 0.05

    @property
    def types(self) -> tuple[str, ...]:
        """The loss types as a tuple."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    @property
    def weights(self) -> tuple[float, ...]:
        """The factors of the loss types."""
        return (1.0,) * len(self.types) if self.loss_weights is None else tuple(self.loss_weights)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss uses log-probs of a reference model."""
        return not self.reference_free and not REFERENCE.isdisjoint(self.types)

    def check(self) -> "Options":
        """Returns the options. Raises a ValueError if one is out of range, or unused by a listed type."""
        types = self.types
        for name in types:
            if name not in LOSSES:
                raise ValueError(f"loss_type: expected one or several of {', '.join(LOSSES)}; got {name!r}")
        if not types or len(self.weights) != len(types):
            raise ValueError(
                f"loss_weights: expected one per loss_type {types}, at least one, got {self.loss_weights!r}"
            )
        if not all(_finite(w) for w in self.weights):
            raise ValueError(f"loss_weights: expected finite numbers, got {self.loss_weights!r}")
        for name, ok, expected in (
            ("beta", 0 < self.beta < math.inf, "a finite number > 0"),
            ("label_smoothing", 0 <= self.label_smoothing <= 1, "a number in [0, 1]"),
            ("length_alpha", _finite(self.length_alpha), "a finite number"),
            ("ld_alpha", 0 <= self.ld_alpha <= 1, "a number in [0, 1]"),
            ("nll_weight", 0 <= self.nll_weight < math.inf, "a finite number >= 0"),
            ("f_divergence", self.f_divergence in DIVERGENCES, f"one of {', '.join(DIVERGENCES)}"),
            ("f_alpha", _finite(self.f_alpha), "a finite number"),
            ("margin", _finite(self.margin), "a finite number"),
            ("tau", 0 < self.tau < math.inf, "a finite number > 0"),
        ):
            if not ok:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        if "robust" in types and not self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing: expected < 0.5 with robust, got {self.label_smoothing}")
        if "exo_pair" in types and not 0 < self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing: expected in (0, 1) with exo_pair, e.g. 1e-3, got {self.label_smoothing}"
            )
        default = Options()
        # (option, loss types that use it, whether any or all of the listed types must use it)
        for name, users, needed in (
            ("label_smoothing", SMOOTHED, any),
            ("margin", {"simpo"}, any),
            ("tau", {"discopop"}, any),
            ("reference_free", REFERENCE, all),
            ("length_alpha", OF_MARGIN, all),
            ("ld_alpha", frozenset(LOSSES) - PER_TOKEN, all),
            ("f_divergence", REFERENCE - SORTED - {"apo_zero"}, all),
            ("use_weighting", REFERENCE - SORTED, all),
        ):
            if getattr(self, name) != getattr(default, name) and not needed(t in users for t in types):
                raise ValueError(
                    f"{name}: expected {getattr(default, name)!r}, because "
                    f"{', '.join(t for t in types if t not in users)} does not use it, "
                    f"got {getattr(self, name)!r}; it is used by {', '.join(t for t in LOSSES if t in users)}"
                )
        if self.f_alpha != default.f_alpha and self.f_divergence != "alpha":
            raise ValueError(
                f"f_alpha: expected {default.f_alpha} unless f_divergence='alpha', got {self.f_alpha}"
            )
        if self.f_divergence != "reverse_kl" and self.reference_free:
            raise ValueError(
                f"f_divergence: expected 'reverse_kl' with reference_free, got {self.f_divergence!r}"
            )
        if self.nll_weight and not {"orpo", "sft"}.isdisjoint(types):
            raise ValueError(
                f"nll_weight: expected 0, because orpo and sft include this term, got {self.nll_weight}"
            )
        return self


def _finite(x: float) -> bool:
    return -math.inf < x < math.inf  # torch.compile cannot trace math.isfinite of dynamic numbers


def score(ratio: Tensor, o: Options) -> Tensor:
    """The score of log-ratios under the f-divergence, shaped as `ratio`; derivative 1 at 0 (js: 1/2).

    Source: Wang et al. 2023 (f-divergences).
    """
    if o.f_divergence == "forward_kl":
        return -torch.exp(at_most(-ratio, EXPONENT_LIMIT))
    if o.f_divergence == "js":
        return F.logsigmoid(ratio)
    if o.f_divergence == "alpha" and o.f_alpha != 1:
        return torch.exp(at_most((o.f_alpha - 1) * ratio, EXPONENT_LIMIT)) / (o.f_alpha - 1)
    return ratio


def dpo_loss(
    logp: Tensor,
    target: Tensor,
    ref_logp: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    log_sum_squares: Tensor | None = None,
    num_items: int | Tensor | None = None,
    **options: Any,
) -> LossOutput:
    """Preference loss of B pairs: the mean over pairs of a formula on log-ratios of policy and reference.

    a and b are the log-ratios of the chosen and the rejected completion (sums over tokens), n_w and n_l their
    numbers of tokens, and u = beta * (a - b). The loss types are: sigmoid, -log sigmoid(u) (with
    label_smoothing: cDPO); robust; hinge; ipo (a and b divided by n_w and n_l) and ipo_sum (not divided);
    exo_pair; nca_pair; bco_pair; sppo_hard; apo_zero; apo_down; discopop; sigmoid_norm; aot; aot_unpaired.
    Without a reference: simpo; cpo; orpo; sft (the NLL per token of the chosen completions). Several types
    are added with loss_weights.

    Args:
        logp: [2B, T], or packed [N] with cu_seqlens: log-probs of the targets under the policy. The first B
            sequences are the chosen, the last B the rejected completions of the same prompts.
        target: shaped as logp, integers; -100 for an ignored token (prompt, padding).
        ref_logp: log-probs under the reference, shaped as logp or summed per sequence [2B]; detached. Needed
            if a listed type uses a reference and reference_free is not set.
        cu_seqlens: [2B + 1], integers, from 0 to N: ends of the packed sequences.
        log_sum_squares: log sum_v p_v**2 of each token's distribution, shaped as logp; with use_weighting.
        num_items: a number > 0 or a 0-dim tensor: the number of pairs in the whole batch, if this call has a
            part of it. None: their number in this call. Not with sft, orpo or nll_weight, whose terms are
            divided by tokens.
        beta: factor of the log-ratios, > 0; larger values keep the policy closer to the reference.
        loss_type: one or several of the types above.
        loss_weights: one factor per loss_type. None: all 1.
        label_smoothing: probability that a preference label is wrong: in [0, 1] for sigmoid, aot,
            aot_unpaired, simpo and cpo, in [0, 1/2) for robust, in (0, 1) for exo_pair.
        reference_free: whether to use 0 as the log-probs of the reference.
        length_alpha: R-DPO: length_alpha * (n_w - n_l) is added to u; for types that are functions of u.
        ld_alpha: LD-DPO: weight of tokens beyond the length of the shorter completion, in [0, 1]; for types
            that do not divide by lengths. Needs ref_logp per token.
        nll_weight: factor of the NLL per token of the chosen completions (RPO; alpha in CPO, 1 in its paper).
        f_divergence: reverse_kl, forward_kl, js or alpha: the function of the log-ratio that replaces it
            (exponents are limited to 80).
        f_alpha: order of the alpha divergence.
        use_weighting: WPO: whether to multiply the loss of a pair by the exponential of the mean over tokens
            of logp - log_sum_squares, of both completions, detached.
        margin: SimPO's gamma, the target margin.
        tau: DiscoPOP's temperature.

    Returns:
        LossOutput(loss [], metrics). Metrics are detached scalars, means over pairs. rewards_chosen and
        rewards_rejected are beta * log-ratio (without a reference beta * log-prob, per token if every type
        divides by lengths); margin is their difference; accuracy is the share of pairs with a positive
        margin; logp_chosen and logp_rejected are sums under the policy in nats. An empty completion has
        log-prob 0; an empty batch has loss 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not match; the number of sequences is odd; cu_seqlens are invalid (on CUDA the
            loss is NaN instead); loss_type is unknown; an option is out of range; no listed type uses
            label_smoothing, margin or tau; one listed type does not use another option; a reference is
            missing, or given to a loss without one.

    Source: Rafailov et al. 2023 (sigmoid); Mitchell 2023 (cDPO); Chowdhury et al. 2024 (robust); Zhao et
    al. 2023 (hinge); Azar et al. 2023 (ipo); Ji et al. 2024 (exo); Chen et al. 2024 (nca); Jung et al. 2024
    (bco); Wu et al. 2024 (sppo); D'Oosterlinck et al. 2024 (apo); Lu et al. 2024 (discopop); Melnyk et al.
    2024 (aot); Meng et al. 2024 (simpo); Xu et al. 2024 (cpo); Hong et al. 2024 (orpo); Park et al. 2024
    (R-DPO); Liu et al. 2024 (LD-DPO); Pang et al. 2024 (RPO); Wang et al. 2023 (f-divergences); Zhou et al.
    2024 (WPO).
    """
    o = Options(**options).check()
    sequences = check_sequences(target, cu_seqlens)
    if sequences % 2:
        raise ValueError(
            f"target: expected an even number of sequences (B chosen, B rejected), got {sequences}"
        )
    (logp,) = as_scores(target, logp=logp)
    counted = target != IGNORE
    tokens = sequence_sum(counted.to(logp.dtype), cu_seqlens)  # [2B], exact below 2**24
    weight = None
    if o.ld_alpha != 1:
        shorter = torch.minimum(*tokens.chunk(2)).repeat(2)
        beyond = position_in_sequence(counted, cu_seqlens) >= per_token(shorter, counted, cu_seqlens)
        weight = torch.ones_like(logp).masked_fill(beyond, o.ld_alpha)

    def total(per: Tensor, weight: Tensor | None = None) -> Tensor:
        per = per.where(counted, 0.0)
        return sequence_sum(per if weight is None else per * weight, cu_seqlens)

    policy = total(logp, weight)  # [2B]
    reference = torch.zeros_like(policy)
    if not o.needs_reference and ref_logp is not None:
        raise ValueError(
            f"ref_logp: expected None, got a tensor; loss_type {o.types} with "
            f"reference_free={o.reference_free} does not use a reference"
        )
    if o.needs_reference and ref_logp is None:
        raise ValueError(
            f"ref_logp: expected log-probs of the reference with loss_type {o.types}, got None; pass "
            "ref_logp (or ref_hidden and ref_weight, to the module), or set reference_free"
        )
    if ref_logp is not None:
        if o.ld_alpha != 1 and ref_logp.shape != target.shape:
            raise ValueError(
                f"ref_logp: expected shape {list(target.shape)} (per token) with ld_alpha, "
                f"got {list(ref_logp.shape)}"
            )
        total_of = partial(total, weight=weight)
        reference = sums("ref_logp", ref_logp.detach(), target, sequences, total_of).to(logp.dtype)
    (a, b), (policy_w, policy_l) = (policy - reference).chunk(2), policy.chunk(2)
    n_w, n_l = tokens.chunk(2)
    chosen = policy_w if weight is None else total(logp).chunk(2)[0]
    nll = -chosen.sum() / n_w.sum().clamp(min=1)
    score_a, score_b = score(a, o), score(b, o)
    ref_w, ref_l = reference.chunk(2)
    pairs = Pairs(
        a, b, score_a, score_b, o.beta * (score_a - score_b) + o.length_alpha * (n_w - n_l),
        policy_w, policy_l, ref_w, ref_l, n_w.clamp(min=1), n_l.clamp(min=1),
        (n_w > 0) & (n_l > 0), nll, o.beta, o.label_smoothing, o.margin, o.tau,
    )  # fmt: skip
    first, *others = (w * LOSSES[name](pairs) for w, name in zip(o.weights, o.types, strict=True))
    losses = sum(others, first)  # [B]
    if o.use_weighting:
        if log_sum_squares is None:
            raise ValueError("log_sum_squares: expected a tensor with use_weighting, got None")
        (squares,) = as_scores(target, log_sum_squares=log_sum_squares)
        likely_w, likely_l = (total((logp - squares).detach()) / tokens.clamp(min=1)).chunk(2)
        losses = losses * torch.exp(likely_w + likely_l)
    elif log_sum_squares is not None:
        raise ValueError("log_sum_squares: expected None without use_weighting, got a tensor")
    if num_items is not None and (o.nll_weight or not {"sft", "orpo"}.isdisjoint(o.types)):
        raise ValueError(
            f"num_items: expected None, got a value; loss_type {o.types} with nll_weight={o.nll_weight} "
            "divides some terms by pairs and others by tokens"
        )
    loss = average(losses.sum(), losses.shape[0], num_items)
    if o.nll_weight:
        loss = loss + o.nll_weight * nll
    return LossOutput(loss, _metrics(pairs, o))


@torch.no_grad()
def _metrics(p: Pairs, o: Options) -> dict[str, Tensor]:
    chosen, rejected = p.a, p.b
    if PER_TOKEN.issuperset(o.types) and REFERENCE.isdisjoint(o.types):
        chosen, rejected = chosen / p.n_w, rejected / p.n_l
    count = max(chosen.shape[0], 1)
    metrics = {
        "rewards_chosen": o.beta * chosen,
        "rewards_rejected": o.beta * rejected,
        "margin": o.beta * (chosen - rejected),
        "accuracy": indicator(chosen > rejected, chosen, rejected),
        "logp_chosen": p.policy_w,
        "logp_rejected": p.policy_l,
    }
    return {name: value.sum() / count for name, value in metrics.items()}
