"""A context manager that sets the logits budget temporarily."""

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
