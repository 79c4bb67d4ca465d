"""References of all operators in plain PyTorch with the same signatures, for any device, float64 included."""

from sukhops.reference.adaptive_span import adaptive_span_attention
from sukhops.reference.director import director_logp, director_topk
from sukhops.reference.segmentation import (
    segmentation_entropy,
    segmentation_logz,
    segmentation_marginals,
    segmentation_sample,
    segmentation_viterbi,
)
from sukhops.reference.vocab_head import linear_logp, linear_token_stats, linear_topk

__all__ = [
    "adaptive_span_attention",
    "director_logp",
    "director_topk",
    "linear_logp",
    "linear_token_stats",
    "linear_topk",
    "segmentation_entropy",
    "segmentation_logz",
    "segmentation_marginals",
    "segmentation_sample",
    "segmentation_viterbi",
]
