"""Models and trainers of Hugging Face transformers."""

from sukhops.integrations.transformers import _requirement  # noqa: F401  (first: checks the version)
from sukhops.integrations.transformers._director import add_director_head
from sukhops.integrations.transformers._loading import from_pretrained
from sukhops.integrations.transformers._spans import (
    AdaptiveSpans,
    adaptive_spans,
    add_adaptive_spans,
)
from sukhops.integrations.transformers._trainer import LossTrainer

__all__ = [
    "AdaptiveSpans",
    "LossTrainer",
    "adaptive_spans",
    "add_adaptive_spans",
    "add_director_head",
    "from_pretrained",
]
