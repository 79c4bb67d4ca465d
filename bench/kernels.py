"""Compiles the CUDA kernels without a GPU; records registers, spills, shared memory and instructions.

    python bench/kernels.py    # writes bench/results/kernels.jsonl and .md

Triton kernels are listed in bench/builds; CUDA C++ kernels in csrc/*.cu are compiled if nvcc is installed.
"""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path

import gpu_build
import report
import triton
from gpu_build import ARCHITECTURES, Built, Kernel
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
TEXT = """# Compiled kernels

Made by `python bench/kernels.py` without a GPU; `tests/test_kernels.py` checks that it is up to date. A cell
has one value for each of {architectures}, or a single value if they are equal. Spills (local memory of a
thread) and shared memory are in bytes; spills must be 0. Tensor cores: number of tensor-core instructions;
kernels with half-precision matrix products must have some. Wide loads: number of 16-byte loads from global
memory.
"""


def triton_kernels() -> dict[str, list[Kernel]]:
    """The Triton kernels of every operation, by the operation's name."""
    names = sorted(p.stem for p in (ROOT / "bench" / "builds").glob("[a-z]*.py"))
    return {name: importlib.import_module(f"builds.{name}").KERNELS for name in names}


def row(op: str, kernel: str, form: str, arch: int, compiler: str, built: Built) -> dict:
    return {"op": op, "kernel": kernel, "form": form, "arch": arch, "compiler": compiler, **built._asdict()}


def rows(architectures: Sequence[int] = ARCHITECTURES) -> list[dict]:
    """Compiles every kernel for each architecture; CUDA C++ only if nvcc is installed."""
    found, compiler = [], f"triton {triton.__version__}"
    listed = [(op, kernel) for op, kernels in triton_kernels().items() for kernel in kernels]
    for op, kernel in tqdm(listed, desc="kernels"):
        for arch in architectures:
            found.append(row(op, kernel.kernel.__name__, kernel.name, arch, compiler, kernel.build(arch)))
    for path in sorted((ROOT / "csrc").glob("*.cu")) if gpu_build.nvcc() else ():
        for arch in architectures:
            for name, built in gpu_build.build_cuda(path, arch).items():
                found.append(row(path.stem, name, "", arch, gpu_build.nvcc_version(), built))
    return found


def document(found: list[dict]) -> str:
    header = [
        "operation",
        "kernel",
        "form",
        "registers",
        "spills",
        "shared memory",
        "tensor cores",
        "wide loads",
    ]
    groups: dict[tuple, list[dict]] = {}
    for r in found:
        groups.setdefault((r["op"], r["kernel"], r["form"]), []).append(r)
    body = []
    for names, group in groups.items():
        cells = []
        for field in ("registers", "spills", "shared", "tensor_core", "wide_loads"):
            values = [f"{r[field]:,}" for r in group]
            cells.append(values[0] if len(set(values)) == 1 else " / ".join(values))
        body.append([*names, *cells])
    compilers = ", ".join(dict.fromkeys(r["compiler"] for r in found))
    architectures = ", ".join(f"sm_{arch}" for arch in ARCHITECTURES)
    text = TEXT.format(architectures=architectures)
    return f"{text}\n{report.markdown(header, body)}\n\nCompiled by {compilers}.\n"


def main() -> None:
    found = rows()
    with (report.RESULTS / "kernels.jsonl").open("w") as file:
        file.writelines(json.dumps(r) + "\n" for r in found)
    path = report.RESULTS / "kernels.md"
    path.write_text(document(found))
    print(f"{len(found)} builds: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
