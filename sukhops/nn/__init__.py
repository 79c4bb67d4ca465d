"""Modules: options and parameters; forward is one call."""

from sukhops.nn.cringe import CringeLoss, PairwiseCringeLoss
from sukhops.nn.director import DirectorHead, DirectorLoss
from sukhops.nn.dpo import DPOLoss
from sukhops.nn.kto import KTOLoss, StepKTOLoss
from sukhops.nn.segmentation import SegmentationLoss

__all__ = [
    "CringeLoss",
    "DPOLoss",
    "DirectorHead",
    "DirectorLoss",
    "KTOLoss",
    "PairwiseCringeLoss",
    "SegmentationLoss",
    "StepKTOLoss",
]
