"""How far a result may be from the truth: budgets derived from the data, not tolerances.

The truth is the reference in float64 on the same rounded inputs. An operator may be off by twice what
the reference is off in the operator's own precision, plus four roundings of the result's dtype.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Comparison(NamedTuple):
    name: str  # of the output, or "grad of" an input
    error: float  # largest distance from the truth
    budget: float

    @property
    def ok(self) -> bool:
        return self.error <= self.budget  # False for NaN


_comparing = False


@contextmanager
def compared_ranks() -> Iterator[None]:
    """Within it, calls with a group also check that hidden and targets have the same values on all ranks.

    Where they have not, every rank raises. It costs a pass over them; enter it on all ranks.
    """
    global _comparing
    before, _comparing = _comparing, True
    try:
        yield
    finally:
        _comparing = before


def ranks_are_compared() -> bool:
    return _comparing


def budget(result: Tensor, low: Tensor, exact: Tensor) -> float:
    """`2 * err(low) + 4 * eps(result.dtype) * max(1, max|exact|)`; `low` is the reference's result."""
    eps = torch.finfo(result.dtype).eps
    return 2 * distance(low, exact) + 4 * eps * max(1.0, finite_max(exact))


def distance(result: Tensor, exact: Tensor) -> float:
    """The largest absolute difference; equal infinities and NaN at the same places count 0."""
    result, exact = result.detach().double(), exact.detach().double()
    difference = torch.where(result == exact, 0.0, (result - exact).abs())
    difference = torch.where(result.isnan() & exact.isnan(), 0.0, difference)
    return difference.max().item() if difference.numel() else 0.0


def finite_max(t: Tensor) -> float:
    t = t.detach()[torch.isfinite(t.detach())]
    return t.abs().max().item() if t.numel() else 0.0


def compare(
    op: Callable, reference: Callable, inputs: dict[str, Any], dtype: torch.dtype, seed: int = 0
) -> list[Comparison]:
    """Runs `op` and `reference` on `inputs` in `dtype`, and the reference in float64 as the truth.

    Floating tensors of `inputs` are rounded to `dtype`; those that require a gradient get one, from a
    random upstream gradient of every differentiable output. Results without a gradient that are
    integers (indices, say) are not compared.
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
        paths = [n for n, t in named.items() if t.requires_grad]
        if wanted and paths:
            grads = torch.autograd.grad(
                [named[n] for n in paths],
                [given[n] for n in wanted],
                [upstream[n] for n in paths],
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
    """`compare`, raising an AssertionError that lists every result over its budget."""
    rows = compare(op, reference, inputs, dtype, seed)
    bad = [f"{r.name}: error {r.error:.3g} over budget {r.budget:.3g}" for r in rows if not r.ok]
    assert not bad, f"{getattr(op, '__name__', op)} in {dtype}: " + "; ".join(bad)
