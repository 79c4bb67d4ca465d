"""Raises an ImportError if transformers is missing or too old. This package imports it first."""

_NEEDED = "sukhops.integrations.transformers needs transformers 5.24 or newer"

try:
    import transformers
except ImportError as error:
    raise ImportError(f"{_NEEDED}: pip install 'transformers>=5.24'") from error
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
    raise ImportError(f"{_NEEDED}, got {transformers.__version__}")
