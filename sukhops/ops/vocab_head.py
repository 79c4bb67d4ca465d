"""Log-probs, statistics and largest logits of a linear head, with exact gradients, without storing logits."""

import math
from collections.abc import Collection
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sukhops import _checks, _library
from sukhops._budget import budget_of_call
from sukhops.parallel import vocab_head as parallel
from sukhops.parallel._dtensor import takes_dtensors

_head = torch.ops.sukhops.vocab_head.default
_backward = torch.ops.sukhops.vocab_head_backward.default
_LAUNCHERS = "sukhops.triton_kernels.vocab_head"


class LogpAndLse(NamedTuple):
    logp: Tensor  # shaped as target
    lse: Tensor  # [...]


class TopK(NamedTuple):
    values: Tensor  # [..., k]
    indices: Tensor  # [..., k]
    lse: Tensor  # [...]


class TokenStats(NamedTuple):  # each [...], or None if not requested
    logp: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None
    log_sum_sq: Tensor | None
    mean_logit: Tensor | None
    top1: Tensor | None


STATISTICS = ("entropy", "log_sum_sq", "mean_logit")  # outputs that need additional sums over the vocabulary


class Head(NamedTuple):
    """Results of one pass over the vocabulary. Rows whose targets are all ignored are 0.

    The largest logit and the log of the sum are returned separately: if all logits of a row share a large
    offset, log-probs computed from maximum + log_sum would lose digits. `maximum` has no gradient.
    """

    maximum: Tensor  # [N]
    log_sum: Tensor  # [N], log sum_v exp(logit_v - maximum)
    target_logit: Tensor  # [N, K]
    topk_value: Tensor  # [N, k], descending
    topk_index: Tensor  # [N, k]
    entropy: Tensor  # [N], or [0] if no statistics are requested
    log_sum_sq: Tensor  # as entropy
    mean_logit: Tensor  # as entropy

    def lse(self) -> Tensor:  # [N]
        return self.maximum + self.log_sum

    def logp(self, logit: Tensor) -> Tensor:
        """Log-probs [N, K] of logits [N, K]."""
        return (logit - self.maximum.unsqueeze(-1)) - self.log_sum.unsqueeze(-1)


