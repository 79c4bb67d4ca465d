"""KTO on whole completions and Step-KTO on reasoning steps, as functions of log-probs."""

import math
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from sukhops import _checks
from sukhops.losses._output import LossOutput, average
from sukhops.losses._sequences import IGNORE, as_scores, check_labels, check_sequences, sequence_sum, sums
from sukhops.losses._steps import step_sums


class KTOOptions(NamedTuple):
    """The options of `kto_loss`, which documents them."""

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def check(self) -> "KTOOptions":
        """Returns the options. Raises a ValueError if one is out of range."""
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta: expected a finite number > 0, got {self.beta!r}")
        for name in ("desirable_weight", "undesirable_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number >= 0, got {getattr(self, name)!r}")
        return self


class Mismatched(NamedTuple):
    """A batch of prompts with the completions of other prompts, from which the reference point is estimated.

    `mismatched` builds such a batch.
    """

    target: Tensor  # [m, T'], or packed [N'] with cu_seqlens
    logp: Tensor  # log-probs under the policy, shaped as target
    ref_logp: Tensor  # log-probs under the reference, shaped as target or per sequence [m]
    cu_seqlens: Tensor | None = None  # [m + 1]
    step_ids: Tensor | None = None  # shaped as target, to estimate a reference point for steps too


def kto_loss(
    logp: Tensor,
    target: Tensor,
    desirable: Tensor,
    ref_logp: Tensor,
    *,
    kl: float | Tensor | Mismatched,
    cu_seqlens: Tensor | None = None,
    num_items: int | Tensor | None = None,
    **options: Any,
) -> LossOutput:
    """KTO loss of unpaired completions, with a reference point z that is detached.

        r    = sum over tokens of logp - ref_logp
        loss = mean of  desirable_weight   * (1 - sigmoid(beta * (r - z)))  where desirable
                        undesirable_weight * (1 - sigmoid(beta * (z - r)))  where not

    The mean is over all labeled completions of both classes; without any the loss is 0.

    Args:
        logp: [B, T], or packed [N] with cu_seqlens: log-probs of the targets under the policy.
        target: shaped as logp, integers; -100 for an ignored token (prompt, padding).
        desirable: [B], bool, or integers 1, 0 and -1 (not labeled, ignored).
        ref_logp: log-probs under the reference, shaped as logp or summed per sequence [B]; detached.
        kl: the reference point z, detached: a number, a scalar tensor, or a `Mismatched` batch, whose mean
            log-ratio is the estimate of z (a mean over all ranks, if torch.distributed is initialized).
            Negative values are replaced by 0.
        cu_seqlens: [B + 1], integers, from 0 to N: ends of the packed sequences.
        num_items: a number > 0 or a 0-dim tensor: the number of labeled completions in the whole batch, if
            this call has a part of it. None: their number in this call.
        beta: factor of the log-ratios, > 0; larger values keep the policy closer to the reference.
        desirable_weight, undesirable_weight: factors of the two classes, >= 0.

    Returns:
        LossOutput(loss [], metrics). Metrics are detached scalars. kl is z. rewards_desirable (mean of
        beta * r), logp_desirable (mean log-prob of a completion, in nats) and count_desirable describe the
        desirable completions; the same names with undesirable describe the others. They are 0 if the class is
        empty. margin is the difference of the two rewards. An empty completion has r = 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device; a label is outside
            {1, 0, -1} or cu_seqlens are invalid (on CUDA the loss is NaN instead); an option is out of range.

    Source: Ethayarajh et al. 2024 (KTO).
    """
    o = KTOOptions(**options).check()
    ratio, policy = _log_ratio(logp, ref_logp, target, cu_seqlens)
    label = check_labels("desirable", desirable, ratio.shape, target)
    z = reference_point(kl, ratio)
    losses = value_loss(ratio, label, z, o)
    counted = label != -1
    loss = average(losses.where(counted, 0.0).sum(), counted.sum(), num_items)
    return LossOutput(loss, _metrics(ratio, policy, label, z, o.beta))


