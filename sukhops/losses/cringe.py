"""CRINGE and pairwise CRINGE: negative tokens are contrasted with a rival, a likely token that is sampled."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sukhops import _checks
from sukhops.losses._output import LossOutput, average, indicator
from sukhops.losses._sequences import IGNORE, as_scores, check_labels, check_sequences, sequence_sum


def label_per_token(label: Tensor, target: Tensor) -> Tensor:
    """Labels 1, 0 and -1, given per sequence [B] or shaped as target, as int64 shaped as target.

    Raises:
        TypeError, ValueError: target or label has the wrong type, shape or device; a label is not 1, 0 or -1,
            which is checked on the CPU in eager mode.
    """
    _checks.check_integers("target", target)
    _checks.check_tensor("label", label)
    if label.shape == target.shape:
        return check_labels("label", label, target.shape, target, counted=target != IGNORE)
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
    """Samples the rival of each target from the k best tokens other than the target.

    Args:
        values: [..., k + 1], the largest logits in descending order.
        indices: [..., k + 1], their tokens.
        target: [...], the token that is never sampled.
        noise: [..., k + 1], standard Gumbel noise, to repeat a sample. None: drawn from `generator`.
        generator: random generator on the device of values. None: torch's default generator.

    Returns:
        [...], int64, in [0, k], the index of the rival in the last axis of values. It is drawn from the
        softmax of the k logits; for k = 1 it is the best token other than the target.

    Source: Adolphs et al. 2023 (CRINGE).
    """
    last = torch.arange(values.shape[-1], device=values.device) == values.shape[-1] - 1
    hit = indices == target.unsqueeze(-1)
    excluded = hit | (last & ~hit.any(-1, keepdim=True))  # the target, or else the last of the k + 1
    if values.shape[-1] == 2:
        return (~excluded).int().argmax(-1)
    if noise is None:
        # torch.compile takes no generator, not even None
        given: dict[str, Any] = {} if generator is None else {"generator": generator}
        uniform = torch.rand(values.shape, dtype=values.dtype, device=values.device, **given)
        noise = -torch.log(-torch.log(uniform.clamp(min=torch.finfo(values.dtype).tiny)))
    lowest = torch.finfo(values.dtype).min  # -inf stays above the excluded
    drawn = (values.detach() + noise).clamp(min=lowest)
    return drawn.masked_fill(excluded, -torch.inf).argmax(-1)


def cringe_loss(
    logp: Tensor,
    gap: Tensor,
    target: Tensor,
    label: Tensor,
    *,
    alpha: float = 1.0,
    num_items: int | Tensor | None = None,
) -> LossOutput:
    """Cross entropy of positive and unlabeled tokens plus a contrastive loss of negative tokens.

        loss = (sum of -logp where label is not 0 + alpha * sum of softplus(gap) where label is 0) / tokens

    with tokens the number of tokens that are not ignored.

    Args:
        logp: log-probs of the targets, shaped as target; used where the label is not 0.
        gap: logit of the target minus that of its rival (`sample_rival`), shaped as target; used where the
            label is 0. -inf if there is no rival, in a vocabulary of one token.
        target: [...], integers; -100 for an ignored token.
        label: [B], or shaped as target: 1 positive, 0 negative, -1 unlabeled.
        alpha: factor of the contrastive term, >= 0.
        num_items: a number > 0 or a 0-dim tensor: the number of tokens in the whole batch, if this call has a
            part of it. None: their number in this call.

    Returns:
        LossOutput(loss [], metrics). Metrics are detached scalars. ce and ct are means in nats over the
        tokens of each kind, ce_tokens and ct_tokens their numbers; accuracy is the share of negative tokens
        whose logit is below that of their rival. Without tokens all are 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device; a label is outside
            {1, 0, -1} (on CUDA the loss is NaN instead; labels per token are not checked at ignored tokens);
            alpha is out of range.

    Source: Adolphs et al. 2023 (CRINGE).
    """
    check_alpha(alpha)
    label = label_per_token(label, target)
    logp, gap = as_scores(target, logp=logp, gap=gap)
    counted = target != IGNORE
    positive, negative = counted & (label != 0), counted & (label == 0)
    wrong = counted & ((label < -1) | (label > 1))
    ce = (-logp).where(positive, 0.0).masked_fill(wrong, torch.nan).sum()
    ct = F.softplus(gap.where(negative, -torch.inf)).sum()
    loss = average(ce + alpha * ct, counted.sum(), num_items)
    with torch.no_grad():
        ce_tokens, ct_tokens = positive.sum(), negative.sum()
        metrics = {
            "ce": ce.detach() / ce_tokens.clamp(min=1),
            "ct": ct.detach() / ct_tokens.clamp(min=1),
            "ce_tokens": ce_tokens,
            "ct_tokens": ct_tokens,
            "accuracy": indicator(gap < 0, gap).where(negative, 0.0).sum() / ct_tokens.clamp(min=1),
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
    """CRINGE of B pairs. A gate lowers the loss of pairs whose chosen completion is more likely by a margin.

        gate = sigmoid((margin - (logp_w - logp_l)) / temperature)
        loss = mean over pairs of gate * (ce + alpha * ct)

    with logp_w and logp_l the log-probs of the chosen and the rejected completion, ce the mean of -logp over
    the tokens of the chosen completion, and ct the mean of softplus(gap) over those of the rejected one.

    Args:
        logp: [2B, T], or packed [N] with cu_seqlens: log-probs of the targets. The first B sequences are the
            chosen, the last B the rejected completions.
        gap: logit of the target minus that of its sampled rival, shaped as logp; used only in rejected
            completions.
        target: shaped as logp, integers; -100 for an ignored token.
        cu_seqlens: [2B + 1], integers, from 0 to N: ends of the packed sequences.
        alpha: factor of the contrastive term, >= 0.
        margin: margin of logp_w - logp_l, in nats.
        temperature: temperature of the gate, > 0.
        detach_gate: whether to detach the gate.
        num_items: a number > 0 or a 0-dim tensor: the number of pairs in the whole batch, if this call has a
            part of it. None: their number in this call.

    Returns:
        LossOutput(loss [], metrics). Metrics are detached scalars. gate, ce, ct, logp_chosen and
        logp_rejected are means over pairs; accuracy is the share of pairs whose chosen completion is more
        likely. ce, ct and the log-prob of an empty completion are 0. Without pairs all are 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device; the number of sequences
            is odd; cu_seqlens are invalid (on CUDA the loss is NaN instead); an option is out of range.

    Source: Xu et al. 2023 (pairwise CRINGE). The form of the gate and its gradient are this library's
    interpretation; the paper does not specify them.
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
        "accuracy": indicator(chosen > rejected, chosen, rejected),
    }  # fmt: skip
    return LossOutput(loss, {name: value.detach().sum() / pairs for name, value in named.items()})


def check_alpha(alpha: float) -> None:
    """Raises a ValueError unless alpha is finite and >= 0."""
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha: expected a finite number >= 0, got {alpha!r}")


def check_gate(margin: float, temperature: float) -> None:
    """Raises a ValueError unless margin is finite and temperature is finite and > 0."""
    if not -math.inf < margin < math.inf:
        raise ValueError(f"margin: expected a finite number, got {margin!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature!r}")