@overload
def linear_logp(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *,
    softcap: float | None = None, scale: float = 1.0, temperature: float = 1.0, ignore_index: int = -100,
    return_lse: Literal[False] = False, group: ProcessGroup | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def linear_logp(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *,
    softcap: float | None = None, scale: float = 1.0, temperature: float = 1.0, ignore_index: int = -100,
    return_lse: Literal[True], group: ProcessGroup | None = None,
) -> LogpAndLse: ...  # fmt: skip
@takes_dtensors
def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_lse: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor | LogpAndLse:
    """Log-probabilities of target tokens under a linear head, without storing its logits.

        logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature
        logp   = logits[target] - logsumexp(logits)

    Without softcap, logits = scale * (hidden @ weight.T + bias) / temperature. The error of a log-prob is a
    few roundings of max(1, |logp|), even if the logits of a row share a large offset.

    Rows whose targets are all ignored are dropped before the matrix product. Gradients are exact for any
    upstream gradient, and only those that are needed are computed: with a frozen head, forward and backward
    pass take two matrix products instead of four (three for rows whose logits `set_logits_budget` allows to
    keep). Only first derivatives are supported.

    Args:
        hidden: [..., D], float32, bfloat16, float16 or float64.
        weight: [V, D], of the same dtype.
        target: [...] (one per row) or [..., K] (K per row), int64 or int32, in [0, V) or `ignore_index`.
        bias: [V], or None.
        softcap: bound of the logits, > 0. None: no bound.
        scale: factor of the logits before the bound.
        temperature: divisor of the logits after the bound, > 0.
        ignore_index: target of an ignored token: its log-prob is exactly 0, without gradient.
        return_lse: whether to return the log-sum-exp of each row too.
        group: process group whose ranks each hold a slice of the vocabulary, in rank order. weight and bias
            are this rank's slice, which may be empty; target holds indices into the whole vocabulary. All
            other arguments must be equal on every rank, and so are the results and the gradient of hidden.

    Returns:
        Log-probs in nats, shaped as `target`, float32 (float64 for float64 inputs). With `return_lse`, the
        named tuple (logp, lse [...]), both differentiable; lse is 0 if all K > 0 targets are ignored.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        RuntimeError: a target is outside [0, V), on the CPU. On CUDA its row is NaN instead.

    Source: all losses of this package use it; one target per row as in Rafailov et al. 2023 (DPO), several as
    in Grave et al. 2019 (hybrid language models).
    """
    hidden, weight, bias = _checked_head(hidden, weight, bias, softcap, scale, temperature, group)
    _checks.check_integers("target", target)
    _checks.check_device("hidden", hidden, "target", target)
    single = target.dim() == hidden.dim() - 1
    rows = hidden.shape[:-1]
    if target.shape[: len(rows)] != rows or target.dim() not in (len(rows), len(rows) + 1):
        raise ValueError(
            f"target: expected shape {[*rows]} (one per row of hidden) or {[*rows, 'K']} (K per row), "
            f"got {list(target.shape)}"
        )
    targets = target.reshape(math.prod(hidden.shape[:-1]), 1 if single else target.shape[-1]).long()
    head = vocab_head(
        hidden, weight, targets, bias,
        softcap=softcap, scale=scale, temperature=temperature, ignore_index=ignore_index, group=group,
    )  # fmt: skip
    logp = head.logp(head.target_logit).masked_fill(targets == ignore_index, 0.0).reshape(target.shape)
    return LogpAndLse(logp, head.lse().reshape(rows)) if return_lse else logp


@takes_dtensors
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    outputs: Collection[str] = ("logp",),
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    group: ProcessGroup | None = None,
) -> TokenStats:
    """Statistics of a linear head's distribution for each token, all from one pass over the vocabulary.

        logits     = as in `linear_logp`,  p = softmax(logits)
        logp       = log p[target]
        lse        = log sum_v exp(logits[v])
        entropy    = -sum_v p[v] log p[v]
        log_sum_sq = log sum_v p[v]^2
        mean_logit = sum_v logits[v] / V
        top1       = target is the lowest index among the largest logits

    logp, lse and entropy are differentiable, with d entropy / d logits[v] = -p[v] (log p[v] + entropy); the
    others have no gradient. Requesting entropy, log_sum_sq or mean_logit computes the sums of all three. With
    a frozen head, the backward pass of the entropy takes two matrix products, that of logp and lse none.

    Args:
        hidden, weight, bias, softcap, scale, temperature, ignore_index, group: as in `linear_logp`.
        target: [...], one per row, int64 or int32, in [0, V) or `ignore_index`.
        outputs: names of the outputs to compute, at least one.

    Returns:
        Named tuple (logp, lse, entropy, log_sum_sq, mean_logit, top1), each [...], or None if not requested.
        In nats, float32 (float64 for float64 inputs); top1 is bool. Ignored rows are 0 and False.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device; outputs is invalid.
        RuntimeError: a target is outside [0, V), on the CPU. On CUDA its row is NaN and top1 False instead.

    Source: numbers that trainers log per token or use as regularizers; log_sum_sq is the denominator of the
    weight in Zhou et al. 2024 (WPO).
    """
    check_outputs(outputs)
    hidden, weight, bias = _checked_head(hidden, weight, bias, softcap, scale, temperature, group)
    _checks.check_integers("target", target)
    _checks.check_device("hidden", hidden, "target", target)
    rows = hidden.shape[:-1]
    _checks.check_shape("target", target, rows, "one per row of hidden")
    targets = target.reshape(-1, 1).long()
    top, statistics = int("top1" in outputs), tuple(n for n in STATISTICS if n in outputs)
    differentiable = not {"logp", "lse", "entropy"}.isdisjoint(outputs)
    with torch.set_grad_enabled(torch.is_grad_enabled() and differentiable):
        head = vocab_head(
            hidden, weight, targets, bias, k=top, statistics=statistics,
            softcap=softcap, scale=scale, temperature=temperature, ignore_index=ignore_index, group=group,
        )  # fmt: skip
    found = {"entropy": head.entropy, "log_sum_sq": head.log_sum_sq, "mean_logit": head.mean_logit}
    if "logp" in outputs:
        found["logp"] = head.logp(head.target_logit)
    if "lse" in outputs:
        found["lse"] = head.lse()
    if "top1" in outputs:
        found["top1"] = (head.topk_index == targets) & (targets != ignore_index) & ~head.topk_value.isnan()
    return TokenStats(*(found[n].reshape(rows) if n in outputs else None for n in TokenStats._fields))


