"""Configurations of the vocabulary head's kernels to compile ahead of time, for training and decoding."""

from gpu_build import POINTERS, Kernel
from sukhops.triton_kernels import vocab_head as kernels

ROW = {
    "bias_ptr": "*fp32!",
    "stride": "i32!",
    "v0": "i32!",
    "width": "i32!",
    "bound": "fp32",
    "scale": "fp32",
}
FORWARD = ROW | {
    "tile_ptr": "*fp32!", "target_ptr": "*i64!", "target_logit_ptr": "*fp32!", "top_value_ptr": "*fp32!",
    "top_index_ptr": "*i64!", "maximum_ptr": "*fp32!", "sum_ptr": "*fp32!", "moments_ptr": "*fp32!",
    "decay_ptr": "*fp32!", "targets": "i32", "mean_scale": "fp32",
}  # fmt: skip
BACKWARD = ROW | {
    "tile_ptr": "*fp32!", "maximum_ptr": "*fp32!", "log_sum_ptr": "*fp32!", "entropy_ptr": "*fp32!",
    "grad_log_sum_ptr": "*fp32!", "grad_entropy_ptr": "*fp32!", "pick_ptr": "*i64!",
    "grad_pick_ptr": "*fp32!",
    "tile_row_ptr": "*i64!", "picks": "i32", "slope": "fp32",
}  # fmt: skip
# name of the form, kernel, dtype of the output tile, constants other than False and 0
FORMS = [
    ("logp", kernels.forward_rows, "float32", {}),
    ("frozen", kernels.forward_rows, "bfloat16", dict(HAS_CAP=True, MEAN=True)),
    ("top 5", kernels.forward_rows, "float32", dict(HAS_BIAS=True, TOP=5)),
    ("statistics", kernels.forward_rows, "float32", dict(MOMENTS=True, TOP=1)),
    ("backward", kernels.backward_rows, "bfloat16", {}),
    ("backward kept", kernels.backward_rows, "bfloat16", dict(KEPT=True)),
    ("backward fp16", kernels.backward_rows, "float16", dict(HAS_BIAS=True, HAS_CAP=True)),
    ("backward entropy", kernels.backward_rows, "bfloat16", dict(ENTROPY=True)),
]
FORWARD_DEFAULTS = dict(HAS_BIAS=False, HAS_CAP=False, MOMENTS=False, MEAN=False, TOP=0)
BACKWARD_DEFAULTS = dict(KEPT=False, HAS_BIAS=False, HAS_CAP=False, ENTROPY=False)


def form(name, kernel, dtype, constants) -> Kernel:
    is_forward = kernel is kernels.forward_rows
    types, defaults = (FORWARD, FORWARD_DEFAULTS) if is_forward else (BACKWARD, BACKWARD_DEFAULTS)
    return Kernel(
        name, kernel, types | {"out_ptr": POINTERS[dtype] + "!"},
        defaults | constants | {"CHUNK": kernels.CHUNK}, kernels.WARPS, wide=True,
    )  # fmt: skip


KERNELS = [form(*given) for given in FORMS]
