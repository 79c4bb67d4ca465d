"""segmentation.cu without a GPU: its recursions on the host, compared with enumeration; compilation."""

import ctypes
import hashlib
import itertools
import math
import os
import shutil
import subprocess
from pathlib import Path

import gpu_build
import pytest
import roofline
import torch
from gpu_build import CACHE
from hypothesis import HealthCheck, given, settings
from segmentation_oracle import problems, sequences, upstream_like
from segmentation_sums import walk

import sukhops
from sukhops import reference
from sukhops.testing import budget, distance

ROOT = Path(__file__).parent.parent
HEADER, KERNELS = ROOT / "csrc" / "segmentation_warp.h", ROOT / "csrc" / "segmentation.cu"
EXAMPLES = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def host():
    source = ROOT / "tests" / "segmentation_host.cpp"
    CACHE.mkdir(exist_ok=True)
    path = CACHE / f"segmentation_host-{key(source.read_text(), HEADER.read_text())}.so"
    if not path.exists():
        built = path.with_suffix(f".{os.getpid()}")
        command = ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", f"-I{HEADER.parent}", source, "-o", built]
        subprocess.run(command, check=True)
        built.rename(path)
    return ctypes.CDLL(str(path))


class OnHost:
    """Computes results of the operators on [B, T, K] with the host build, one sequence per call."""

    def __init__(self, library, scores, lengths):
        self.library, self.scores = library, scores.contiguous()
        self.name = str(scores.dtype).removeprefix("torch.")
        self.lengths = [scores.shape[1]] * scores.shape[0] if lengths is None else lengths.tolist()

    def call(self, function, b, *arguments):
        given = [t.data_ptr() if isinstance(t, torch.Tensor) else t for t in arguments]
        x = self.scores[b]
        f = getattr(self.library, f"{function}_{self.name}")
        f(*(ctypes.c_int64(v) for v in (x.data_ptr(), self.lengths[b], x.shape[1], *given)))

    def each(self, function, *shapes_and_rest):
        """Calls `function` for each sequence b: shapes become outputs, other arguments x become x[b]."""
        found = []
        for b in range(len(self.lengths)):
            made = [self.scores.new_zeros(a) if isinstance(a, tuple) else a[b] for a in shapes_and_rest]
            self.call(function, b, *made)
            found.append([m for m, a in zip(made, shapes_and_rest, strict=True) if isinstance(a, tuple)])
        return [torch.stack(f) for f in zip(*found, strict=True)]

    def posterior(self, steps=0):
        """`steps`: number of steps per chunk; 0: one chunk."""
        logz, out = self.each("posterior", [steps] * len(self.lengths), (2,), tuple(self.scores.shape[1:]))
        return logz[:, 0], logz[:, 1], out

    def moments(self, upstream):
        nothing = [0] * len(self.lengths)
        mean, out = self.each(
            "moments", nothing if upstream is None else upstream, (1,), tuple(self.scores.shape[1:])
        )
        return mean[:, 0], out

    def best(self):
        segments = torch.zeros(self.scores.shape[:2], dtype=torch.int64)
        (score,) = self.each("best", (1,), segments)
        return score[:, 0], segments

    def samples(self, b, count, seed):
        segments = torch.zeros(count, self.scores.shape[1], dtype=torch.int64)
        self.call("samples", b, self.scores.shape[1], count, seed, segments)
        return segments


def gradient(x, s):
    return torch.autograd.grad(x, s, retain_graph=True)[0] if x.requires_grad else torch.zeros_like(s)


@EXAMPLES
@given(problems())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_enumeration(host, dtype, problem):
    scores, lengths = problem[0].to(dtype), problem[1]
    every, upstream = sequences(scores, lengths), upstream_like(scores)
    ours = OnHost(host, scores, lengths)
    s = scores.clone().requires_grad_()
    logz, marginals = (
        reference.segmentation_logz(s, lengths),
        reference.segmentation_marginals(s, lengths),
    )
    entropy = reference.segmentation_entropy(s, lengths)

    def close(result, low, exact, terms=1.0):
        """terms: magnitude of the terms of the sum, if above 1, since they may cancel"""
        exact = torch.stack(exact) if isinstance(exact[0], torch.Tensor) else torch.tensor(exact)
        cancelled = 4 * torch.finfo(result.dtype).eps * (max(terms, 1.0) - 1)
        assert distance(result, exact) <= budget(result, low, exact) + cancelled, (result, exact)

    for steps in (0, 1, 3):
        alpha, beta, posterior = ours.posterior(steps)
        for sweep in (alpha, beta):
            close(sweep, logz, [e.logz for e in every])
        close(posterior, marginals, [e.marginals() for e in every])
        assert not posterior[scores == -torch.inf].any()
    _, covariance = ours.moments(upstream)
    low = gradient((marginals * upstream).sum(), s)
    close(covariance, low, [e.covariance(u) for e, u in zip(every, upstream, strict=True)])
    mean, change = ours.moments(None)
    close(mean, entropy, [e.entropy() for e in every])
    change_exact = [e.entropy_gradient() for e in every]
    close(change, gradient(entropy.sum(), s), change_exact, terms=entropy.max().item())
    score, segments = ours.best()
    best = sukhops.segmentation_viterbi(scores, lengths)
    assert torch.equal(score, best.score) and torch.equal(segments, best.segments)


