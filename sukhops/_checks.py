"""Argument checks shared by the public functions. Errors have the form "argument: expected ..., got ..."."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = ("cpu", "cuda", "meta")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over values of `dtype`, and so of log-probs and losses."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        hint = "; pass its weight" if isinstance(value, torch.nn.Module) and name.endswith("weight") else ""
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}{hint}")


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


def check_weight(
    name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, bias_name: str, group: object | None,
    hidden_name: str = "hidden",
) -> int:  # fmt: skip
    """Checks weight [V, D] and bias [V] of a head against hidden [..., D]; returns V (> 0 without group)."""
    if weight.dim() != 2 or (weight.shape[0] == 0 and group is None):
        raise ValueError(f"{name}: expected shape [V, D] with V >= 1, got {list(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{hidden_name}: expected last axis D = {weight.shape[1]} as in {name} {list(weight.shape)}, "
            f"got {list(hidden.shape)}"
        )
    if bias is not None:
        check_shape(bias_name, bias, (weight.shape[0],), "[V]")
    return weight.shape[0]


def check_floats(**tensors: Tensor) -> None:
    """Checks that all tensors are floating-point, on one supported device and outside torch.func transforms.

    Their dtypes may differ.
    """
    for name, t in tensors.items():
        check_tensor(name, t)
        if hasattr(t, "device_mesh"):
            raise TypeError(
                f"{name}: expected a plain tensor, got a DTensor; pass its local part "
                "(and group=, if the function has it)"
            )
        if t.dtype not in FLOATS:
            raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {t.dtype}")
        if t.device.type not in DEVICES:
            raise NotImplementedError(f"{name}: expected a cpu or cuda tensor, got {t.device}")
        check_reverse_mode(name, t)
    if len(tensors) > 1:
        (like, first), *others = tensors.items()
        for name, t in others:
            check_device(like, first, name, t)


def check_reverse_mode(name: str, t: Tensor) -> None:
    """Checks that t is outside torch.func transforms and forward-mode AD."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{name}: torch.func transforms (grad, vjp, jvp, vmap and others) are not supported; use "
            "backward() or torch.autograd.grad for gradients, and leading axes for batches"
        )
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        if forward_ad.unpack_dual(t).tangent is not None:  # else torch silently returns a tangent of 0
            raise NotImplementedError(f"{name}: forward-mode AD is not supported; use reverse mode")


def as_floats(**tensors: Tensor | None) -> list[Any]:
    """Checks tensors as `check_floats` does, applies autocast, and checks that all have one dtype.

    Autocast leaves float64 unchanged, as in torch. None stays None, which is why the result type is Any.
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
            autocast = (
                "" if torch.float64 in (t.dtype, given[like].dtype) else ", or run under torch.autocast"
            )
            raise TypeError(
                f"{name}: expected {given[like].dtype} like {like}, got {t.dtype}; cast one of them{autocast}"
            )
    return [given.get(name) for name in tensors]
