"""Sums over the segmentations of long sequences in long double, and how far rounding may take results."""

import math

import numpy as np
import torch


def _log_sum(x):
    top = x.max(-1)
    safe = np.where(np.isneginf(top), 0, top)
    with np.errstate(divide="ignore"):
        return safe + np.log(np.exp(x - safe[:, None]).sum(-1))


def exact_sums(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logz [B] and the posterior [B, T, K], in float64, of scores [B, T, K], by sums from both ends."""
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
    """[B, T + K], by how many segments each position is covered on average."""
    b, t, k = posterior.shape
    total = torch.zeros(b, t + k, dtype=torch.float64)
    for i in range(k):
        for d in range(i + 1):
            total[:, d : d + t] += posterior[:, :, i]
    return total


def walk(t: int, k: int, dtype: torch.dtype) -> float:
    """How far from 1 the sum of all that covers a position may be, after t boundaries.

    Shares are the terms of a sum over that sum: they add up to 1 but for k roundings of the sum and one of
    the quotient; the mass of a boundary is added up with k more, and a last one makes the posterior. All of
    them are relative to that mass, which is at most 1. Roundings of either sign make a walk of 2 t (k + 1)
    steps of at most half an eps, within five standard deviations but for a chance of 8e-6 (Hoeffding).
    """
    return 5 * math.sqrt(2 * t * (k + 1)) * torch.finfo(dtype).eps / 2
