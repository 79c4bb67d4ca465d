"""Cases of the CUDA tests: every operation of `python -m sukhops check`, and shapes large enough for a GPU.

Operations that are not in this build are left out and listed in `MISSING`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

import sukhops
from sukhops import reference
from sukhops.__main__ import OPS
from sukhops.ops.vocab_head import TokenStats

GROUPS = ("vocab_head", "director", "adaptive_span", "segmentation")


class Case(NamedTuple):
    op: str  # the group, selected with pytest -k
    name: str
    call: Callable
    reference: Callable
    inputs: Callable[[], dict]  # on the CPU; gradients are compared for tensors with requires_grad
    small: bool = True


def group(name: str, operators: list[str]) -> str:
    """The group of an operation: "preference" for losses on a vocabulary head, else the operator's file."""
    return "preference" if name.endswith("Loss") else next(g for g in GROUPS if operators[0].startswith(g))


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape)).requires_grad_()


def head_blocks() -> dict:
    """A vocabulary of prime size that spans several blocks; two targets per row."""
    target = torch.randint(0, 100_003, (700, 2))
    target[::4] = -100
    target[1, 0] = -100
    return {"hidden": normal(700, 64), "weight": normal(100_003, 64, scale=0.2), "target": target,
            "bias": normal(100_003)}  # fmt: skip


def stats_blocks() -> dict:
    given = head_blocks()
    return given | {"target": given["target"][:, 0]}


def frozen_blocks() -> dict:
    given = head_blocks()
    return given | {n: given[n].detach() for n in ("weight", "bias")}


def director_blocks() -> dict:
    """More rows than one block has, two classifiers, gamma per row."""
    return {"hidden": normal(70, 96), "lm_weight": normal(50_001, 96, scale=0.2),
            "one": normal(50_001, 96, scale=0.2), "two": normal(50_001, 96, scale=0.2),
            "gamma": (2 * torch.rand(70)).requires_grad_()}  # fmt: skip


def two_attributes(op: Callable) -> Callable:
    def call(hidden, lm_weight, one, two, gamma):
        return op(hidden, lm_weight, [one, two], gamma=[gamma, 0.5])

    return call


def attention(
    heads: int, kv_heads: int, length: int, width: int, *, queries: int | None = None, **more
) -> Callable[[], dict]:
    def inputs() -> dict:
        size = {"q": (heads, queries or length), "k": (kv_heads, length), "v": (kv_heads, length)}
        given = {n: normal(2, *s, width) for n, s in size.items()}
        span = (torch.rand(heads) * length / 2 + 0.25).requires_grad_()
        return given | {"span": span} | {n: f() for n, f in more.items()}

    return inputs


def spans(op: Callable, **options) -> Callable:
    """Keeps spans in float32 or float64 if the other inputs are in half precision."""

    def call(q, k, v, span, **given):
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        return op(q, k, v, span.to(exact), **given, **options)

    return call


