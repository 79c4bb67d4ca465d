"""Exact sums over all segmentations of a sequence: log-partition, posterior, entropy, best one, samples.

scores[b, t, k] is the log-score of the segment that covers positions t .. t+k of sequence b; it is -inf if
there is no such segment. A segmentation covers [0, length) with consecutive segments; its log-score is the
sum of their log-scores. Segments that extend beyond the length are ignored.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sukhops import _checks, _library

_ops = torch.ops.sukhops


class Viterbi(NamedTuple):
    score: Tensor  # [B]
    segments: Tensor  # [B, T], int64


def segmentation_logz(scores: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Log-partition function: log of the sum, over all segmentations, of exp(log-score).

    Exact for sequences of any length, also if some positions cannot be reached: sums are stored as a mantissa
    and an exponent, and the logarithm is taken at the end. Sums of scores may be as large as 3e15 nats (2^52
    binary exponents). Beyond that every result of the sequence is NaN, never a wrong number. A sequence with
    float32 scores above 5e6 / max(16, K) is computed in float64 on the CPU, which takes several times longer;
    on CUDA its results may be NaN. The gradient is the posterior of each segment, exactly 0 for an impossible
    segment, and can be differentiated once more. Time and memory are linear in T. A mantissa and an exponent
    per position are kept for the backward pass, on CUDA for both recursions; on the CPU the memory of the
    gradient [B, T, K] is also allocated in the forward pass.

    Args:
        scores: [B, T, K], float32, float64, bfloat16 or float16 (half precision is computed in float32).
            Autocast does not change their dtype. K is the length of the longest segment.
        lengths: [B], int64 or int32, each in [0, T]. None: every sequence has T positions.

    Returns:
        [B], in nats, float32 (float64 for float64 inputs). -inf with gradient 0 if no segmentation exists; 0
        for length 0; NaN if a score within the length is NaN or +inf, or if sums are too large.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        RuntimeError: a length is outside [0, T], on the CPU (on CUDA the result of that sequence is NaN
            instead); K is above 128 (64 in float64), on CUDA.

    Source: the marginal likelihood of Grave et al. 2019 (hybrid language models).
    """
    scores, lengths = _prepare(scores, lengths)
    needs_gradient = _needs_gradient(scores)
    if needs_gradient and not torch.compiler.is_compiling():
        return _Logz.apply(scores, lengths)
    return _ops.segmentation_logz(scores, lengths, needs_gradient)[0]


