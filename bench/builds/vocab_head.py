"""The row passes of the vocabulary head in the forms that training and decoding use."""

from gpu_build import POINTERS, Kernel
from sukhops.triton_kernels import vocab_head as kernels

ROW = {
    "bias_ptr": "*fp32!",
    "stride": "i32!",
    "v0": "i32!",
    "width": "i32!",
    "softcap": "fp32",
    "scale": "fp32",
}
FORWARD = ROW | {
    "tile_ptr": "*fp32!", "target_ptr": "*i64!", "target_logit_ptr": "*fp32!", "top_value_ptr": "*fp32!",
    "top_index_ptr": "*i64!", "maximum_ptr": "*fp32!", "sum_ptr": "*fp32!", "decay_ptr": "*fp32!",
    "targets": "i32",
}  # fmt: skip
BACKWARD = ROW | {
    "tile_ptr": "*fp32!", "lse_ptr": "*fp32!", "grad_lse_ptr": "*fp32!", "pick_ptr": "*i64!",
    "grad_pick_ptr": "*fp32!", "place_ptr": "*i64!", "picks": "i32",
}  # fmt: skip
# name, kernel, dtype of the gradient or mean tile, constants
FORMS = [
    ("logp", kernels.forward_rows, "float32", dict(HAS_BIAS=False, HAS_CAP=False, MEAN=False, TOP=0)),
    ("frozen", kernels.forward_rows, "bfloat16", dict(HAS_BIAS=False, HAS_CAP=True, MEAN=True, TOP=0)),
    ("top 5", kernels.forward_rows, "float32", dict(HAS_BIAS=True, HAS_CAP=False, MEAN=False, TOP=5)),
    ("backward", kernels.backward_rows, "bfloat16", dict(KEPT=False, HAS_BIAS=False, HAS_CAP=False)),
    ("backward kept", kernels.backward_rows, "bfloat16", dict(KEPT=True, HAS_BIAS=False, HAS_CAP=False)),
    ("backward fp16", kernels.backward_rows, "float16", dict(KEPT=False, HAS_BIAS=True, HAS_CAP=True)),
]
KERNELS = [
    Kernel(
        name, kernel,
        (FORWARD if kernel is kernels.forward_rows else BACKWARD) | {"out_ptr": POINTERS[dtype] + "!"},
        constants | {"CHUNK": kernels.CHUNK}, kernels.WARPS, wide=True,
    )
    for name, kernel, dtype, constants in FORMS
]  # fmt: skip
