"""Runs the tests with other versions of torch and Python, each in a new environment: make test-versions.

The operators are built once, by this Python: their stable ABI should load in all versions. Only the lexicon's
module is compiled for each Python. An environment takes gigabytes and is removed after its run.

    python tests/versions.py                the oldest and newest torch; the pinned torch on other Pythons
    python tests/versions.py 3.12:2.13.0    a single pair of Python and torch

Results go to bench/results/versions.jsonl, from which `make docs` makes the table of docs/reliability.md.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "versions"
RESULTS = ROOT / "bench" / "results" / "versions.jsonl"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TOOLS = ("numpy", "pytest", "hypothesis", "tqdm", "matplotlib", "ninja", "setuptools<82")
# not run: tests that do not depend on the versions, or need the pinned tools
LEFT_OUT = ("house", "docs", "gpu*", "kernels", "roofline", "oldest_torch", "compilers", "*triton*", "*_cuda")
OURS = f"{sys.version_info.major}.{sys.version_info.minor}"


def pinned() -> str:
    return re.search(r"^torch==([\d.]+)", (ROOT / "requirements-dev.txt").read_text(), re.M)[1]


def oldest() -> str:
    return re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1] + ".0"


def newest() -> str:
    """The version of torch that pip would install: the newest one that its constraints allow."""
    options = ["--dry-run", "--no-deps", "--ignore-installed"]
    command = [sys.executable, "-m", "pip", "install", *options, "torch"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.search(r"^Would install torch-([\d.]+)", out, re.M)[1]


def pythons() -> dict[str, str]:
    """The working Python programs of PYTHONS on PATH or in pyenv, by version."""
    found = {}
    for version in PYTHONS:
        installed = Path.home().glob(f".pyenv/versions/{version}.*/bin/python")
        for program in filter(None, [shutil.which(f"python{version}"), *map(str, installed)]):
            if subprocess.run([program, "-c", "import venv"], capture_output=True).returncode == 0:
                found[version] = program
                break
    return found | {OURS: sys.executable}


def tree(python: Path) -> Path:
    """A copy of the working tree with the built operators and the lexicon's module for `python`."""
    folder = FOLDER / "tree"
    shutil.rmtree(folder, ignore_errors=True)
    tracked = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(tracked, cwd=ROOT, capture_output=True, text=True).stdout.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "sukhops" / "triton_kernels").symlink_to(folder / "triton_kernels")
    shutil.copy2(ROOT / "sukhops" / "_C.so", folder / "sukhops")
    ask = "import sysconfig as s; print(s.get_paths()['include'], s.get_config_var('EXT_SUFFIX'))"
    asked = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    include, suffix = asked.stdout.split()
    pybind11 = Path(sysconfig.get_paths()["purelib"]) / "torch" / "include"
    source, target = folder / "csrc" / "lexicon.cpp", folder / "sukhops" / f"_lexicon{suffix}"
    flags = ["-std=c++20", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", f"-I{include}", f"-I{pybind11}"]
    subprocess.run(["g++", *flags, source, "-o", target], check=True)
    return folder


def run(program: str, version: str, torch: str) -> dict:
    environment, began = FOLDER / f"{version}-{torch}", time.monotonic()
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([program, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", f"torch=={torch}", *TOOLS], check=True)
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    folder = tree(python)
    ignored = [f"--ignore-glob=*/test_{name}.py" for name in LEFT_OUT]
    chosen = ["-m", "not full and not real and not large and not interpreter and not gpu"]
    command = [python, "-m", "pytest", "-q", *ignored, *chosen, "tests"]
    suite = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, stdout=subprocess.PIPE, text=True
    )
    print(suite.stdout, flush=True)
    check = subprocess.run([python, "-m", "sukhops", "check"], cwd=folder, stdout=subprocess.DEVNULL)
    ended = re.findall(r"(\d+) (passed|failed|skipped|error)", suite.stdout.splitlines()[-1])
    counts = {kind: int(n) for n, kind in ended}
    shutil.rmtree(environment)
    return {
        "python": version,
        "torch": torch,
        "commit": commit.strip(),
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0),
        "skipped": counts.get("skipped", 0),
        "check": check.returncode == 0,
        "minutes": (time.monotonic() - began) / 60,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="*", metavar="PYTHON:TORCH")
    options = parser.parse_args()
    found = pythons()
    pairs = [tuple(p.split(":")) for p in options.pairs] or [
        (OURS, oldest()), (OURS, newest()), *((version, pinned()) for version in found if version != OURS)
    ]  # fmt: skip
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    failed = False
    for version, torch in pairs:
        print(f"Python {version}, torch {torch}", flush=True)
        row = run(found[version], version, torch)
        print(row, flush=True)
        failed |= row["failed"] > 0 or row["passed"] == 0 or not row["check"]
        rows = [r for r in rows if (r["python"], r["torch"]) != (version, torch)] + [row]
        RESULTS.write_text("".join(json.dumps(r) + "\n" for r in rows))
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
