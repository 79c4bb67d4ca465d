"""Loads the compiled operators, and has the functions with which sukhops/ops registers them in Python."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

_HERE = Path(__file__).parent
BUILD = "pip install --no-build-isolation -e . (in a checkout, with torch >= 2.11 installed)"


def _load(name: str, required: bool = False) -> bool:
    path = _HERE / f"{name}.so"
    if not path.exists():
        if required:
            raise ImportError(f"sukhops is not built: {path} is missing. Build it: {BUILD}")
        return False
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"{path.name} does not load with torch {torch.__version__}: {error}. Rebuild it: {BUILD}"
        ) from error
    return True


_load("_C", required=True)
has_cuda_library = _load("_C_cuda")
launched: set[str] = set()  # operators whose CUDA kernel is launched from Python


def launcher(name: str) -> Callable:
    """Returns a function that calls `name` ("module:function") on the device of its first tensor argument.

    The module, and with it Triton, is imported on the first call.
    """
    module, function = name.split(":")

    def launch(*args: Any) -> Any:
        tensors = (
            t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, Tensor)
        )
        with torch.cuda.device(next(tensors).device):
            return getattr(importlib.import_module(module), function)(*args)

    return launch


def cuda_launcher(op: str, name: str) -> None:
    """Registers the function `name` ("module:function") as the CUDA kernel of `op`."""
    torch.library.impl(f"sukhops::{op}", "CUDA", launcher(name))
    launched.add(op)


def not_differentiable_twice(op: str) -> None:
    """Makes differentiating the backward operator `op` raise; torch would silently leave the gradient out."""

    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise NotImplementedError(f"sukhops::{op}: second derivatives are not implemented")

    torch.library.register_autograd(f"sukhops::{op}", backward)
