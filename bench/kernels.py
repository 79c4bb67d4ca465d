"""What the CUDA kernels compile to, without a GPU: registers, spills, shared memory, instructions.

    python bench/kernels.py    # writes bench/results/kernels.jsonl and .md

Triton's kernels come from bench/builds, CUDA's from csrc/*.cu where nvcc is installed.
"""

import importlib
import json
from pathlib import Path

import gpu_build
import report
import triton
from gpu_build import ARCHITECTURES, Built, Kernel
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
TEXT = """# What the kernels compile to

Made by `python bench/kernels.py` without a GPU; `tests/test_kernels.py` holds it to what is compiled. A cell
has a value for each of {architectures}, or one where they agree. Spills, a thread's local memory, and shared
memory are bytes; spills must be 0. Tensor cores: instructions that multiply matrices there; a kernel of half
precisions with a product must have some. Wide loads: 16-byte loads from global memory.
"""


def triton_kernels() -> dict[str, list[Kernel]]:
    """The kernels of every operation, by its name."""
    names = sorted(p.stem for p in (ROOT / "bench" / "builds").glob("[a-z]*.py"))
    return {name: importlib.import_module(f"builds.{name}").KERNELS for name in names}


def row(op: str, kernel: str, form: str, arch: int, compiler: str, built: Built) -> dict:
    return {"op": op, "kernel": kernel, "form": form, "arch": arch, "compiler": compiler, **built._asdict()}


def rows() -> list[dict]:
    """Every kernel that can be compiled here, for every architecture."""
    found, compiler = [], f"triton {triton.__version__}"
    listed = [(op, kernel) for op, kernels in triton_kernels().items() for kernel in kernels]
    for op, kernel in tqdm(listed, desc="kernels"):
        for arch in ARCHITECTURES:
            found.append(row(op, kernel.kernel.__name__, kernel.name, arch, compiler, kernel.build(arch)))
    for path in sorted((ROOT / "csrc").glob("*.cu")) if gpu_build.nvcc() else ():
        for arch in ARCHITECTURES:
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
