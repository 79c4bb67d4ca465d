"""What every loss returns."""

from typing import NamedTuple

from torch import Tensor


class LossOutput(NamedTuple):
    loss: Tensor  # a scalar to differentiate
    metrics: dict[str, Tensor]  # detached