def segmentation_marginals(scores: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The posterior probability of every segment: the total probability of the segmentations that contain it.

    Arguments and errors are those of `segmentation_logz`.

    Returns:
        [B, T, K], float32 (float64 for float64 inputs). 0 for impossible segments, positions from the length
        on and sequences without a segmentation. The sum over k is the probability that a segment starts at t;
        the sum of (k + 1) * posterior is the length. Only first derivatives of the posterior are supported.

    Source: the gradient of the marginal likelihood of Grave et al. 2019.
    """
    scores, lengths = _prepare(scores, lengths)
    ones = scores.new_ones(scores.shape[0])
    if scores.is_cpu and not _needs_gradient(scores) and not torch.compiler.is_compiling():
        scores = scores.detach()
        _, alpha, exponent, kept = _ops.segmentation_logz_kept(scores, lengths)
        _ops.segmentation_marginals_kept(scores, lengths, alpha, exponent, ones, kept)
        return kept
    _, alpha, exponent = _ops.segmentation_logz(scores.detach(), lengths, True)
    return _ops.segmentation_marginals(scores, lengths, alpha, exponent, ones)


def segmentation_entropy(scores: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Entropy of the distribution over segmentations.

    Arguments and errors are those of `segmentation_logz`.

    Returns:
        [B], in nats, float32 (float64 for float64 inputs), computed in float64; 0 if no segmentation exists.
        Only first derivatives are supported.

    Source: the distribution of Grave et al. 2019; the entropy follows from the chain rule over boundaries.
    """
    return _ops.segmentation_entropy(*_prepare(scores, lengths))


def segmentation_viterbi(scores: Tensor, lengths: Tensor | None = None) -> Viterbi:
    """The segmentation with the largest log-score.

    Arguments and errors are those of `segmentation_logz`.

    Returns:
        Named tuple (score [B], segments [B, T]). score is the log-score in nats, float32 (float64 for float64
        inputs), summed in float64. segments, int64, holds the length of the segment that starts at t, and 0
        if none starts there. Among equal segmentations the one with the shortest last segment is taken, then
        the shortest segment before it, and so on. If no segmentation exists, score is -inf; if a score is NaN
        or +inf, score is NaN; in both cases segments are all 0. There is no gradient (that of score would be
        the segmentation itself).

    Source: Viterbi 1967, over the lattice of Grave et al. 2019.
    """
    scores, lengths = _prepare(scores, lengths)
    return Viterbi(*_ops.segmentation_viterbi(scores.detach(), lengths))


def segmentation_sample(
    scores: Tensor,
    num_samples: int,
    lengths: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws exact, independent samples from the distribution over segmentations.

    Args:
        scores, lengths: as in `segmentation_logz`.
        num_samples: number of samples per sequence, >= 0. All samples of a call share one forward recursion.
        generator: random generator for the seed, on the device of `scores`. None: torch's default generator.

    Returns:
        [num_samples, B, T], int64, like segments of `segmentation_viterbi`; all 0 if no segmentation exists.
        The same seed gives the same samples for any number of threads.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device; num_samples < 0.
        RuntimeError: a length is outside [0, T], a score is NaN or +inf, or sums are too large, on the CPU.
            On CUDA the segments of that sequence are -1 instead.

    Source: forward filtering, backward sampling (Frühwirth-Schnatter 1994) over the lattice of Grave et al.
    2019.
    """
    if not isinstance(num_samples, int) or isinstance(num_samples, bool):
        raise TypeError(f"num_samples: expected an int, got {type(num_samples).__name__}")
    if num_samples < 0:
        raise ValueError(f"num_samples: expected >= 0, got {num_samples}")
    scores, lengths = _prepare(scores, lengths)
    scores = scores.detach()
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
    if generator is not None and generator.device.type != scores.device.type:
        raise ValueError(f"generator: expected on {scores.device} like scores, got {generator.device}")
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator, device=scores.device)
    _, alpha, exponent = _ops.segmentation_logz(scores, lengths, False)
    return _ops.segmentation_sample(scores, lengths, alpha, exponent, num_samples, seed)


def _prepare(scores: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Checks the arguments and casts half-precision scores to float32; autograd casts their gradient back.

    Autocast is ignored, because it would round sums of log-probs to three digits.
    """
    _checks.check_floats(scores=scores)
    if scores.dim() != 3:
        raise ValueError(f"scores: expected shape [B, T, K], got {list(scores.shape)}")
    if not _library.has_cuda_library and scores.device.type == "cuda":
        raise NotImplementedError(
            f"scores: expected a cpu tensor, got {scores.device}: the CUDA kernels of segmentation are not "
            f"built. Build them, with nvcc and a CUDA version of torch: {_library.BUILD}"
        )
    if lengths is not None:
        _checks.check_integers("lengths", lengths)
        _checks.check_device("scores", scores, "lengths", lengths)
        _checks.check_shape("lengths", lengths, (scores.shape[0],), "[B]")
        lengths = lengths.long()
    dtype = _checks.accumulation_dtype(scores.dtype)
    return scores if scores.dtype == dtype else scores.to(dtype), lengths


def _needs_gradient(scores: Tensor) -> bool:
    return torch.is_grad_enabled() and scores.requires_grad


# ------------------------------------------------------------------ fakes


@torch.library.register_fake("sukhops::segmentation_logz")
def _(scores, lengths, need_gradient):
    b, t, _ = scores.shape
    cuda = scores.device.type == "cuda"  # there mantissas are float64; the gradient needs both recursions
    shape = (2 if need_gradient and cuda else 1, b, t + 1)
    alpha = scores.new_empty(shape, dtype=torch.float64 if cuda else scores.dtype)
    return scores.new_empty(b), alpha, scores.new_empty(shape, dtype=torch.float64)


@torch.library.register_fake("sukhops::segmentation_marginals")
def _(scores, lengths, alpha, exponent, grad):
    return scores.new_empty(scores.shape)


@torch.library.register_fake("sukhops::segmentation_logz_kept")
def _(scores, lengths):
    b, t, k = scores.shape
    alpha = scores.new_empty(1, b, t + 1)
    return (
        scores.new_empty(b),
        alpha,
        alpha.new_empty(alpha.shape, dtype=torch.float64),
        scores.new_empty(b, t, k),
    )


@torch.library.register_fake("sukhops::segmentation_marginals_kept")
def _(scores, lengths, alpha, exponent, grad, kept):
    return None


@torch.library.register_fake("sukhops::segmentation_marginals_backward")
def _(scores, lengths, grad, upstream, need_scores):
    b, t, k = scores.shape
    return scores.new_empty(b), scores.new_empty(b if need_scores else 0, t, k)


@torch.library.register_fake("sukhops::segmentation_entropy")
def _(scores, lengths):
    return scores.new_empty(scores.shape[0])


@torch.library.register_fake("sukhops::segmentation_entropy_backward")
def _(scores, lengths, grad):
    return scores.new_empty(scores.shape)


@torch.library.register_fake("sukhops::segmentation_viterbi")
def _(scores, lengths):
    b, t, _ = scores.shape
    return scores.new_empty(b), scores.new_empty(b, t, dtype=torch.int64)


@torch.library.register_fake("sukhops::segmentation_sample")
def _(scores, lengths, alpha, exponent, num_samples, seed):
    b, t, _ = scores.shape
    return scores.new_empty(num_samples, b, t, dtype=torch.int64)


# ------------------------------------------------------------------ autograd


def _save_logz(ctx, inputs, output):
    scores, lengths, _ = inputs
    _, alpha, exponent = output
    ctx.mark_non_differentiable(alpha, exponent)
    ctx.set_materialize_grads(False)  # else torch allocates zeros as gradients of alpha and exponent
    ctx.save_for_backward(scores, lengths, alpha, exponent)


def _gradient_logz(ctx, grad, *_):
    if grad is None:
        return None, None, None
    return _ops.segmentation_marginals(*ctx.saved_tensors, grad), None, None


class _Logz(torch.autograd.Function):
    """The same gradient as the registered formula, with less Python: registration costs as much as a kernel.

    On the CPU the forward pass stores exp(scores) in a buffer, and the backward pass overwrites the buffer
    with the gradient. That works only once. If other code may see the buffer (saved-tensor hooks) or the
    backward pass may run again, the gradient is computed from the scores instead.
    """

    @staticmethod
    def forward(ctx, scores, lengths):
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # e.g. activation checkpointing
        with torch._C._AutoDispatchBelowAutograd():
            if scores.is_cpu and hooks is None:
                logz, alpha, exponent, kept = _ops.segmentation_logz_kept(scores, lengths)
            else:
                (logz, alpha, exponent), kept = _ops.segmentation_logz(scores, lengths, True), None
        ctx.save_for_backward(scores, lengths, alpha, exponent, kept)
        return logz

    @staticmethod
    def backward(ctx, grad):
        *saved, kept = ctx.saved_tensors
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # the gradient needs a gradient itself
            return _ops.segmentation_marginals(*saved, grad), None
        with torch._C._AutoDispatchBelowAutograd():
            if kept is None or _may_run_again(grad):
                return _ops.segmentation_marginals(*saved, grad), None
            _ops.segmentation_marginals_kept(*saved, grad, kept)
        return kept, None


def _may_run_again(grad):
    """Whether the graph of this backward pass is retained, or a batch of upstream gradients shares it."""
    retained = torch._C._autograd._get_current_graph_task_keep_graph()
    batched = torch._C._functorch.is_legacy_batchedtensor(grad) or torch._C._functorch.is_batchedtensor(grad)
    return retained or batched


def _save_marginals(ctx, inputs, output):
    scores, lengths, _, _, grad = inputs
    ctx.save_for_backward(scores, lengths, grad)


def _gradient_marginals(ctx, upstream):
    """alpha and exponent get no gradient: the gradient of the scores includes their part."""
    need = ctx.needs_input_grad
    grad_grad, grad_scores = _ops.segmentation_marginals_backward(*ctx.saved_tensors, upstream, need[0])
    return grad_scores if need[0] else None, None, None, None, grad_grad if need[4] else None


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient_entropy(ctx, grad):
    return _ops.segmentation_entropy_backward(*ctx.saved_tensors, grad), None


torch.library.register_autograd("sukhops::segmentation_logz", _gradient_logz, setup_context=_save_logz)
torch.library.register_autograd(
    "sukhops::segmentation_marginals", _gradient_marginals, setup_context=_save_marginals
)
torch.library.register_autograd("sukhops::segmentation_entropy", _gradient_entropy, setup_context=_save)
for _name in ("segmentation_marginals_backward", "segmentation_entropy_backward"):
    _library.not_differentiable_twice(_name)
