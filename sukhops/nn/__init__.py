"""Modules: options and parameters; forward is one call."""

from sukhops.nn.director import DirectorHead, DirectorLoss

__all__ = ["DirectorHead", "DirectorLoss"]
