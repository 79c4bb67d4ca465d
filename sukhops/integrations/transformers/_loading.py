"""Loads models with a DirectorHead or adaptive spans that `save_pretrained` wrote."""

from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from sukhops.integrations.transformers._director import with_director
from sukhops.integrations.transformers._spans import with_spans

_OURS = (".adaptive_span.ratio", ".cls_weight", ".cls_bias", ".scale", ".shift")
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def from_pretrained(path: str, **kwargs: Any) -> PreTrainedModel:
    """Loads a model with a DirectorHead, adaptive spans or both, which `save_pretrained` wrote.

    Args:
        path: a folder, or a repository on the Hugging Face Hub.
        kwargs: arguments of `from_pretrained` of transformers (dtype, device_map, revision, ...).

    Returns:
        The model, of the class that was saved (a class of transformers, or one registered with
        `AutoModelForCausalLM`).

    Raises:
        ValueError: the checkpoint has neither a DirectorHead nor adaptive spans, or lacks weights that its
            config requires; the class is unknown.

    Source: this library.
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
            "path: expected sukhops_director or sukhops_adaptive_spans in the config, got neither a "
            f"DirectorHead nor adaptive spans in {path}"
        )
    model_class: Any = _model_class(config)
    model_class = with_director(model_class) if director else model_class
    loads = with_spans(model_class) if spans else model_class
    wants_report = kwargs.pop("output_loading_info", False)
    model, report = loads.from_pretrained(path, output_loading_info=True, **kwargs)
    model.__class__ = model_class
    missing = sorted(name for name in report["missing_keys"] if name.endswith(_OURS))
    if missing:
        raise ValueError(f"path: the config of {path} requires weights that it lacks: {', '.join(missing)}")
    return (model, report) if wants_report else model


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the checkpoint's architecture."""
    names = config.architectures or [""]
    found = getattr(transformers, names[0], None)
    if found is None and type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        found = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if found is None or names[0] not in ("", found.__name__):
        raise ValueError(
            f"path: expected a class of transformers or one registered with AutoModelForCausalLM, got {names}"
        )
    return found
