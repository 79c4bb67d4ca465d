"""KTO and Step-KTO on a fused head."""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sukhops.losses._output import LossOutput
from sukhops.losses.kto import KTOOptions, Mismatched, StepKTOOptions, kto_loss, step_kto_loss
from sukhops.nn._reference import reference_logp
from sukhops.ops.vocab_head import linear_logp
from sukhops.parallel._dtensor import takes_dtensors


class KTOLoss(nn.Module):
    """KTO of unpaired completions straight from hidden states: the logits are never kept.

    Args:
        beta: strength of the tie to the reference, > 0.
        desirable_weight, undesirable_weight: factors of the two classes, >= 0.

    Raises:
        ValueError: an option out of range.

    Source: Ethayarajh et al. 2024 (KTO); `sukhops.losses.kto_loss` has the formula.
    """

    def __init__(self, beta: float = 0.1, *, desirable_weight: float = 1.0, undesirable_weight: float = 1.0):
        super().__init__()
        self.options = KTOOptions(beta, desirable_weight, undesirable_weight).check()

    def extra_repr(self) -> str:
        return ", ".join(f"{n}={v!r}" for n, v in self.options._asdict().items())

    @takes_dtensors
    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        desirable: Tensor,
        *,
        bias: Tensor | None = None,
        ref_logp: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: float | Tensor | None = None,
        kl_hidden: Tensor | None = None,
        kl_target: Tensor | None = None,
        kl_ref_hidden: Tensor | None = None,
        kl_ref_logp: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        kl_cu_seqlens: Tensor | None = None,
        num_items: int | Tensor | None = None,
        group: ProcessGroup | None = None,
    ) -> LossOutput:
        """
        Args:
            hidden: [B, T, D], or packed [N, D] with cu_seqlens; row i predicts target i. float32, bfloat16,
                float16 or float64.
            weight: [V, D], of the same dtype.
            target: [B, T] or [N], integers in [0, V), or -100 for a token that does not count.
            desirable: [B], bool, or integers 1, 0 and -1 (not labelled).
            bias: [V], or None.
            ref_logp: log-probs of the reference, per token (as target) or per sequence [B]; or
            ref_hidden, ref_weight, ref_bias: as hidden, weight and bias, of the reference. Exactly one of
                the two forms; never differentiated.
            kl: the reference point, a number or a scalar tensor; or
            kl_hidden, kl_target: as hidden and target, of the mismatched batch (`sukhops.losses.mismatched`
                builds it), with kl_ref_logp, or kl_ref_hidden for the same reference head. Exactly one of
                the two forms; never differentiated.
            cu_seqlens: [B + 1], integers, 0 first and N last; kl_cu_seqlens the mismatched batch's.
            num_items: the labelled completions of the whole batch, where this call has a part of it; None:
                its own.
            group: as in `sukhops.linear_logp`; ref_weight and ref_bias are slices too.

        Returns:
            LossOutput(loss, metrics), see `sukhops.losses.kto_loss`.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape or device; a reference or a
                reference point that is missing or given twice; a label outside {1, 0, -1}.
            RuntimeError: a target outside [0, V), on the CPU; on CUDA NaN.
        """
        return kto_loss(
            linear_logp(hidden, weight, target, bias, group=group),
            target,
            desirable,
            _reference(target, ref_logp, ref_hidden, ref_weight, ref_bias, group),
            kl=_reference_point(
                kl, kl_hidden, kl_target, kl_ref_hidden, kl_ref_logp, kl_cu_seqlens, None,
                weight, bias, ref_weight, ref_bias, group,
            ),
            cu_seqlens=cu_seqlens,
            num_items=num_items,
            **self.options._asdict(),
        )  # fmt: skip


