"""Measures the memory of each headline case of the README again, in a new process."""

import subprocess
import sys
from pathlib import Path

import pytest
import report
import torch

import sukhops  # noqa: F401  (registers the operators)

ROOT = Path(__file__).parent.parent
MARGIN, SLACK = 1.25, 8.0  # factor, and MiB: the resident set consists of whole pages of each thread's heap
MEASURE = """
import importlib, sys
import harness
module, name, dtype = sys.argv[1:]
cases = importlib.import_module(f"bench_{module}").cases()
(case,) = [c for c in cases if c.name == name and str(c.dtype) == dtype and "fwd_bwd" in c.modes]
print(harness.peak_memory(case, case.providers["sukhops"]) / 2**20)
"""


def stated() -> dict[tuple[str, str, str], float]:
    """The recorded MiB of sukhops in each headline case: of this class of CPU, or the most of all classes."""
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for h in report.HEADLINES:
        for r in report.rows(h.name):
            if (r["case"], r["mode"], r["provider"]) == (h.case, h.mode, "sukhops") and "memory_mib" in r:
                of_class = found.setdefault((h.name, h.case, f"torch.{r['dtype']}"), {})
                of_class[r["isa"]] = r["memory_mib"]
    mine = torch.ops.sukhops.cpu_capability()
    return {key: of_class.get(mine, max(of_class.values())) for key, of_class in found.items()}


CASES = stated()


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(key, marks=() if i in (0, len(CASES) - 1) else pytest.mark.full, id=" ".join(key))
        for i, key in enumerate(CASES)
    ],
)
def test_headline(key):
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *key], capture_output=True, text=True, cwd=ROOT / "bench", timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert float(run.stdout.splitlines()[-1]) <= MARGIN * CASES[key] + SLACK
