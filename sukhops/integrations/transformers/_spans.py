"""Adaptive spans in the self-attention of a transformers model, through its attention interface."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from sukhops import adaptive_span_attention
from sukhops.integrations.transformers._causal import check_loaded, check_model
from sukhops.nn import AdaptiveSpan
from sukhops.nn.adaptive_span import SpanReport
from sukhops.nn.head_loss import in_use

NAME = "sukhops_adaptive_span"
_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


class AdaptiveSpans:
    """The spans of all layers of a model. They are parameters of its attention modules.

    Args:
        attention: the attention modules, each with an attribute `adaptive_span`.
    """

    def __init__(self, attention: list[nn.Module]):
        self._attention = attention

    @property
    def layers(self) -> list[AdaptiveSpan]:
        """The `AdaptiveSpan` that each layer uses: with PEFT's modules_to_save, the copy that is trained."""
        return [_span_of(module) for module in self._attention]

    def penalty(self, coef: float) -> Tensor:
        """The sum over layers of coef * mean span in tokens, a scalar. Add it to the training loss."""
        parts = [layer.penalty(coef) for layer in self.layers]
        return torch.stack([part.to(parts[0].device) for part in parts]).sum()

    def report(self) -> list[SpanReport]:
        """For each layer: spans in tokens, keys that a query reads, and their share. Waits for the device."""
        return [layer.report() for layer in self.layers]

    def freeze(self) -> "AdaptiveSpans":
        """Stops the training of all spans. Returns itself."""
        for layer in self.layers:
            layer.ratio.requires_grad_(False)
        return self


def add_adaptive_spans(
    model: PreTrainedModel, max_span: int, *, ramp: float = 32.0, init: float = 1.0
) -> AdaptiveSpans:
    """Gives every self-attention of a causal language model a learned span for each head.

    The other parts of attention stay as they are: grouped keys, rotary positions, left padding, packed
    sequences (position_ids without a mask), DynamicCache, StaticCache, `generate`. A padding mask may hide
    tokens at the start and at the end of a sequence, but not between visible tokens. With init = 1 and a
    max_span not shorter than the longest sequence, the model computes the same as before.

    The spans are the parameters `adaptive_span.ratio` of the attention modules, and part of their state_dict.
    Exclude them from weight decay. `save_pretrained` writes them, and stores the options in
    `config.sukhops_adaptive_spans`; `sukhops.integrations.transformers.from_pretrained` loads both.

    Args:
        model: a causal language model of transformers whose attention uses `AttentionInterface` (Llama,
            Mistral, Qwen, GPT-2 and most others). Apply PEFT after this call, with
            `modules_to_save=["adaptive_span"]` to train the spans too.
        max_span: keys max_span or more tokens back are never seen, whatever the span.
        ramp: width of the soft mask's ramp in tokens, > 0.
        init: initial span as a share of max_span, in [0, 1].

    Returns:
        `AdaptiveSpans`, with `penalty(coef)`, `report()` and `freeze()`.

    Raises:
        TypeError: model is not a causal language model of transformers, or is wrapped by PEFT.
        ValueError: the model already has spans; its attention has dropout, a soft cap, sinks, or a sliding
            window shorter than max_span; it has layers of another kind; an option is out of range. In
            forward: output_attentions is set; a mask has 4 axes; a mask hides tokens between visible ones, on
            the CPU (on CUDA the sequence is NaN instead).

    Source: Sukhbaatar et al. 2019 (Adaptive Attention Span in Transformers).
    """
    layers = _attentions(model, max_span)
    if any(hasattr(layer, "adaptive_span") for layer in layers):
        raise ValueError("model: expected one without spans, got one that has adaptive spans already")
    check_loaded(model, "sukhops_adaptive_spans", "adaptive spans")
    entry = {"max_span": max_span, "ramp": float(ramp), "init": float(init)}
    _attach(model, entry)
    model.config.sukhops_adaptive_spans = entry
    return adaptive_spans(model)


def adaptive_spans(model: nn.Module) -> AdaptiveSpans:
    """The spans that `add_adaptive_spans` or `from_pretrained` added to a model, which PEFT or DDP may wrap.

    Raises:
        ValueError: the model has no spans.

    Source: this library.
    """
    found = [m for m in model.modules() if "adaptive_span" in m._modules]
    if not found:
        raise ValueError("model: has no adaptive spans; call add_adaptive_spans first")
    return AdaptiveSpans(found)


def _span_of(attention: nn.Module) -> AdaptiveSpan:
    span: Any = attention.adaptive_span
    while not isinstance(span, AdaptiveSpan):
        span = in_use(span)
    return span


