"""Checks that a model is a causal model of transformers whose logits are lm_head(hidden)."""

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sukhops.integrations.transformers._labels import ModelHead, plain_logits
from sukhops.nn import DirectorHead

# config options by which models scale or bound their logits; 1 and None have no effect
_LOGITS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "logits_soft_cap",
    "lm_head_multiplier",
    "output_logit_soft_cap",
    "output_multiplier",
    "softcap",
)
_LENGTH = 8  # number of tokens in the test input
_ROUNDING = 16  # largest allowed difference between two calls, in roundings (eps) of the largest logit


def check_model(model: nn.Module, addition: str) -> None:
    """Raises a TypeError if a model that will get `addition` is not from transformers, or is wrapped."""
    if not isinstance(model, PreTrainedModel):
        hint = f"; add the {addition} first, then get_peft_model" if hasattr(model, "peft_config") else ""
        raise TypeError(f"model: expected a PreTrainedModel, got {type(model).__name__}{hint}")


def check_loaded(model: PreTrainedModel, entry: str, addition: str) -> None:
    """Raises a ValueError if, by the config, the checkpoint has an addition that was not loaded."""
    if getattr(model.config, entry, None) is not None:
        raise ValueError(
            f"model: its checkpoint has {addition}, which transformers does not load; load it with "
            f"sukhops.integrations.transformers.from_pretrained, or set config.{entry} to None to drop it"
        )


def check_causal(model: PreTrainedModel) -> None:
    """Raises an error if, by its config, the model is not causal or its logits are not lm_head(hidden)."""
    config = model.config.get_text_config()
    changed = {name: getattr(config, name, None) for name in _LOGITS}
    changed = {name: value for name, value in changed.items() if value not in (None, 1)}
    if changed:
        raise ValueError(
            "model: expected one whose logits are lm_head(hidden), like those of Llama, Qwen and GPT-2, "
            f"got {changed} in its config"
        )
    if getattr(config, "add_cross_attention", False):
        raise ValueError("model: expected one without an encoder, got add_cross_attention in its config")
    if getattr(config, "is_encoder_decoder", False) or model.get_output_embeddings() is None:
        raise TypeError(f"model: expected a causal language model with a head, got {type(model).__name__}")


def check_logits(model: PreTrainedModel) -> None:
    """Runs the model on a few tokens; raises if it is not causal or its logits are not lm_head(hidden).

    A model whose weights are not available (on the meta device, offloaded, sharded) is not run.
    """
    head, device = model.get_output_embeddings(), model.get_input_embeddings().weight.device
    weights = [*model.parameters(), *model.buffers()]
    if any(w.is_meta or hasattr(w, "ds_id") or isinstance(w, DTensor) for w in weights):
        return
    if isinstance(head, DirectorHead) and not isinstance(head, ModelHead) and _has_rows(head):
        return  # its gamma has the shape of another batch
    ids = _tokens(model).to(device)
    try:
        with _undisturbed(model):
            logits, expected = _logits(model, ids)
            ids[:, -1] = ids[:, 0]
            changed, _ = _logits(model, ids)
    except Exception:
        if device.type == "cpu" and torch.accelerator.is_available():
            return  # the model may need kernels of the accelerator, and has not been moved there yet
        raise
    name = type(model).__name__
    if logits.shape != expected.shape or not _close(logits, expected):
        raise ValueError(
            "model: expected one whose logits are lm_head(hidden), like those of Llama, Qwen and GPT-2; the "
            f"logits of {name} differ from those of its output embeddings ({type(head).__name__}) on the "
            f"hidden states of {type(model.base_model).__name__}"
        )
    if not _close(logits[:, :-1], changed[:, :-1]):
        raise ValueError(
            f"model: expected a causal language model; in {name} the last token changes the logits of "
            "earlier ones"
        )


def _has_rows(head: DirectorHead) -> bool:
    return isinstance(head.gamma, Tensor) and head.gamma.numel() > 1


def _tokens(model: PreTrainedModel) -> Tensor:
    """Different token ids [1, 8], without special tokens of the config such as padding or images."""
    configs = (model.config, model.config.get_text_config())
    named = [v for c in configs for n, v in vars(c).items() if n.endswith(("token_id", "token_index"))]
    count = model.get_input_embeddings().weight.shape[0]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    free = [token for token in order[: _LENGTH + len(named)].tolist() if token not in named]
    return torch.tensor([free[:_LENGTH]])


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Context manager: evaluation mode without gradient; restores modes and random states afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _logits(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The model's logits, and those of its head on the hidden states of its backbone."""
    head = model.get_output_embeddings()
    plain = isinstance(head, ModelHead)
    found = model(ids, **_no_cache(model), **({"labels": ids} if plain else {})).logits
    hidden = model.base_model(ids, **_no_cache(model.base_model))[0]
    if hidden.shape[-1] != getattr(head, "in_features", hidden.shape[-1]):
        return found, hidden  # the head does not accept these hidden states: the comparison must fail
    with plain_logits(plain):
        return found, head(hidden.to(next(head.parameters()).dtype))


def _no_cache(module: nn.Module) -> dict:
    return {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}


def _close(logits: Tensor, expected: Tensor) -> bool:
    bound = _ROUNDING * max(torch.finfo(x.dtype).eps for x in (logits, expected))
    return bool((logits - expected).abs().max() <= bound * expected.abs().max())
