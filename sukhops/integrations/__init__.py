"""Adapters to other libraries. Each is imported by its name; the libraries are optional."""
