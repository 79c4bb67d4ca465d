"""Labels of a model with a DirectorHead: its head returns plain logits where the model has them."""

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
    plain = False  # whether the model that runs in this thread has labels


_MODE = _Mode()


@contextlib.contextmanager
def plain_logits(plain: bool) -> Iterator[None]:
    """Whether the heads that run in this thread return plain logits."""
    before, _MODE.plain = _MODE.plain, plain
    try:
        yield
    finally:
        _MODE.plain = before


def call(forward: Callable, model: PreTrainedModel, /, *args: Any, **kwargs: Any) -> Any:
    """Calls forward; where it has labels, by name or by place, the head returns plain logits."""
    place = model._labels_place
    labels = kwargs.get("labels", args[place] if len(args) > place else None)
    with plain_logits(labels is not None):
        return forward(*args, **kwargs)


def bound(model: PreTrainedModel, forward: Callable) -> types.MethodType:
    """The method of the model that calls forward through `call`."""
    method: Any = functools.partial(call, forward)
    method.__name__ = "forward"  # a pickle gets the method of the class
    method.__wrapped__ = getattr(forward, "__func__", forward)  # accelerate follows it
    signature = inspect.signature(forward)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    rest = [p for p in signature.parameters.values() if p.name != "self"]
    method.__signature__ = signature.replace(parameters=[first, *rest])  # generate and Trainer read it
    return types.MethodType(method, model)


class ModelHead(DirectorHead):
    """The head of a model: gated where the model has no labels."""

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias) if _MODE.plain else super().forward(hidden)
