"""Inputs of a fuzz case: choices that hypothesis can shrink, and tensors of any layout from one seed."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from budgets import logits_budget
from hypothesis import strategies as st
from torch import Tensor

from sukhops._checks import accumulation_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EDGES = (
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    32,
    33,
    47,
    63,
    64,
    65,
    127,
    128,
    129,
    255,
    256,
    257,
)  # sizes around those of tiles and vectors
LAYOUTS = ("plain", "offset", "steps", "rows apart", "transposed", "padded", "flipped")
HUGE = ("huge", "negative huge", "root of huge")
SPECIALS = ("nan", "inf", "-inf", "denormal", *HUGE)
OWN_ISA = torch.ops.sukhops.cpu_capability().replace(" + bfloat16 products", "_bf16")


class Source:
    """The choices of one case. All numbers come from one seed, so a short list describes a failing case."""

    def __init__(self, data, special: bool = True):
        self.data = data
        self.generator = torch.Generator().manual_seed(self.integer("seed", 0, 2**31))
        # float64 less often, because it is compared less strictly
        self.dtype = self.pick("dtype", *DTYPES[:3], *DTYPES)
        self.acc = accumulation_dtype(self.dtype)
        self.special = self.pick("special value", *[None] * 9, *SPECIALS) if special else None
        self.bad = False  # whether the call must raise an error

    def pick(self, label: str, *values):
        return self.data.draw(st.sampled_from(values), label)

    def flag(self, label: str) -> bool:
        return self.pick(label, False, True)

    def integer(self, label: str, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high), label)

    def size(self, label: str, most: int, least: int = 0) -> int:
        """A size, often small, sometimes near a multiple of a tile or vector."""
        edges = [e for e in EDGES if least <= e <= most]
        sizes = st.integers(least, max(least, min(most, 4))) | st.integers(least, most)
        return self.data.draw(sizes | st.sampled_from(edges) if edges else sizes, label)

    def rows(self, most: int = 70) -> tuple[int, ...]:
        kind = self.pick("rows", "one axis", "one axis", "none", "two axes")
        if kind == "none":
            return ()
        if kind == "two axes":
            return self.size("rows[0]", 8), self.size("rows[1]", 8)
        return (self.size("rows", most),)

    # -------------------------------------------------------------- tensors

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator)

    def tensor(self, label: str, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor in any layout: normal numbers, many equal numbers or zeros; sometimes special values."""
        kind = self.pick(f"{label}: values", "normal", "normal", "normal", "ties", "zero", "equal rows")
        t = scale * self.normal(*shape)
        if kind == "ties":
            t = t.round()
        if kind == "zero":
            t = torch.zeros_like(t)
        t = t.to(dtype or self.dtype)
        if self.special and t.numel() and self.flag(f"{label}: special"):
            for _ in range(self.integer(f"{label}: special values", 1, 3)):
                index = self.whole(0, t.numel(), 1).item()
                t.view(-1)[index] = special_value(self.special, t.dtype)
        t = self.laid_out(label, t)
        if kind == "equal rows" and t.dim() and t.shape[0]:
            t = t[:1].expand(t.shape)
        return t

    def laid_out(self, label: str, t: Tensor) -> Tensor:
        return laid_out(t, self.pick(f"{label}: layout", *LAYOUTS))

    def integers(self, label: str, t: Tensor) -> Tensor:
        return self.laid_out(label, t.to(self.pick(f"{label}: dtype", torch.int64, torch.int32)))

    def target(self, shape: tuple[int, ...], v: int, ignore: int = -100, label: str = "target") -> Tensor:
        """Targets of which none, some or all are ignored; sometimes one is invalid and must raise."""
        t = self.whole(0, v, *shape)
        share = self.pick(f"{label}: ignored", 0.3, 0.0, 1.0)
        t[self.uniform(*shape) < share] = ignore
        wrong = self.pick(f"{label}: wrong", *[None] * 12, -1, -(2**31), v, 2**31 - 1)
        if wrong is not None and t.numel() and wrong != ignore:
            t.view(-1)[self.whole(0, t.numel(), 1).item()] = wrong
            self.bad = True
        return self.integers(label, t)

    def with_gradients(self, given: dict[str, object], never: tuple[str, ...] = ()) -> dict[str, object]:
        """Sets requires_grad of a random subset of the floating-point tensors."""
        floats = [
            t for n, t in named(given).items() if t.is_floating_point() and n.split("[")[0] not in never
        ]
        chosen = self.integer("gradients", 0, 2 ** len(floats) - 1)
        for i, t in enumerate(floats):
            t.requires_grad_(bool(chosen >> i & 1))
        return given


