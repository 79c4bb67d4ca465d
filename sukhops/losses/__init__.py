"""Losses on log-probs: the functional twins of the modules in `sukhops.nn`."""
