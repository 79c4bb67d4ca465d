"""Modules: options and parameters; forward is one call."""
