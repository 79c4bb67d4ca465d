"""The checks that public functions share. Each names the argument, what it got and what it expected."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = ("cpu", "cuda", "meta")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over `dtype`, and so log-probs and losses, are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def check_device(like: str, first: Tensor, name: str, t: Tensor) -> None:
    if t.device != first.device:
        raise ValueError(f"{name}: expected on {first.device} like {like}, got {t.device}")


def check_integers(name: str, t: Tensor) -> None:
    check_tensor(name, t)
    if t.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int64 or int32, got {t.dtype}")


def check_shape(name: str, t: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {list(shape)} ({meaning}), got {list(t.shape)}")


def check_floats(**tensors: Tensor) -> None:
    """All floating, on one supported device, under no transform of torch.func; of dtypes of their own."""
    for name, t in tensors.items():
        check_tensor(name, t)
        if hasattr(t, "device_mesh"):
            raise TypeError(
                f"{name}: a DTensor is not taken here; pass its local part, and group= where there is"
            )
        if t.dtype not in FLOATS:
            raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {t.dtype}")
        if t.device.type not in DEVICES:
            raise NotImplementedError(f"{name}: sukhops runs on cpu and cuda tensors, got {t.device}")
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                f"{name}: torch.func transforms (grad, vjp, jvp, vmap and the like) are not supported; use "
                "backward() or torch.autograd.grad, and leading axes as the batch"
            )
        if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
            if forward_ad.unpack_dual(t).tangent is not None:  # torch would give a tangent of 0 in silence
                raise NotImplementedError(f"{name}: forward-mode AD is not implemented, reverse mode is")
    if len(tensors) > 1:
        (like, first), *others = tensors.items()
        for name, t in others:
            check_device(like, first, name, t)


def as_floats(**tensors: Tensor | None) -> list[Any]:
    """The tensors, checked as by `check_floats`, cast where autocast is on, and of one dtype.

    Autocast leaves float64 alone, as torch does. None passes through (Any: a Tensor for a Tensor).
    """
    given = {name: t for name, t in tensors.items() if t is not None}
    check_floats(**given)
    like, first = next(iter(given.items()))
    device = first.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        given = {name: t if t.dtype == torch.float64 else t.to(dtype) for name, t in given.items()}
    for name, t in given.items():
        if t.dtype != given[like].dtype:
            raise TypeError(
                f"{name}: expected {given[like].dtype} like {like}, got {t.dtype}; "
                "cast one of them, or run under torch.autocast"
            )
    return [given.get(name) for name in tensors]
