"""Adapters to other libraries, which are optional: import the adapter that you need by its full name."""