@functools.cache
def with_spans(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass whose constructor adds the spans that the config describes, so that they can be loaded."""

    def init(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        _attach(self, config.sukhops_adaptive_spans)

    def init_weights(self: PreTrainedModel, module: nn.Module) -> None:
        model_class._init_weights(self, module)
        if isinstance(module, AdaptiveSpan):
            module.reset_parameters()

    names = {
        "__init__": init,
        "_init_weights": init_weights,
        "_keep_in_fp32_modules_strict": {*(model_class._keep_in_fp32_modules_strict or ()), "adaptive_span"},
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
    }
    return type(model_class.__name__, (model_class,), names)


def _attach(model: PreTrainedModel, entry: dict) -> None:
    """Adds spans to a model, with the options in `entry` from its config."""
    heads = model.config.get_text_config().num_attention_heads
    layers = _attentions(model, entry["max_span"])
    made = []
    for layer in layers:
        like = next(layer.parameters())
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        made.append(AdaptiveSpan(heads, **entry, device=like.device, dtype=dtype))
    for layer, span in zip(layers, made, strict=True):
        layer.adaptive_span = span
    model.set_attn_implementation(NAME)
    model.register_forward_pre_hook(_no_attentions, with_kwargs=True)


def _no_attentions(model: PreTrainedModel, args: tuple, options: dict) -> None:
    wanted = options.get("output_attentions")
    if model.config.output_attentions if wanted is None else wanted:
        raise ValueError("output_attentions: not supported with adaptive spans")


def _attentions(model: PreTrainedModel, max_span: int) -> list[nn.Module]:
    """The self-attention modules, one per layer. Raises an error if spans cannot be added to them."""
    check_model(model, "spans")
    config = model.config.get_text_config()
    found = [
        m
        for m in model.modules()
        if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx")
        if getattr(m, "is_causal", True)
    ]
    interface = model._supports_attention_backend and model._can_set_attn_implementation()
    other = config is not model.config or config.is_encoder_decoder or not getattr(config, "is_causal", True)
    other = other or getattr(config, "add_cross_attention", False)
    if other or not interface or len(found) != config.num_hidden_layers:
        raise TypeError(
            "model: expected a causal language model of transformers, for text only, with self-attention "
            f"through AttentionInterface in every layer, like Llama and GPT-2, got {type(model).__name__}"
        )
    for reason in _reasons(config, found, max_span):
        raise ValueError(f"model: expected attention without {reason}")
    return found


def _reasons(config: PreTrainedConfig, layers: list[nn.Module], max_span: int) -> list[str]:
    """The features of the model's attention that the operator does not support."""
    found = [
        f"dropout; set config.{name} to 0 when the model is loaded, got {getattr(config, name)}"
        for name in _DROPOUT
        if getattr(config, name, 0)
    ]
    if getattr(config, "attn_logit_softcapping", None):
        found.append(f"a soft cap, got attn_logit_softcapping = {config.attn_logit_softcapping}")
    if any(hasattr(layer, "sinks") for layer in layers):
        found.append("sinks")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        found.append(f"layer types other than full and sliding attention, got {sorted(kinds)}")
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in kinds or not getattr(config, "layer_types", None)
    if window and sliding and window < max_span and getattr(config, "use_sliding_window", True):
        found.append(f"a window shorter than max_span = {max_span}, got sliding_window = {window}")
    if getattr(config, "v_head_dim", None):
        found.append("heads whose keys and values differ in width")
    return found


# ------------------------------------------------------------------ functions that transformers calls


def _first_positions(
    *, batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
    mask_function: Callable = causal_mask_function, attention_mask: Tensor | None = None,
    use_vmap: bool = False, device: torch.device | str | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """The mask of the layers, int64 [B, 1, M, 2]: first visible key per query, position of the first query.

    Both count from the first key in the cache. The shape is [B, 1, 1, 2] without attention_mask and packing.
    """
    if use_vmap:
        raise ValueError("attention_mask: expected a causal mask, got a mask function of the model")
    position = torch.as_tensor(q_offset - kv_offset, device=device).expand(batch_size)
    wrong = torch.zeros(batch_size, dtype=torch.bool, device=device)
    start = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
    if mask_function is not causal_mask_function and q_length > 1:  # packed: consecutive documents
        row = torch.arange(batch_size, device=device).unsqueeze(1)
        query = torch.arange(q_length, device=device) + q_offset
        sees = [
            mask_function(row, 0 * row, a, b) for a, b in ((query[1:], query[:-1]), (query[:-1], query[1:]))
        ]
        before, after = (x.expand(batch_size, q_length - 1) for x in sees)
        wrong = wrong | after.any(1)
        start = F.pad(query[1:].where(~before, 0), (1, 0)).cummax(1).values
    if attention_mask is not None:
        mask = attention_mask.bool()
        begins = mask & ~F.pad(mask, (1, 0))[:, :-1]
        wrong = wrong | (begins.sum(1) > 1)
        first = mask.int().argmax(1).where(mask.any(1), mask.shape[1])
        start = torch.maximum(start, first.unsqueeze(1)).expand(batch_size, q_length)
    if wrong.device.type == "cpu" and not torch.compiler.is_compiling() and wrong.any():
        raise ValueError(
            "attention_mask: expected None, or [B, N] that hides tokens at the ends of a sequence only, "
            f"got another for sequence {int(wrong.int().argmax())}"
        )
    position = position.where(~wrong, -1)  # invalid, for which the operator returns NaN on CUDA
    return torch.stack([start - kv_offset, position.unsqueeze(1).expand_as(start)], -1).unsqueeze(1)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention [B, M, H, d] of query [B, H, M, d] to the key and value cache [B, Hkv, N, d]."""
    if not hasattr(module, "adaptive_span"):
        raise ValueError(
            "model: expected adaptive spans as in its config, got none; it shares the config of a model that "
            "has spans (give each model its own copy), or was built from such a config"
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if not (options.get(name) is None or options[name] is False):
            raise ValueError(f"{name}: not supported with adaptive spans")
    if dropout:
        raise ValueError(f"dropout: expected 0 with adaptive spans, got {dropout}")
    if attention_mask is None or attention_mask.dtype != torch.int64 or attention_mask.shape[-1] != 2:
        raise ValueError("attention_mask: expected None or [B, N] with adaptive spans, got one of 4 axes")
    start, position = attention_mask[:, 0].unbind(-1)
    spans = _span_of(module)
    out = adaptive_span_attention(
        query, key, value, spans.span(), ramp=spans.ramp, scale=scaling, max_span=spans.max_span,
        key_start=start if start.shape[1] == query.shape[2] else None, query_start=position[:, 0],
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _first_positions)
