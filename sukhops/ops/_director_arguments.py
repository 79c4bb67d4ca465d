"""Checks of the arguments of Director's functions, and their form as arguments of the operators."""

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sukhops import _checks

# the operator's arguments: hidden, lm_weight, cls_weight, gamma, lm_bias, cls_bias, affine
Arguments = tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor | None, list[Tensor | None], Tensor | None]


def as_list(value: object) -> list:
    """A list or tuple as a list; any other value as a list of one."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def checked_director(
    hidden: Tensor, lm_weight: Tensor, cls_weight: Tensor | list[Tensor] | None, gamma: float | Tensor | list,
    lm_bias: Tensor | None, cls_bias: Tensor | list | None, cls_affine: tuple | None,
    group: ProcessGroup | None,
) -> tuple[Arguments, torch.Size]:  # fmt: skip
    """Checks the arguments; returns those of the operator, and the leading axes of hidden."""
    if (cls_weight is None) == (cls_affine is None):
        got = "both" if cls_affine is not None else "neither"
        raise ValueError(f"cls_affine: expected exactly one of cls_weight and cls_affine, got {got}")
    weights = [] if cls_weight is None else as_list(cls_weight)
    if cls_weight is not None and not weights:
        raise ValueError("cls_weight: expected at least one classifier, got an empty list")
    if cls_affine is not None and cls_bias is not None:
        raise ValueError("cls_bias: expected None with cls_affine, whose b is the bias, got a bias")
    biases = [None] * len(weights) if cls_bias is None else as_list(cls_bias)
    if len(biases) != len(weights):
        raise ValueError(f"cls_bias: expected {len(weights)}, one per cls_weight, got {len(biases)}")
    several = isinstance(cls_weight, (list, tuple))
    names = [f"cls_weight[{i}]" if several else "cls_weight" for i in range(len(weights))]
    bias_names = [f"cls_bias[{i}]" if several else "cls_bias" for i in range(len(weights))]
    named = dict(zip((*names, *bias_names), (*weights, *biases), strict=True))
    hidden, lm_weight, lm_bias, *rest = _checks.as_floats(
        hidden=hidden, lm_weight=lm_weight, lm_bias=lm_bias, **named
    )
    weights, biases = rest[: len(weights)], rest[len(weights) :]
    v = _checks.check_weight("lm_weight", hidden, lm_weight, lm_bias, "lm_bias", group)
    for name, weight, bias_name, bias in zip(names, weights, bias_names, biases, strict=True):
        _checks.check_shape(name, weight, tuple(lm_weight.shape), "[V, D] as lm_weight")
        if bias is not None:
            _checks.check_shape(bias_name, bias, (v,), "[V]")
    rows = hidden.shape[:-1]
    strengths = _gamma(gamma, max(1, len(weights)), rows, hidden)
    affine = None if cls_affine is None else affine_pair(cls_affine, hidden)
    flat = hidden.reshape(math.prod(rows), hidden.shape[-1])
    if group is None:  # the operator takes a list without None: an empty tensor stands for "no bias"
        biases = [hidden.new_empty(0) if b is None else b for b in biases]
    return (flat, lm_weight, weights, strengths, lm_bias, biases, affine), rows


def _gamma(gamma: object, count: int, rows: torch.Size, hidden: Tensor) -> Tensor:
    """gamma as a tensor [count, N] in the accumulation dtype."""
    given = list(gamma) if isinstance(gamma, (list, tuple)) else [gamma] * count
    if len(given) != count:
        raise ValueError(
            f"gamma: expected a number, a tensor, or a list of {count}, one per classifier, got {len(given)}"
        )
    dtype = _checks.accumulation_dtype(hidden.dtype)
    n, out = math.prod(rows), []
    for g in given:
        if isinstance(g, Tensor):
            _checks.check_device("hidden", hidden, "gamma", g)
            _checks.check_reverse_mode("gamma", g)
            try:
                g = g.to(dtype).expand(rows)
            except RuntimeError:
                raise ValueError(
                    f"gamma: expected a tensor that broadcasts to {list(rows)} (the rows of hidden), "
                    f"got {list(g.shape)}"
                ) from None
            out.append(g.reshape(n))
        elif isinstance(g, (int, float)) and 0 <= g < float("inf"):
            out.append(torch.full((), g, dtype=dtype, device=hidden.device).expand(n))
        else:
            raise ValueError(f"gamma: expected a finite number >= 0 or a tensor of these, got {g!r}")
    return out[0].unsqueeze(0) if count == 1 else torch.stack(out)


def affine_pair(affine: object, hidden: Tensor) -> Tensor:
    """(a, b) as a tensor [2] in the accumulation dtype."""
    if isinstance(affine, Tensor):
        affine = affine.unbind() if affine.shape == (2,) else ()
    if not isinstance(affine, (tuple, list)) or len(affine) != 2:
        raise ValueError(f"cls_affine: expected (a, b), two numbers or scalar tensors, got {affine!r}")
    dtype, pair = _checks.accumulation_dtype(hidden.dtype), []
    for x in affine:
        if isinstance(x, Tensor):
            if x.numel() != 1:
                raise ValueError(f"cls_affine: expected scalars, got shape {list(x.shape)}")
            _checks.check_device("hidden", hidden, "cls_affine", x)
            _checks.check_reverse_mode("cls_affine", x)
            pair.append(x.to(dtype).reshape(()))
        elif isinstance(x, (int, float)):
            pair.append(torch.full((), x, dtype=dtype, device=hidden.device))
        else:
            raise TypeError(f"cls_affine: expected numbers or scalar tensors, got {type(x).__name__}")
    return torch.stack(pair)


def checked_classifier(
    hidden: Tensor, weight: Tensor, target: Tensor, label: Tensor, bias: Tensor | None,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, torch.Size]:  # fmt: skip
    """Checks arguments; returns hidden [N, D], weight, bias, target and label [N], and the leading axes."""
    hidden, weight, bias = _checks.as_floats(hidden=hidden, weight=weight, bias=bias)
    _checks.check_weight("weight", hidden, weight, bias, "bias", group)
    rows = hidden.shape[:-1]
    for name, t in (("target", target), ("label", label)):
        _checks.check_integers(name, t)
        _checks.check_device("hidden", hidden, name, t)
        _checks.check_shape(name, t, tuple(rows), "one per row of hidden")
    n = math.prod(rows)
    flat = hidden.reshape(n, hidden.shape[-1])
    return flat, weight, bias, target.reshape(n).long(), label.reshape(n).long(), rows
