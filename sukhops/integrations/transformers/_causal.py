"""What the integrations need of a model: of transformers, causal, with logits that are lm_head(hidden)."""

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sukhops.integrations.transformers._labels import ModelHead, plain_logits
from sukhops.nn import DirectorHead

# what models multiply logits with, or bound them by; 1 and None do nothing
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
_LENGTH = 8  # tokens that the model is tried on
_ROUNDING = 16  # units in the last place of the largest logit that two calls may differ by


def check_model(model: nn.Module, what: str) -> None:
    """Raises where a model that shall get `what` is none of transformers, or is wrapped."""
    if not isinstance(model, PreTrainedModel):
        hint = f"; add the {what} first, then get_peft_model" if hasattr(model, "peft_config") else ""
        raise TypeError(f"model: expected a PreTrainedModel, got {type(model).__name__}{hint}")


def check_loaded(model: PreTrainedModel, entry: str, what: str) -> None:
    """Raises where the config's entry says that the checkpoint has what the model has not."""
    if getattr(model.config, entry, None) is not None:
        raise ValueError(
            f"model: its checkpoint has {what}, which transformers does not load: load it with "
            f"sukhops.integrations.transformers.from_pretrained, or set config.{entry} to None to start anew"
        )


def check_causal(model: PreTrainedModel) -> None:
    """Raises where the config says that the model's logits are not those of its head on its hidden states."""
    config = model.config.get_text_config()
    changed = {name: getattr(config, name, None) for name in _LOGITS}
    changed = {name: value for name, value in changed.items() if value not in (None, 1)}
    if changed:
        raise ValueError(
            "model: expected one whose logits are lm_head(hidden), as Llama's, Qwen's and GPT-2's are, "
            f"got {changed} in its config"
        )
    if getattr(config, "add_cross_attention", False):
        raise ValueError("model: expected one without an encoder, got add_cross_attention in its config")
    if getattr(config, "is_encoder_decoder", False) or model.get_output_embeddings() is None:
        raise TypeError(f"model: expected a causal language model with a head, got {type(model).__name__}")


def check_logits(model: PreTrainedModel) -> None:
    """Raises where the model's logits on a few tokens are not those of its head on its hidden states.

    A model whose weights are not at hand (on the meta device, offloaded, sharded) is not tried.
    """
    head, device = model.get_output_embeddings(), model.get_input_embeddings().weight.device
    weights = [*model.parameters(), *model.buffers()]
    if any(w.is_meta or hasattr(w, "ds_id") or isinstance(w, DTensor) for w in weights):
        return
    if isinstance(head, DirectorHead) and not isinstance(head, ModelHead) and _has_rows(head):
        return  # its gamma is that of a batch
    ids = _tokens(model).to(device)
    try:
        with _undisturbed(model):
            logits, expected = _logits(model, ids)
            ids[:, -1] = ids[:, 0]
            changed, _ = _logits(model, ids)
    except Exception:
        if device.type == "cpu" and torch.accelerator.is_available():
            return  # kernels that need the accelerator, where the model is not yet
        raise
    name = type(model).__name__
    if logits.shape != expected.shape or not _close(logits, expected):
        raise ValueError(
            "model: expected one whose logits are lm_head(hidden), as Llama's, Qwen's and GPT-2's are; those "
            f"of {name} differ from its output embeddings ({type(head).__name__}) on what "
            f"{type(model.base_model).__name__} returns"
        )
    if not _close(logits[:, :-1], changed[:, :-1]):
        raise ValueError(
            f"model: expected a causal language model; in {name} the last token changes the logits of "
            "earlier ones"
        )


def _has_rows(head: DirectorHead) -> bool:
    return isinstance(head.gamma, Tensor) and head.gamma.numel() > 1


def _tokens(model: PreTrainedModel) -> Tensor:
    """[1, 8], no two the same, and none that the config gives a meaning such as padding or an image."""
    configs = (model.config, model.config.get_text_config())
    named = [v for c in configs for n, v in vars(c).items() if n.endswith(("token_id", "token_index"))]
    count = model.get_input_embeddings().weight.shape[0]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    free = [token for token in order[: _LENGTH + len(named)].tolist() if token not in named]
    return torch.tensor([free[:_LENGTH]])


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradient; modes and random numbers are what they were afterwards."""
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
        return found, hidden  # no logits of this head
    with plain_logits(plain):
        return found, head(hidden.to(next(head.parameters()).dtype))


def _no_cache(module: nn.Module) -> dict:
    return {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}


def _close(logits: Tensor, expected: Tensor) -> bool:
    bound = _ROUNDING * max(torch.finfo(x.dtype).eps for x in (logits, expected))
    return bool((logits - expected).abs().max() <= bound * expected.abs().max())
