"""Loads what `add_director_head` and `add_adaptive_spans` made, as `save_pretrained` wrote it."""

from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from sukhops.integrations.transformers._director import with_director
from sukhops.integrations.transformers._spans import with_spans

_OURS = (".adaptive_span.ratio", ".cls_weight", ".cls_bias", ".scale", ".shift")
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def from_pretrained(path: str, **kwargs: Any) -> PreTrainedModel:
    """A model with a DirectorHead, adaptive spans or both, as its `save_pretrained` wrote it.

    Args:
        path: a folder, or a repository of the hub.
        kwargs: those of `from_pretrained` of transformers (dtype, device_map, revision, ...).

    Returns:
        The model, of the class that was saved: one of transformers, or one registered with
        `AutoModelForCausalLM`.

    Raises:
        ValueError: a checkpoint with neither, or without the weights of what its config names; an unknown
            class.

    Source: the library's.
    """
    given = kwargs.get("config")
    config = given if isinstance(given, PreTrainedConfig) else None
    if config is None:
        options = {name: kwargs[name] for name in _HUB if name in kwargs}
        config = transformers.AutoConfig.from_pretrained(given or path, **options)
    director, spans = (
        getattr(config, name, None) is not None for name in ("sukhops_director", "sukhops_adaptive_spans")
    )
    if not director and not spans:
        raise ValueError(
            f"path: {path} has neither a DirectorHead nor adaptive spans (sukhops_director, "
            "sukhops_adaptive_spans) in its config"
        )
    model_class: Any = _model_class(config)
    model_class = with_director(model_class) if director else model_class
    loads = with_spans(model_class) if spans else model_class
    wants_report = kwargs.pop("output_loading_info", False)
    model, report = loads.from_pretrained(path, output_loading_info=True, **kwargs)
    model.__class__ = model_class
    missing = sorted(name for name in report["missing_keys"] if name.endswith(_OURS))
    if missing:
        raise ValueError(f"path: the config of {path} names what its weights lack: {', '.join(missing)}")
    return (model, report) if wants_report else model


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Of the checkpoint's architecture."""
    names = config.architectures or [""]
    found = getattr(transformers, names[0], None)
    if found is None and type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        found = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if found is None or names[0] not in ("", found.__name__):
        raise ValueError(
            f"path: expected a class of transformers or one registered with AutoModelForCausalLM, got {names}"
        )
    return found
