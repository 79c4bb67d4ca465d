"""CRINGE and pairwise CRINGE on a fused head."""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sukhops.losses import _sequences
from sukhops.losses._output import LossOutput
from sukhops.losses.cringe import (
    check_alpha,
    check_gate,
    cringe_loss,
    label_per_token,
    pairwise_cringe_loss,
    sample_rival,
)
from sukhops.ops.vocab_head import target_and_topk
from sukhops.parallel._dtensor import takes_dtensors


class CringeLoss(nn.Module):
    """The CRINGE loss, computed from hidden states without the logits.

    A negative token is contrasted with a rival, a likely token that is sampled. The contrast takes one matrix
    product, because its gradient touches only two rows of the weight. If k >= V, k = V - 1 is used. The
    negative token itself is never its own rival.

    Args:
        alpha: factor of the contrastive term, >= 0.
        k: the rival is sampled from the k most likely other tokens; 1: it is the most likely one.
        detach_positive: whether to detach the rival's logit.

    Raises:
        ValueError: an option is out of range.

    Source: Adolphs et al. 2023 (CRINGE); `sukhops.losses.cringe_loss` has the formula.
    """

    def __init__(self, alpha: float = 1.0, k: int = 1, *, detach_positive: bool = False):
        super().__init__()
        check_alpha(alpha)
        _check_k(k)
        self.alpha, self.k, self.detach_positive = alpha, k, detach_positive

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, k={self.k}, detach_positive={self.detach_positive}"

    @takes_dtensors
    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        label: Tensor,
        *,
        bias: Tensor | None = None,
        generator: torch.Generator | None = None,
        num_items: int | Tensor | None = None,
        group: ProcessGroup | None = None,
    ) -> LossOutput:
        """The loss of a batch.

        Args:
            hidden: [..., D], float32, bfloat16, float16 or float64; row i predicts target i.
            weight: [V, D], of the same dtype.
            target: [...], integers in [0, V), or -100 for an ignored token.
            label: [B], or shaped as target: 1 positive, 0 negative, -1 unlabeled (trained like positive).
            bias: [V], or None.
            generator: random generator that samples the rivals, on hidden's device. None: torch's default
                generator. The same state gives the same rivals. Not used if k = 1. With group and k > 1 it is
                required, in the same state on every rank.
            num_items: number of tokens (not ignored) in the whole batch, if this call has a part of it. None:
                their number in this call.
            group: as in `sukhops.linear_logp`.

        Returns:
            LossOutput(loss, metrics), see `sukhops.losses.cringe_loss`.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device; a label is outside
                {1, 0, -1}.
            RuntimeError: a target is outside [0, V), on the CPU. On CUDA the loss is NaN instead.
        """
        label = label_per_token(label, target)
        logp, gap = _logp_and_gap(
            hidden, weight, target, bias, self.k, generator, group, detach_rival=self.detach_positive
        )
        return cringe_loss(logp, gap, target, label, alpha=self.alpha, num_items=num_items)


class PairwiseCringeLoss(nn.Module):
    """The pairwise CRINGE loss of B pairs, computed from hidden states without the logits.

    Args:
        alpha: factor of the contrastive term, >= 0.
        k: as in `CringeLoss`.
        margin: by how many nats the chosen completion should be more likely than the rejected one.
        temperature: temperature of the gate, > 0.
        detach_gate: whether to detach the gate; rejected tokens then take one matrix product.

    Raises:
        ValueError: an option is out of range.

    Source: Xu et al. 2023 (pairwise CRINGE). `sukhops.losses.pairwise_cringe_loss` has the formula, and says
    which parts of it are this library's interpretation.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        k: int = 1,
        *,
        margin: float = 0.0,
        temperature: float = 1.0,
        detach_gate: bool = False,
    ):
        super().__init__()
        check_alpha(alpha)
        check_gate(margin, temperature)
        _check_k(k)
        self.alpha, self.k = alpha, k
        self.margin, self.temperature, self.detach_gate = margin, temperature, detach_gate

    def extra_repr(self) -> str:
        names = ("alpha", "k", "margin", "temperature", "detach_gate")
        return ", ".join(f"{n}={getattr(self, n)}" for n in names)

    @takes_dtensors
    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        bias: Tensor | None = None,
        generator: torch.Generator | None = None,
        cu_seqlens: Tensor | None = None,
        num_items: int | Tensor | None = None,
        group: ProcessGroup | None = None,
    ) -> LossOutput:
        """The loss of a batch.

        Args:
            hidden: [2B, T, D], or packed [N, D] with cu_seqlens, float32, bfloat16, float16 or float64: B
                chosen, then B rejected sequences; row i predicts target i.
            weight: [V, D], of the same dtype.
            target: [2B, T] or [N], integers in [0, V), or -100 for an ignored token.
            bias: [V], or None.
            generator: as in `CringeLoss`.
            cu_seqlens: [2B + 1], integers, from 0 to N: ends of the packed sequences.
            num_items: number of pairs in the whole batch, if this call has a part of it. None: their number
                in this call.
            group: as in `sukhops.linear_logp`.

        Returns:
            LossOutput(loss, metrics), see `sukhops.losses.pairwise_cringe_loss`.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device; the number of
                sequences is odd.
            RuntimeError: a target is outside [0, V), on the CPU. On CUDA the loss is NaN instead.
        """
        sequences = _sequences.check_sequences(target, cu_seqlens)
        logp, gap = _logp_and_gap(hidden, weight, target, bias, self.k, generator, group)
        if self.detach_gate:  # then the log-sum-exp of rejected tokens needs no gradient
            first = torch.arange(sequences, device=target.device) < sequences // 2
            logp = torch.where(_sequences.per_token(first, target, cu_seqlens), logp, logp.detach())
        return pairwise_cringe_loss(
            logp,
            gap,
            target,
            cu_seqlens=cu_seqlens,
            alpha=self.alpha,
            margin=self.margin,
            temperature=self.temperature,
            detach_gate=self.detach_gate,
            num_items=num_items,
        )


def _logp_and_gap(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, k: int,
    generator: torch.Generator | None, group: ProcessGroup | None, *, detach_rival: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-prob of each target, and its logit minus that of its sampled rival: both as target, 0 if ignored.

    Positive and negative tokens share one forward pass. The backward pass computes for each row only the
    gradients of those outputs that the loss has used.
    """
    if group is not None and k > 1 and generator is None:
        raise ValueError("generator: expected one in the same state on every rank (group, k > 1), got None")
    head = target_and_topk(hidden, weight, target, k + 1, bias, group)
    logp = head.logp(head.target_logit).reshape(target.shape)
    if head.topk_value.shape[-1] < 2:
        return logp, torch.full_like(logp, -torch.inf)
    value, index = (t.reshape(*target.shape, t.shape[-1]) for t in (head.topk_value, head.topk_index))
    position = sample_rival(value, index, target, generator=generator).unsqueeze(-1)
    rival = value.gather(-1, position).squeeze(-1)
    logit = head.target_logit.reshape(target.shape)
    return logp, logit - (rival.detach() if detach_rival else rival)


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected an int >= 1, got {k!r}")
