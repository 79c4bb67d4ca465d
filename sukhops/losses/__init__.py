"""Losses on log-probs: the functional twins of the modules in `sukhops.nn`."""

from sukhops.losses._output import LossOutput
from sukhops.losses.director import director_loss
from sukhops.losses.dpo import dpo_loss

__all__ = ["LossOutput", "director_loss", "dpo_loss"]
