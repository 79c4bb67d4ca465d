"""Makes the DirectorHead of a model return plain logits if the model is called with labels."""

import contextlib
import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sukhops.nn import DirectorHead


class _Mode(threading.local):
    plain = False  # whether the model that runs in this thread was called with labels


_MODE = _Mode()


@contextlib.contextmanager
def plain_logits(plain: bool) -> Iterator[None]:
    """Context manager: sets whether heads in this thread return plain logits."""
    before, _MODE.plain = _MODE.plain, plain
    try:
        yield
    finally:
        _MODE.plain = before


def call(forward: Callable, model: PreTrainedModel, /, *args: Any, **kwargs: Any) -> Any:
    """Calls forward. If labels are given, by name or by position, the head returns plain logits."""
    position = model._labels_position
    labels = kwargs.get("labels", args[position] if len(args) > position else None)
    with plain_logits(labels is not None):
        return forward(*args, **kwargs)


def bound(model: PreTrainedModel, forward: Callable) -> types.MethodType:
    """A method of the model that calls forward through `call`."""
    method: Any = functools.partial(call, forward)
    method.__name__ = "forward"  # pickle stores a method by name, and loads that of the class
    method.__wrapped__ = getattr(forward, "__func__", forward)  # accelerate unwraps with it
    signature = inspect.signature(forward)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    rest = [p for p in signature.parameters.values() if p.name != "self"]
    method.__signature__ = signature.replace(parameters=[first, *rest])  # read by generate and Trainer
    return types.MethodType(method, model)


class ModelHead(DirectorHead):
    """The head of a model: it returns plain logits if the model has labels, else gated log-probabilities."""

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias) if _MODE.plain else super().forward(hidden)
