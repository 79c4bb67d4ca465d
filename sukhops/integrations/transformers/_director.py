"""DirectorHead in a transformers model: adds, saves, loads and resizes it; the model keeps its own loss."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sukhops.integrations.transformers._causal import (
    check_causal,
    check_loaded,
    check_logits,
    check_model,
)
from sukhops.integrations.transformers._labels import ModelHead, bound, call
from sukhops.nn import DirectorHead


def add_director_head(
    model: PreTrainedModel, *, gamma: float | Tensor = 1.0, shared: bool = False
) -> DirectorHead:
    """Replaces the head of a causal language model by a `DirectorHead` with the same weight, tied or not.

    Without labels, the logits of the model are the gated log-probabilities, so `generate` decodes from them.
    With labels, loss and logits are those of the plain language model, without the classifier. This also
    holds if other code has replaced the `forward` of the model, or replaces it later. `gamma` may be set on
    the head between calls.

    `save_pretrained` writes the classifier into the checkpoint, and gamma and shared into
    `config.sukhops_director`; `sukhops.integrations.transformers.from_pretrained` loads both. (The
    `from_pretrained` of transformers loads the plain language model and reports the classifier as
    unexpected.) `resize_token_embeddings` resizes the classifier too; new tokens get the mean of its rows.
    `type(model)` becomes a subclass of the same name.

    Args:
        model: a causal language model whose output embeddings are an nn.Linear. It must not share its config
            object with another model. Apply PEFT after this call:
            `get_peft_model(model, LoraConfig(..., modules_to_save=["lm_head"]))` trains and saves a copy of
            the whole head; from then on, set gamma on this copy. Without modules_to_save the classifier is
            frozen.
        gamma, shared: as in `DirectorHead`.

    Returns:
        The head, which is now the model's output embeddings. Its classifier is not trained yet; train it with
        `DirectorLoss`, for example in a `LossTrainer`.

    Raises:
        TypeError: model has another type, or is wrapped by PEFT.
        ValueError: the model already has a DirectorHead, or its checkpoint has one that was not loaded; the
            model is not causal; its logits are not those of its head, because it scales or bounds them
            (Gemma 2, Cohere, Granite) and would scale the gate too; gamma is out of range.

    Source: Arora et al. 2022 (Director).
    """
    check_model(model, "head")
    if _heads(model):
        raise ValueError("model: its head is a DirectorHead already")
    check_loaded(model, "sukhops_director", "a DirectorHead")
    check_causal(model)
    check_logits(model)
    head = _replace_head(model, gamma, shared)
    model.__class__ = with_director(model.__class__)
    if "forward" in vars(model):
        model.forward = model.forward  # so that __setattr__ of the new class wraps it
    model.config.sukhops_director = _entry(head)
    return head


def _heads(model: PreTrainedModel) -> list[DirectorHead]:
    """The DirectorHeads in the model's output embeddings: one, or several copies in a PEFT layer."""
    found = model.get_output_embeddings()
    return [] if found is None else [m for m in found.modules() if isinstance(m, DirectorHead)]


def _replace_head(model: PreTrainedModel, gamma: float | Tensor, shared: bool) -> DirectorHead:
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
        raise TypeError(
            "model: expected output embeddings that are an nn.Linear of a floating dtype, "
            f"got {type(linear).__name__}"
        )
    head = ModelHead.from_linear(linear, gamma=gamma, shared=shared)
    model.set_output_embeddings(head)
    return head


def _entry(head: DirectorHead) -> dict:
    """The config entry, in JSON types. The values of a tensor gamma are in the checkpoint too."""
    gamma = head.gamma
    return {
        "gamma": gamma.tolist() if isinstance(gamma, Tensor) else float(gamma),
        "tensor": isinstance(gamma, Tensor),
        "shared": head.shared,
    }


_Mixin: Any = object  # Any, because the methods below belong to the class of the model


class _Director(_Mixin):
    """Methods of a model with a DirectorHead: a base class that comes before the model's own class."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        entry = getattr(config, "sukhops_director", None)
        if entry is not None:
            gamma = entry["gamma"]
            if entry["tensor"]:  # on the CPU, because from_pretrained builds models on the meta device
                gamma = torch.tensor(gamma, device="cpu", dtype=torch.float32)
            _replace_head(self, gamma, entry["shared"])

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":  # accelerate, Liger, TRL and LossTrainer replace it
            value = bound(self, value)
        super().__setattr__(name, value)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DirectorHead):
            module.reset_parameters()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        for head in _heads(self)[:1]:
            self.config.sukhops_director = _entry(head)
        return super().save_pretrained(*args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        head = self.get_output_embeddings()
        if not isinstance(head, DirectorHead):
            raise TypeError(
                f"model: expected a DirectorHead, got {type(head).__name__}; resize it before PEFT wraps it"
            )
        rows, width = head.weight.shape
        plain: Any = nn.Linear(width, rows, device="meta")
        plain.weight, plain.bias = head.weight, head.bias
        self.set_output_embeddings(plain)
        try:
            embeddings = super().resize_token_embeddings(*args, **kwargs)
            _resize(head, self.get_output_embeddings())
        finally:
            self.set_output_embeddings(head)
        return embeddings

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (self._model_class,), self.__dict__


def _empty(model_class: Any) -> PreTrainedModel:
    made: Any = with_director(model_class)
    return made.__new__(made)


@functools.cache
def with_director(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of `_Director` and the model's class, with the name of the latter."""
    position = list(inspect.signature(model_class.forward).parameters).index("labels") - 1  # without self

    @functools.wraps(model_class.forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return call(functools.partial(model_class.forward, self), self, *args, **kwargs)

    names = {
        "forward": forward,
        "_labels_position": position,
        "_model_class": model_class,
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
    }
    return type(model_class.__name__, (_Director, model_class), names)


@torch.no_grad()
def _resize(head: DirectorHead, plain: nn.Linear) -> None:
    """Gives the head the resized weight and bias, and resizes the classifier; new rows are its mean row."""
    head.weight, head.bias = plain.weight, plain.bias
    rows = head.weight.shape[0]
    head.out_features = rows
    for name in () if head.shared else ("cls_weight", "cls_bias"):
        old = getattr(head, name)
        new = old[:rows]
        if rows > len(old):
            mean = old.float().mean(0, keepdim=True).to(old.dtype)
            new = torch.cat([old, mean.expand(rows - len(old), *old.shape[1:])])
        setattr(head, name, nn.Parameter(new.clone(), requires_grad=old.requires_grad))
