"""Losses as functions of log-probs. The modules in `sukhops.nn` call them with log-probs of a fused head."""

from sukhops.losses._output import LossOutput
from sukhops.losses._steps import step_ids
from sukhops.losses.cringe import cringe_loss, pairwise_cringe_loss
from sukhops.losses.director import director_loss
from sukhops.losses.dpo import dpo_loss
from sukhops.losses.kto import Mismatched, kto_loss, mismatched, step_kto_loss
from sukhops.losses.segmentation import segmentation_loss, unit_targets

__all__ = [
    "LossOutput",
    "Mismatched",
    "cringe_loss",
    "director_loss",
    "dpo_loss",
    "kto_loss",
    "mismatched",
    "pairwise_cringe_loss",
    "segmentation_loss",
    "step_ids",
    "step_kto_loss",
    "unit_targets",
]
