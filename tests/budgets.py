"""The budget of logits, for the time of a test."""

import contextlib
from collections.abc import Iterator

import sukhops


@contextlib.contextmanager
def logits_budget(nbytes: int) -> Iterator[None]:
    before = sukhops.set_logits_budget(nbytes)
    try:
        yield
    finally:
        sukhops.set_logits_budget(before)
