"""Modules: options and parameters; forward is one call."""

from sukhops.nn.director import DirectorHead, DirectorLoss
from sukhops.nn.dpo import DPOLoss

__all__ = ["DPOLoss", "DirectorHead", "DirectorLoss"]