def check_outputs(outputs: Collection[str]) -> None:
    """Raises a ValueError unless `outputs` is a list (or set) of fields of `TokenStats`, at least one."""
    names = TokenStats._fields
    is_list = isinstance(outputs, Collection) and not isinstance(outputs, str)
    if not is_list or not outputs or any(name not in names for name in outputs):
        raise ValueError(f"outputs: expected some of {', '.join(names)}, got {outputs!r}")


@takes_dtensors
def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
) -> TopK:
    """The k largest logits of a linear head and its log-sum-exp, without storing the other logits.

    Args:
        hidden: [..., D], float32, bfloat16, float16 or float64.
        weight: [V, D], of the same dtype.
        k: number of logits per row, 1 <= k <= V.
        bias, softcap, scale, temperature, group: as in `linear_logp`.

    Returns:
        Named tuple (values [..., k], indices [..., k], lse [...]). values are logits in descending order, the
        lower index first among equal ones; their log-probs are `values - lse[..., None]`, up to the rounding
        of lse. float32 (float64 for float64 inputs), indices int64. values and lse are differentiable.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device; k is out of range.

    Source: CRINGE (Adolphs et al. 2023) and decoding need the largest logits.
    """
    hidden, weight, bias = _checked_head(hidden, weight, bias, softcap, scale, temperature, group)
    if not isinstance(k, int) or k < 1 or (group is None and k > weight.shape[0]):
        raise ValueError(f"k: expected an int in [1, V = {weight.shape[0]}], got {k!r}")
    rows = hidden.shape[:-1]
    none = torch.empty(math.prod(rows), 0, dtype=torch.int64, device=hidden.device)
    head = vocab_head(
        hidden, weight, none, bias, k=k, softcap=softcap, scale=scale, temperature=temperature, group=group
    )
    if head.topk_value.shape[-1] < k:  # with group, the size of the vocabulary is known only now
        raise ValueError(f"k: expected an int in [1, V = {head.topk_value.shape[-1]}], got {k!r}")
    shape = (*rows, k)
    return TopK(head.topk_value.reshape(shape), head.topk_index.reshape(shape), head.lse().reshape(rows))


def target_and_topk(
    hidden: Tensor, weight: Tensor, target: Tensor, k: int, bias: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Head:  # fmt: skip
    """The logit of one target per row, the k (at most V) largest logits and the log-sum-exp, in one pass.

    hidden [..., D] is flattened to N rows. Errors are those of `linear_logp` and `linear_topk`. Rows whose
    target is -100 are dropped before the matrix product and are 0. If a loss uses neither log-sum-exp nor
    log-probs, the gradient touches only k + 1 rows of the weight per token.
    """
    hidden, weight, bias = _checked_head(hidden, weight, bias, group=group)
    _checks.check_integers("target", target)
    _checks.check_device("hidden", hidden, "target", target)
    rows = hidden.shape[:-1]
    _checks.check_shape("target", target, rows, "one per row of hidden")
    k = k if group is not None else min(k, weight.shape[0])
    return vocab_head(hidden, weight, target.reshape(-1, 1).long(), bias, k=k, group=group)


def vocab_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    k: int = 0,
    statistics: tuple[str, ...] = (),
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    group: ProcessGroup | None = None,
) -> Head:
    """Calls the operator on checked arguments: hidden [..., D] is flattened to N rows, targets are [N, K].

    statistics: the requested ones of STATISTICS, in its order; with group the others have shape [0].
    """
    if group is not None:
        return parallel.head(
            vocab_head, group, hidden, weight, targets, bias, k=k, statistics=statistics, softcap=softcap,
            scale=scale, temperature=temperature, ignore_index=ignore_index,
        )  # fmt: skip
    need = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden, weight, bias)]
    flat = hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1])
    *outputs, _, _ = _head(
        flat, weight, targets, bias, k, bool(statistics), softcap, scale, temperature, ignore_index,
        budget_of_call(weight, bias), *need,
    )  # fmt: skip
    return Head(*outputs)


