"""TRL's fused language-model head, computed by `sukhops.linear_token_stats`. Only `enable` imports TRL."""

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sukhops.ops.vocab_head import TokenStats, linear_token_stats

_OLDEST = "1.16"
_PARAMETERS = (
    "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
    "logit_scale", "outputs",
)  # fmt: skip
_NAMES = {
    "entropy": "entropy", "log_sum_sq_probs": "log_sum_sq", "mean_logits": "mean_logit", "is_top1": "top1",
}  # fmt: skip

_replaced: dict[str, object] = {}  # names in trl.trainer.utils and their values before `enable`


def enable() -> None:
    """Lets sukhops compute the language-model head of all TRL trainers, including existing ones.

    Replaces two functions in `trl.trainer.utils`: the one that computes log-probabilities, and the one that
    decides whether TRL computes them only at positions with a label. With sukhops TRL does this on every
    device. Further calls have no effect.

    Raises:
        ImportError: TRL is not installed or is older than 1.16.
        RuntimeError: TRL's function has another name or other parameters than in TRL 1.16.

    Source: this library; TRL is from von Werra et al. 2020.
    """
    if _replaced:
        return
    utils = _trl_utils()
    for name, value in (("_ChunkedLogProbFunction", _LogProbFunction), ("_use_triton", _always)):
        _replaced[name] = getattr(utils, name)
        setattr(utils, name, value)


def disable() -> None:
    """Restores the functions that `enable` replaced. Without `enable` it does nothing."""
    if _replaced:
        from trl.trainer import utils

        for name, value in _replaced.items():
            setattr(utils, name, value)
        _replaced.clear()


@contextmanager
def enabled() -> Iterator[None]:
    """Context manager: `enable` inside the block, then the previous state. Raises the errors of `enable`."""
    before = bool(_replaced)
    enable()
    try:
        yield
    finally:
        (enable if before else disable)()


def log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: Collection[str] = tuple(_NAMES),
) -> tuple[Tensor | None, ...]:
    """Replacement for TRL's `_ChunkedLogProbFunction.apply`, with the same arguments and results.

    Matrix products use the autocast dtype if autocast is on, else the dtype of hidden; weight and bias are
    cast to it. If the weight has another dtype, its copy is kept for the backward pass. If DeepSpeed ZeRO-3
    partitions the weight, the caller must gather it, as TRL does. The gathered weight is not kept: the
    backward pass gathers it again.

    Args:
        hidden: [N, D], float32, bfloat16, float16 or float64.
        weight: [V, D].
        bias: [V], or None.
        targets: [N], int64 or int32, in [0, V).
        temperature: divisor of the logits, > 0.
        chunk_size: not used; `linear_token_stats` chooses the size of its tiles.
        final_logit_softcapping: bound of the logits before division by temperature, > 0. None: no bound.
        logit_scale: factor of the logits before the bound.
        outputs: any of entropy, log_sum_sq_probs, mean_logits and is_top1.

    Returns:
        The tuple (logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1), each [N], float32; is_top1 is
        bool. All but logprobs are None if not in `outputs`. logprobs and entropy are differentiable.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as in `linear_token_stats`.

    Source: this library; the order and the names of the results are those of TRL.
    """
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    hidden = hidden.to(torch.get_autocast_dtype(device) if autocast else hidden.dtype)
    options: dict[str, Any] = {
        "outputs": ("logp", *(ours for theirs, ours in _NAMES.items() if theirs in outputs)),
        "softcap": final_logit_softcapping,
        "scale": logit_scale,
        "temperature": temperature,
    }
    if hasattr(weight, "ds_id") and torch.is_grad_enabled():
        return _Partitioned.apply(hidden, weight, bias, targets, options)
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    return _results(linear_token_stats(hidden, weight, targets, bias, **options))


class _LogProbFunction:
    """Replaces `_ChunkedLogProbFunction` in TRL, which calls only its `apply`."""

    apply = staticmethod(log_probs)


def _always(device: torch.device) -> bool:
    return True


def _results(stats: TokenStats) -> tuple[Tensor | None, ...]:
    floats = (stats.logp, stats.entropy, stats.log_sum_sq, stats.mean_logit)
    return *(None if t is None else t.float() for t in floats), stats.top1


class _Partitioned(torch.autograd.Function):
    """A head whose parameters DeepSpeed ZeRO-3 gathers for the forward pass, and again for the backward pass.

    The operator saves leaf tensors instead of the parameters. Between the two passes these are empty, so that
    they do not keep the gathered memory alive.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: dict[str, Any],
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.parameters = [p for p in (weight, bias) if p is not None]
        rows, *heads = (
            t.detach().to(hidden.dtype).requires_grad_(t.requires_grad) for t in (hidden, *ctx.parameters)
        )
        with torch.enable_grad():
            results = _results(linear_token_stats(rows, heads[0], targets, *heads[1:], **options))
        _empty(heads)
        ctx.rows, ctx.heads, ctx.results = rows, heads, results[:2]
        constants = results[2:]
        ctx.mark_non_differentiable(*(t for t in constants if t is not None))
        return *(None if t is None else t.detach() for t in results[:2]), *constants

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        from trl.trainer import utils

        used = [(t, g) for t, g in zip(ctx.results, upstream[:2], strict=True) if g is not None]
        if not used:
            return (None,) * 5
        results, upstream = zip(*used, strict=True)
        leaves = [ctx.rows, *ctx.heads]
        wanted = [t for t in leaves if t.requires_grad]
        with utils.maybe_gather_lm_head_ctx(*ctx.parameters):
            for head, parameter in zip(ctx.heads, ctx.parameters, strict=True):
                head.data = parameter.detach().to(head.dtype)
            grads = iter(torch.autograd.grad(results, wanted, upstream))
            _empty(ctx.heads)
        found = [next(grads) if t.requires_grad else None for t in leaves]
        return *found, *[None] * (5 - len(found))


def _empty(tensors: list[Tensor]) -> None:
    for t in tensors:
        t.data = t.new_empty(0)


def _trl_utils() -> ModuleType:
    """`trl.trainer.utils`, after a check that it has the functions that `enable` replaces."""
    try:
        import trl
        from packaging.version import Version
        from trl.trainer import utils
    except ImportError as error:
        raise ImportError(f'sukhops.integrations.trl needs TRL: pip install "trl>={_OLDEST}"') from error
    works = f'; sukhops.integrations.trl works with TRL {_OLDEST}: pip install "trl=={_OLDEST}.*"'
    if Version(trl.__version__) < Version(_OLDEST):
        raise ImportError(f"found TRL {trl.__version__}, which is too old{works}")
    for name in ("_ChunkedLogProbFunction", "_use_triton", "maybe_gather_lm_head_ctx"):
        if not hasattr(utils, name):
            raise RuntimeError(f"found TRL {trl.__version__} without trl.trainer.utils.{name}{works}")
    found = tuple(inspect.signature(utils._ChunkedLogProbFunction.forward).parameters)
    if found != _PARAMETERS:
        raise RuntimeError(
            f"found TRL {trl.__version__}, whose trl.trainer.utils._ChunkedLogProbFunction.forward takes "
            f"({', '.join(found)}) instead of ({', '.join(_PARAMETERS)}){works}"
        )
    return utils
