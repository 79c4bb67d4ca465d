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
    """CRINGE straight from hidden states: the logits are never kept.

    A negative token costs one product: its gradient touches two rows of the weight. k is cut to V - 1, and
    the token itself is never sampled against.

    Args:
        alpha: factor of the contrast, >= 0.
        k: a negative token's rival is sampled from the k likeliest other tokens; 1: the likeliest.
        detach_positive: whether the rival's logit is a constant to the gradient.

    Raises:
        ValueError: an option out of range.

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
        """
        Args:
            hidden: [..., D]; row i predicts target i. float32, bfloat16, float16 or float64.
            weight: [V, D], of the same dtype.
            target: [...], integers in [0, V), or -100 for a token that does not count.
            label: [B], or as target: 1 positive, 0 negative, -1 unlabelled (trained as positive).
            bias: [V], or None.
            generator: source of the samples, on hidden's device; None: torch's own. The same state gives the
                same rivals. Not used for k = 1. With group it is needed, in the same state on every rank.
            num_items: the counted tokens of the whole batch, where this call has a part of it; None: its own.
            group: as in `sukhops.linear_logp`.

        Returns:
            LossOutput(loss, metrics), see `sukhops.losses.cringe_loss`.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape or device; a label outside
                {1, 0, -1}.
            RuntimeError: a target outside [0, V), on the CPU; on CUDA NaN.
        """
        label = label_per_token(label, target)
        logp, gap = _logp_and_gap(
            hidden, weight, target, bias, self.k, generator, group, detach_rival=self.detach_positive
        )
        return cringe_loss(logp, gap, target, label, alpha=self.alpha, num_items=num_items)


class PairwiseCringeLoss(nn.Module):
    """Pairwise CRINGE of B pairs straight from hidden states: the logits are never kept.

    Args:
        alpha: factor of the contrast, >= 0.
        k: as in `CringeLoss`.
        margin: by how many nats the chosen completion should be likelier.
        temperature: of the gate, > 0.
        detach_gate: whether the gate is a constant to the gradient; rejected tokens then cost one product.

    Raises:
        ValueError: an option out of range.

    Source: Xu et al. 2023 (pairwise CRINGE); `sukhops.losses.pairwise_cringe_loss` has the formula and says
    what of it is this library's reading.
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
        """
        Args:
            hidden: [2B, T, D], or packed [N, D] with cu_seqlens; B chosen, then B rejected sequences; row i
                predicts target i. float32, bfloat16, float16 or float64.
            weight: [V, D], of the same dtype.
            target: [2B, T] or [N], integers in [0, V), or -100 for a token that does not count.
            bias: [V], or None.
            generator: as in `CringeLoss`.
            cu_seqlens: [2B + 1], integers, 0 first and N last.
            num_items: the pairs of the whole batch, where this call has a part of it; None: its own.
            group: as in `sukhops.linear_logp`.

        Returns:
            LossOutput(loss, metrics), see `sukhops.losses.pairwise_cringe_loss`.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape or device; an odd number of
                sequences.
            RuntimeError: a target outside [0, V), on the CPU; on CUDA NaN.
        """
        sequences = _sequences.check_sequences(target, cu_seqlens)
        logp, gap = _logp_and_gap(hidden, weight, target, bias, self.k, generator, group)
        if self.detach_gate:  # rejected tokens then have no gradient in the log-sum-exp
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
    """Each target's log-prob, and its logit less that of its sampled rival; 0 where ignored.

    One pass for both kinds of token: what the gradient of a row costs follows from what the loss used of it.
    """
    if group is not None and k > 1 and generator is None:
        raise ValueError("generator: k > 1 with group needs one, in the same state on every rank, got None")
    head = target_and_topk(hidden, weight, target, k + 1, bias, group)
    logp = head.logp(head.target_logit).reshape(target.shape)
    if head.topk_value.shape[-1] < 2:
        return logp, torch.full_like(logp, -torch.inf)
    value, index = (t.reshape(*target.shape, t.shape[-1]) for t in (head.topk_value, head.topk_index))
    place = sample_rival(value, index, target, generator=generator).unsqueeze(-1)
    rival = value.gather(-1, place).squeeze(-1)
    logit = head.target_logit.reshape(target.shape)
    return logp, logit - (rival.detach() if detach_rival else rival)


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected an int >= 1, got {k!r}")
