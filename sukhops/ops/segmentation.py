"""Exact sums over all segmentations of a sequence: log-partition, posterior, entropy, the best one, samples.

scores[b, t, k] is the log-score of the segment that covers positions t .. t+k of sequence b, -inf where
there is no such segment. A segmentation covers [0, length) with segments end to end; its log-score is
their sum. Segments that run past the end do not count.
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
    """Log of the sum, over all segmentations, of the exponential of their score.

    Exact for sequences of any length and for positions that no segment reaches: numbers are kept as a
    mantissa and an exponent, and the logarithm is taken at the end. Sums of scores may reach 3e15 nats (2^52
    binary exponents); beyond that every result of the sequence is NaN, never a wrong number. The CPU computes
    a sequence with float32 scores above 5e6 / max(16, K) in float64, which takes several times longer; on
    CUDA it may be NaN. The gradient is the posterior of each segment, exactly 0 for an impossible one; it is
    differentiable once more. Time and memory are linear in T; beside the gradient, whose memory the CPU takes
    in the forward, B * T numbers are kept.

    Args:
        scores: [B, T, K], float32, float64, or bfloat16 and float16 (computed in float32). Under autocast
            they stay what they are. K is the length of the longest segment.
        lengths: [B], int64 or int32, each in [0, T], or None where every sequence has T positions.

    Returns:
        [B], in nats, float32 (float64 for float64 inputs): -inf, with a gradient of zero, where no
        segmentation exists; 0 for length 0; NaN where a score that counts is NaN or +inf, or sums are too
        large.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: a length outside [0, T], on the CPU (on CUDA its sequence is NaN instead); K above 128
            (64 in float64), on CUDA.

    Source: the marginal likelihood of Grave et al. 2019 (hybrid language models).
    """
    scores, lengths = _prepare(scores, lengths)
    needs_gradient = _needs_gradient(scores)
    if needs_gradient and not torch.compiler.is_compiling():
        return _Logz.apply(scores, lengths)
    return _ops.segmentation_logz(scores, lengths, needs_gradient)[0]


def segmentation_marginals(scores: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The posterior probability of every segment: in how many segmentations, by weight, it occurs.

    Args, Raises: as `segmentation_logz`.

    Returns:
        [B, T, K], float32 (float64 for float64 inputs), differentiable once; 0 for impossible segments, rows
        behind the length and sequences without a segmentation. Its sum over K is the probability of a
        boundary at t; the sum of (k + 1) * posterior is the length.

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

    Args, Raises: as `segmentation_logz`.

    Returns:
        [B], in nats, float32 (float64 for float64 inputs), computed in float64; differentiable once; 0 where
        no segmentation exists.

    Source: the distribution of Grave et al. 2019; the entropy by the chain rule over boundaries.
    """
    return _ops.segmentation_entropy(*_prepare(scores, lengths))


def segmentation_viterbi(scores: Tensor, lengths: Tensor | None = None) -> Viterbi:
    """The segmentation with the largest score.

    Args, Raises: as `segmentation_logz`.

    Returns:
        The named tuple (score [B], segments [B, T]): the score in nats, float32 (float64 for float64 inputs),
        added in float64; segments, int64, holds the length of the segment that starts at t, 0 elsewhere. Of
        equal ones the last segment is the shortest, then the one before it. Where none exists the score is
        -inf, where a score is NaN or +inf it is NaN, and the segments are all 0. No gradient: that of the
        score is the segmentation itself.

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
    """Segmentations drawn from their distribution, exactly and independently.

    Args:
        scores, lengths: as in `segmentation_logz`.
        num_samples: how many of each sequence, >= 0; drawn together they share one forward recursion.
        generator: where the seed is drawn from, on the device of `scores`; None is torch's default one.

    Returns:
        [num_samples, B, T], int64, as segments of `segmentation_viterbi`; all 0 where no segmentation exists.
        The same seed gives the same samples for any number of threads.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; num_samples < 0.
        RuntimeError: a length outside [0, T], a score that is NaN or +inf, or sums that are too large, on the
            CPU; on CUDA the segments of that sequence are -1.

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
    """The operators' checked arguments; half precision becomes float32 here, and its gradient half again.

    Autocast, which would round sums of log-probs to three digits, is not asked.
    """
    _checks.check_floats(scores=scores)
    if scores.dim() != 3:
        raise ValueError(f"scores: expected shape [B, T, K], got {list(scores.shape)}")
    if not _library.has_cuda_library and scores.device.type == "cuda":
        raise NotImplementedError(
            "scores: the CUDA kernels of segmentation are not built; with nvcc and a CUDA torch: "
            f"{_library.BUILD}"
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
    cuda = scores.device.type == "cuda"  # mantissas of both sweeps in double
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
    ctx.set_materialize_grads(False)  # zeros for alpha and exponent would be filled
    ctx.save_for_backward(scores, lengths, alpha, exponent)


def _gradient_logz(ctx, grad, *_):
    if grad is None:
        return None, None, None
    return _ops.segmentation_marginals(*ctx.saved_tensors, grad), None, None


class _Logz(torch.autograd.Function):
    """The registered formula, past the registered layer, whose Python takes as long as kernels.

    On the CPU the forward leaves the exponentials of the scores in a buffer that becomes the gradient, once:
    where somebody else may see that buffer or ask again, the gradient is made of the scores.
    """

    @staticmethod
    def forward(ctx, scores, lengths):
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # of checkpoints, say
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
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # the gradient may be differentiated
            return _ops.segmentation_marginals(*saved, grad), None
        with torch._C._AutoDispatchBelowAutograd():
            if kept is None or _asked_again(grad):
                return _ops.segmentation_marginals(*saved, grad), None
            _ops.segmentation_marginals_kept(*saved, grad, kept)
        return kept, None


def _asked_again(grad):
    """Whether the graph of this backward is retained, or each of a batch of gradients will run it."""
    retained = torch._C._autograd._get_current_graph_task_keep_graph()
    return retained or torch._C._functorch.is_legacy_batchedtensor(grad)


def _save_marginals(ctx, inputs, output):
    scores, lengths, _, _, grad = inputs
    ctx.save_for_backward(scores, lengths, grad)


def _gradient_marginals(ctx, upstream):
    """The way through alpha and exponent is counted in the gradient of the scores."""
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