@pytest.mark.parametrize("k", [1, 16, 31, 40, 100])
@pytest.mark.parametrize("size", [1.0, 1e4])
@pytest.mark.parametrize("steps", [0, 8, 96])
def test_long_sequences_agree_with_the_cpu(host, k, size, steps):
    scores, lengths = size * torch.randn(3, 300, k), torch.tensor([300, 0, 123])
    scores[torch.rand(scores.shape) < 0.3] = -torch.inf
    exact = sukhops.segmentation_logz(scores.double(), lengths)
    alpha, beta, posterior = OnHost(host, scores, lengths).posterior(steps)
    cpu = sukhops.segmentation_logz(scores, lengths), sukhops.segmentation_marginals(scores, lengths)
    for sweep in (alpha, beta):
        assert distance(sweep, exact) <= budget(sweep, cpu[0], exact)
    exact = sukhops.segmentation_marginals(scores.double(), lengths)
    low = reference.segmentation_marginals(scores, lengths)
    assert distance(posterior, exact) <= budget(posterior, low, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 4, 16, 17, 64])
@pytest.mark.parametrize("steps", [0, 8])
@pytest.mark.parametrize("size", [5e6, 1.01 * 5e6, 2 * 5e6, 1000 * 5e6, 1e16, 1e20, 3e38])
def test_large_scores_give_correct_results_or_nan(host, size, steps, k, dtype):
    scores = size / max(16, k) * (1 - 1e-6 * torch.rand(3, 150, k, dtype=dtype))
    scores[1] *= -1
    scores[2, :, 1:] *= -1
    exact = sukhops.segmentation_marginals(scores.double())
    logz, _, posterior = OnHost(host, scores, None).posterior(steps)
    low = reference.segmentation_marginals(scores)
    for ours, plain, right, z in zip(posterior, low, exact, logz, strict=True):
        known = right.isfinite().all() and ours.isfinite().all()
        allowed = budget(ours, plain, right) + walk(150, k, torch.float64)
        assert distance(ours, right) <= allowed if known else ours.isnan().any()
        assert ours.isnan().any() or not z.isnan()
    if size == 5e6:
        assert posterior.isfinite().all()


def test_number_of_chunks(host):
    def steps(b, t, k, warps=8 * 132):
        return host.chunks(*(ctypes.c_int64(n) for n in (b, t, k, warps)))

    assert steps(1, 65_536, 16) == roofline.CHUNK and steps(4, 8192, 16) < 8192
    for whole in ((32, 8192, 16), (1, 200, 16), (1, 1000, 128), (1000, 65_536, 8), (1, 0, 4), (0, 100, 4)):
        assert steps(*whole) == whole[1]
    for b, t, k in itertools.product((1, 3, 30), (300, 5000, 100_000), (1, 8, 100)):
        assert steps(b, t, k) == t or (steps(b, t, k) >= 8 * k and 2 * steps(b, t, k) <= t)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("steps", [0, 1, 3, 5])
def test_nan_and_infinity_propagate(host, bad, steps):
    scores = torch.randn(2, 9, 4)
    scores[0, 3, 1] = bad
    alpha, beta, posterior = OnHost(host, scores, None).posterior(steps)
    assert (
        alpha[0].isnan() and beta[0].isnan() and posterior[0].isnan().any() and posterior[1].isfinite().all()
    )
    score, segments = OnHost(host, scores, None).best()
    assert score[0].isnan() and score[1].isfinite() and not segments[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampling_frequencies(host, dtype):
    """Chi-square statistic of 20,000 samples is within six standard deviations of its mean."""
    scores = torch.randn(1, 6, 3, dtype=dtype)
    scores[0, 2, 1] = -torch.inf
    (e,) = sequences(scores, None)
    counts = {tuple(e.encoded(p)): 0 for p in e.parts}
    for s in OnHost(host, scores, None).samples(0, 20_000, 7).tolist():
        counts[tuple(s)] += 1
    common = [
        (c, 20_000 * float(p)) for c, p in zip(counts.values(), e.p, strict=True) if 20_000 * float(p) >= 5
    ]
    statistic = sum((c - x) ** 2 / x for c, x in common)
    assert abs(statistic - len(common)) < 6 * math.sqrt(2 * len(common))


@pytest.mark.skipif(not gpu_build.nvcc() or not shutil.which("c++filt"), reason="needs nvcc and c++filt")
@pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=() if a == 90 else pytest.mark.full) for a in gpu_build.ARCHITECTURES]
)
def test_compiles_without_spills(arch):
    built = gpu_build.build_cuda(KERNELS, arch)
    # five kernels in 3 + 2 widths and two kernels for any width, in two dtypes
    assert len(built) == 29 and not any(one.spills for one in built.values())
