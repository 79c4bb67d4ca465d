"""How many bytes of logits a call may keep for its backward."""

_nbytes = 64 << 20


def set_logits_budget(nbytes: int) -> int:
    """Sets how many bytes of logits one call on a vocabulary head may keep for its backward.

    The forward keeps the logits of as many rows, each [V], as fit, in float32 (float64 for float64 inputs).
    Their backward takes two matrix products instead of three; the logits of other rows are computed again.
    Gradients are the same to rounding. Only what a call needs is kept, until its graph is freed; without
    gradient, or where weight and bias are frozen, nothing is. The budget is read when the forward runs; under
    `torch.compile` it is read when the call is traced, and a change traces it again.

    Args:
        nbytes: >= 0, for this process; the default is 64 MiB. 0 keeps nothing.

    Returns:
        The budget before.

    Raises:
        TypeError, ValueError: nbytes is no int, or negative.

    Source: the trade of memory for time of activation checkpointing (Chen et al. 2016), row by row.
    """
    global _nbytes
    if not isinstance(nbytes, int) or isinstance(nbytes, bool):
        raise TypeError(f"nbytes: expected an int, got {type(nbytes).__name__}")
    if nbytes < 0:
        raise ValueError(f"nbytes: expected >= 0, got {nbytes}")
    before, _nbytes = _nbytes, nbytes
    return before


def get_logits_budget() -> int:
    """The budget that `set_logits_budget` sets, in bytes."""
    return _nbytes