class StepKTOLoss(nn.Module):
    """KTO of whole completions plus KTO of their labelled steps, straight from hidden states.

    Args:
        beta: strength of the tie to the reference, > 0.
        step_beta: the steps' beta, or None for the same.
        step_weight: factor of the steps' term, >= 0.
        step_reduction: "batch", mean over all labelled steps, or "sequence", mean per sequence first.
        desirable_weight, undesirable_weight: factors of the two classes, of completions and steps.

    Raises:
        ValueError: an option out of range.

    Source: Lin et al. 2025 (Step-KTO); `sukhops.losses.step_kto_loss` has the formula and says what is open.
    """

    def __init__(
        self,
        beta: float = 0.1,
        *,
        step_beta: float | None = None,
        step_weight: float = 1.0,
        step_reduction: str = "batch",
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
    ):
        super().__init__()
        self.options = StepKTOOptions(
            beta, step_beta, step_weight, step_reduction, desirable_weight, undesirable_weight
        ).check()

    def extra_repr(self) -> str:
        return ", ".join(f"{n}={v!r}" for n, v in self.options._asdict().items())

    @takes_dtensors
    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        desirable: Tensor,
        step_ids: Tensor,
        step_labels: Tensor,
        *,
        bias: Tensor | None = None,
        ref_logp: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: float | Tensor | None = None,
        step_kl: float | Tensor | None = None,
        kl_hidden: Tensor | None = None,
        kl_target: Tensor | None = None,
        kl_ref_hidden: Tensor | None = None,
        kl_ref_logp: Tensor | None = None,
        kl_step_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        kl_cu_seqlens: Tensor | None = None,
        num_items: int | Tensor | None = None,
        group: ProcessGroup | None = None,
    ) -> LossOutput:
        """
        Args:
            hidden, weight, target, desirable, bias, ref_..., kl, kl_..., cu_seqlens: as in `KTOLoss`;
                log-probs of the reference per token.
            num_items: as in `KTOLoss`, where step_weight is 0.
            group: as in `KTOLoss`.
            step_ids: as target: which step a token belongs to, -1 for none (`sukhops.losses.step_ids`
                builds them from spans).
            step_labels: [B, S], 1 right, 0 wrong, -1 not judged.
            step_kl: the steps' reference point. None: from the mismatched batch's steps if kl_step_ids (as
                kl_target) is given, else the completions'.

        Returns:
            LossOutput(loss, metrics), see `sukhops.losses.step_kto_loss`.

        Raises:
            TypeError, ValueError: as `KTOLoss`; a step id without a label.
            RuntimeError: a target outside [0, V), on the CPU; on CUDA NaN.
        """
        return step_kto_loss(
            linear_logp(hidden, weight, target, bias, group=group),
            target,
            desirable,
            step_ids,
            step_labels,
            _reference(target, ref_logp, ref_hidden, ref_weight, ref_bias, group),
            kl=_reference_point(
                kl, kl_hidden, kl_target, kl_ref_hidden, kl_ref_logp, kl_cu_seqlens, kl_step_ids,
                weight, bias, ref_weight, ref_bias, group,
            ),
            step_kl=step_kl,
            cu_seqlens=cu_seqlens,
            num_items=num_items,
            **self.options._asdict(),
        )  # fmt: skip


def _reference(
    target: Tensor, ref_logp: Tensor | None, ref_hidden: Tensor | None, ref_weight: Tensor | None,
    ref_bias: Tensor | None, group: ProcessGroup | None,
) -> Tensor:  # fmt: skip
    found = reference_logp(target, ref_logp, ref_hidden, ref_weight, ref_bias, group)
    if found is None:
        raise ValueError(
            "ref_logp: the loss compares with a reference: give ref_logp, or ref_hidden and ref_weight"
        )
    return found


def _reference_point(
    kl: float | Tensor | None, kl_hidden: Tensor | None, kl_target: Tensor | None,
    kl_ref_hidden: Tensor | None, kl_ref_logp: Tensor | None, kl_cu_seqlens: Tensor | None,
    kl_step_ids: Tensor | None, weight: Tensor, bias: Tensor | None, ref_weight: Tensor | None,
    ref_bias: Tensor | None, group: ProcessGroup | None,
) -> float | Tensor | Mismatched:  # fmt: skip
    """kl as given, or the mismatched batch's log-probs."""
    batch = {
        "kl_hidden": kl_hidden, "kl_target": kl_target, "kl_ref_hidden": kl_ref_hidden,
        "kl_ref_logp": kl_ref_logp, "kl_cu_seqlens": kl_cu_seqlens, "kl_step_ids": kl_step_ids,
    }  # fmt: skip
    given = [name for name, t in batch.items() if t is not None]
    if kl is not None:
        if given:
            raise ValueError(f"kl: expected either kl or a mismatched batch, got {given} too")
        return kl
    if kl_hidden is None or kl_target is None:
        raise ValueError(f"kl: expected a number, or a mismatched batch (kl_hidden, kl_target), got {given}")
    if (kl_ref_hidden is None) == (kl_ref_logp is None):
        raise ValueError(f"kl_ref_logp: expected exactly one of kl_ref_logp and kl_ref_hidden, got {given}")
    with torch.no_grad():
        if kl_ref_logp is None:
            if kl_ref_hidden is None or ref_weight is None:
                raise ValueError("kl_ref_hidden: needs the reference's head, ref_weight beside ref_hidden")
            kl_ref_logp = linear_logp(kl_ref_hidden, ref_weight, kl_target, ref_bias, group=group)
        logp = linear_logp(kl_hidden, weight, kl_target, bias, group=group)
    return Mismatched(kl_target, logp, kl_ref_logp, kl_cu_seqlens, kl_step_ids)
