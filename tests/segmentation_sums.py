"""Sums over the segmentations of long sequences in long double, and bounds of rounding errors."""

import math

import numpy as np
import torch


def _log_sum(x):
    top = x.max(-1)
    safe = np.where(np.isneginf(top), 0, top)
    with np.errstate(divide="ignore"):
        return safe + np.log(np.exp(x - safe[:, None]).sum(-1))


def exact_sums(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logz [B] and posterior [B, T, K] of scores [B, T, K], by the forward-backward algorithm."""
    s = scores.numpy().astype(np.longdouble)
    b, t, k = s.shape
    alpha, beta = np.zeros((b, t + 1), s.dtype), np.full((b, t + k + 1), -np.inf, s.dtype)
    beta[:, t] = 0
    for j in range(1, t + 1):
        i = np.arange(min(j, k))
        alpha[:, j] = _log_sum(alpha[:, j - 1 - i] + s[:, j - 1 - i, i])
    for j in range(t - 1, -1, -1):
        beta[:, j] = _log_sum(s[:, j] + beta[:, j + 1 : j + 1 + k])
    ends = np.arange(t)[:, None] + np.arange(k) + 1
    logz = alpha[:, t]
    safe = np.where(np.isneginf(logz), 0, logz)
    posterior = np.exp(alpha[:, :-1, None] + s + beta[:, ends] - safe[:, None, None])
    return torch.from_numpy(logz.astype(np.float64)), torch.from_numpy(posterior.astype(np.float64))


def covered(posterior: torch.Tensor) -> torch.Tensor:
    """For each position [B, T + K], the expected number of segments that cover it."""
    b, t, k = posterior.shape
    total = torch.zeros(b, t + k, dtype=torch.float64)
    for i in range(k):
        for d in range(i + 1):
            total[:, d : d + t] += posterior[:, :, i]
    return total


def walk(t: int, k: int, dtype: torch.dtype) -> float:
    """How much the probabilities of the segments that cover a position may differ from 1 in total.

    Every boundary's probability is split among the segments that end there. The split adds k rounding errors
    of a sum and one of a quotient; the boundary's own probability is a sum with k more, and the posterior
    adds one. All are relative to that probability, which is at most 1. After t boundaries, the errors are a
    random walk of 2 t (k + 1) steps of at most eps / 2, which stays within five standard deviations except
    with probability 8e-6 (Hoeffding).
    """
    return 5 * math.sqrt(2 * t * (k + 1)) * torch.finfo(dtype).eps / 2
