"""DirectorHead in a model of transformers: added, saved, loaded, resized, no part of the model's own loss."""

import contextlib
import functools
import inspect
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sukhops.nn import DirectorHead

# what models multiply logits with, or bound them by; 1 and None do nothing
_LOGITS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)


def add_director_head(
    model: PreTrainedModel, *, gamma: float | Tensor = 1.0, shared: bool = False
) -> DirectorHead:
    """Makes the head of a causal language model a `DirectorHead` with the model's own weight, tied or not.

    Without labels the model's logits are the gated log-probabilities, so `generate` decodes from them. With
    labels the model is the plain language model: its loss and its logits are those it has without the
    classifier. `gamma` may be set on the head between calls.

    `save_pretrained` writes the classifier into the checkpoint and gamma and shared into
    `config.sukhops_director`; `from_pretrained` of this module loads both. (The `from_pretrained` of
    transformers loads the plain language model and reports the classifier as unexpected.)
    `resize_token_embeddings` resizes the classifier; new tokens get the mean of its rows. `type(model)`
    becomes a subclass of the same name.

    Args:
        model: a causal language model whose output embeddings are an nn.Linear. PEFT comes after it:
            `get_peft_model(model, LoraConfig(..., modules_to_save=["lm_head"]))` also trains and saves the
            classifier; without modules_to_save it is frozen.
        gamma, shared: as in `DirectorHead`.

    Returns:
        The head, the model's output embeddings from now on. Its classifier is new: train it with
        `DirectorLoss`, for instance in a `LossTrainer`.

    Raises:
        TypeError: a model of another kind, or one that PEFT has wrapped.
        ValueError: a model that has a DirectorHead, or whose checkpoint has one that was not loaded; one that
            scales or bounds its logits (Gemma 2, Cohere, Granite), as the gate would be scaled too.

    Source: Arora et al. 2022 (Director).
    """
    if not isinstance(model, PreTrainedModel):
        hint = "; add the head first, then get_peft_model" if hasattr(model, "peft_config") else ""
        raise TypeError(f"model: expected a PreTrainedModel, got {type(model).__name__}{hint}")
    if _heads(model):
        raise ValueError("model: its head is a DirectorHead already")
    if getattr(model.config, "sukhops_director", None) is not None:
        raise ValueError(
            "model: its checkpoint has a DirectorHead, which transformers does not load: load it with "
            "sukhops.integrations.transformers.from_pretrained, or set config.sukhops_director to None "
            "to start with a new classifier"
        )
    check_causal(model)
    head = _replace_head(model, gamma, shared)
    model.__class__ = with_director(type(model))
    model.config.sukhops_director = _entry(head)
    return head


def check_causal(model: PreTrainedModel) -> None:
    """Raises where the model's logits are not those of its head on its hidden states."""
    config = model.config.get_text_config()
    changed = {name: getattr(config, name, None) for name in _LOGITS}
    changed = {name: value for name, value in changed.items() if value not in (None, 1)}
    if changed:
        raise ValueError(
            "model: expected one whose logits are lm_head(hidden), as Llama's, Qwen's and GPT-2's are, "
            f"got {changed} in its config"
        )
    if getattr(config, "is_encoder_decoder", False) or model.get_output_embeddings() is None:
        raise TypeError(f"model: expected a causal language model with a head, got {type(model).__name__}")


def _heads(model: PreTrainedModel) -> list[DirectorHead]:
    """The model's DirectorHead: one, or in a layer of PEFT one and its copies."""
    found = model.get_output_embeddings()
    return [] if found is None else [m for m in found.modules() if isinstance(m, DirectorHead)]


def _replace_head(model: PreTrainedModel, gamma: float | Tensor, shared: bool) -> DirectorHead:
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
        raise TypeError(
            "model: expected output embeddings that are an nn.Linear of a floating dtype, "
            f"got {type(linear).__name__}"
        )
    head = DirectorHead.from_linear(linear, gamma=gamma, shared=shared)
    model.set_output_embeddings(head)
    return head


def _entry(head: DirectorHead) -> dict:
    """What the config keeps, in JSON's types; a tensor's values are in the checkpoint too."""
    tensor = isinstance(head.gamma, Tensor)
    return {
        "gamma": head.gamma.tolist() if tensor else float(head.gamma),
        "tensor": tensor,
        "shared": head.shared,
    }


class _Director:
    """What a model with a DirectorHead does besides: mixed into its class, before it."""

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        entry = getattr(config, "sukhops_director", None)
        if entry is not None:
            gamma = entry["gamma"]
            if entry["tensor"]:  # has values where from_pretrained builds on the meta device
                gamma = torch.tensor(gamma, device="cpu", dtype=torch.float32)
            _replace_head(self, gamma, entry["shared"])

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DirectorHead):
            module.reset_parameters()

    def save_pretrained(self, *args, **kwargs):
        for head in _heads(self)[:1]:
            self.config.sukhops_director = _entry(head)
        return super().save_pretrained(*args, **kwargs)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        head = self.get_output_embeddings()
        if not isinstance(head, DirectorHead):
            raise TypeError(f"model: resize it before PEFT wraps its head, got {type(head).__name__}")
        plain = nn.Linear(*head.weight.shape[::-1], device="meta")
        plain.weight, plain.bias = head.weight, head.bias
        self.set_output_embeddings(plain)
        try:
            embeddings = super().resize_token_embeddings(*args, **kwargs)
            _resize(head, self.get_output_embeddings())
        finally:
            self.set_output_embeddings(head)
        return embeddings

    def __reduce_ex__(self, protocol):
        return _empty, (self._model_class,), self.__dict__


def _empty(model_class: type[PreTrainedModel]) -> PreTrainedModel:
    made = with_director(model_class)
    return made.__new__(made)


@functools.cache
def with_director(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class with `_Director` before it, under its own name."""
    place = list(inspect.signature(model_class.forward).parameters).index("labels") - 1

    @functools.wraps(model_class.forward)
    def forward(self, *args, **kwargs):
        labels = kwargs.get("labels", args[place] if len(args) > place else None)
        if labels is None:
            return model_class.forward(self, *args, **kwargs)
        with _plain_heads(_heads(self)):
            return model_class.forward(self, *args, **kwargs)

    names = {
        "forward": forward,
        "_model_class": model_class,
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
    }
    return type(model_class.__name__, (_Director, model_class), names)


@contextlib.contextmanager
def _plain_heads(heads: list[DirectorHead]) -> Iterator[None]:
    """The heads return the language model's logits."""
    before = [vars(head).get("forward") for head in heads]
    for head in heads:
        head.forward = functools.partial(_logits, head)
    try:
        yield
    finally:
        for head, forward in zip(heads, before, strict=True):
            del head.forward
            if forward is not None:
                head.forward = forward


def _logits(head: DirectorHead, hidden: Tensor) -> Tensor:
    return F.linear(hidden, head.weight, head.bias)


@torch.no_grad()
def _resize(head: DirectorHead, plain: nn.Linear) -> None:
    """The head takes the resized weight and bias; new tokens get the mean of the classifier's rows."""
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