def special_value(name: str, dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    huge = info.max / 1024  # small enough for sums of up to 300 of them
    return {
        "denormal": info.smallest_normal / 4,
        "huge": huge,
        "negative huge": -huge,
        "root of huge": math.sqrt(info.max),
    }.get(name) or float(name)


def laid_out(t: Tensor, kind: str) -> Tensor:
    """A copy of t in another memory layout; gaps contain NaN or invalid targets."""
    shape = t.shape
    fill = torch.nan if t.is_floating_point() else True if t.dtype == torch.bool else 10**6 + 7

    def memory(*size: int) -> Tensor:
        return torch.full(size, fill, dtype=t.dtype)

    if kind == "plain" or (t.dim() == 0 and kind != "offset"):
        return t.clone()
    if kind == "flipped":
        return t.flip(-1).clone().flip(-1)
    if kind == "offset":
        view = memory(t.numel() + 3)[3:].view(shape)
    elif kind == "steps":
        view = memory(*shape[:-1], 2 * shape[-1] + 1)[..., 1::2]
    elif kind == "rows apart":
        view = memory(3 * shape[0], *shape[1:])[::3]
    elif kind == "transposed":
        view = memory(*reversed(shape)).permute(*reversed(range(t.dim())))
    else:
        view = memory(*shape[:-1], shape[-1] + 5)[..., 2:-3]
    return view.copy_(t)


def named(given: object, name: str = "") -> dict[str, Tensor]:
    """Every distinct tensor among the arguments, by name; elements of a list are name[i]."""
    found: dict[str, Tensor] = {}
    if isinstance(given, Tensor):
        found[name] = given
    elif isinstance(given, dict):
        for key, value in given.items():
            found |= named(value, key)
    elif isinstance(given, list | tuple):
        for i, value in enumerate(given):
            found |= named(value, f"{name}[{i}]")
    distinct = {id(t): n for n, t in reversed(found.items())}
    return {n: t for n, t in found.items() if distinct[id(t)] == n}


def changed(given: object, change: Callable[[Tensor], Tensor], seen: dict[int, Tensor]) -> object:
    """The arguments with `change` applied once to each distinct tensor; `seen` maps ids to new tensors."""
    if isinstance(given, Tensor):
        if id(given) not in seen:
            seen[id(given)] = change(given)
        return seen[id(given)]
    if isinstance(given, dict):
        return {key: changed(value, change, seen) for key, value in given.items()}
    if isinstance(given, list | tuple):
        return type(given)(changed(value, change, seen) for value in given)
    return given


def precise(t: Tensor | None) -> Tensor | None:
    return t.detach().double() if t is not None and t.is_floating_point() else t


def memory_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the whole storage of each tensor, including gaps."""
    return {
        n: torch.empty(0, dtype=torch.uint8).set_(t.detach().untyped_storage()).clone()
        for n, t in tensors.items()
    }


@contextlib.contextmanager
def surroundings(s: Source, row_bytes: int = 0) -> Iterator[None]:
    """Sets the number of threads, the instruction set and the logits budget during a case."""
    budgets = (None, 0, 2 * row_bytes + 3) if row_bytes else (None,)
    threads, isa = s.pick("threads", 1, 2), s.pick("isa", *reversed(torch.ops.sukhops.cpu_isas()))
    budget = s.pick("logits budget", *budgets)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.ops.sukhops.use_cpu_isa(isa)
    try:
        with contextlib.nullcontext() if budget is None else logits_budget(budget):
            yield
    finally:
        torch.set_num_threads(before)
        torch.ops.sukhops.use_cpu_isa(OWN_ISA)


def must_raise(s: Source, error: type[Exception], call: Callable, given: dict[str, object]) -> None:
    """Asserts that the call raises this error and does not change its arguments."""
    tensors = named(given)
    before = memory_of(tensors)
    try:
        call(**given)
    except error:
        after = memory_of(tensors)
        assert all(torch.equal(before[n], after[n]) for n in before), "the call changed an argument"
    else:
        raise AssertionError(f"expected {error.__name__}")
