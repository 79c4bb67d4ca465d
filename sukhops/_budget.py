"""Memory budget for the logits that a call keeps from its forward pass for its backward pass."""

import sys

import torch
from torch import Tensor

_nbytes = 64 << 20


def set_logits_budget(nbytes: int) -> int:
    """Sets how many bytes of logits one call on a vocabulary head may keep for its backward pass.

    The forward pass keeps the logits [V] of as many token rows as fit into the budget, in float32 (float64
    for float64 inputs). For these rows the backward pass takes two matrix products instead of three; for all
    other rows it computes the logits again. Gradients are equal up to rounding. A call keeps at most the
    logits of its own rows, until its autograd graph is freed. It keeps none if no gradient is needed, or if
    weight and bias are frozen. The norm of Director's classifier keeps up to a quarter of the budget beside
    the logits of the language model. The budget is read in the forward pass. Under `torch.compile` it is read
    when the call is traced, and a change of the budget causes a new trace.

    Args:
        nbytes: the budget of this process in bytes, >= 0. The default is 64 MiB; 0 keeps no logits.

    Returns:
        The previous budget in bytes.

    Raises:
        TypeError: nbytes is not an int.
        ValueError: nbytes is negative.

    Source: activation checkpointing (Chen et al. 2016), which trades memory for time, applied row by row.
    """
    global _nbytes
    if not isinstance(nbytes, int) or isinstance(nbytes, bool):
        raise TypeError(f"nbytes: expected an int, got {type(nbytes).__name__}")
    if nbytes < 0:
        raise ValueError(f"nbytes: expected >= 0, got {nbytes}")
    before, _nbytes = _nbytes, nbytes
    return before


def get_logits_budget() -> int:
    """Returns the budget that `set_logits_budget` sets, in bytes."""
    return _nbytes


def budget_of_call(weight: Tensor, bias: Tensor | None) -> int:
    """The budget of a call on a head in bytes, at most the largest int64: 0 if the head gets no gradient."""
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    return min(_nbytes, sys.maxsize) if learns and torch.is_grad_enabled() else 0
