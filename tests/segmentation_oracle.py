"""Every segmentation of a short sequence written out one by one, in Python floats: shares no code with the ops."""

import itertools
import math

import torch
from hypothesis import strategies as st


def segmentations(length: int, k: int) -> list[list[int]]:
    """Lengths of the segments of every segmentation: all subsets of the inner boundaries, none over k."""
    found = []
    for inner in itertools.product((False, True), repeat=max(0, length - 1)):
        edges = [0, *(i + 1 for i, there in enumerate(inner) if there), length] if length else [0]
        parts = [b - a for a, b in itertools.pairwise(edges)]
        if all(p <= k for p in parts):
            found.append(parts)
    return found


class Sequence:
    """One sequence [T, K] with its length: the possible segmentations, their scores and probabilities."""

    def __init__(self, scores: torch.Tensor, length: int):
        self.t, self.k = scores.shape
        self.parts, self.scores = [], []
        for parts in segmentations(length, self.k):
            starts = itertools.accumulate([0, *parts])
            total = math.fsum(
                s if math.isfinite(s := float(scores[t, p - 1])) else -1e300
                for t, p in zip(starts, parts, strict=False)
            )
            if total > -1e299:
                self.parts.append(parts)
                self.scores.append(total)
        self.best = max(self.scores, default=-math.inf)
        weights = [math.exp(s - self.best) for s in self.scores]
        self.logz = self.best + math.log(math.fsum(weights)) if weights else -math.inf
        self.p = [w / math.fsum(weights) for w in weights]

    def presence(self, parts: list[int]) -> torch.Tensor:
        """[T, K], 1 at each segment."""
        x = torch.zeros(self.t, self.k, dtype=torch.float64)
        for t, p in zip(itertools.accumulate([0, *parts]), parts, strict=False):
            x[t, p - 1] = 1.0
        return x

    def encoded(self, parts: list[int]) -> list[int]:
        """[T], the length of the segment that starts at t."""
        return [int(row.argmax()) + 1 if row.any() else 0 for row in self.presence(parts)]

    def marginals(self) -> torch.Tensor:
        total = torch.zeros(self.t, self.k, dtype=torch.float64)
        for parts, p in zip(self.parts, self.p, strict=True):
            total += p * self.presence(parts)
        return total

    def entropy(self) -> float:
        return math.fsum(-p * math.log(p) for p in self.p if p > 0)

    def covariance(self, upstream: torch.Tensor) -> torch.Tensor:
        """The gradient of (upstream * marginals).sum() [T, K]."""
        sums = [float((upstream * self.presence(parts)).sum()) for parts in self.parts]
        mean = math.fsum(p * s for p, s in zip(self.p, sums, strict=True))
        total = torch.zeros(self.t, self.k, dtype=torch.float64)
        for parts, p, s in zip(self.parts, self.p, sums, strict=True):
            total += p * (s - mean) * self.presence(parts)
        return total


@st.composite
def problems(draw):
    """scores [B, T, K] in float64 with -inf here and there, and lengths or None."""
    b, t, k = draw(st.integers(1, 6)), draw(st.integers(0, 8)), draw(st.integers(1, 10))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.sampled_from([0.0, 1.0, 30.0, 1e4]))
    scores = size * torch.randn(b, t, k, generator=generator, dtype=torch.float64)
    missing = draw(st.sampled_from([0.0, 0.2, 0.7]))
    scores[torch.rand(b, t, k, generator=generator) < missing] = -torch.inf
    lengths = draw(st.none() | st.lists(st.integers(0, t), min_size=b, max_size=b).map(torch.tensor))
    return scores, lengths


def sequences(scores: torch.Tensor, lengths: torch.Tensor | None) -> list[Sequence]:
    ends = [scores.shape[1]] * scores.shape[0] if lengths is None else lengths.tolist()
    return [Sequence(s, n) for s, n in zip(scores, ends, strict=True)]
