"""DPO and its family on a fused head."""

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sukhops.losses._output import LossOutput
from sukhops.losses.dpo import Options, dpo_loss
from sukhops.nn._reference import reference_logp
from sukhops.ops.vocab_head import linear_token_stats
from sukhops.parallel._dtensor import takes_dtensors


class DPOLoss(nn.Module):
    """Preference loss of B pairs, computed from hidden states without the logits [2B, T, V].

    `sukhops.losses.dpo_loss` explains each option, and which loss types use it. label_smoothing, margin and
    tau raise an error if no listed type uses them; any other option does if one listed type does not use it.

    Args:
        beta: factor of the log-ratios, > 0; larger values keep the policy closer to the reference.
        loss_type: one or several of sigmoid, robust, hinge, ipo, ipo_sum, exo_pair, nca_pair, bco_pair,
            sppo_hard, apo_zero, apo_down, discopop, sigmoid_norm, aot, aot_unpaired, simpo, cpo, orpo, sft.
        loss_weights: one factor per loss_type. None: all 1.
        label_smoothing: probability that a preference label is wrong.
        reference_free: whether to use 0 as the log-probs of the reference model.
        length_alpha: R-DPO's factor of the difference in length.
        ld_alpha: LD-DPO's weight of tokens beyond the length of the shorter completion; needs ref_logp per
            token.
        nll_weight: factor of the negative log-likelihood per token of the chosen completions.
        f_divergence: reverse_kl, forward_kl, js or alpha.
        use_weighting: WPO: whether to weight each pair by its probability under the policy.
        margin: SimPO's gamma.
        tau: DiscoPOP's temperature.
        f_alpha: order of the alpha divergence.

    Raises:
        ValueError: loss_type is unknown; an option is out of range, or a listed loss type does not use it.

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
        """The loss of a batch.

        Args:
            hidden: [2B, T, D], or packed [N, D] with cu_seqlens, float32, bfloat16, float16 or float64: B
                chosen, then B rejected sequences; row i predicts target i.
            weight: [V, D], of the same dtype.
            target: [2B, T] or [N], integers in [0, V), or -100 for an ignored token.
            bias: [V], or None.
            ref_logp: log-probs under the reference model, per token (shaped as target) or per sequence [2B].
                If the loss has a reference, give either ref_logp or the reference head; both are detached.
            ref_hidden, ref_weight, ref_bias: like hidden, weight and bias, for the reference model, which may
                have another width.
            cu_seqlens: [2B + 1], integers, from 0 to N: ends of the packed sequences.
            num_items: number of pairs in the whole batch, if this call has a part of it. None: their number
                in this call.
            group: as in `sukhops.linear_logp`; ref_weight and ref_bias are slices too.

        Returns:
            LossOutput(loss, metrics), see `sukhops.losses.dpo_loss`.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device; a reference is
                missing, given twice, or given to a loss without one; the number of sequences is odd.
            RuntimeError: a target is outside [0, V), on the CPU. On CUDA the loss is NaN instead.
        """
        o = self.options
        if not o.needs_reference and any(t is not None for t in (ref_logp, ref_hidden, ref_weight, ref_bias)):
            raise ValueError(
                "ref_logp, ref_hidden, ref_weight, ref_bias: expected None, got a reference; loss_type "
                f"{o.types} with reference_free={o.reference_free} does not use one"
            )
        outputs = ("logp", "log_sum_sq") if o.use_weighting else ("logp",)
        stats = linear_token_stats(hidden, weight, target, bias, outputs=outputs, group=group)
        return dpo_loss(
            stats.logp,  # type: ignore[arg-type]  # not None: it is in outputs
            target,
            reference_logp(target, ref_logp, ref_hidden, ref_weight, ref_bias, group),
            cu_seqlens=cu_seqlens,
            log_sum_squares=stats.log_sum_sq,
            num_items=num_items,
            **o._asdict(),
        )
