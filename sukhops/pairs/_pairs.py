"""Return type of the functions that choose pairs, and their argument checks."""

import enum
import math
from typing import NamedTuple

import torch
from torch import Tensor

from sukhops import _checks


class Reason(enum.IntEnum):
    """The rule by which a pair was kept or dropped."""

    SCORE = 0  # kept: only one candidate was good enough, and only one bad enough
    LENGTH = 1  # kept: several candidates were good (or bad) enough, and length decided between them
    ORDER = 2  # kept: candidates were equal in score and length, and the first was taken
    UNSCORED = 3  # dropped: fewer than two candidates have a score
    EQUAL = 4  # dropped: all candidates have the same score
    TOO_LONG = 5  # dropped: the chosen candidate is longer than max_length


class Pairs(NamedTuple):
    """One pair per prompt, each field [P]. If keep is False, the indices are in range but have no meaning."""

    chosen: Tensor  # int64, index of the chosen candidate
    rejected: Tensor  # int64, index of the rejected candidate
    keep: Tensor  # bool, whether to train on the pair
    reason: Tensor  # int64, a Reason

    def columns(self) -> dict[str, list]:
        """The fields as lists with one entry per prompt, for `datasets.Dataset.from_dict` or pandas."""
        return {
            "chosen": self.chosen.tolist(),
            "rejected": self.rejected.tolist(),
            "keep": self.keep.tolist(),
            "reason": [Reason(r).name.lower() for r in self.reason.tolist()],
        }


def check_numbers(name: str, t: Tensor, *, nan: bool = False, negative: bool = False) -> None:
    """Checks that a tensor is real, finite (NaN only if `nan`) and not negative (unless `negative`)."""
    _checks.check_tensor(name, t)
    if t.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {t.dtype}")
    if t.numel():
        low, high = torch.stack(t.aminmax()).tolist()
        if math.isfinite(low) and math.isfinite(high) and (negative or low >= 0):
            return  # valid tensors need only this one pass
    bad = t.isinf() if nan else ~t.isfinite()
    if not negative:
        bad = bad | (t < 0)
    if bad.any():
        expected = f"{'finite numbers' if negative else 'finite numbers >= 0'}{' or NaN' if nan else ''}"
        raise ValueError(f"{name}: expected {expected}, got {t[bad][0].item()}")