def _checked_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None = None, scale: float = 1.0,
    temperature: float = 1.0, group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    hidden, weight, bias = _checks.as_floats(hidden=hidden, weight=weight, bias=bias)
    _checks.check_weight("weight", hidden, weight, bias, "bias", group)
    for name, number in (("softcap", softcap), ("scale", scale)):
        if isinstance(number, Tensor):
            raise TypeError(f"{name}: expected a number, got a tensor, which would get no gradient")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap: expected a finite number > 0 or None, got {softcap!r}")
    if not abs(scale) < float("inf"):
        raise ValueError(f"scale: expected a finite number, got {scale!r}")
    if not isinstance(temperature, int | float) or not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature!r}")
    return hidden, weight, bias


@torch.library.register_fake("sukhops::vocab_head")
def _(hidden, weight, target, bias, k, statistics, softcap, scale, temperature, ignore_index, logits_budget,
      need_hidden, need_weight, need_bias):  # fmt: skip
    acc = _checks.accumulation_dtype(hidden.dtype)
    (n, d), v = hidden.shape, weight.shape[0]
    keep_mean = need_hidden and not need_weight and not need_bias
    # min would compile one graph for calls within the budget and one for others
    kept = torch.sym_min(n, logits_budget // (v * acc.itemsize)) if need_weight or need_bias else 0
    return (
        hidden.new_empty(n, dtype=acc),
        hidden.new_empty(n, dtype=acc),
        hidden.new_empty(n, target.shape[1], dtype=acc),
        hidden.new_empty(n, k, dtype=acc),
        target.new_empty(n, k),
        *(hidden.new_empty(n if statistics else 0, dtype=acc) for _ in STATISTICS),
        hidden.new_empty((n, d) if keep_mean else (0,), dtype=acc),
        hidden.new_empty(kept, v, dtype=acc),
    )


@torch.library.register_fake("sukhops::vocab_head_backward")
def _(hidden, weight, target, bias, topk_index, maximum, log_sum, entropy, mean_weight, logits, grad_log_sum,
      grad_target, grad_topk, grad_entropy, softcap, scale, temperature, ignore_index, need_hidden,
      need_weight, need_bias):  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty((weight.shape[0],) if need_bias else (0,)),
    )


def _setup_context(ctx, inputs, output):
    hidden, weight, target, bias, _, statistics, *ctx.options = inputs[:10]
    maximum, log_sum, _, _, topk_index, entropy, log_sum_sq, mean_logit, mean_weight, logits = output
    ctx.save_for_backward(
        hidden, weight, target, bias, topk_index, maximum, log_sum, entropy, mean_weight, logits
    )
    constants = (maximum, topk_index, log_sum_sq, mean_logit, mean_weight, logits)
    ctx.mark_non_differentiable(*constants, *(() if statistics else (entropy,)))
    ctx.set_materialize_grads(False)  # None instead of zeros for unused outputs, which saves work


def _gradient(ctx, _maximum, grad_log_sum, grad_target, grad_topk, _index, grad_entropy, *_):
    need = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    upstream = (grad_log_sum, grad_target, grad_topk, grad_entropy)
    grads = _backward(*ctx.saved_tensors, *upstream, *ctx.options, *need)
    hidden, weight, bias = (g if wanted else None for g, wanted in zip(grads, need, strict=True))
    return hidden, weight, None, bias, *[None] * 10


torch.library.register_autograd("sukhops::vocab_head", _gradient, setup_context=_setup_context)
_library.not_differentiable_twice("vocab_head_backward")
_library.cuda_launcher("vocab_head", f"{_LAUNCHERS}:forward")
_library.cuda_launcher("vocab_head_backward", f"{_LAUNCHERS}:backward")