def value_loss(ratio: Tensor, label: Tensor, z: Tensor, o: KTOOptions) -> Tensor:
    """KTO's loss of each log-ratio; NaN if its label is not 1, 0 or -1.

    Args:
        ratio: [...], log-ratios of policy and reference.
        label: [...], 1 for desirable, 0 and -1 for undesirable (the caller masks -1).
        z: [], the reference point.
        o: the options.

    Returns:
        [...], losses.

    Source: Ethayarajh et al. 2024 (KTO).
    """
    good = o.desirable_weight * torch.sigmoid(o.beta * (z - ratio))
    bad = o.undesirable_weight * torch.sigmoid(o.beta * (ratio - z))
    losses = torch.where(label == 1, good, bad)
    return losses.masked_fill((label < -1) | (label > 1), torch.nan)


def reference_point(kl: float | Tensor | Mismatched, like: Tensor) -> Tensor:
    """The reference point z [] of `kto_loss`, detached, in the dtype and on the device of `like`.

    Raises:
        TypeError, ValueError: kl is not a number, a scalar tensor or a valid `Mismatched` batch.
    """
    if isinstance(kl, Mismatched):
        with torch.no_grad():
            ratio, _ = _log_ratio(kl.logp, kl.ref_logp, kl.target, kl.cu_seqlens, "kl_")
            return mean_over_ranks(ratio.sum(), ratio.shape[0]).clamp(min=0).to(like)
    if isinstance(kl, Tensor):
        if kl.numel() != 1:
            raise ValueError(f"kl: expected a number or a scalar tensor, got shape {list(kl.shape)}")
        return kl.detach().reshape(()).to(like).clamp(min=0)
    if isinstance(kl, bool) or not isinstance(kl, int | float):
        raise TypeError(f"kl: expected a number, a scalar tensor or Mismatched, got {type(kl).__name__}")
    return torch.full_like(like[:0].sum(), kl).clamp(min=0).detach()


def mean_over_ranks(total: Tensor, count: int | Tensor) -> Tensor:
    """total / count [], both first summed over all ranks if torch.distributed is initialized; 0 / 0 is 0."""
    both = torch.stack([total, torch.as_tensor(count).to(total)])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(both)
    return both[0] / both[1].clamp(min=1)


class StepKTOOptions(NamedTuple):
    """The options of `step_kto_loss`, which documents them."""

    beta: float = 0.1
    step_beta: float | None = None
    step_weight: float = 1.0
    step_reduction: str = "batch"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def outcome(self) -> KTOOptions:
        """The options for whole completions."""
        return KTOOptions(self.beta, self.desirable_weight, self.undesirable_weight)

    @property
    def step(self) -> KTOOptions:
        """The options for steps."""
        return self.outcome if self.step_beta is None else self.outcome._replace(beta=self.step_beta)

    def check(self) -> "StepKTOOptions":
        """Returns the options. Raises a ValueError if one is out of range."""
        self.outcome.check()
        if self.step_beta is not None and not 0 < self.step_beta < math.inf:
            raise ValueError(f"step_beta: expected None or a finite number > 0, got {self.step_beta!r}")
        if not 0 <= self.step_weight < math.inf:
            raise ValueError(f"step_weight: expected a finite number >= 0, got {self.step_weight!r}")
        if self.step_reduction not in ("batch", "sequence"):
            raise ValueError(f"step_reduction: expected 'batch' or 'sequence', got {self.step_reduction!r}")
        return self


