"""DTensors in and out: unwrapped here, and nowhere else, for every function that takes a head's weight."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
WEIGHTS = {"weight", "bias", "lm_weight", "lm_bias", "cls_weight", "cls_bias", "ref_weight", "ref_bias"}
ROWS = {"hidden", "ref_hidden", "kl_hidden", "kl_ref_hidden"}


def takes_dtensors(call: Callable[P, R]) -> Callable[P, R]:
    """`call`, a function with the argument group, for DTensors too.

    Weights are Shard(0) or Replicate() on a mesh of one dimension, hidden is Replicate() or Shard(i) of a
    leading axis on the same. Results are Replicate(), a slice's columns of a distribution Shard of them.
    """
    signature = inspect.signature(call)

    @functools.wraps(call)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if not any(map(_is_dtensor, _tensors((*args, *kwargs.values())))):
            return call(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return _unwrapped(call, bound)

    return wrapped


def _tensors(values: tuple) -> list:
    return [t for v in values for t in (v if isinstance(v, list | tuple) else (v,)) if isinstance(t, Tensor)]


def _is_dtensor(t: Tensor) -> bool:
    return hasattr(t, "device_mesh")  # torch.distributed.tensor takes half a second to import


def _unwrapped(call: Callable, bound: inspect.BoundArguments) -> Any:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    given = bound.arguments
    if given.get("group") is not None:
        raise ValueError("group: DTensors have a mesh of their own, expected None")
    heads = {n: t for n, v in given.items() if n in WEIGHTS for t in _tensors((v,))}
    mesh = next((t.device_mesh for t in heads.values() if isinstance(t, DTensor)), None)
    if mesh is None:
        named = next(n for n, v in given.items() if any(map(_is_dtensor, _tensors((v,)))))
        raise ValueError(f"{named}: a DTensor needs a weight that is one, on the same mesh")
    first = next(n for n, t in heads.items() if isinstance(t, DTensor))
    placed = heads[first].placements
    if mesh.ndim != 1 or placed not in ((Shard(0),), (Replicate(),)):
        raise ValueError(
            f"{first}: expected Shard(0) or Replicate() on a mesh of one dimension, got {placed} on "
            f"{mesh.ndim} dimensions"
        )
    if not isinstance(given.get("hidden"), DTensor):
        raise ValueError(
            f"{first}: a DTensor with a plain hidden. Where FSDP2 has sharded the parameters, call the loss "
            "in nn.HeadLoss, which they are gathered for. For tensor parallel pass this rank's slice with "
            "group=, or a hidden that is a DTensor on the same mesh"
        )

    if "generator" in given and given["generator"] is None and getattr(given["self"], "k", 1) > 1:
        raise ValueError(
            "generator: k > 1 with DTensors needs one, in the same state on every rank, got None"
        )

    def local(name: str, t: object) -> object:
        if isinstance(t, list | tuple) and not isinstance(t, torch.Size):
            return [local(name, x) for x in t]
        if not isinstance(t, Tensor):
            return t
        if name in WEIGHTS:
            if not isinstance(t, DTensor) or t.device_mesh != mesh or t.placements != placed:
                raise ValueError(f"{name}: expected a DTensor {placed} on the mesh of {first}")
            return t.to_local()
        if not isinstance(t, DTensor):
            if name in ROWS:
                raise ValueError(f"{name}: expected a DTensor on the mesh of {first}, like hidden")
            return t
        if t.device_mesh != mesh:
            raise ValueError(f"{name}: expected a DTensor on the mesh of {first}")
        (placement,) = t.placements
        leading = isinstance(placement, Shard) and placement.dim < t.dim() - (name in ROWS)
        if not leading and placement != Replicate():
            raise ValueError(f"{name}: expected Replicate() or Shard of a leading axis, got {placement}")
        return t.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])

    for name in list(given):
        given[name] = local(name, given[name])
    if placed == (Shard(0),):
        given["group"] = mesh.get_group()
    out = call(*bound.args, **bound.kwargs)
    if call.__name__ == "director_logp" and placed == (Shard(0),):
        shape = torch.Size((*out.shape[:-1], heads[first].shape[0]))
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            out, mesh, [Shard(out.dim() - 1)], run_check=False, shape=shape, stride=strides
        )

    def replicated(out: Any) -> Any:
        if isinstance(out, Tensor):
            return DTensor.from_local(out, mesh, [Replicate()], run_check=False)
        if isinstance(out, dict):
            return {n: replicated(t) for n, t in out.items()}
        return type(out)(*map(replicated, out)) if isinstance(out, tuple) else out

    return replicated(out)
