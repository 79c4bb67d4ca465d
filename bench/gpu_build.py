"""Compiles kernels ahead of time, without a GPU, and reads registers, spills and instructions from the code.

Results are cached under .cache/ by a hash of the kernel, the options and the compiler's version.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch.utils.cpp_extension import include_paths
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CACHE = Path(__file__).parent.parent / ".cache"
ARCHITECTURES = (80, 90, 100)
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "float64": "*fp64"}
WIDE = r"ld\.global[.\w]*\.(?:v4\.b32|v2\.b64)|cp\.async\.c[ag]\.shared\.global[^;]*, (?:16|0x10)\b"
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes of shared memory per thread block


class Built(NamedTuple):
    registers: int
    spills: int  # bytes of local memory
    shared: int  # bytes
    wide_loads: int  # 16-byte loads from global memory, to registers or to shared memory
    tensor_core: int  # tensor-core instructions


class Kernel(NamedTuple):
    """A Triton kernel, arguments that a launcher passes to it, and requirements on its code."""

    name: str
    kernel: Callable
    signature: dict[str, str]
    constants: dict
    warps: int
    stages: int = 3
    multiplies: bool = False  # has half-precision matrix products: must use tensor cores
    wide: bool = False  # is limited by memory bandwidth: must use 16-byte loads

    def build(self, arch: int) -> Built:
        return build(self.kernel, arch, self.signature, self.constants, self.warps, self.stages)


def build(kernel, arch: int, signature: dict, constants: dict, warps: int, stages: int = 3) -> Built:
    """Compiles a kernel. `signature` gives the type of each argument ("*fp32", "i64", ...). A trailing "!"
    says that a pointer or integer is divisible by 16, as for aligned tensors and padded strides."""
    text = kernel.cache_key  # covers the kernel and every function that it calls
    key = repr((WIDE, text, kernel.__name__, arch, signature, constants, warps, stages, triton.__version__))
    return Built(**cached(f"{kernel.__name__}-{arch}", key, lambda: _triton(
        kernel, arch, signature, constants, warps, stages
    )._asdict()))  # fmt: skip


def _triton(kernel, arch: int, signature: dict, constants: dict, warps: int, stages: int) -> Built:
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
    with temporary(compiled.asm["cubin"]) as cubin:
        usage = cuobjdump("--dump-resource-usage", cubin)
    ptx = compiled.asm["ptx"]
    return Built(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=int(re.search(r"LOCAL:(\d+)", usage)[1]) + int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=compiled.metadata.shared,
        wide_loads=len(re.findall(WIDE, ptx)),
        tensor_core=len(re.findall(r"\b(?:mma\.sync|wgmma|tcgen05\.mma)", ptx)),
    )


def build_cuda(path: Path, arch: int) -> dict[str, Built]:
    """Compiles a .cu file with the flags of setup.py; returns its kernels by name. Needs nvcc."""
    headers = sorted(path.parent.glob("*.h"))
    key = repr((path.read_text(), *(h.read_text() for h in headers), arch, nvcc_version(), torch.__version__))
    found = cached(f"{path.stem}-{arch}", key, lambda: _cuda(path, arch))
    return {name: Built(**built) for name, built in found.items()}


def nvcc() -> str | None:
    return shutil.which("nvcc")


def nvcc_version() -> str:
    text = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc " + re.search(r"release ([\d.]+)", text)[1]


def _cuda(path: Path, arch: int) -> dict[str, dict]:
    target = f"sm_{arch}" + ("a" if arch == 90 else "")
    flags = ["-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_STABLE_ONLY"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", *(f"-I{p}" for p in include_paths("cpu"))]
    with temporary(b"") as built:
        subprocess.run([nvcc(), "-c", f"-arch={target}", *flags, "-o", built, path], check=True)
        usage, code = cuobjdump("--dump-resource-usage", built), cuobjdump("-sass", built)
    found = {}
    for name, registers, stack, shared, local in re.findall(
        r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage
    ):
        body = re.split(r"Function : ", code.partition(f"Function : {name}\n")[2])[0]
        found[demangled(name)] = Built(
            int(registers), int(stack) + int(local), int(shared),
            len(re.findall(r"(?:LDG|LDGSTS)\.E\.(?:\w+\.)*128", body)), len(re.findall(r"[A-Z]*MMA\.", body)),
        )._asdict()  # fmt: skip
    return found


def demangled(name: str) -> str:
    """The kernel's name with its template arguments, without parameter types and namespaces."""
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    text = re.sub(r"\(anonymous namespace\)::|^void |\((?:int|bool)\)", "", text)
    return re.sub(r"\(.*\)$", "", text)


def cuobjdump(option: str, cubin: Path) -> str:
    tool = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump"))
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def temporary(content: bytes) -> Iterator[Path]:
    CACHE.mkdir(exist_ok=True)
    path = CACHE / f"{os.getpid()}.cubin"
    path.write_bytes(content)
    try:
        yield path
    finally:
        path.unlink()


def cached(name: str, key: str, make: Callable[[], dict]) -> dict:
    CACHE.mkdir(exist_ok=True)
    path = CACHE / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if not path.exists():
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(make()))
        fresh.replace(path)
    return json.loads(path.read_text())
