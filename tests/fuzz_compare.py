"""Compares the call of a fuzz case with the true result in float64, and checks rules for every call."""

import math
from collections.abc import Callable
from unittest import mock

import torch
from fuzz_inputs import HUGE, Source, changed, memory_of, named, precise
from torch import Tensor

from sukhops.testing import distance, finite_max

Call = Callable[..., dict[str, Tensor]]

NOT_FINITE = ("nan", "inf", "-inf")
LARGE = 1e3  # larger numbers are judged separately: their error budget would hide errors of small ones
SAMPLES = 64
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integer dtype by size in bytes
HALVES = (torch.bfloat16, torch.float16)

_move: Callable[[Tensor, Tensor | float], Tensor] | None = None


def rounded(t: Tensor, size: float | None = None) -> Tensor:
    """Returns t; while `Perturbations` computes a perturbed truth, t changed by possible rounding errors.

    A truth calls this function on every intermediate result that an implementation rounds. size: magnitude of
    the numbers that are rounded; None: that of t.
    """
    return t if _move is None else _move(t, t.detach() if size is None else size)


def moving() -> bool:
    """Whether `Perturbations` is computing a perturbed truth."""
    return _move is not None


class Upstream:
    """Upstream gradients, equal in every run of a case; some may be 0, or missing for one result."""

    def __init__(self, s: Source):
        finite = s.special not in NOT_FINITE  # kernels skip 0 * NaN, which is NaN in the truth
        self.kind = s.pick("upstream", "normal", "ones", "sparse") if finite else "normal"
        self.left_out = s.pick("upstream: left out", None, None, 0, 1) if finite else None
        self.generator = s.generator
        self.chosen: list[str] | None = None
        self.made: dict[str, Tensor] = {}
        self.copies: dict[str, Tensor] = {}

    def of(self, paths: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.chosen is None:
            self.chosen = list(paths)
            if self.left_out is not None and len(paths) > 1:
                del self.chosen[self.left_out]
        return {n: rounded(self._make(n, t).to(t.dtype)) for n, t in paths.items() if n in self.chosen}

    def _make(self, name: str, like: Tensor) -> Tensor:
        if name not in self.made:
            grad = torch.randn(like.shape, generator=self.generator, dtype=torch.float64)
            if self.kind == "sparse" and like.dim():
                grad *= torch.rand(like.shape, generator=self.generator) < 0.4
            if self.kind == "ones":  # expanded from one element, like the gradient of sum()
                grad = torch.ones((), dtype=like.dtype).expand(like.shape)
            self.made[name] = grad.to(like.dtype)
            self.copies[name] = self.made[name].clone()
        return self.made[name]

    def assert_unchanged(self) -> None:
        for name, made in self.made.items():
            assert torch.equal(made, self.copies[name]), f"{name}: the backward changed its upstream gradient"


def results(call: Call, given: dict, leaves: dict[str, Tensor], upstream: Upstream) -> dict[str, Tensor]:
    """The results of a call and the gradients of its leaves, by name."""
    found = dict(call(**given))
    grads = dict.fromkeys(leaves)
    paths = {n: t for n, t in found.items() if t.requires_grad}
    above = upstream.of(paths) if leaves else {}
    if above:
        outputs = [paths[n] for n in above]
        values = torch.autograd.grad(outputs, list(leaves.values()), list(above.values()), allow_unused=True)
        grads = dict(zip(leaves, values, strict=True))
    for name, g in grads.items():
        found[f"grad of {name}"] = torch.zeros_like(leaves[name]) if g is None else g
    return {n: t.detach() for n, t in found.items()}


def compare(
    s: Source,
    call: Call,
    truth: Call | None,
    given: dict[str, object],
    terms: int,
    fixed: tuple[str, ...] = (),
    unknown: Callable[[str, Tensor], Tensor] = lambda name, exact: torch.zeros_like(exact, dtype=torch.bool),
    plain: Call | None = None,
    off: Callable[[str], float] = lambda name: 0.0,
    spreads: bool = False,
) -> dict[str, Tensor]:
    """Fails unless the call is within budget of its truth, is bitwise deterministic and changes no argument.

    Args:
        call, truth: take the arguments `given`, return tensors by name. truth=None skips the comparison.
        terms: number of terms of the longest sums in the computation.
        fixed: arguments that are not perturbed to estimate rounding errors.
        unknown: for a result's name and truth, a mask of elements that may have any value, also NaN.
        plain: replaces `truth` in the call's own precision, where NaN may spread as it does in `plain`.
        off: for a result's name, the error of the truth itself, added to the budget of float64 calls.
        spreads: whether NaN may spread to elements that do not depend on it.

    Returns:
        The results of the call.
    """
    tensors = named(given)
    leaves = {n: t for n, t in tensors.items() if t.requires_grad}
    upstream = Upstream(s)
    before = memory_of(tensors)
    ours = results(call, given, leaves, upstream)
    again = results(call, given, leaves, upstream)
    assert_unchanged(before, tensors)
    upstream.assert_unchanged()
    for name in ours:
        assert same_bits(ours[name], again[name]), f"{name}: the second call gives other bits"

    if truth is None:
        return ours

    def at(change: Callable[[Tensor], Tensor], truth: Call = truth) -> dict[str, Tensor]:
        seen: dict[int, Tensor] = {}
        moved = changed(given, change, seen)
        return results(truth, moved, {n: seen[id(t)].requires_grad_() for n, t in leaves.items()}, upstream)

    low = at(lambda t: t.detach().clone(memory_format=torch.contiguous_format), plain or truth)
    exact = at(precise)
    assert ours.keys() == exact.keys()
    overflow = s.special not in NOT_FINITE and any(
        (exact[n].isfinite() & ~low[n].isfinite()).any() or (s.special in HUGE and exact[n].isnan().any())
        for n in exact
    )
    near = Perturbations(s, at, terms, {id(t) for n, t in tensors.items() if n in fixed})
    for name, found in ours.items():
        shape, dtype = low[name].shape, low[name].dtype
        assert found.shape == shape and found.dtype == dtype, f"{name}: {found.dtype} {list(found.shape)}"
        if found.is_floating_point():
            known = ~unknown(name, exact[name])
            if overflow:  # after an overflow, implementations differ in which other numbers become inf or NaN
                known = known & found.isfinite() & exact[name].isfinite()
            if spreads:
                known = known & ~(found.isnan() & ~exact[name].isnan())
            more = off(name) if s.dtype == torch.float64 else 0.0
            judge(name, found, low[name], exact[name], near, known, more)
        else:
            assert torch.equal(found, exact[name]), f"{name}: {found} instead of {exact[name]}"
    return ours


class Tanh(torch.autograd.Function):
    """tanh with derivative 1 - y * y of a rounded y: near 1, no rounding of x has the same effect."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y), None


class Perturbations:
    """Samples of the truth for inputs that are perturbed by the size of rounding errors.

    A sum of n products computed in any order is the exact sum of products with at most n rounding errors each
    (Higham 2002, section 3.1), so any result of the truth for such inputs is acceptable. The samples set the
    budget where the reference's own error happens to be small, which is likely for a single number.
    For results in half precision, the perturbation is a few roundings to half precision.
    """

    def __init__(self, s: Source, at: Callable, terms: int, fixed: set[int]):
        self.at, self.terms, self.fixed = at, terms, fixed
        self.generator, self.dtype = s.generator, s.dtype
        self.found: dict[float, list[dict[str, Tensor]]] = {}

    def sample(self, i: int, dtype: torch.dtype) -> dict[str, Tensor]:
        roundings = 4 if dtype in HALVES else self.terms + 4
        amplitude = roundings * torch.finfo(dtype).eps / 2
        samples = self.found.setdefault(amplitude, [])
        if i == len(samples):
            samples.append(self._run(amplitude, 4 * torch.finfo(dtype).eps / 2))
        return samples[i]

    def _run(self, amplitude: float, few: float) -> dict[str, Tensor]:
        global _move

        def move(t: Tensor, size: Tensor | float) -> Tensor:
            signs = torch.randint(0, 2, t.shape, generator=self.generator, dtype=torch.float64) * 2 - 1
            return torch.where(t.isfinite(), t + amplitude * signs * size, t)

        def change(t: Tensor) -> Tensor:
            exact = precise(t)
            return move(exact, exact) if t.is_floating_point() and id(t) not in self.fixed else exact

        def tanh(x: Tensor) -> Tensor:
            y = x.detach().tanh()
            return Tanh.apply(x, move(y, y * (few / amplitude)))

        _move = move
        try:
            with mock.patch("torch.tanh", tanh):  # the softcap in the reference
                return self.at(change)
        finally:
            _move = None


def judge(
    name: str, ours: Tensor, low: Tensor, exact: Tensor, near: Perturbations, known: Tensor, off: float
) -> None:
    """Asserts that one result is correct; `low` is the truth computed in the call's own precision."""
    dtype = ours.dtype
    roundings_of = (
        near.dtype if name.startswith("grad") else dtype
    )  # gradients are computed from numbers of the input dtype
    ours, low = ours.double(), low.double()
    lost = known & exact.isnan() & ~ours.isnan()
    assert not lost.any(), f"{name}: {ours[lost][0]} where the truth is NaN"
    lost = known & exact.isinf() & ours.isfinite()
    assert not lost.any(), f"{name}: {ours[lost][0]} where the truth is {exact[lost][0]}"
    lost = known & (exact == -torch.inf) & (low == -torch.inf) & (ours != -torch.inf)
    lost = lost & (not name.startswith("grad"))  # a gradient's sum may contain 0 * inf
    assert not lost.any(), f"{name}: {ours[lost][0]} where the truth is -inf"
    known = known & exact.isfinite() & low.isfinite()
    lost = known & ~ours.isfinite()
    assert not lost.any(), f"{name}: {ours[lost][0]} where the truth is {exact[lost][0]}"
    for group in (known & (exact.abs() <= LARGE), known & (exact.abs() > LARGE)):
        error, worst = distance(ours[group], exact[group]), distance(low[group], exact[group])
        floor = 4 * torch.finfo(dtype).eps * max(1.0, finite_max(exact[group]))
        floor, i = floor + off, 0
        while error > 2 * worst + floor and i < SAMPLES:
            moved = distance(near.sample(i, roundings_of)[name][group], exact[group])
            worst, i = max(worst, math.inf if math.isnan(moved) else moved), i + 1
        assert error <= 2 * worst + floor, f"{name}: error {error:.3g} over budget {2 * worst + floor:.3g}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(t.view(BITS[t.element_size()]) for t in (a, b)))


def assert_unchanged(before: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    after = memory_of(tensors)
    for name in before:
        assert torch.equal(before[name], after[name]), f"{name}: the call changed its argument"
