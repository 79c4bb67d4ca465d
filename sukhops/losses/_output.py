"""Return type of all losses, and the average over items."""

import math
from typing import NamedTuple

from torch import Tensor


class LossOutput(NamedTuple):
    """A loss and its metrics by name."""

    loss: Tensor  # [], differentiable
    metrics: dict[str, Tensor]  # [] each, detached


def indicator(condition: Tensor, *values: Tensor) -> Tensor:
    """1 where condition is True, else 0, but NaN where one of `values` is NaN; of the dtype of values."""
    found = condition.to(values[0].dtype)
    for value in values:
        found = found.masked_fill(value.isnan(), math.nan)
    return found


def average(total: Tensor, counted: Tensor | int, num_items: int | Tensor | None) -> Tensor:
    """Divides `total` by `num_items`, or by `counted` if num_items is None; 0 / 0 is 0.

    Args:
        total: [] or [B], sum of losses.
        counted: number of items in this call, a number or a tensor that broadcasts to total.
        num_items: a number > 0, a 0-dim tensor, or None.

    Returns:
        The quotient, shaped as total.

    Raises:
        TypeError, ValueError: num_items is not as above.
    """
    if num_items is None:
        return total / (counted.clamp(min=1) if isinstance(counted, Tensor) else max(counted, 1))
    if isinstance(num_items, Tensor):
        if num_items.dim() or num_items.is_complex():
            raise ValueError(f"num_items: expected a number or a 0-dim tensor, got {list(num_items.shape)}")
        return total / num_items.to(total)
    if isinstance(num_items, bool) or not isinstance(num_items, int | float):
        raise TypeError(f"num_items: expected a number or a 0-dim tensor, got {type(num_items).__name__}")
    if not 0 < num_items < math.inf:
        raise ValueError(f"num_items: expected a finite number > 0, got {num_items!r}")
    return total / num_items
