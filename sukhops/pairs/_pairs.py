"""What the functions that choose pairs return, and their checks."""

import enum
import math
from typing import NamedTuple

import torch
from torch import Tensor

from sukhops import _checks


class Reason(enum.IntEnum):
    """Which rule chose a pair, or dropped it."""

    SCORE = 0  # kept: nothing else has the best score, nor the worst
    LENGTH = 1  # kept: length decided among several that are good or bad enough
    ORDER = 2  # kept: two equal in score and length; the first of them was taken
    UNSCORED = 3  # dropped: fewer than two have a score
    EQUAL = 4  # dropped: all have the same score
    TOO_LONG = 5  # dropped: the chosen one is longer than max_length


class Pairs(NamedTuple):
    """One pair per prompt, each [P]. All indices are in range; where keep is False they are no pair."""

    chosen: Tensor  # int64: index of the chosen one
    rejected: Tensor  # int64
    keep: Tensor  # bool
    reason: Tensor  # int64: a Reason

    def columns(self) -> dict[str, list]:
        """Plain lists, a row per prompt, for `datasets.Dataset.from_dict` or `pandas.DataFrame`."""
        return {
            "chosen": self.chosen.tolist(),
            "rejected": self.rejected.tolist(),
            "keep": self.keep.tolist(),
            "reason": [Reason(r).name.lower() for r in self.reason.tolist()],
        }


def check_numbers(name: str, t: Tensor, *, nan: bool = False, negative: bool = False) -> None:
    """A real tensor whose entries are finite (or NaN, where allowed) and not negative (unless allowed)."""
    _checks.check_tensor(name, t)
    if t.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {t.dtype}")
    if t.numel():
        low, high = torch.stack(t.aminmax()).tolist()
        if math.isfinite(low) and math.isfinite(high) and (negative or low >= 0):
            return  # by far the most, in one pass
    bad = t.isinf() if nan else ~t.isfinite()
    if not negative:
        bad = bad | (t < 0)
    if bad.any():
        expected = f"{'finite numbers' if negative else 'finite numbers >= 0'}{' or NaN' if nan else ''}"
        raise ValueError(f"{name}: expected {expected}, got {t[bad][0].item()}")
