"""CRINGE and pairwise CRINGE: negative tokens contrasted with a likely token that is sampled."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sukhops import _checks
from sukhops.losses._output import LossOutput, average
from sukhops.losses._sequences import IGNORE, as_scores, check_labels, check_sequences, sequence_sum


def label_per_token(label: Tensor, target: Tensor) -> Tensor:
    """Labels [B] or as target, 1, 0 or -1, as integers of target's shape."""
    _checks.check_integers("target", target)
    _checks.check_tensor("label", label)
    if label.shape == target.shape:
        return check_labels("label", label, target.shape, target)
    if target.dim() != 2 or label.shape != target.shape[:1]:
        raise ValueError(
            f"label: expected shape {list(target.shape)} or one per sequence of target [B, T], "
            f"got {list(label.shape)}"
        )
    return check_labels("label", label, label.shape, target).unsqueeze(1).expand(target.shape)


def sample_rival(
    values: Tensor, indices: Tensor, target: Tensor, noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """The place, among the k + 1 best logits, of a token sampled from the k best other than the target.

    Args:
        values: [..., k + 1], logits in descending order.
        indices: [..., k + 1], their tokens.
        target: [...], the token that is never sampled.
        noise: [..., k + 1], standard Gumbel noise, for a replay; None: drawn from `generator`.

    Returns:
        [...] int64 in [0, k]: drawn from the softmax of the k logits; the best one for k = 1.
    """
    last = torch.arange(values.shape[-1], device=values.device) == values.shape[-1] - 1
    hit = indices == target.unsqueeze(-1)
    barred = hit | (last & ~hit.any(-1, keepdim=True))  # the target, or the last of k + 1
    if values.shape[-1] == 2:
        return (~barred).int().argmax(-1)
    if noise is None:
        uniform = torch.rand(values.shape, dtype=values.dtype, device=values.device, generator=generator)
        noise = -torch.log(-torch.log(uniform.clamp(min=torch.finfo(values.dtype).tiny)))
    return (values.detach() + noise).masked_fill(barred, -torch.inf).argmax(-1)


def cringe_loss(
    logp: Tensor,
    gap: Tensor,
    target: Tensor,
    label: Tensor,
    *,
    alpha: float = 1.0,
    num_items: int | Tensor | None = None,
) -> LossOutput:
    """Cross entropy of positive and unlabelled tokens plus a contrast of the negative ones.

        loss = (sum of -logp where label is not 0 + alpha * sum of softplus(gap) where it is) / counted tokens

    Args:
        logp: as target: log-probs of the targets; used where the label is not 0.
        gap: as target: logit of the target less that of its sampled rival; used where the label is 0. -inf
            where there is no rival, in a vocabulary of one.
        target: [...], integers; -100 where a token does not count.
        label: [B], or as target: 1 positive, 0 negative, -1 unlabelled.
        alpha: factor of the contrast, >= 0.
        num_items: a number > 0 or a 0-dim tensor to divide by: the counted tokens of the whole
            batch, where this call has a part of it. None: what this call counts.

    Returns:
        LossOutput(loss [], metrics), detached scalars: ce and ct, means in nats over the tokens of each kind;
        ce_tokens and ct_tokens, their numbers; accuracy, the share of negative tokens below their rival.
        No token at all gives 0.

    Raises:
        TypeError, ValueError: wrong types, dtypes, shapes or devices, a label outside {1, 0, -1} (on CUDA
            NaN), alpha out of range.

    Source: Adolphs et al. 2023 (CRINGE).
    """
    check_alpha(alpha)
    label = label_per_token(label, target)
    logp, gap = as_scores(target, logp=logp, gap=gap)
    counted = target != IGNORE
    positive, negative = counted & (label != 0), counted & (label == 0)
    ce = (-logp).where(positive, 0.0).masked_fill((label < -1) | (label > 1), torch.nan).sum()
    ct = F.softplus(gap.where(negative, -torch.inf)).sum()
    loss = average(ce + alpha * ct, counted.sum(), num_items)
    with torch.no_grad():
        ce_tokens, ct_tokens = positive.sum(), negative.sum()
        metrics = {
            "ce": ce.detach() / ce_tokens.clamp(min=1),
            "ct": ct.detach() / ct_tokens.clamp(min=1),
            "ce_tokens": ce_tokens,
            "ct_tokens": ct_tokens,
            "accuracy": ((gap < 0) & negative).sum() / ct_tokens.clamp(min=1),
        }
    return LossOutput(loss, metrics)


def pairwise_cringe_loss(
    logp: Tensor,
    gap: Tensor,
    target: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    alpha: float = 1.0,
    margin: float = 0.0,
    temperature: float = 1.0,
    detach_gate: bool = False,
    num_items: int | Tensor | None = None,
) -> LossOutput:
    """CRINGE of B pairs, each under a gate that closes when the chosen completion is likelier by a margin.

        gate = sigmoid((margin - (logp_w - logp_l)) / temperature)     log-probs of whole completions
        loss = mean of gate * (token mean of -logp of the chosen + alpha * token mean of softplus(gap) of the
               rejected)

    Args:
        logp: [2B, T], or packed [N] with cu_seqlens: log-probs of the targets; the first B sequences are the
            chosen, the last B the rejected completions.
        gap: as logp: logit of the target less that of its sampled rival; used in rejected completions.
        target: as logp, integers; -100 where a token does not count.
        cu_seqlens: [2B + 1], integers, 0 first and N last.
        alpha: factor of the contrast, >= 0.
        margin: of the log-probs, in nats.
        temperature: of the gate, > 0.
        detach_gate: whether the gate is a constant to the gradient.
        num_items: a number > 0 or a 0-dim tensor to divide by: the pairs of the whole
            batch, where this call has a part of it. None: what this call counts.

    Returns:
        LossOutput(loss [], metrics), detached scalars, means over pairs: gate, ce, ct, logp_chosen,
        logp_rejected, accuracy (share of pairs whose chosen completion is likelier). An empty completion
        has ce, ct and log-prob 0; no pair gives 0.

    Raises:
        TypeError, ValueError: wrong types, dtypes, shapes or devices, an odd number of sequences, bad
            cu_seqlens (on CUDA NaN), an option out of range.

    Source: Xu et al. 2023 (pairwise CRINGE). The gate's form, and whether it has a gradient,
    are this library's reading, not the paper's word.
    """
    check_alpha(alpha)
    check_gate(margin, temperature)
    sequences = check_sequences(target, cu_seqlens)
    if sequences % 2:
        raise ValueError(
            f"target: expected an even number of sequences (B chosen, B rejected), got {sequences}"
        )
    logp, gap = as_scores(target, logp=logp, gap=gap)
    counted = target != IGNORE

    def total(t: Tensor) -> Tensor:
        return sequence_sum(t.where(counted, 0.0), cu_seqlens)

    tokens = sequence_sum(counted.to(logp.dtype), cu_seqlens).clamp(min=1)
    summed, contrast = total(logp), sequence_sum(F.softplus(gap.where(counted, -torch.inf)), cu_seqlens)
    (chosen, rejected), (n_w, n_l) = summed.chunk(2), tokens.chunk(2)
    ce, ct = -chosen / n_w, contrast.chunk(2)[1] / n_l
    gate = torch.sigmoid((margin - (chosen - rejected)) / temperature)
    pairs = max(sequences // 2, 1)
    loss = average(((gate.detach() if detach_gate else gate) * (ce + alpha * ct)).sum(), pairs, num_items)
    named = {
        "gate": gate, "ce": ce, "ct": ct, "logp_chosen": chosen, "logp_rejected": rejected,
        "accuracy": (chosen > rejected).to(chosen.dtype),
    }  # fmt: skip
    return LossOutput(loss, {name: value.detach().sum() / pairs for name, value in named.items()})


def check_alpha(alpha: float) -> None:
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha: expected a finite number >= 0, got {alpha!r}")


def check_gate(margin: float, temperature: float) -> None:
    if not -math.inf < margin < math.inf:
        raise ValueError(f"margin: expected a finite number, got {margin!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature!r}")
