"""The loss of a hybrid language model, summed over segmentations, on a fused head."""

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sukhops import _checks
from sukhops.losses._output import LossOutput
from sukhops.losses.segmentation import check_flat, segmentation_loss, unit_targets
from sukhops.ops.vocab_head import linear_logp
from sukhops.parallel._dtensor import takes_dtensors


class SegmentationLoss(nn.Module):
    """Negative log-likelihood of texts, summed over their segmentations into units, from hidden states.

    Each position has one softmax over all V units. The B x T x V log-probs are never stored, only K per
    position. `sukhops.losses.segmentation_loss` has the formula; `sukhops.Lexicon` creates the units and
    their ids. With K = 1 this is the cross entropy of a character model.

    Args:
        flat: whether to use the warm-up loss of the public training code instead of the likelihood: the mean
            negative log-prob of all units at all positions where they occur.

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
        """The loss of a batch.

        Args:
            hidden: [B, T, D], float32, bfloat16, float16 or float64. Row t predicts the unit that starts at
                position t, whatever its length, so it may depend only on positions before t: it is the state
                of the model after reading symbol t-1. Row 0 is the state after a start symbol, or after the
                symbol before the text. With a causal model, shift as in any language model:
                `loss(model(x[:, :-1]), weight, ids_of_x[:, 1:])`.
            weight: [V, D], of the same dtype.
            unit_ids: [B, T, K], integers in [0, V): the unit that covers positions t .. t+k, or -1 if there
                is none. Units that end after their sequence are ignored.
            bias: [V], or None.
            lengths: [B], integers in [0, T]. None: all T. Rows of hidden at and after the length are ignored.
            num_items: number of symbols in the whole batch, if this call has a part of it. None: their number
                in this call.
            group: as in `sukhops.linear_logp`.

        Returns:
            LossOutput(loss, metrics). The loss is in nats per symbol, the metrics are bits_per_symbol and
            unreachable; see `sukhops.losses.segmentation_loss`.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device; on the CPU in eager
                mode, an id is outside [-1, V).
            RuntimeError: on the CPU, a length is outside [0, T], or under torch.compile an id outside
                [-1, V). On CUDA the loss is NaN instead.
        """
        _checks.check_floats(hidden=hidden, weight=weight)
        # linear_logp raises for a weight that is not [V, D], and with a group for ids outside the vocabulary
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
