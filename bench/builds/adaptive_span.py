"""Configurations of the adaptive_span kernels to compile; their tile sizes depend on the architecture."""

from collections.abc import Callable
from typing import NamedTuple

import triton.language as tl
from gpu_build import POINTERS, Built, build
from sukhops.triton_kernels import adaptive_span as kernels
from sukhops.triton_kernels._parts import parts

INPUTS = ("q", "k", "v", "grad", "rel", "out", "dq", "dk", "dv")  # tensors of the inputs' dtype
FORMS = {  # name: kernel, name of its table of tile sizes, arguments of `compiled`
    "forward": (kernels.forward_tiles, "FORWARD_TILES", dict()),
    "few": (kernels.forward_tiles, "FEW_ROWS_TILES", dict(few=True, group=4, query_start=True)),
    "rows": (kernels.backward_rows, "DQ_TILES", dict(key_start=True, query_start=True)),
    "keys": (kernels.backward_keys, "DKV_TILES", dict()),
    "keys by row": (kernels.backward_keys, "DKV_TILES", dict(by_row=True)),
    "grouped keys": (kernels.backward_keys, "GROUPED_DKV_TILES", dict(group=4)),
    "grouped keys by row": (
        kernels.backward_keys, "GROUPED_DKV_BY_ROW_TILES", dict(group=4, by_row=True)
    ),
    "rel forward": (kernels.forward_tiles, "REL_FORWARD_TILES", dict(rel=True)),
    "rel rows": (kernels.backward_rows, "REL_DQ_TILES", dict(rel=True)),
    "rel keys": (kernels.backward_keys, "REL_DKV_TILES", dict(rel=True)),
    "rel keys by row": (kernels.backward_keys, "REL_DKV_TILES", dict(rel=True, by_row=True)),
    "rel distances": (kernels.backward_distances, "DREL_TILES", dict(rel=True)),
}  # fmt: skip


class Form(NamedTuple):
    """Like gpu_build.Kernel, but with tile sizes that depend on the architecture."""

    name: str
    kernel: Callable
    form: str
    dtype: str
    d: int
    multiplies: bool
    wide: bool = False

    def build(self, arch: int) -> Built:
        return compiled(self.form, arch, self.dtype, self.d, **FORMS[self.form][2])


def form(name: str, dtype: str, d: int) -> Form:
    half = dtype in ("bfloat16", "float16")
    return Form(f"{name}, d = {d}, {dtype}", FORMS[name][0], name, dtype, d, half)


def compiled(
    form: str, arch: int, dtype: str, d: int, *, rel=False, key_start=False, query_start=False, by_row=False,
    few=False, group=1,
) -> Built:  # fmt: skip
    """by_row: the queries of a head differ in their span or first key."""
    kernel, table, _ = FORMS[form]
    configurations, key_start = getattr(kernels, table), key_start or by_row
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


KERNELS = [form(name, "bfloat16", 64) for name in FORMS] + [form("forward", "float32", 64)]
