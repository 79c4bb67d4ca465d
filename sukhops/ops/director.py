"""Director: a language-model head gated by a classifier of the next token, and operators to train it."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sukhops import _checks, _library
from sukhops._budget import budget_of_call
from sukhops.ops._director_arguments import affine_pair, checked_classifier, checked_director
from sukhops.parallel import director as parallel
from sukhops.parallel._dtensor import takes_dtensors

_ops = torch.ops.sukhops
_LAUNCHERS = "sukhops.triton_kernels.director"


class DirectorTopK(NamedTuple):
    values: Tensor  # [..., k], log-probabilities
    indices: Tensor  # [..., k]


class ClassifierTerms(NamedTuple):
    logit: Tensor  # [...], of the target
    norm: Tensor  # [...], of all other tokens


@takes_dtensors
def director_logp(
    hidden: Tensor,
    lm_weight: Tensor,
    cls_weight: Tensor | list[Tensor] | None,
    *,
    gamma: float | Tensor | list = 1.0,
    lm_bias: Tensor | None = None,
    cls_bias: Tensor | list | None = None,
    cls_affine: tuple | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Log-probabilities of the whole vocabulary under a language model gated by a classifier.

        logp = log_softmax(lm + gamma * logsigmoid(cls))

    with lm = hidden @ lm_weight.T + lm_bias and cls = hidden @ cls_weight.T + cls_bias. The classifier's
    logit of a token says how desirable the token is as the next one. Several classifiers (attributes) are
    given as lists, and their gates are added. A shared head has no classifier matrix: cls = a * lm + b.

    All floating-point arguments, including gamma and cls_affine, are differentiable. Only first derivatives
    are supported.

    Args:
        hidden: [..., D], float32, bfloat16, float16 or float64.
        lm_weight: [V, D], of the same dtype.
        cls_weight: [V, D], or a list of these for several classifiers. None if `cls_affine` is given.
        gamma: strength of the gate, finite and >= 0: a number, a tensor that broadcasts to [...], or a
            list of these, one per classifier. 0 switches the gate off, even if its logit is infinite.
        lm_bias: [V], or None.
        cls_bias: [V] or None, or a list of these for several classifiers.
        cls_affine: (a, b) of a shared head, numbers or scalar tensors, or None.
        group: process group whose ranks each hold a slice of the vocabulary, in rank order. Weights and
            biases are this rank's slice, which may be empty; all other arguments are equal on every rank.
            Each rank computes a loss from its own columns, and every rank must run its backward pass.

    Returns:
        [..., V], in nats, float32 (float64 for float64 inputs). With group, the columns of this rank's slice,
        normalized over the whole vocabulary.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device; cls_weight and
            cls_affine are both given or both None; a number gamma is negative or not finite.
        RuntimeError: a value of a tensor gamma is negative or not finite, on the CPU. On CUDA its row is NaN
            instead.

    Source: Arora et al. 2022 (Director).
    """
    arguments, rows = checked_director(
        hidden, lm_weight, cls_weight, gamma, lm_bias, cls_bias, cls_affine, group
    )
    logp = _ops.director(*arguments)[0] if group is None else parallel.director_logp(group, *arguments)
    return logp.reshape(*rows, logp.shape[-1])


@takes_dtensors
def director_topk(
    hidden: Tensor,
    lm_weight: Tensor,
    cls_weight: Tensor | list[Tensor] | None,
    k: int,
    *,
    gamma: float | Tensor | list = 1.0,
    lm_bias: Tensor | None = None,
    cls_bias: Tensor | list | None = None,
    cls_affine: tuple | None = None,
    group: ProcessGroup | None = None,
) -> DirectorTopK:
    """The k most probable tokens of `director_logp`, found without storing the others.

    All V are stored if k is larger than both 1,024 and V / 16 on a CPU, and if k is larger than 64 or the
    inputs are float64 on CUDA.

    Args:
        k: number of tokens per row, 1 <= k <= V.
        hidden, lm_weight, cls_weight, gamma, lm_bias, cls_bias, cls_affine, group: as in `director_logp`.

    Returns:
        Named tuple (values [..., k], indices [..., k]). values are log-probabilities in nats in descending
        order, float32 (float64 for float64 inputs); indices are int64, the lower one first among equal
        values. This is for decoding; `director_logp` has gradients.

    Raises:
        TypeError, ValueError, RuntimeError: as `director_logp`; k is out of range.
        NotImplementedError: a gradient of the values is computed.

    Source: Arora et al. 2022 (Director).
    """
    arguments, rows = checked_director(
        hidden, lm_weight, cls_weight, gamma, lm_bias, cls_bias, cls_affine, group
    )
    v = arguments[1].shape[0]
    if not isinstance(k, int) or isinstance(k, bool) or k < 1 or (group is None and k > v):
        raise ValueError(f"k: expected an int in [1, V = {v}], got {k!r}")
    if group is None:
        values, indices, *_ = _ops.director_topk(*arguments, k)
    else:
        values, indices = parallel.director_topk(group, *arguments, k)
    return DirectorTopK(values.reshape(*rows, k), indices.reshape(*rows, k))


