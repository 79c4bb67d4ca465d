"""Unwraps DTensor arguments and wraps results, for every function that takes a head's weight."""

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
    """Decorator that makes a function with the argument `group` accept DTensors too.

    Weights must be Shard(0) or Replicate() on a mesh of one dimension; hidden must be Replicate(), or Shard
    of a leading axis, on the same mesh. Results are Replicate(), except the log-probs of `director_logp` if
    the weights are Shard(0): these are Shard of the vocabulary axis.
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
        raise ValueError("group: expected None with DTensors, whose mesh has a group, got a group")
    heads = {n: t for n, v in given.items() if n in WEIGHTS for t in _tensors((v,))}
    mesh = next((t.device_mesh for t in heads.values() if isinstance(t, DTensor)), None)
    if mesh is None:
        named = next(n for n, v in given.items() if any(map(_is_dtensor, _tensors((v,)))))
        raise ValueError(f"{named}: expected a plain tensor with a plain weight, got a DTensor")
    first = next(n for n, t in heads.items() if isinstance(t, DTensor))
    placed = heads[first].placements
    if mesh.ndim != 1 or placed not in ((Shard(0),), (Replicate(),)):
        raise ValueError(
            f"{first}: expected Shard(0) or Replicate() on a mesh of one dimension, got {placed} on "
            f"{mesh.ndim} dimensions"
        )
    if not isinstance(given.get("hidden"), DTensor):
        raise ValueError(
            f"{first}: expected a plain tensor with a plain hidden, got a DTensor. If FSDP2 has sharded the "
            "parameters, call the loss through nn.HeadLoss, which gathers them. For tensor parallelism pass "
            "this rank's slice with group=, or hidden as a DTensor on the same mesh"
        )

    if "generator" in given and given["generator"] is None and getattr(given["self"], "k", 1) > 1:
        raise ValueError(
            "generator: expected one in the same state on every rank (DTensors, k > 1), got None"
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
