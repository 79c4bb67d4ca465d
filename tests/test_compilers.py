"""Compiles every C++ source with each installed compiler, and runs the product kernels on aarch64 (qemu)."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc").glob("*.cpp"))
COMPILERS = ["g++-11", "clang++", "aarch64-linux-gnu-g++"]
FLAGS = ["-std=c++20", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


@pytest.fixture(params=COMPILERS)
def compiler(request):
    if not shutil.which(request.param):
        pytest.skip(f"{request.param} is not installed")
    return request.param


@pytest.mark.full
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_compiles(compiler, source):
    if source.name == "lexicon.cpp" and compiler.startswith("aarch64"):
        pytest.skip("needs the Python headers of an aarch64 machine")
    include = [f"-I{path}" for path in [*include_paths(), sysconfig.get_paths()["include"]]]
    command = [compiler, *FLAGS, *include, "-O1", "-c", source, "-o", "/dev/null"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("target", ["g++", "clang++", "aarch64-linux-gnu-g++"])
def test_product_kernels_without_torch(tmp_path, target):
    run = ["qemu-aarch64"] if target.startswith("aarch64") else []
    for program in (target, *run):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    source, built = ROOT / "tests" / "product_host.cpp", tmp_path / "product_host"
    flags = ["-std=c++20", "-O2", "-ffp-contract=fast", "-static", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
    subprocess.run([target, *flags, source, "-o", built], check=True)
    result = subprocess.run([*run, built], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "products are right\n", result.stdout
