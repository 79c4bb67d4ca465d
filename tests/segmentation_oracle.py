"""Enumerates every segmentation of a short sequence, with 60 decimal digits; shares no code with the ops."""

import itertools
from decimal import Decimal, getcontext

import torch
from hypothesis import strategies as st

getcontext().prec = 60


def segmentations(length: int, k: int) -> list[list[int]]:
    """Segment lengths of all segmentations: subsets of the inner boundaries, no segment longer than k."""
    found = []
    for inner in itertools.product((False, True), repeat=max(0, length - 1)):
        edges = [0, *(i + 1 for i, there in enumerate(inner) if there), length] if length else [0]
        parts = [b - a for a, b in itertools.pairwise(edges)]
        if all(p <= k for p in parts):
            found.append(parts)
    return found


class Sequence:
    """One sequence [T, K] with its length: its possible segmentations, their scores and probabilities."""

    def __init__(self, scores: torch.Tensor, length: int):
        self.t, self.k = scores.shape
        self.parts, self.scores = [], []
        for parts in segmentations(length, self.k):
            total = sum((Decimal(float(scores[t, p - 1])) for t, p in self.segments(parts)), Decimal(0))
            if total.is_finite():
                self.parts.append(parts)
                self.scores.append(total)
        best = max(self.scores, default=Decimal("-Infinity"))
        weights = [(s - best).exp() for s in self.scores]
        self.best = float(best)
        self.logz = float(best + sum(weights).ln()) if weights else float("-inf")
        self.p = [w / sum(weights) for w in weights]

    @staticmethod
    def segments(parts: list[int]) -> list[tuple[int, int]]:
        return list(zip(itertools.accumulate([0, *parts]), parts, strict=False))

    def weighted(self, weights: list[Decimal]) -> torch.Tensor:
        """For each segment [T, K], the sum of the weights of the segmentations that contain it."""
        table = [[Decimal(0)] * self.k for _ in range(self.t)]
        for parts, weight in zip(self.parts, weights, strict=True):
            for t, p in self.segments(parts):
                table[t][p - 1] += weight
        return torch.tensor([[float(x) for x in row] for row in table], dtype=torch.float64).reshape(
            self.t, self.k
        )

    def marginals(self) -> torch.Tensor:
        return self.weighted(self.p)

    def entropy(self) -> float:
        return float(sum((-p * p.ln() for p in self.p if p > 0), Decimal(0)))

    def covariance(self, upstream: torch.Tensor) -> torch.Tensor:
        """The gradient of (upstream * marginals).sum() [T, K]."""
        values = [
            sum((Decimal(float(upstream[t, p - 1])) for t, p in self.segments(parts)), Decimal(0))
            for parts in self.parts
        ]
        return self.centered(values)

    def entropy_gradient(self) -> torch.Tensor:
        return self.centered([-p.ln() if p > 0 else Decimal(0) for p in self.p])

    def centered(self, values: list[Decimal]) -> torch.Tensor:
        mean = sum((p * v for p, v in zip(self.p, values, strict=True)), Decimal(0))
        return self.weighted([p * (v - mean) for p, v in zip(self.p, values, strict=True)])

    def encoded(self, parts: list[int]) -> list[int]:
        """For each position t [T], the length of the segment that starts there, or 0."""
        there = dict(self.segments(parts))
        return [there.get(t, 0) for t in range(self.t)]


@st.composite
def problems(draw):
    """scores [B, T, K] in float64, some of them -inf, and lengths or None."""
    b, t, k = draw(st.integers(1, 6)), draw(st.integers(0, 8)), draw(st.integers(1, 10))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.sampled_from([0.0, 1.0, 30.0, 1e4]))
    scores = size * torch.randn(b, t, k, generator=generator, dtype=torch.float64)
    missing = draw(st.sampled_from([0.0, 0.2, 0.7]))
    scores[torch.rand(b, t, k, generator=generator) < missing] = -torch.inf
    lengths = draw(st.none() | st.lists(st.integers(0, t), min_size=b, max_size=b).map(torch.tensor))
    return scores, lengths


def upstream_like(scores: torch.Tensor) -> torch.Tensor:
    """An upstream gradient whose sums over a segmentation are less than 1, as error budgets assume."""
    return 0.1 * torch.arange(scores.numel(), dtype=scores.dtype).cos().reshape(scores.shape)


def sequences(scores: torch.Tensor, lengths: torch.Tensor | None) -> list[Sequence]:
    ends = [scores.shape[1]] * scores.shape[0] if lengths is None else lengths.tolist()
    return [Sequence(s, n) for s, n in zip(scores, ends, strict=True)]
