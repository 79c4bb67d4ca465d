"""Compiles Triton kernels ahead of time, without a GPU, and reads what came out of them.

Results are cached under .cache/ by a hash of the kernel file, the options and Triton's version.
"""

import hashlib
import inspect
import json
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CACHE = Path(__file__).parent.parent / ".cache"
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may use


class Built(NamedTuple):
    registers: int
    spills: int  # bytes of local memory
    shared: int  # bytes
    wide_loads: int  # 16-byte loads from global memory
    tensor_core: int  # matrix instructions


def build(kernel, arch: int, signature: dict, constants: dict, warps: int, stages: int = 3) -> Built:
    """`signature` gives a type per argument ("*fp32", "i64", ...); pointers and ints marked with a
    trailing "!" are divisible by 16, as aligned tensors and padded strides are."""
    text = inspect.getsource(inspect.getmodule(kernel.fn))
    key = repr((text, kernel.__name__, arch, signature, constants, warps, stages, triton.__version__))
    path = CACHE / f"{kernel.__name__}-{arch}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if path.exists():
        return Built(**json.loads(path.read_text()))
    names = kernel.arg_names
    types = {n: t.rstrip("!") for n, t in signature.items()} | {n: "constexpr" for n in constants}
    source = ASTSource(
        kernel,
        signature={n: types[n] for n in names},
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n, t in signature.items() if t.endswith("!")},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages}
    )
    CACHE.mkdir(exist_ok=True)
    cubin = CACHE / f"{path.stem}.{os.getpid()}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump"))
    usage = subprocess.run(
        [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    cubin.unlink()
    ptx = compiled.asm["ptx"]
    built = Built(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=int(re.search(r"LOCAL:(\d+)", usage)[1]) + int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=compiled.metadata.shared,
        wide_loads=len(re.findall(r"ld\.global[.\w]*\.(?:v4\.b32|v2\.b64)", ptx)),
        tensor_core=len(re.findall(r"\b(?:mma\.sync|wgmma|tcgen05\.mma)", ptx)),
    )
    path.write_text(json.dumps(built._asdict()))
    return built
