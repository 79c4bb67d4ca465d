"""Configurations of the adaptive_span kernels to compile; their tile sizes depend on the architecture."""

from collections.abc import Callable
from typing import NamedTuple

import triton.language as tl
from gpu_build import POINTERS, Built, build
from sukhops.triton_kernels import adaptive_span as kernels
from sukhops.triton_kernels._parts import parts

INPUTS = ("q", "k", "v", "grad", "rel", "out", "dq", "dk", "dv")  # tensors of the inputs' dtype
FORMS = {  # name of a table of tile sizes: name of the form, kernel, arguments of `compiled`
    "FORWARD_TILES": ("forward", kernels.forward_tiles, dict()),
    "FEW_ROWS_TILES": ("few", kernels.forward_tiles, dict(few=True, group=4, query_start=True)),
    "DQ_TILES": ("rows", kernels.backward_rows, dict(key_start=True, query_start=True)),
    "DKV_TILES": ("keys", kernels.backward_keys, dict()),
    "GROUPED_DKV_TILES": ("grouped keys", kernels.backward_keys, dict(group=4)),
    "REL_FORWARD_TILES": ("rel forward", kernels.forward_tiles, dict(rel=True)),
    "REL_DQ_TILES": ("rel rows", kernels.backward_rows, dict(rel=True)),
    "REL_DKV_TILES": ("rel keys", kernels.backward_keys, dict(rel=True)),
    "DREL_TILES": ("rel distances", kernels.backward_distances, dict(rel=True)),
}


class Form(NamedTuple):
    """Like gpu_build.Kernel, but with tile sizes that depend on the architecture."""

    name: str
    kernel: Callable
    table: str
    dtype: str
    d: int
    multiplies: bool
    wide: bool = False

    def build(self, arch: int) -> Built:
        return compiled(self.table, arch, self.dtype, self.d, **FORMS[self.table][2])


def form(table: str, dtype: str, d: int) -> Form:
    name, kernel, _ = FORMS[table]
    return Form(f"{name}, d = {d}, {dtype}", kernel, table, dtype, d, dtype in ("bfloat16", "float16"))


def compiled(
    table: str, arch: int, dtype: str, d: int, *, rel=False, key_start=False, query_start=False, by_row=False,
    few=False, group=1,
) -> Built:  # fmt: skip
    kernel, configurations = FORMS[table][1], getattr(kernels, table)
    kind = {"float32": "float", "float64": "double"}.get(dtype, "half")
    if kind == "half" and arch < 90 and "ampere" in configurations:
        kind = "ampere"
    wide = sum(d > width for width in kernels.WIDTHS)
    bm, bn, warps, stages = configurations[kind][wide] if kind in configurations else kernels.SMALL_TILES
    d1, d2 = parts(d)
    acc = "float64" if dtype == "float64" else "float32"
    constants = dict(
        PACK=group if few else 1, CONSECUTIVE=not few, BY_ROW=by_row, D=d, D1=d1, D2=d2, ACC=getattr(tl, acc),
        BM=bm, BN=bn, BT=bm,
    )  # fmt: skip
    ones = {"span_h", "skip", "m" if few else "splits"} | ({"group"} if group == 1 else set())
    constants |= dict.fromkeys(ones, 1)  # Triton compiles an integer argument that is 1 as a constant
    constants |= {"rel_ptr": None} if not rel else {}
    constants |= {"start_ptr": None} if not key_start else {}
    constants |= {"query_ptr": None} if not query_start else {}
    constants |= {"order_ptr": None} if few else {}
    constants = {n: c for n, c in constants.items() if n in kernel.arg_names}
    signature = {n: "i32" for n in kernel.arg_names if n not in constants}
    for name in signature:
        argument = name.removesuffix("_ptr")
        if name.endswith("_ptr"):
            signature[name] = POINTERS[dtype if argument in INPUTS else acc] + "!"
        elif argument[1:] in ("_b", "_h", "_t") or argument == "rel_h":
            signature[name] = "i32!"
    fixed = {"first_ptr": "*i32!", "full_ptr": "*i32!", "order_ptr": "*i64!"}
    fixed |= {"start_ptr": "*i64!", "query_ptr": "*i64!"}
    fixed |= {"span_ptr": POINTERS[acc], "ramp": "fp64", "scale": "fp64"}
    signature |= {n: t for n, t in fixed.items() if n in signature}
    return build(kernel, arch, signature, constants, warps, stages)


KERNELS = [form(table, "bfloat16", 64) for table in FORMS] + [form("FORWARD_TILES", "float32", 64)]
