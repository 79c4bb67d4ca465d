"""Fused CPU, CUDA and Triton operators for training and decoding language models."""

from sukhops import (
    _library,  # noqa: F401  (first: loads the compiled operators that the other modules use)
    losses,
    nn,
    pairs,
    reference,
    testing,
)
from sukhops._budget import get_logits_budget, set_logits_budget
from sukhops.lexicon import Lexicon
from sukhops.ops.adaptive_span import adaptive_span_attention
from sukhops.ops.director import director_logp, director_topk
from sukhops.ops.segmentation import (
    segmentation_entropy,
    segmentation_logz,
    segmentation_marginals,
    segmentation_sample,
    segmentation_viterbi,
)
from sukhops.ops.vocab_head import linear_logp, linear_token_stats, linear_topk

__version__ = "0.2.0"
__all__ = [
    "Lexicon",
    "adaptive_span_attention",
    "director_logp",
    "director_topk",
    "get_logits_budget",
    "linear_logp",
    "linear_token_stats",
    "linear_topk",
    "losses",
    "nn",
    "pairs",
    "reference",
    "segmentation_entropy",
    "segmentation_logz",
    "segmentation_marginals",
    "segmentation_sample",
    "segmentation_viterbi",
    "set_logits_budget",
    "testing",
]
