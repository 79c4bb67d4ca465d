"""Rules of the repository: file sizes and names, packaging, `python -m sukhops info` and `check`."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

import sukhops  # noqa: F401  (loads the operators)

ROOT = Path(__file__).parent.parent
TRACKED = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT).stdout.split()
OPERATORS = re.findall(r'"(\w+)\(', (ROOT / "csrc" / "schema.cpp").read_text())


def module(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)


def test_files_are_short():
    for name in TRACKED:
        path = ROOT / name
        if path.suffix in (".py", ".cpp", ".h", ".cu") and path.exists():
            limit = 600 if name.startswith(("csrc/", "triton_kernels/")) else 400
            assert len(path.read_text().splitlines()) <= limit * 1.1, name


def test_triton_kernels_are_imported_through_sukhops():
    for name in TRACKED:
        if name.endswith(".py") and (ROOT / name).exists():
            text = (ROOT / name).read_text()
            assert not re.search(r"^\s*(?:from|import) triton_kernels\b", text, re.M), name


def test_every_operator_has_a_cpu_kernel_and_a_fake():
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for operator in OPERATORS:
        if "Tensor" not in str(getattr(torch.ops.sukhops, operator).default._schema):
            continue
        assert has(f"sukhops::{operator}", "CPU"), operator
        assert torch._library.simple_registry.singleton.find(f"sukhops::{operator}").fake_impl.kernel, (
            operator
        )


@pytest.mark.parametrize("name", [p.stem for p in (ROOT / "sukhops" / "ops").glob("[a-z]*.py")])
def test_every_op_has_a_reference_test_and_benchmark(name):
    for path in (f"sukhops/reference/{name}.py", f"tests/test_{name}.py", f"bench/bench_{name}.py"):
        assert (ROOT / path).exists(), path


def test_info_and_check():
    info = module("-m", "sukhops", "info")
    assert info.returncode == 0 and "vocab_head" in info.stdout
    check = module("-m", "sukhops", "check")
    assert check.returncode == 0, check.stdout
    assert "linear_logp" in check.stdout and "FAIL" not in check.stdout


def test_missing_library_says_how_to_build(tmp_path):
    package = tmp_path / "sukhops"
    package.mkdir()
    for name in ("__init__.py", "_library.py"):
        (package / name).write_text((ROOT / "sukhops" / name).read_text())
    run = subprocess.run(
        [sys.executable, "-c", "import sukhops"], capture_output=True, text=True, cwd=tmp_path
    )
    assert "sukhops is not built" in run.stderr and "pip install --no-build-isolation" in run.stderr


@pytest.mark.full
def test_wheel_contains_only_the_package(tmp_path):
    run = module("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path))
    assert run.returncode == 0, run.stderr
    # the lexicon module is built for one Python version
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    (wheel,) = tmp_path.glob(f"sukhops-*-{python}-{python}*-*.whl")
    names = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]
    assert all(n.startswith("sukhops/") for n in names)
    libraries = {"sukhops/_C.so", f"sukhops/_lexicon{sysconfig.get_config_var('EXT_SUFFIX')}"}
    assert {n for n in names if n.endswith(".so")} - {"sukhops/_C_cuda.so"} == libraries
    assert {"sukhops/py.typed", "sukhops/triton_kernels/vocab_head.py"} <= set(names)
    # the operators do not depend on the Python version
    assert b"PyObject_" not in zipfile.ZipFile(wheel).read("sukhops/_C.so")
    installed = tmp_path / "installed"
    target = ["--no-deps", "--no-index", "--target", str(installed), str(wheel)]
    assert module("-m", "pip", "install", "-q", *target).returncode == 0
    program = "import sukhops; print(sukhops.__file__, sukhops.Lexicon.from_text(['ab']).units)"
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, cwd=installed,
    )  # fmt: skip
    assert run.stdout.startswith(str(installed)) and run.stdout.endswith("['', 'a', 'b']\n"), run.stderr


@pytest.mark.full
@pytest.mark.parametrize("variant", ["avx2", "base", "clang"])
def test_other_builds(tmp_path, variant):
    """The test suite on builds without AVX-512, and on a build by clang."""
    clang = variant == "clang"
    if clang and not shutil.which("clang++"):
        pytest.skip("clang++ is not installed")
    if variant == "avx2" and "avx512" not in torch.ops.sukhops.cpu_capability():
        pytest.skip("without AVX-512, the installed build uses the same kernels")
    flags = {"CC": "clang", "CXX": "clang++"} if clang else {"CFLAGS": f"-DSUKHOPS_ISA={variant}"}
    # subprocesses of the tests import tests from the checkout and sukhops from this build
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'lib'}{os.pathsep}{ROOT}"}
    build = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "-b",
        str(tmp_path),
        "--build-lib",
        str(tmp_path / "lib"),
    ]
    assert subprocess.run(build, cwd=ROOT, env=environment | flags).returncode == 0
    check = "import sukhops, torch; print(torch.ops.sukhops.cpu_capability(), sukhops.__file__)"
    elsewhere = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    run = subprocess.run([sys.executable, "-c", check], **elsewhere)
    expected = {"avx2": "avx2", "base": "portable", "clang": ""}[variant]
    assert expected in run.stdout and str(tmp_path) in run.stdout
    suite = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), str(ROOT / "tests")]
    run = subprocess.run(
        [*suite, "-k", "not house", "-m", "not full and not real and not large"], **elsewhere
    )
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.every_isa
def test_marked_tests_run_with_every_instruction_set(request):
    used = torch.ops.sukhops.cpu_capability().replace(" + bfloat16 products", "_bf16")
    assert used == request.node.callspec.params["isa"]