def step_kto_loss(
    logp: Tensor,
    target: Tensor,
    desirable: Tensor,
    step_ids: Tensor,
    step_labels: Tensor,
    ref_logp: Tensor,
    *,
    kl: float | Tensor | Mismatched,
    step_kl: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_items: int | Tensor | None = None,
    **options: Any,
) -> LossOutput:
    """KTO on whole completions plus step_weight times KTO on their labeled steps.

    Args:
        logp, target, kl, cu_seqlens: as in `kto_loss`.
        num_items: as in `kto_loss`; only if step_weight is 0, because steps are divided by their own number.
        desirable: [B], as in `kto_loss`. A completion with -1 contributes only the losses of its steps.
        step_ids: shaped as target, integers: number of the step that a token belongs to, -1 for none.
        step_labels: [B, S], 1 right, 0 wrong, -1 not judged. Steps that are not judged or have no tokens are
            ignored.
        ref_logp: log-probs under the reference, shaped as logp; detached.
        step_kl: reference point of the steps: a number or a scalar tensor. None: the mean over the non-empty
            steps of the `Mismatched` batch if it has step_ids, else z of the completions.
        beta, desirable_weight, undesirable_weight: as in `kto_loss`, for completions and for steps.
        step_beta: beta of the steps. None: the same as beta.
        step_weight: factor of the loss of the steps, >= 0.
        step_reduction: "batch": mean over all steps that are not ignored. "sequence": mean within each
            sequence, then mean over sequences.

    Returns:
        LossOutput(loss [], metrics). Metrics are those of `kto_loss`, and outcome_loss, step_loss (without
        step_weight), step_kl, rewards_right_steps and rewards_wrong_steps (means of step_beta * r),
        right_steps and wrong_steps (numbers of steps).

    Raises:
        TypeError, ValueError: as in `kto_loss`; a step id is outside [-1, S) (on CUDA the loss is NaN
            instead); step_kl is given although the mismatched batch has step_ids.

    Source: Lin et al. 2025 (Step-KTO). Its code is not public. Details that the paper leaves open are
    options, with defaults chosen by this library.
    """
    o = StepKTOOptions(**options).check()
    if num_items is not None and o.step_weight:
        raise ValueError("num_items: expected None unless step_weight is 0, got a value")
    outcome = kto_loss(
        logp, target, desirable, ref_logp, kl=kl, cu_seqlens=cu_seqlens, num_items=num_items,
        **o.outcome._asdict(),
    )  # fmt: skip
    logp, ref_logp = as_scores(target, logp=logp, ref_logp=ref_logp)
    sequences = check_sequences(target, cu_seqlens)
    if step_labels.dim() != 2 or step_labels.shape[0] != sequences:
        raise ValueError(
            f"step_labels: expected shape [{sequences}, S] (a row per sequence), "
            f"got {list(step_labels.shape)}"
        )
    label = check_labels("step_labels", step_labels, step_labels.shape, target)  # [B, S]
    steps = label.shape[1]
    ratio = logp - ref_logp.detach().to(logp.dtype)
    per_step, tokens = step_sums(ratio, target, step_ids, steps, cu_seqlens)  # [B, S] each
    if isinstance(kl, Mismatched) and kl.step_ids is not None:
        if step_kl is not None:
            raise ValueError("step_kl: expected None with kl_step_ids, which estimate it, got a value")
        z = _step_reference_point(kl, kl.step_ids).to(per_step)
    else:
        z = outcome.metrics["kl"] if step_kl is None else reference_point(step_kl, per_step.flatten())
    losses = value_loss(per_step, label, z, o.step)
    counted = (label != -1) & (tokens > 0)
    losses = losses.where(counted, 0.0)
    if o.step_reduction == "batch":
        step_loss = losses.sum() / counted.sum().clamp(min=1)
    else:
        means = losses.sum(-1) / counted.sum(-1).clamp(min=1)
        step_loss = means.sum() / counted.any(-1).sum().clamp(min=1)
    metrics = outcome.metrics | {"outcome_loss": outcome.loss.detach(), "step_loss": step_loss.detach()}
    metrics["step_kl"] = z
    for name, value in (("right", 1), ("wrong", 0)):
        chosen = counted & (label == value)
        metrics[f"rewards_{name}_steps"] = _mean_where(o.step.beta * per_step.detach(), chosen)
        metrics[f"{name}_steps"] = chosen.sum()
    return LossOutput(outcome.loss + o.step_weight * step_loss, metrics)


@torch.no_grad()
def _step_reference_point(kl: Mismatched, step_ids: Tensor) -> Tensor:
    logp, ref_logp = as_scores(kl.target, kl_logp=kl.logp, kl_ref_logp=kl.ref_logp)
    most = max(1, kl.target.shape[-1])  # a sequence has no more steps than tokens
    per_step, tokens = step_sums(logp - ref_logp, kl.target, step_ids, most, kl.cu_seqlens, "kl_step_ids")
    nonempty = tokens > 0
    return mean_over_ranks(per_step.where(nonempty, 0.0).sum(), nonempty.sum()).clamp(min=0)


