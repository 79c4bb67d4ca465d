"""Modules: losses on a fused head, the Director head, and attention with adaptive spans."""

from sukhops.nn.adaptive_span import AdaptiveSpan, AdaptiveSpanAttention
from sukhops.nn.cringe import CringeLoss, PairwiseCringeLoss
from sukhops.nn.director import DirectorHead, DirectorLoss
from sukhops.nn.dpo import DPOLoss
from sukhops.nn.head_loss import HeadLoss
from sukhops.nn.kto import KTOLoss, StepKTOLoss
from sukhops.nn.segmentation import SegmentationLoss

__all__ = [
    "AdaptiveSpan",
    "AdaptiveSpanAttention",
    "CringeLoss",
    "DPOLoss",
    "DirectorHead",
    "DirectorLoss",
    "HeadLoss",
    "KTOLoss",
    "PairwiseCringeLoss",
    "SegmentationLoss",
    "StepKTOLoss",
]
