"""KTO on whole completions and Step-KTO on reasoning steps, on a fused head."""

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sukhops import _checks
from sukhops.losses._output import LossOutput
from sukhops.losses.kto import KTOOptions, Mismatched, StepKTOOptions, kto_loss, step_kto_loss
from sukhops.nn._reference import logp_without_gradient, reference_logp
from sukhops.ops.vocab_head import linear_logp
from sukhops.parallel._dtensor import takes_dtensors


class KTOLoss(nn.Module):
    """The KTO loss of unpaired completions, computed from hidden states without the logits.

    Args:
        beta: factor of the log-ratios, > 0; larger values keep the policy closer to the reference.
        desirable_weight, undesirable_weight: factors of the losses of the two classes, >= 0.

    Raises:
        ValueError: an option is out of range.

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
        """The loss of a batch.

        Args:
            hidden: [B, T, D], or packed [N, D] with cu_seqlens, float32, bfloat16, float16 or float64; row i
                predicts target i.
            weight: [V, D], of the same dtype.
            target: [B, T] or [N], integers in [0, V), or -100 for an ignored token.
            desirable: [B], bool, or integers 1, 0 and -1 (not labeled).
            bias: [V], or None.
            ref_logp: log-probs under the reference model, per token (shaped as target) or per sequence [B].
                Give either ref_logp or the reference head; both are detached.
            ref_hidden, ref_weight, ref_bias: like hidden, weight and bias, for the reference model.
            kl: the reference point, a number or a scalar tensor. Give either kl or the mismatched batch from
                which it is estimated; both are detached.
            kl_hidden, kl_target: like hidden and target, for the mismatched batch, which
                `sukhops.losses.mismatched` builds.
            kl_ref_hidden, kl_ref_logp: like ref_hidden and ref_logp, for the mismatched batch. Give one of
                the two; kl_ref_hidden uses ref_weight and ref_bias.
            cu_seqlens: [B + 1], integers, from 0 to N: ends of the packed sequences.
            kl_cu_seqlens: like cu_seqlens, for the mismatched batch.
            num_items: number of labeled completions in the whole batch, if this call has a part of it. None:
                their number in this call.
            group: as in `sukhops.linear_logp`; ref_weight and ref_bias are slices too.

        Returns:
            LossOutput(loss, metrics), see `sukhops.losses.kto_loss`.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device; the reference or
                the reference point is missing or given twice; a label is outside {1, 0, -1}.
            RuntimeError: a target is outside [0, V), on the CPU. On CUDA the loss is NaN instead.
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
    """KTO on whole completions plus KTO on their labeled steps, computed from hidden states.

    Args:
        beta: factor of the log-ratios, > 0; larger values keep the policy closer to the reference.
        step_beta: beta of the steps. None: the same as beta.
        step_weight: factor of the loss of the steps, >= 0.
        step_reduction: "batch": mean over all labeled steps. "sequence": mean within each sequence, then mean
            over sequences.
        desirable_weight, undesirable_weight: factors of the two classes, for completions and for steps.

    Raises:
        ValueError: an option is out of range.

    Source: Lin et al. 2025 (Step-KTO). `sukhops.losses.step_kto_loss` has the formula, and says which details
    the paper leaves open.
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
        """The loss of a batch.

        Args:
            hidden, weight, target, desirable, bias: as in `KTOLoss`.
            step_ids: shaped as target: number of the step that a token belongs to, -1 for none
                (`sukhops.losses.step_ids` builds it from spans).
            step_labels: [B, S], 1 right, 0 wrong, -1 not judged.
            ref_logp, ref_hidden, ref_weight, ref_bias: as in `KTOLoss`; ref_logp must be per token.
            kl, kl_hidden, kl_target, kl_ref_hidden, kl_ref_logp: as in `KTOLoss`; with kl_step_ids,
                kl_ref_logp must be per token.
            step_kl: reference point of the steps. None: estimated from the steps of the mismatched batch if
                kl_step_ids is given, else the reference point of the completions.
            kl_step_ids: like step_ids, for the mismatched batch, or None.
            cu_seqlens, kl_cu_seqlens, group: as in `KTOLoss`.
            num_items: as in `KTOLoss`; only if step_weight is 0.

        Returns:
            LossOutput(loss, metrics), see `sukhops.losses.step_kto_loss`.

        Raises:
            TypeError, ValueError: as in `KTOLoss`; a step id has no label.
            RuntimeError: a target is outside [0, V), on the CPU. On CUDA the loss is NaN instead.
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
            "ref_logp: expected ref_logp, or ref_hidden and ref_weight (the loss needs a reference), got None"
        )
    return found


def _reference_point(
    kl: float | Tensor | None, kl_hidden: Tensor | None, kl_target: Tensor | None,
    kl_ref_hidden: Tensor | None, kl_ref_logp: Tensor | None, kl_cu_seqlens: Tensor | None,
    kl_step_ids: Tensor | None, weight: Tensor, bias: Tensor | None, ref_weight: Tensor | None,
    ref_bias: Tensor | None, group: ProcessGroup | None,
) -> float | Tensor | Mismatched:  # fmt: skip
    """kl as given, or the mismatched batch with its log-probs."""
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
    _checks.check_integers("kl_target", kl_target)
    if kl_ref_logp is None:
        if ref_weight is None:
            raise ValueError("kl_ref_hidden: expected ref_weight (the reference head) too, got None")
        kl_ref_logp = logp_without_gradient(
            kl_target, group, kl_ref_hidden=kl_ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias
        )
    logp = logp_without_gradient(kl_target, group, kl_hidden=kl_hidden, weight=weight, bias=bias)
    return Mismatched(kl_target, logp, kl_ref_logp, kl_cu_seqlens, kl_step_ids)
