"""Segmentations: log-partition and gradient, compared with a loop, pytorch-struct and a floor.

`python bench/bench_segmentation.py` runs the main case, with `--all` all cases and a grid of shapes;
`pytest bench` runs the cases without the grid with pytest-benchmark.
"""

import itertools

import harness
import torch
import torch.nn.functional as F
from harness import Case, Inputs, Provider, test_provider  # noqa: F401  (pytest bench runs it)

import sukhops
from sukhops import reference

SAMPLES = 100


def make(b: int, t: int, k: int, size: float = 1.0) -> Inputs:
    g = torch.Generator().manual_seed(0)
    return {"scores": (size * torch.randn(b, t, k, generator=g)).requires_grad_()}


def logz(f):
    return lambda i: lambda: f(i["scores"])


def loop(scores: torch.Tensor) -> torch.Tensor:
    """A loop over positions; ahead[:, j] is the log-sum over segmentations that end j positions later."""
    b, _, k = scores.shape
    nothing = scores.new_full((b, 1), -1e30)
    ahead = F.pad(scores.new_zeros(b, 1), (0, k - 1), value=-1e30)  # [B, K]
    for row in scores.unbind(1):
        ahead = torch.logaddexp(torch.cat([ahead[:, 1:], nothing], 1), ahead[:, :1] + row)
    return ahead[:, 0]


def pytorch_struct(scores: torch.Tensor) -> torch.Tensor:
    """Edges are [B, T, K + 1, C, C], indexed by length; segments that end after the text are masked."""
    from torch_struct import SemiMarkovCRF

    b, t, k = scores.shape
    over = torch.arange(t).unsqueeze(1) + torch.arange(k) >= t
    edges = F.pad(scores.masked_fill(over, -1e5), (1, 0), value=-1e5)
    return SemiMarkovCRF(edges[..., None, None], torch.full((b,), t + 1)).partition


def floor(i: Inputs):
    """exp of every score, and 2 * B chains of T dependent products: the steps of the two sweeps."""
    scores = i["scores"].detach()
    b, t, _ = scores.shape
    exponentials, factors = torch.ones_like(scores), torch.ones(2 * b, t)
    sums = torch.ones_like(factors)

    def call():
        torch.exp(scores, out=exponentials)
        torch.cumprod(factors, 1, out=sums)

    return call


def peers(b: int, t: int, k: int) -> dict[str, Provider]:
    """Peers. Memory is predicted from autograd's tape or charts [B, T, K + 1, K + 1], time from T = 1024."""
    steps = b * t * k * 4.0
    return {
        "a loop": Provider(logz(loop), 8 * steps, "torch", seconds=1.5e-4 * t),
        "pytorch-struct": Provider(
            logz(pytorch_struct), 40 * steps * (k + 2), "torch-struct", seconds=3e-7 * b * t * (k + 1) ** 2
        ),
    }


def gradient_case(
    name: str,
    b: int,
    t: int,
    k: int,
    rounds: int = 7,
    compared: bool = True,
    size: float = 1.0,
    checked: int = 60,
) -> Case:
    """`checked`: number of positions, in at most 3 sequences, of the check against float64."""
    return Case(
        "segmentation", name, {"B": b, "T": t, "K": k}, torch.float32,
        lambda: make(b, t, k, size), lambda: make(min(b, 3), checked, k, size),
        logz(reference.segmentation_logz),
        {"sukhops": Provider(logz(sukhops.segmentation_logz), ours=True)}
        | (peers(b, t, k) if compared else {}),
        floor, rounds,
    )  # fmt: skip


def forward(times: int):
    def bare(i: Inputs):
        scores = i["scores"].detach()
        return lambda: [sukhops.segmentation_logz(scores) for _ in range(times)]

    return bare


def bare_case(name: str, ours, exact, over) -> Case:
    """A case without autograd."""
    b, t, k = 16, 1024, 16
    return Case(
        "segmentation", name, {"B": b, "T": t, "K": k}, torch.float32,
        lambda: make(b, t, k), lambda: {"scores": make(3, 60, k)["scores"].detach()}, logz(exact),
        {"sukhops": Provider(logz(ours), ours=True)}, over, 15, ("fwd_nograd",),
    )  # fmt: skip


def first_segments(scores: torch.Tensor) -> torch.Tensor:
    """1 for every sample, because each has a segment at position 0."""
    return sukhops.segmentation_sample(scores, SAMPLES)[..., 0].clamp(max=1).to(scores.dtype)


def cases() -> list[Case]:
    return [
        gradient_case("log-partition and gradient", 16, 1024, 16, 15)._replace(main=True),
        gradient_case("the same, in turns with the floor alone", 16, 1024, 16, 41, compared=False),
        gradient_case("the same, scores 20 times as large", 16, 1024, 16, 15, compared=False, size=20.0),
        *(
            gradient_case(f"one sequence, T = {t:,}", 1, t, 16, 15, compared=False, checked=t)
            for t in (16384, 65536)
        ),
        bare_case(
            "posterior: the same kernels without autograd",
            sukhops.segmentation_marginals,
            reference.segmentation_marginals,
            floor,
        ),
        bare_case(
            "best segmentation, over the log-partition",
            lambda s: sukhops.segmentation_viterbi(s).score,
            lambda s: reference.segmentation_viterbi(s).score,
            forward(1),
        ),
        bare_case(
            f"{SAMPLES} samples, over {SAMPLES} log-partitions",
            first_segments,
            lambda s: s.new_ones(SAMPLES, s.shape[0]),
            forward(SAMPLES),
        ),
    ]


def grid() -> list[Case]:
    shapes = itertools.product((512, 4096, 65536), (8, 16, 64), (1, 32))
    return [gradient_case("grid", b, t, k, 3) for t, k, b in shapes]


if __name__ == "__main__":
    harness.main("segmentation", cases(), grid())
