"""The kernels of adaptive_span in the forms of its launchers, whose tiles depend on the architecture."""

from collections.abc import Callable
from typing import NamedTuple

import triton.language as tl
from gpu_build import POINTERS, Built, build
from sukhops.triton_kernels import adaptive_span as kernels
from sukhops.triton_kernels._parts import parts

INPUTS = ("q", "k", "v", "grad", "rel", "out", "dq", "dk", "dv")  # tensors of the inputs' dtype
PROGRAMS = {  # table of the configurations: kernel, what its programs meet
    "FORWARD": (kernels.forward_tiles, dict()),
    "FEW": (kernels.forward_tiles, dict(few=True, group=4, place=True)),
    "ROWS": (kernels.backward_rows, dict(start=True, place=True)),
    "KEYS": (kernels.backward_keys, dict()),
    "GROUPED_KEYS": (kernels.backward_keys, dict(group=4)),
    "REL_FORWARD": (kernels.forward_tiles, dict(rel=True)),
    "REL_ROWS": (kernels.backward_rows, dict(rel=True)),
    "REL_KEYS": (kernels.backward_keys, dict(rel=True)),
    "REL_DISTANCES": (kernels.backward_distances, dict(rel=True)),
}


class Form(NamedTuple):
    """A gpu_build.Kernel that each architecture compiles with its own tiles."""

    name: str
    kernel: Callable
    table: str
    dtype: str
    d: int
    multiplies: bool
    wide: bool = False

    def build(self, arch: int) -> Built:
        return compiled(self.table, arch, self.dtype, self.d, **PROGRAMS[self.table][1])


def form(table: str, dtype: str, d: int) -> Form:
    name = f"{table.lower().replace('_', ' ')}, d = {d}, {dtype}"
    return Form(name, PROGRAMS[table][0], table, dtype, d, dtype in ("bfloat16", "float16"))


def compiled(
    table: str, arch: int, dtype: str, d: int, *, rel=False, start=False, place=False, by_row=False,
    few=False, group=1,
) -> Built:  # fmt: skip
    kernel, configurations = PROGRAMS[table][0], getattr(kernels, table)
    kind = {"float32": "float", "float64": "double"}.get(dtype, "half")
    if kind == "half" and arch < 90 and "ampere" in configurations:
        kind = "ampere"
    wide = sum(d > width for width in kernels.UP_TO)
    bm, bn, warps, stages = configurations[kind][wide] if kind in configurations else kernels.SMALL
    d1, d2 = parts(d)
    acc = "float64" if dtype == "float64" else "float32"
    constants = dict(
        PACK=group if few else 1, SKEW=not few, BY_ROW=by_row, D=d, D1=d1, D2=d2, ACC=getattr(tl, acc), BM=bm,
        BN=bn, BT=bm,
    )  # fmt: skip
    ones = {"span_h", "skip", "m" if few else "splits"} | ({"group"} if group == 1 else set())
    constants |= dict.fromkeys(ones, 1)  # what Triton makes of an int that is 1
    constants |= {"rel_ptr": None} if not rel else {}
    constants |= {"start_ptr": None} if not start else {}
    constants |= {"query_ptr": None} if not place else {}
    constants |= {"order_ptr": None} if few else {}
    constants = {n: c for n, c in constants.items() if n in kernel.arg_names}
    signature = {n: "i32" for n in kernel.arg_names if n not in constants}
    for name in signature:
        what = name.removesuffix("_ptr")
        if name.endswith("_ptr"):
            signature[name] = POINTERS[dtype if what in INPUTS else acc] + "!"
        elif what[1:] in ("_b", "_h", "_t") or what == "rel_h":
            signature[name] = "i32!"
    fixed = {"first_ptr": "*i32!", "whole_ptr": "*i32!", "order_ptr": "*i64!"}
    fixed |= {"start_ptr": "*i64!", "query_ptr": "*i64!"}
    fixed |= {"span_ptr": POINTERS[acc], "ramp": "fp64", "scale": "fp64"}
    signature |= {n: t for n, t in fixed.items() if n in signature}
    return build(kernel, arch, signature, constants, warps, stages)


KERNELS = [form(table, "bfloat16", 64) for table in PROGRAMS] + [form("FORWARD", "float32", 64)]
