"""Training a hybrid language model over segmentations on a fused head."""

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sukhops import _checks
from sukhops.losses._output import LossOutput
from sukhops.losses.segmentation import check_flat, segmentation_loss, unit_targets
from sukhops.ops.vocab_head import linear_logp
from sukhops.parallel._dtensor import takes_dtensors


class SegmentationLoss(nn.Module):
    """Likelihood of texts, summed over their segmentations into units, straight from hidden states.

    One softmax over all V units per position: the B x T x V log-probs are never kept, K per position are.
    `sukhops.losses.segmentation_loss` has the formula; `sukhops.Lexicon` makes the units and their ids. With
    K = 1 this is the cross entropy of a character model.

    Args:
        flat: the warm-up loss of the public training code, the mean log-prob of all units wherever they
            could start, instead of the likelihood.

    Source: Grave et al. 2019 (hybrid language models).
    """

    def __init__(self, *, flat: bool = False):
        super().__init__()
        check_flat(flat)
        self.flat = flat

    def extra_repr(self) -> str:
        return f"flat={self.flat}"

    @takes_dtensors
    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        unit_ids: Tensor,
        *,
        bias: Tensor | None = None,
        lengths: Tensor | None = None,
        num_items: int | Tensor | None = None,
        group: ProcessGroup | None = None,
    ) -> LossOutput:
        """
        Args:
            hidden: [B, T, D], float32, bfloat16, float16 or float64. Row t predicts the unit that starts at
                position t, whatever its length, so it may know positions before t only: it is the state
                after the model has read symbol t-1, and row 0 the state after a start symbol or after the
                symbol before the text. A causal model that reads x gives it for units of x[1:], as for
                x[1:] in any language model: `loss(model(x[:, :-1]), weight, ids_of_x[:, 1:])`.
            weight: [V, D], of the same dtype.
            unit_ids: [B, T, K], integers in [0, V): the unit that covers positions t .. t+k, or -1 where
                there is none. Units that end after their sequence count as none.
            bias: [V], or None.
            lengths: [B], integers in [0, T]; None: T each. Rows of hidden from there on do not count.
            num_items: the symbols of the whole batch, where this call has a part of it; None: its own.
            group: as in `sukhops.linear_logp`.

        Returns:
            LossOutput(loss, metrics): nats per symbol; bits_per_symbol and unreachable, see
            `sukhops.losses.segmentation_loss`.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape or device; on the CPU in eager
                mode an id outside [-1, V).
            RuntimeError: a length outside [0, T], or under torch.compile such an id, on the CPU; on CUDA NaN.
        """
        _checks.check_floats(hidden=hidden, weight=weight)
        # what is no [V, D] linear_logp refuses, and ids outside a vocabulary in slices
        v = weight.shape[0] if weight.dim() == 2 and group is None else None
        targets = unit_targets(unit_ids, lengths, v)
        _checks.check_device("hidden", hidden, "unit_ids", unit_ids)
        if unit_ids.shape[:2] != hidden.shape[:-1]:
            raise ValueError(
                f"unit_ids: expected shape [B, T, K] for hidden [B, T, D] = {list(hidden.shape)}, "
                f"got {list(unit_ids.shape)}"
            )
        logp = linear_logp(hidden, weight, targets, bias, group=group)
        return segmentation_loss(logp, unit_ids, lengths=lengths, flat=self.flat, num_items=num_items)
