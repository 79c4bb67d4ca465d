"""Every C++ and CUDA source compiles with the headers of the oldest supported torch."""

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from gpu_build import CACHE

ROOT = Path(__file__).parent.parent
OLDEST = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1] + ".0"
SOURCES = [p for p in sorted((ROOT / "csrc").iterdir()) if p.suffix in (".cpp", ".cu")]
FLAGS = ["-std=c++20", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


@pytest.fixture(scope="module")
def include(tmp_path_factory):
    """The folder of the headers of the oldest torch, downloaded once (the wheel has half a gigabyte)."""
    folder = CACHE / f"torch-{OLDEST}"
    if not folder.exists():
        wheels = tmp_path_factory.mktemp("wheel")
        command = ["pip", "download", "-q", "--no-deps", "-d", str(wheels), f"torch=={OLDEST}"]
        run = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        if run.returncode:
            pytest.skip(f"torch {OLDEST} cannot be fetched: {run.stderr.strip().splitlines()[-1]}")
        (wheel,) = wheels.iterdir()
        with zipfile.ZipFile(wheel) as z:
            z.extractall(folder, [n for n in z.namelist() if n.startswith("torch/include/")])
        wheel.unlink()
    return folder / "torch" / "include"


@pytest.mark.full
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_compiles(include, source):
    compiler = "nvcc" if source.suffix == ".cu" else "g++"
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    target = (
        ["-DUSE_CUDA", "-arch=sm_80", "-o", "/dev/null", "-c"] if compiler == "nvcc" else ["-fsyntax-only"]
    )
    includes = [f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    flags = [*FLAGS, *target]
    if source.name == "lexicon.cpp":  # a pybind11 module: not the stable ABI, but the headers of Python
        flags = ["-std=c++20", *target, f"-I{sysconfig.get_paths()['include']}"]
    run = subprocess.run([compiler, *flags, *includes, source], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
