"""Configurations of Director's decoding kernel and of its gradient kernels to compile ahead of time."""

import triton.language as tl
from gpu_build import POINTERS, Kernel
from sukhops.triton_kernels import director as kernels

GATE_TILES = {
    "cls_table": "*i64!", "lm_bias_ptr": "*fp32!", "cls_bias_ptr": "*fp32!", "gamma_ptr": "*fp32",
    "affine_ptr": "*fp32", "out_ptr": "*fp32!", "maximum_ptr": "*fp32!", "sum_ptr": "*fp32!",
    "top_ptr": "*i64!", "n": "i32", "vocab": "i32", "depth": "i32!", "tiles": "i32",
}  # fmt: skip
GRADIENTS = {
    "tile_ptr": "*fp32!", "grad_ptr": "*fp32!", "logp_ptr": "*fp32!", "total_ptr": "*fp32!",
    "gamma_ptr": "*fp32", "bias_ptr": "*fp32!", "affine_ptr": "*fp32", "lm_out_ptr": "*bf16!",
    "cls_out_ptr": "*bf16!", "grad_gamma_ptr": "*fp32", "grad_affine_ptr": "*fp32!", "v0": "i32!",
    "width": "i32!", "vocab": "i32!",
}  # fmt: skip
NORM = {
    "tile_ptr": "*fp32!", "out_ptr": "*bf16!", "bias_ptr": "*fp32!", "affine_ptr": "*fp32",
    "target_ptr": "*i64!", "grad_ptr": "*fp32!", "grad_logit_ptr": "*fp32!", "sum_ptr": "*fp32!",
    "logit_ptr": "*fp32!", "grad_affine_ptr": "*fp32!", "tile_stride": "i32!", "v0": "i32!",
    "width": "i32!",
}  # fmt: skip
# name of the form, dtype, block sizes of the launcher, constants
DECODING = [
    ("logp fp32", "float32", kernels.FEW_ROWS, dict(HEADS=1, WRITE=True, TOP=0)),
    ("logp bf16", "bfloat16", kernels.FEW_ROWS, dict(HEADS=1, WRITE=True, TOP=0)),
    ("logp many rows bf16", "bfloat16", kernels.MANY_ROWS, dict(HEADS=1, WRITE=True, TOP=0)),
    ("top 16 bf16", "bfloat16", kernels.FEW_ROWS, dict(HEADS=1, WRITE=False, TOP=16)),
    ("top 64 fp16, two attributes", "float16", kernels.FEW_ROWS, dict(HEADS=2, WRITE=False, TOP=64)),
    ("shared bf16", "bfloat16", kernels.FEW_ROWS, dict(HEADS=0, WRITE=True, TOP=0)),
]


def decoding(name: str, dtype: str, block: tuple, constants: dict) -> Kernel:
    bn, bv, bd, warps, stages = block
    pointer = POINTERS[dtype] + "!"
    constants = constants | dict(HAS_LM_BIAS=False, HAS_CLS_BIAS=True, ACC=tl.float32, BN=bn, BV=bv, BD=bd)
    signature = GATE_TILES | {"hidden_ptr": pointer, "lm_ptr": pointer}
    return Kernel(
        name, kernels.gate_tiles, signature, constants, warps, stages, dtype != "float32", wide=True
    )


def rows(name: str, kernel, signature: dict, **constants) -> Kernel:
    constants = constants | dict(HAS_BIAS=True, CHUNK=kernels.CHUNK)
    return Kernel(name, kernel, signature, constants, kernels.ROW_WARPS, wide=True)


KERNELS = [decoding(*form) for form in DECODING] + [
    rows(name + (", shared" if shared else ""), kernel, signature, SHARED=shared, **constants)
    for shared in (False, True)
    for name, kernel, signature, constants in (
        ("gradients", kernels.gate_backward_rows, GRADIENTS, dict(LM=True)),
        ("norm", kernels.norm_rows, NORM, dict(BACKWARD=False)),
        ("norm backward", kernels.norm_rows, NORM, dict(BACKWARD=True)),
    )
]
