"""The checks that public functions share. Each names the argument, what it got and what it expected."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = ("cpu", "cuda", "meta")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over `dtype`, and so log-probs and losses, are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def check_floats(**tensors: Tensor | None) -> None:
    """All floating, of one dtype, on one supported device. None is skipped."""
    first = None
    for name, t in tensors.items():
        if t is None:
            continue
        check_tensor(name, t)
        if t.dtype not in FLOATS:
            raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {t.dtype}")
        if t.device.type not in DEVICES:
            raise NotImplementedError(f"{name}: sukhops runs on cpu and cuda tensors, got {t.device}")
        if first is None:
            first = name, t
        elif t.dtype != first[1].dtype:
            raise TypeError(
                f"{name}: expected {first[1].dtype} like {first[0]}, got {t.dtype}; "
                "cast one of them, or run under torch.autocast"
            )
        check_device(first[0], first[1], name, t)


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


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in autocast's dtype where autocast is on; float64 is left alone, as torch does."""
    device = next(t for t in tensors if t is not None).device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)
        for t in tensors
    ]
