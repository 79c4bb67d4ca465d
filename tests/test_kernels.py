"""Compiles every CUDA kernel: the code respects each architecture's limits and matches kernels.md."""

import shutil

import gpu_build
import kernels
import pytest
import report
import triton
from gpu_build import ARCHITECTURES, SHARED_LIMIT

BUILDS = [(op, kernel) for op, listed in kernels.triton_kernels().items() for kernel in listed]
# compiling takes long: make test compiles for sm_90 alone and reads what was recorded of the others
architectures = pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=() if arch == 90 else pytest.mark.full) for arch in ARCHITECTURES]
)


@architectures
@pytest.mark.parametrize("op, kernel", BUILDS, ids=[f"{op}-{k.kernel.__name__}-{k.name}" for op, k in BUILDS])
def test_compiles_within_the_limits(op, kernel, arch):
    built = kernel.build(arch)
    assert built.spills == 0
    assert built.shared <= SHARED_LIMIT[arch]
    assert not kernel.multiplies or built.tensor_core > 0
    assert not kernel.wide or built.wide_loads > 0


def test_every_triton_file_has_builds():
    files = {p.stem for p in (kernels.ROOT / "triton_kernels").glob("[a-z]*.py")}
    assert files == set(kernels.triton_kernels())


@pytest.mark.parametrize("op, kernel", BUILDS, ids=[f"{op}-{k.kernel.__name__}-{k.name}" for op, k in BUILDS])
def test_recorded_builds_respect_the_limits(op, kernel):
    names = op, kernel.kernel.__name__, kernel.name
    found = {r["arch"]: r for r in report.rows("kernels") if (r["op"], r["kernel"], r["form"]) == names}
    assert set(found) == set(ARCHITECTURES), "run python bench/kernels.py"
    for arch, built in found.items():
        assert built["spills"] == 0 and built["shared"] <= SHARED_LIMIT[arch]
        assert not kernel.multiplies or built["tensor_core"] > 0
        assert not kernel.wide or built["wide_loads"] > 0


@architectures
def test_record_is_up_to_date(arch):
    recorded = [r for r in report.rows("kernels") if r["arch"] == arch]
    compilers = {r["compiler"].split()[0]: r["compiler"] for r in recorded}
    if compilers["triton"] != f"triton {triton.__version__}":
        pytest.skip(f"recorded with {compilers['triton']}")
    same_nvcc = (
        gpu_build.nvcc() and compilers.get("nvcc", gpu_build.nvcc_version()) == gpu_build.nvcc_version()
    )
    found = [r for r in kernels.rows([arch]) if same_nvcc or not r["compiler"].startswith("nvcc")]
    expected = [r for r in recorded if same_nvcc or not r["compiler"].startswith("nvcc")]
    assert found == expected, "run python bench/kernels.py"


def test_document_is_up_to_date():
    assert kernels.document(report.rows("kernels")) == (report.RESULTS / "kernels.md").read_text()


SOURCE = """
#include <cuda_fp16.h>
namespace {
template <int N>
__global__ void scale(float4* x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) { float4 y = x[i]; x[i] = make_float4(y.w * N, y.z, y.y, y.x); }
}
template __global__ void scale<3>(float4*, int);
}  // namespace
"""


@pytest.mark.skipif(not gpu_build.nvcc() or not shutil.which("c++filt"), reason="needs nvcc and c++filt")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_build_cuda_reads_a_cu_file(tmp_path, monkeypatch, arch):
    monkeypatch.setattr(gpu_build, "CACHE", tmp_path / "cache")
    path = tmp_path / "scale.cu"
    path.write_text(SOURCE)
    (built,) = (found := gpu_build.build_cuda(path, arch)).values()
    assert list(found) == ["scale<3>"]
    assert 4 < built.registers < 40
    assert (built.spills, built.shared, built.tensor_core, built.wide_loads) == (0, 0, 0, 1)
