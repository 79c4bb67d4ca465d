"""Builds, tests and measures sukhops on a machine with a CUDA device and its own torch; `make gpu` runs it.

Nothing is downloaded: only installed peers are measured. Every step runs in its own process, so the next step
runs even if one fails or crashes the device. A summary lists steps that failed or for which no time was left.

    python bench/gpu.py [--op NAME ...] [--step build test bench suite] [--minutes M]
    python bench/gpu.py --step sanitize [--op NAME ...]    # compute-sanitizer: memcheck and racecheck

Writes bench/results/<gpu>.jsonl, and makes the table <gpu>.md and plots from it. The exit status is 1 if a
step failed and 2 without a CUDA device.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import report
import torch

ROOT = Path(__file__).parent.parent
OPS = ("vocab_head", "preference", "director", "adaptive_span", "segmentation")
STEPS = ("build", "test", "bench", "suite")
SANITIZERS = ("memcheck", "racecheck")


class Step(NamedTuple):
    name: str
    command: list[str]
    seconds: float  # time limit
    environment: dict[str, str] | None = None


class Outcome(NamedTuple):
    step: str
    status: str  # "ok", "FAILED", "out of time" or "no time left"
    seconds: float


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def planned(steps: list[str], ops: list[str], arch: str, rows: Path) -> list[Step]:
    """The steps in order: those that need the device first, the CPU tests last."""
    found = []
    pytest = python("-m", "pytest", "-q", "-p", "no:cacheprovider")
    if "build" in steps:
        install = python("-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", ".")
        found.append(Step("build", install, 300, {"TORCH_CUDA_ARCH_LIST": arch}))
    for op in ops if "test" in steps else ():
        found.append(Step(f"test {op}", [*pytest, "-m", "gpu", "tests/test_gpu.py", "-k", op], 120))
    for op in ops if "bench" in steps else ():
        found.append(Step(f"bench {op}", python("bench/gpu_run.py", op, str(rows / f"{op}.jsonl")), 150))
    if "suite" in steps:
        workers = min(8, os.cpu_count() or 1)
        spread = ["-n", str(workers)] if find_spec("xdist") else []
        threads = {"OMP_NUM_THREADS": "2"} if spread else None
        found.append(Step("suite", [*pytest, *spread, "-m", "not full and not gpu"], 400, threads))
    for tool in SANITIZERS if "sanitize" in steps else ():
        check = f"compute-sanitizer --tool {tool} --error-exitcode 9 --target-processes all".split()
        # without caching each tensor is a separate allocation, so that out-of-bounds access is detected
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for op in ops:
            tests = ["tests/test_gpu.py", "-k", f"{op} and budget and small and cuda"]
            found.append(Step(f"{tool} {op}", [*check, *pytest, *tests], 300, uncached))
    return found


def run(step: Step, limit: float) -> Outcome:
    """Runs a step in a new process; its output goes to the terminal."""
    start = time.monotonic()
    process = subprocess.Popen(
        step.command, cwd=ROOT, env=os.environ | (step.environment or {}), start_new_session=True
    )
    try:
        code = process.wait(timeout=min(step.seconds, limit))
        status = "ok" if code == 0 else f"FAILED ({code})"
    except subprocess.TimeoutExpired:
        status = "out of time"
    finally:
        if process.poll() is None:  # out of time or interrupted: also kill its child processes
            os.killpg(process.pid, 9)
            process.wait()
    return Outcome(step.name, status, time.monotonic() - start)


def run_all(steps: list[Step], seconds: float) -> list[Outcome]:
    start, outcomes = time.monotonic(), []
    for number, step in enumerate(steps, 1):
        left = seconds - (time.monotonic() - start)
        print(f"\n[{number}/{len(steps)}] {step.name} · {left:.0f} s left", flush=True)
        outcomes.append(run(step, left) if left > 5 else Outcome(step.name, "no time left", 0.0))
        print(
            f"[{number}/{len(steps)}] {step.name}: {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s",
            flush=True,
        )
    return outcomes


def document(found: list[dict]) -> str:
    """A Markdown page: times of sukhops and of its peers, predicted times, then the goals of each case."""
    device = next((row["machine"] for row in found if "machine" in row), "GPU")
    body, verdicts = [], []
    for row in found:
        if row.get("failed") or row.get("skipped"):
            why = row.get("failed") or row["skipped"]
            body.append([row.get("case", row["op"]), row.get("provider", ""), *[""] * 5, why])
            continue
        ratio = f"{row['ratio_p50']:.2f}" if "ratio_p50" in row else ""
        body.append([
            row["case"] + "".join(f", {k} = {v:,}" for k, v in row["shape"].items() if isinstance(v, int)),
            row["provider"], f"{row['p50_ms']:.3f}", report.number(row.get("predicted_ms"), ".3f"), ratio,
            report.number(row.get("memory_mib")), report.number(row.get("error"), ".1e"), "",
        ])  # fmt: skip
        verdicts += [f"- {row['case']}: {verdict}" for verdict in row.get("reach", ())]
    header = ["case", "provider", "ms", "predicted ms", "× floor", "MiB", "error", ""]
    parts = [f"# Measured on {device}", report.markdown(header, body)]
    if verdicts:
        parts.append("Goals:\n\n" + "\n".join(verdicts))
    return "\n\n".join(parts) + "\n"


def save(rows: Path) -> Path | None:
    """Merges the new rows into the file of this GPU; operations that did not run keep their old rows."""
    parts = {
        p.stem: [json.loads(line) for line in p.read_text().splitlines()]
        for p in sorted(rows.glob("*.jsonl"))
    }
    if not parts:
        return None
    stem = re.sub(r"\W+", "_", torch.cuda.get_device_name()).strip("_").lower()
    path = report.RESULTS / f"{stem}.jsonl"
    kept = [row for row in report.rows(stem) if row["op"] not in parts]
    found = kept + [row for part in parts.values() for row in part]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    path.with_suffix(".md").write_text(document(found))
    measured = [row for row in found if "shape" in row and "p50_ms" in row]
    if find_spec("matplotlib"):
        for case, axis in report.sweeps(measured).items():
            report.plot(stem, measured, case, axis)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--step", nargs="+", choices=[*STEPS, "sanitize"], default=list(STEPS))
    parser.add_argument("--minutes", type=float, default=600.0, help="time limit of the whole run")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        print(
            f"make gpu needs a CUDA device: torch {torch.__version__} ({built}) sees none here",
            file=sys.stderr,
        )
        return 2
    if "sanitize" in options.step and not shutil.which("compute-sanitizer"):
        print("--step sanitize needs compute-sanitizer, which comes with CUDA, on the PATH", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}.{minor}" + ("a" if major == 9 else "")
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run_all(planned(options.step, options.op, arch, Path(folder)), 60 * options.minutes)
        path = save(Path(folder))
    if path:
        print("\n" + path.with_suffix(".md").read_text() + f"\nrows: {path.relative_to(ROOT)}")
    print()
    for outcome in outcomes:
        print(f"{outcome.step:<26}{outcome.status:<16}{outcome.seconds:6.0f} s")
    return int(any(outcome.status != "ok" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