def segments(batch: int, length: int, longest: int) -> Callable[[], dict]:
    def inputs() -> dict:
        scores = torch.randn(batch, length, longest) - 1.0
        scores[torch.rand(scores.shape) < 0.2] = float("-inf")
        scores[..., 0] = scores[..., 0].clamp(min=-5.0)  # keep all segments of length 1
        ends = torch.linspace(length, length // 2, batch).long()
        return {"scores": scores.requires_grad_(), "lengths": ends}

    return inputs


# function of sukhops, group, name, wrapper of the function, inputs, small
CONTRACT = [
    ("linear_logp", "vocab_head", "blocks",
     lambda f: lambda **g: f(**g, softcap=6.0, scale=1.3, return_lse=True), head_blocks, False),
    ("linear_logp", "vocab_head", "frozen blocks", lambda f: f, frozen_blocks, False),
    ("linear_token_stats", "vocab_head", "every number",
     lambda f: lambda **g: f(**g, temperature=1.7, outputs=TokenStats._fields), stats_blocks, False),
    ("director_logp", "director", "blocks", two_attributes, director_blocks, False),
    ("adaptive_span_attention", "adaptive_span", "rel_pos and padding", spans,
     attention(3, 3, 70, 24, rel_pos=lambda: normal(70, 24), key_start=lambda: torch.tensor([0, 9])), True),
    ("adaptive_span_attention", "adaptive_span", "grouped, 80 wide", spans, attention(4, 2, 300, 80), False),
    ("adaptive_span_attention", "adaptive_span", "preallocated cache", spans,
     attention(3, 3, 79, 24, queries=70, query_start=lambda: torch.tensor([0, 9])), True),
    ("adaptive_span_attention", "adaptive_span", "long",
     lambda f: spans(f, max_span=1500), attention(8, 8, 3000, 64), False),
    ("adaptive_span_attention", "adaptive_span", "hard window",
     lambda f: spans(f, ramp=1.0, max_span=64), attention(2, 2, 200, 64), True),
    ("segmentation_logz", "segmentation", "ragged", lambda f: f, segments(4, 37, 5), True),
    ("segmentation_marginals", "segmentation", "ragged marginals", lambda f: f, segments(4, 37, 5), True),
    ("segmentation_entropy", "segmentation", "ragged entropy", lambda f: f, segments(4, 37, 5), True),
    ("segmentation_logz", "segmentation", "long", lambda f: f, segments(40, 5000, 16), False),
    ("segmentation_logz", "segmentation", "in chunks", lambda f: f, segments(2, 1000, 4), True),
]  # fmt: skip

MISSING = sorted({function for function, *_ in CONTRACT if not hasattr(sukhops, function)})
CASES = [
    Case(group(name, operators), name, call, plain, inputs) for name, operators, call, plain, inputs in OPS
] + [
    Case(op, f"{function} {name}", *(make(getattr(m, function)) for m in (sukhops, reference)), inputs, small)
    for function, op, name, make, inputs, small in CONTRACT
    if function not in MISSING
]  # fmt: skip


def on(device: str, inputs: dict) -> dict:
    return {
        n: t.detach().to(device).requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t
        for n, t in inputs.items()
    }


class Large(NamedTuple):
    """Inputs of more than 2^31 elements; results of the last rows are compared with a call on those alone."""

    op: str
    function: str
    gigabytes: float  # device memory that the case needs
    make: Callable[[], dict]  # on the device
    rows: Callable[[dict], dict]  # selects the last rows


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0, scale)


def tail(*names: str) -> Callable[[dict], dict]:
    return lambda given: {n: t[-2:] if n in names else t for n, t in given.items()}


# one tensor has slightly more than 2^31 elements: hidden, weight, Director's scores, k and v, segments
LARGE = [
    Large("vocab_head", "linear_logp", 20,
          lambda: {"hidden": random(530_000, 4096), "weight": random(1000, 4096, scale=0.02),
                   "target": torch.randint(0, 1000, (530_000,), device="cuda")},
          tail("hidden", "target")),
    Large("vocab_head", "linear_logp", 20,
          lambda: {"hidden": random(64, 4096), "weight": random(530_000, 4096, scale=0.02),
                   "target": 530_000 - torch.arange(1, 65, device="cuda")},
          tail("hidden", "target")),
    Large("director", "director_logp", 30,
          lambda: {"hidden": random(16_800, 64), "lm_weight": random(128_256, 64, scale=0.2),
                   "cls_weight": random(128_256, 64, scale=0.2)},
          tail("hidden")),
    Large("adaptive_span", "adaptive_span_attention", 60,
          lambda: {n: random(260, 16, 8192, 64) for n in "qkv"}
          | {"span": torch.full((16,), 60.5, device="cuda")},
          tail("q", "k", "v")),
    Large("segmentation", "segmentation_logz", 60,
          lambda: {"scores": random(16_500, 8192, 16)}, tail("scores")),
]  # fmt: skip