def classifier_logit(
    hidden: Tensor, weight: Tensor, target: Tensor, label: Tensor, bias: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """The classifier's logit of one token per row: a dot product with one row of `weight`, not with all.

    Its gradient touches only the rows of `weight` that belong to targets.

    Args:
        hidden: [..., D], float32, bfloat16, float16 or float64.
        weight: [V, D], of the same dtype.
        target: [...], int64 or int32, in [0, V) or -100.
        label: [...], int64 or int32: 1 or 0 for a row of a classifier example, -1 for any other row.
        bias: [V], or None.
        group: as in `director_logp`.

    Returns:
        [...], float32 (float64 for float64 inputs); 0 where target is -100 or label is -1.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        RuntimeError: a target is outside [0, V), or a label outside {1, 0, -1} (not checked if the target is
            -100), on the CPU. On CUDA that row is NaN instead.

    Source: Arora et al. 2022 (Director): only the emitted token has a label.
    """
    hidden, weight, bias, target, label, rows = checked_classifier(hidden, weight, target, label, bias, group)
    dot = _ops.director_dot if group is None else partial(parallel.classifier_logit, group)
    return dot(hidden, weight, target, label, bias).reshape(rows)


def classifier_norm(
    hidden: Tensor, weight: Tensor, target: Tensor, label: Tensor, bias: Tensor | None = None,
    affine: tuple | None = None, group: ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """Regularizer that keeps the classifier undecided about the tokens that were not emitted.

    The mean over v != target of (sigmoid(cls_v) - 1/2)**2. The logits are computed in tiles and never stored.
    With `affine` = (a, b) of a shared head, cls = a * (hidden @ weight.T + bias) + b.

    Arguments and errors are those of `classifier_logit`; affine is cls_affine of `director_logp`.

    Returns:
        [...], float32 (float64 for float64 inputs), in [0, 1/4]; 0 where target is -100 or label is -1.

    Source: the explicit classifier norm of Director's public training code (Arora et al. 2022).
    """
    return classifier_terms(hidden, weight, target, label, bias, affine, group).norm


def classifier_terms(
    hidden: Tensor, weight: Tensor, target: Tensor, label: Tensor, bias: Tensor | None = None,
    affine: tuple | None = None, group: ProcessGroup | None = None,
) -> ClassifierTerms:  # fmt: skip
    """`classifier_logit` and `classifier_norm` in one call, whose backward pass makes one weight gradient.

    The logits of as many rows as fit a quarter of `sukhops.set_logits_budget` are kept for the backward pass.
    Arguments and errors are those of `classifier_norm`; affine changes the norm only.

    Returns:
        Named tuple (logit [...], norm [...]), float32 (float64 for float64 inputs).

    Source: Arora et al. 2022 (Director).
    """
    hidden, weight, bias, target, label, rows = checked_classifier(hidden, weight, target, label, bias, group)
    pair = None if affine is None else affine_pair(affine, hidden)
    terms = _ops.director_norm if group is None else partial(parallel.classifier_terms, group)
    kept = budget_of_call(weight, bias) // 4  # most of a loss's memory is for the language model
    norm, logit, *_ = terms(hidden, weight, target, label, bias, pair, kept)
    return ClassifierTerms(logit.reshape(rows), norm.reshape(rows))


# ------------------------------------------------------------------ fakes


def _acc(hidden: Tensor) -> torch.dtype:
    return _checks.accumulation_dtype(hidden.dtype)


@torch.library.register_fake("sukhops::director")
def _(hidden, lm_weight, cls_weight, gamma, lm_bias, cls_bias, cls_affine):
    n, acc = hidden.shape[0], _acc(hidden)
    sizes = ((n, lm_weight.shape[0]), (n,), (n,))
    return tuple(hidden.new_empty(size, dtype=acc) for size in sizes)


@torch.library.register_fake("sukhops::director_topk")
def _(hidden, lm_weight, cls_weight, gamma, lm_bias, cls_bias, cls_affine, k):
    n, acc = hidden.shape[0], _acc(hidden)
    found = hidden.new_empty(n, k, dtype=acc), hidden.new_empty(n, k, dtype=torch.int64)
    return *found, *(hidden.new_empty(n, dtype=acc) for _ in range(2))


@torch.library.register_fake("sukhops::director_backward")
def _(grad, grad_elsewhere, logp, hidden, lm_weight, cls_weight, gamma, lm_bias, cls_bias, cls_affine,
      need_hidden, need_lm_weight, need_cls_weight, need_bias):  # fmt: skip
    def like(t, need):
        return t.new_empty(t.shape if need else (0,))

    return (
        like(hidden, need_hidden),
        like(lm_weight, need_lm_weight),
        [like(w, need_cls_weight) for w in cls_weight],
        gamma.new_empty(gamma.shape),
        hidden.new_empty(lm_weight.shape[0] if need_bias and lm_bias is not None else 0),
        [like(b, need_bias) for b in cls_bias],
        gamma.new_empty(0 if cls_affine is None else 2),
    )


@torch.library.register_fake("sukhops::director_dot")
def _(hidden, weight, target, label, bias):
    return hidden.new_empty(hidden.shape[0], dtype=_acc(hidden))


@torch.library.register_fake("sukhops::director_norm")
def _(hidden, weight, target, label, bias, affine, logits_budget):
    n, v, acc = hidden.shape[0], weight.shape[0], _acc(hidden)
    kept = torch.sym_min(n, logits_budget // (v * acc.itemsize))  # min would compile a graph for each case
    return tuple(hidden.new_empty(size, dtype=acc) for size in ((n,), (n,), (kept, v)))


def _fake_grads(hidden, weight, need_hidden, need_weight, need_bias):
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


@torch.library.register_fake("sukhops::director_dot_backward")
def _(grad, hidden, weight, target, label, need_hidden, need_weight, need_bias):
    return _fake_grads(hidden, weight, need_hidden, need_weight, need_bias)


@torch.library.register_fake("sukhops::director_norm_backward")
def _(grad, grad_logit, hidden, weight, target, label, bias, affine, logits, need_hidden, need_weight,
      need_bias):  # fmt: skip
    grads = _fake_grads(hidden, weight, need_hidden, need_weight, need_bias)
    return *grads, hidden.new_empty(0 if affine is None else 2, dtype=_acc(hidden))


# ------------------------------------------------------------------ autograd


def _save(ctx, inputs, output):
    hidden, lm_weight, cls_weight, gamma, lm_bias, cls_bias, cls_affine = inputs
    logp, *sums = output
    ctx.heads = len(cls_weight)
    ctx.mark_non_differentiable(*sums)
    ctx.save_for_backward(logp, hidden, lm_weight, gamma, lm_bias, cls_affine, *cls_weight, *cls_bias)


def _gradient(ctx, grad, *_):
    logp, hidden, lm_weight, gamma, lm_bias, cls_affine, *rest = ctx.saved_tensors
    cls_weight, cls_bias = rest[: ctx.heads], rest[ctx.heads :]
    need = [any(n) if isinstance(n, (list, tuple)) else n for n in ctx.needs_input_grad]
    grads = _ops.director_backward(
        grad, None, logp, hidden, lm_weight, cls_weight, gamma, lm_bias, cls_bias, cls_affine,
        need[0], need[1], need[2], need[4] or need[5],
    )  # fmt: skip
    return tuple(_wanted(grads, ctx.needs_input_grad))


def _wanted(grads, need):
    """The gradients, with None for those that are not needed. Lists hold one entry per classifier."""
    if isinstance(need, (list, tuple)):
        return [_wanted(g, n) for g, n in zip(grads, need, strict=True)]
    return grads if need else None


def _no_gradient(ctx, *grads):
    raise NotImplementedError("director_topk is for decoding and has no gradient: use director_logp")


def _save_dot(ctx, inputs, output):
    hidden, weight, target, label, _ = inputs
    ctx.save_for_backward(hidden, weight, target, label)


def _gradient_dot(ctx, grad):
    need = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    hidden, weight, bias = _wanted(_ops.director_dot_backward(grad, *ctx.saved_tensors, *need), need)
    return hidden, weight, None, None, bias


def _save_norm(ctx, inputs, output):
    *inputs, _ = inputs
    ctx.save_for_backward(*inputs, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # a gradient of the kept logits would be as large as they are


def _gradient_norm(ctx, grad, grad_logit, _):
    hidden = ctx.saved_tensors[0]
    grad, grad_logit = (
        hidden.new_zeros(hidden.shape[0], dtype=_acc(hidden)) if g is None else g for g in (grad, grad_logit)
    )
    need = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    grads = _ops.director_norm_backward(grad, grad_logit, *ctx.saved_tensors, *need)
    hidden, weight, bias, affine = _wanted(grads, [*need, ctx.needs_input_grad[5]])
    return hidden, weight, None, None, bias, affine, None


torch.library.register_autograd("sukhops::director", _gradient, setup_context=_save)
torch.library.register_autograd("sukhops::director_topk", _no_gradient)
torch.library.register_autograd("sukhops::director_dot", _gradient_dot, setup_context=_save_dot)
torch.library.register_autograd("sukhops::director_norm", _gradient_norm, setup_context=_save_norm)
for _name in ("director_backward", "director_dot_backward", "director_norm_backward"):
    _library.not_differentiable_twice(_name)
for _name, _launcher in (
    ("director", "logp"), ("director_topk", "topk"), ("director_backward", "backward"),
    ("director_dot", "dot"), ("director_dot_backward", "dot_backward"),
    ("director_norm", "norm"), ("director_norm_backward", "norm_backward"),
):  # fmt: skip
    _library.cuda_launcher(_name, f"{_LAUNCHERS}:{_launcher}")
