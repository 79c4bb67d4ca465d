"""DPO and its family on a fused head."""

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sukhops.losses._output import LossOutput
from sukhops.losses.dpo import Options, dpo_loss
from sukhops.nn._reference import reference_logp
from sukhops.ops.vocab_head import linear_token_stats
from sukhops.parallel._dtensor import takes_dtensors


class DPOLoss(nn.Module):
    """Preference loss of B pairs straight from hidden states: the logits are never kept.

    `sukhops.losses.dpo_loss` has the formulas and says what each option means and which loss types use it;
    an option that a listed type does not use raises.

    Args:
        beta: strength of the tie to the reference, > 0.
        loss_type: one or several of sigmoid, robust, hinge, ipo, ipo_sum, exo_pair, nca_pair, bco_pair,
            sppo_hard, apo_zero, apo_down, discopop, sigmoid_norm, aot, aot_unpaired, simpo, cpo, orpo, sft.
        loss_weights: one per loss_type; None: 1 each.
        label_smoothing: probability that a label is wrong.
        reference_free: the reference's log-probs count as 0.
        length_alpha: R-DPO's length term.
        ld_alpha: LD-DPO's weight of the tokens beyond the shorter completion; needs ref_logp per token.
        nll_weight: factor of the chosen completions' token-mean NLL.
        f_divergence: reverse_kl, forward_kl, js or alpha.
        use_weighting: WPO: pairs weighted by how likely the policy finds them.
        margin: SimPO's gamma.
        tau: DiscoPOP's temperature.
        f_alpha: the order of the alpha divergence.

    Raises:
        ValueError: an unknown loss_type, an option out of range, or one that a listed type does not use.

    Source: Rafailov et al. 2023 (DPO); the others as in `sukhops.losses.dpo_loss`.
    """

    def __init__(
        self,
        beta: float = 0.1,
        loss_type: str | list[str] = "sigmoid",
        *,
        loss_weights: list[float] | None = None,
        label_smoothing: float = 0.0,
        reference_free: bool = False,
        length_alpha: float = 0.0,
        ld_alpha: float = 1.0,
        nll_weight: float = 0.0,
        f_divergence: str = "reverse_kl",
        use_weighting: bool = False,
        margin: float = 0.0,
        tau: float = 0.05,
        f_alpha: float = 0.5,
    ):
        super().__init__()
        self.options = Options(
            beta=beta,
            loss_type=loss_type,
            loss_weights=loss_weights,
            label_smoothing=label_smoothing,
            reference_free=reference_free,
            length_alpha=length_alpha,
            ld_alpha=ld_alpha,
            nll_weight=nll_weight,
            f_divergence=f_divergence,
            use_weighting=use_weighting,
            margin=margin,
            tau=tau,
            f_alpha=f_alpha,
        ).check()

    def extra_repr(self) -> str:
        default = Options()._asdict()
        set_here = {n: v for n, v in self.options._asdict().items() if v != default[n]}
        return ", ".join(
            f"{n}={v!r}"
            for n, v in ({"beta": self.options.beta, "loss_type": self.options.loss_type} | set_here).items()
        )

    @takes_dtensors
    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        bias: Tensor | None = None,
        ref_logp: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
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
            ref_logp: log-probs of the reference, per token (as target) or per sequence [2B]; or
            ref_hidden, ref_weight, ref_bias: as hidden, weight and bias, of the reference, whose width may
                differ. Exactly one of the two forms where the loss has a reference; never differentiated.
            cu_seqlens: [2B + 1], integers, 0 first and N last.
            num_items: the pairs of the whole batch, where this call has a part of it; None: its own.
            group: as in `sukhops.linear_logp`; ref_weight and ref_bias are slices too.

        Returns:
            LossOutput(loss, metrics), see `sukhops.losses.dpo_loss`.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape or device; a reference that is
                missing, given twice or not wanted; an odd number of sequences.
            RuntimeError: a target outside [0, V), on the CPU; on CUDA NaN.
        """
        o = self.options
        if not o.needs_reference and any(t is not None for t in (ref_logp, ref_hidden, ref_weight, ref_bias)):
            raise ValueError(
                f"ref_logp, ref_hidden, ref_weight, ref_bias: loss_type {o.types} with "
                f"reference_free={o.reference_free} has no reference, expected None"
            )
        outputs = ("logp", "log_sum_sq") if o.use_weighting else ("logp",)
        stats = linear_token_stats(hidden, weight, target, bias, outputs=outputs, group=group)
        return dpo_loss(
            stats.logp,  # type: ignore[arg-type]  # one of outputs
            target,
            reference_logp(target, ref_logp, ref_hidden, ref_weight, ref_bias, group),
            cu_seqlens=cu_seqlens,
            log_sum_squares=stats.log_sum_sq,
            num_items=num_items,
            **o._asdict(),
        )
