"""Compares operators with their references. Errors are held to budgets from the data, not to tolerances.

The exact result is the reference in float64 on the same rounded inputs. The error of an operator may be twice
the error of the reference in the operator's own dtype, plus four roundings in the dtype of the result.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Comparison(NamedTuple):
    """The error of one output or gradient, and the error that is allowed."""

    name: str  # of an output, or "grad of <input>"
    error: float  # largest absolute difference from the exact result
    budget: float  # largest allowed error

    @property
    def ok(self) -> bool:
        return self.error <= self.budget  # False for NaN


_comparing = False


@contextmanager
def compared_ranks() -> Iterator[None]:
    """Inside this context, calls with a group check that hidden and targets are equal on all ranks.

    If they differ, every rank raises a ValueError. Each call then reads these tensors once more. Enter the
    context on all ranks.
    """
    global _comparing
    before, _comparing = _comparing, True
    try:
        yield
    finally:
        _comparing = before


def ranks_are_compared() -> bool:
    """Whether `compared_ranks` is active."""
    return _comparing


def budget(result: Tensor, low: Tensor, exact: Tensor) -> float:
    """Largest allowed error: `2 * err(low) + 4 * eps(result.dtype) * max(1, max|exact|)`.

    `low` is the result of the reference in the operator's dtype. All three tensors have the same shape.
    """
    eps = torch.finfo(result.dtype).eps
    return 2 * distance(low, exact) + 4 * eps * max(1.0, finite_max(exact))


def distance(result: Tensor, exact: Tensor) -> float:
    """Largest absolute difference of two tensors of one shape; equal infinities, or two NaN, differ by 0."""
    result, exact = result.detach().double(), exact.detach().double()
    difference = torch.where(result == exact, 0.0, (result - exact).abs())
    difference = torch.where(result.isnan() & exact.isnan(), 0.0, difference)
    return difference.max().item() if difference.numel() else 0.0


def finite_max(t: Tensor) -> float:
    """Largest absolute value of the finite elements; 0 if there are none."""
    t = t.detach()[torch.isfinite(t.detach())]
    return t.abs().max().item() if t.numel() else 0.0


def compare(
    op: Callable, reference: Callable, inputs: dict[str, Any], dtype: torch.dtype, seed: int = 0
) -> list[Comparison]:
    """Runs `op` and `reference` on `inputs` in `dtype`, and compares both with the reference in float64.

    Floating-point tensors of `inputs` are rounded to `dtype`. Inputs that require a gradient get one, from
    random upstream gradients of all differentiable outputs. Integer outputs (indices, for example) are not
    compared.

    Args:
        op, reference: functions with the same keyword arguments; they return a tensor or a named tuple.
        inputs: their arguments by name.
        dtype: of the floating-point inputs of `op`.
        seed: of the upstream gradients.

    Returns:
        One `Comparison` per floating-point output and per gradient.
    """
    rounded = {
        name: t.detach().to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t
        for name, t in inputs.items()
    }
    wanted = [n for n, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad]

    def run(f: Callable, dtype: torch.dtype) -> dict[str, Tensor]:
        given = {
            name: t.to(dtype, copy=True) if isinstance(t, Tensor) and t.is_floating_point() else t
            for name, t in rounded.items()
        }
        for name in wanted:
            given[name].requires_grad_()
        out = f(**given)
        named = out._asdict() if hasattr(out, "_asdict") else {"result": out}
        named = {n: t for n, t in named.items() if t is not None and t.is_floating_point()}
        generator = torch.Generator().manual_seed(seed)
        upstream = {
            n: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for n, t in named.items()
        }
        differentiable = [n for n, t in named.items() if t.requires_grad]
        if wanted and differentiable:
            grads = torch.autograd.grad(
                [named[n] for n in differentiable],
                [given[n] for n in wanted],
                [upstream[n] for n in differentiable],
                allow_unused=True,
            )
            for n, g in zip(wanted, grads, strict=True):
                named[f"grad of {n}"] = torch.zeros_like(given[n]) if g is None else g
        return {n: t.detach() for n, t in named.items()}

    ours, low, exact = run(op, dtype), run(reference, dtype), run(reference, torch.float64)
    return [Comparison(n, distance(ours[n], exact[n]), budget(ours[n], low[n], exact[n])) for n in ours]


def assert_close(
    op: Callable, reference: Callable, inputs: dict[str, Any], dtype: torch.dtype, seed: int = 0
) -> None:
    """Calls `compare`, and raises an AssertionError that lists every result over its error budget."""
    rows = compare(op, reference, inputs, dtype, seed)
    bad = [f"{r.name}: error {r.error:.3g} over budget {r.budget:.3g}" for r in rows if not r.ok]
    assert not bad, f"{getattr(op, '__name__', op)} in {dtype}: " + "; ".join(bad)
