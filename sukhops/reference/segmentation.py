"""Reference of the segmentation operators in plain PyTorch: log space, one step per position.

Segment (t, k) covers positions t .. t+k; a segmentation covers [0, length) with consecutive segments.

    alpha_0 = 0,   alpha_j = logsumexp_k (alpha_{j-1-k} + scores[j-1-k, k]),   logz = alpha_length
    posterior[t, k] = d logz / d scores[t, k]
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sukhops.ops.segmentation import Viterbi


def segmentation_logz(scores: Tensor, lengths: Tensor | None = None) -> Tensor:
    """See `sukhops.segmentation_logz`."""
    alpha = _alphas(scores, _logsumexp)  # [B, T + 1]
    return alpha.gather(1, _lengths(scores, lengths).unsqueeze(1)).squeeze(1)


def segmentation_marginals(scores: Tensor, lengths: Tensor | None = None) -> Tensor:
    """See `sukhops.segmentation_marginals`."""
    with torch.enable_grad():
        given = scores if scores.requires_grad else scores.detach().requires_grad_()
        logz = segmentation_logz(given, lengths)
        (posterior,) = torch.autograd.grad(logz.sum(), given, create_graph=scores.requires_grad)
    return posterior.to(_wide(scores).dtype)


def segmentation_entropy(scores: Tensor, lengths: Tensor | None = None) -> Tensor:
    """See `sukhops.segmentation_entropy`."""
    s = _wide(scores)
    posterior = segmentation_marginals(s, lengths)  # [B, T, K]
    logz = segmentation_logz(s, lengths)  # [B]
    mean_score = (posterior * s.where(s != -torch.inf, 0.0)).sum((1, 2))
    exists = logz != -torch.inf
    return (logz.where(exists, 0.0) - mean_score).where(exists, 0.0)


def segmentation_viterbi(scores: Tensor, lengths: Tensor | None = None) -> Viterbi:
    """See `sukhops.segmentation_viterbi`."""
    ends = _lengths(scores, lengths)
    s = _wide(scores.detach()).double()  # [B, T, K]
    best = _alphas(s, lambda x: x.amax(-1))  # [B, T + 1]
    score = best.gather(1, ends.unsqueeze(1)).squeeze(1)
    segments = torch.zeros(scores.shape[:2], dtype=torch.int64, device=scores.device)
    for b in range(scores.shape[0]):
        j = int(ends[b]) if score[b] > -torch.inf else 0
        while j > 0:
            arriving = torch.stack(
                [best[b, j - 1 - k] + s[b, j - 1 - k, k] for k in range(min(j, s.shape[2]))]
            )
            k = int(arriving.argmax())
            j -= k + 1
            segments[b, j] = k + 1
    return Viterbi(score.to(_wide(scores).dtype), segments)


def segmentation_sample(
    scores: Tensor, num_samples: int, lengths: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """See `sukhops.segmentation_sample`; the distribution is the same, the samples of a seed are not."""
    ends = _lengths(scores, lengths)
    s = _wide(scores.detach())
    alpha = _alphas(s, _logsumexp)
    segments = torch.zeros(num_samples, *scores.shape[:2], dtype=torch.int64, device=scores.device)
    for b in range(scores.shape[0]):
        for sample in range(num_samples if alpha[b, ends[b]] > -torch.inf else 0):
            j = int(ends[b])
            while j > 0:
                arriving = torch.stack(
                    [alpha[b, j - 1 - k] + s[b, j - 1 - k, k] for k in range(min(j, s.shape[2]))]
                )
                k = int(torch.multinomial((arriving - alpha[b, j]).exp(), 1, generator=generator))
                j -= k + 1
                segments[sample, b, j] = k + 1
    return segments


def _wide(scores: Tensor) -> Tensor:
    return scores if scores.dtype == torch.float64 else scores.float()


def _lengths(scores: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return torch.full(scores.shape[:1], scores.shape[1], device=scores.device)
    return lengths.long()


def _alphas(scores: Tensor, combine: Callable[[Tensor], Tensor]) -> Tensor:
    """alpha [B, T + 1], in which `combine` reduces the scores of the (at most K) segments that end at j."""
    s = _wide(scores)
    b, t, k = s.shape
    alpha = [s[:, :, :0].sum((1, 2))]  # 0, but part of the autograd graph even if T is 0
    segment = [row.unbind(1) for row in s.unbind(1)]  # [T][K], each [B]
    for j in range(1, t + 1):
        ending = [alpha[j - 1 - i] + segment[j - 1 - i][i] for i in range(min(j, k))]
        alpha.append(combine(torch.stack(ending, -1)) if ending else s.new_full((b,), -torch.inf))
    return torch.stack(alpha, 1)


def _logsumexp(x: Tensor) -> Tensor:
    """logsumexp over the last axis; if all terms are -inf, -inf with gradient 0 instead of NaN."""
    dead = (x == -torch.inf).all(-1)  # [B]
    return torch.logsumexp(x.masked_fill(dead.unsqueeze(-1), 0.0), -1).masked_fill(dead, -torch.inf)