def _log_ratio(
    logp: Tensor, ref_logp: Tensor, target: Tensor, cu_seqlens: Tensor | None, prefix: str = ""
) -> tuple[Tensor, Tensor]:
    """Log-ratio of policy and reference, and log-prob under the policy (detached): [B] each."""
    sequences = check_sequences(target, cu_seqlens)
    counted = target != IGNORE
    (logp,) = as_scores(target, **{f"{prefix}logp": logp})

    def total(per: Tensor) -> Tensor:
        return sequence_sum(per.where(counted, 0.0), cu_seqlens)

    policy = total(logp)
    reference = sums(f"{prefix}ref_logp", ref_logp.detach(), target, sequences, total)
    return policy - reference.to(policy.dtype), policy.detach()


@torch.no_grad()
def _metrics(ratio: Tensor, policy: Tensor, label: Tensor, z: Tensor, beta: float) -> dict[str, Tensor]:
    metrics = {"kl": z}
    for name, value in (("desirable", 1), ("undesirable", 0)):
        chosen = label == value
        metrics[f"rewards_{name}"] = _mean_where(beta * ratio, chosen)
        metrics[f"logp_{name}"] = _mean_where(policy, chosen)
        metrics[f"count_{name}"] = chosen.sum()
    metrics["margin"] = metrics["rewards_desirable"] - metrics["rewards_undesirable"]
    return metrics


def _mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    return values.where(chosen, 0.0).sum() / chosen.sum().clamp(min=1)


@overload
def mismatched(target: Tensor, ids: None = None, *, pad_id: int = 0) -> Tensor: ...
@overload
def mismatched(target: Tensor, ids: Tensor, *, pad_id: int = 0) -> tuple[Tensor, Tensor]: ...
def mismatched(
    target: Tensor, ids: Tensor | None = None, *, pad_id: int = 0
) -> Tensor | tuple[Tensor, Tensor]:
    """Combines every prompt with the completion of the next sequence, to estimate KTO's reference point.

    Sequence i keeps its prompt (the positions before its first target) and continues with the completion of
    sequence i + 1; the last sequence takes the completion of the first. T' is T, or larger if a completion
    needs it. Completions move within a batch only, so shuffle the data.

    Args:
        target: [B, T], integers, B >= 2; -100 before (prompt) and after (padding) the completion.
        ids: [B, T], the input tokens that predict target (target[i, t] follows ids[i, t]), or None.
        pad_id: token for the ids after the completion.

    Returns:
        target [B, T'], or with ids the tuple (ids [B, T'], target [B, T']).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; B = 1, so that there is no
            other completion.

    Source: Ethayarajh et al. 2024 (KTO).
    """
    check_sequences(target, None)
    b, t = target.shape
    if b == 1:
        raise ValueError("target: expected B >= 2 sequences, got 1; pass kl as a number instead")
    if ids is not None:
        _checks.check_integers("ids", ids)
        _checks.check_shape("ids", ids, target.shape, "as target")
        _checks.check_device("target", target, "ids", ids)
    if t == 0:
        return target if ids is None else (ids, target)
    counted = target != IGNORE
    nonempty = counted.any(-1)
    start = counted.int().argmax(-1).where(nonempty, t)  # [B], first position of the completion
    end = (t - counted.flip(-1).int().argmax(-1)).where(nonempty, t)  # [B], position after the completion
    other = (torch.arange(b, device=target.device) + 1) % b
    length = max(t, int((start + end[other] - start[other]).max())) if b else t  # T'
    position = torch.arange(length, device=target.device)
    source = position - start.unsqueeze(1) + start[other].unsqueeze(1)  # [B, T'], position in the other one
    taken = (position >= start.unsqueeze(1)) & (source < end[other].unsqueeze(1))

    def rolled(values: Tensor, fill: int) -> Tensor:
        return values[other].gather(1, source.clamp(0, t - 1)).where(taken, fill)

    new_target = rolled(target, IGNORE)
    if ids is None:
        return new_target
    prompt = position <= start.unsqueeze(1)  # ids[start], the last prompt token, predicts target[start]
    own = ids[:, position.clamp(max=t - 1)]
    return torch.where(prompt & (position < t), own, rolled(ids, pad_id)), new_target
