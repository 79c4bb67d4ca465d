"""What every loss returns, and what its average divides by."""

import math
from typing import NamedTuple

from torch import Tensor


class LossOutput(NamedTuple):
    loss: Tensor  # a scalar to differentiate
    metrics: dict[str, Tensor]  # detached


def average(total: Tensor, counted: Tensor | int, num_items: int | Tensor | None) -> Tensor:
    """`total` over `num_items`, or where that is None over what was counted; 0 / 0 is 0."""
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
