"""Times several providers (implementations) of one operation, and the bare matrix products it cannot avoid.

Each provider is checked against float64 before it is timed. The providers take turns, call by call. A ratio
is the median over rounds of a provider's time divided by that of the bare products in the same round. Peak
memory is measured in a forked process: the resident set that a full-size call adds, after a small call, minus
the size of the gradients.
"""

import argparse
import ctypes
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module, metadata
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"  # recorded results, kept per class of CPU
OWN = Path(__file__).parent / "own"  # results of your own runs, ignored by git
MEMORY_LIMIT, TIME_LIMIT = 8 << 30, 60.0  # bytes, seconds; providers predicted to need more are not run
PEER_SECONDS = 8.0  # time limit for each peer
SHORT_ROUNDS, SHORT_SECONDS = 5, 2.0  # rounds, and time limit for each peer, if only the main cases run
MODULES = {"trl": "trl.kernels", "liger-kernel": "liger_kernel.chunked_loss", "torch-struct": "torch_struct"}
EMULATED = "not measured: this CPU has no bfloat16 products"
MODES = ("fwd_nograd", "fwd", "bwd", "fwd_bwd")

Inputs = dict[str, Tensor]


class Provider(NamedTuple):
    """`make(inputs)` returns a function without arguments, whose result (any shape) is differentiated."""

    make: Callable[[Inputs], Callable[[], Tensor]]
    memory: float = 0.0  # predicted bytes in addition to the inputs
    package: str = "sukhops"  # its version is recorded in the row
    ours: bool = False
    same: bool = True  # computes the same function as the reference and is checked; otherwise only timed
    compiles: bool = False  # the first call for a shape takes extra time and memory
    seconds: float = 0.0  # predicted time of a call


def compiled(make: Callable[[Inputs], Callable[[], Tensor]], memory: float) -> Provider:
    """torch.compile of another provider's call."""
    return Provider(lambda inputs: torch.compile(make(inputs)), memory, "torch", compiles=True)


class Case(NamedTuple):
    op: str
    name: str
    shape: dict[str, int | str]
    dtype: torch.dtype
    make: Callable[[], Inputs]  # leaf tensors; gradients are computed for those with requires_grad
    small: Callable[[], Inputs]  # smaller inputs, for the check against float64
    exact: Callable[[Inputs], Callable[[], Tensor]]  # the reference
    providers: dict[str, Provider]
    products: Callable[[Inputs], Callable[[], None]] | None = None  # the bare products
    rounds: int = 7
    modes: tuple[str, ...] = ("fwd_bwd",)
    device: str = "cpu"
    main: bool = False  # run by `make bench`


def main(name: str, cases: list[Case], grid: list[Case] | None = None) -> None:
    """The command line of a benchmark: its main cases, or all of them and its grid."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument(
        "--all", action="store_true", help="run every case (many minutes), not only the main ones"
    )
    parser.add_argument("--case", default="", help="with --all: only cases whose name contains this")
    parser.add_argument("--record", action="store_true", help="write to bench/results, for the documentation")
    args = parser.parse_args()
    if (args.record or args.case) and not args.all:
        parser.error("--record and --case require --all")
    if args.all:
        for rows in run([c for c in cases if args.case in c.name]):
            save(name, rows, args.record)
        for rows in run([c for c in grid or [] if args.case in c.name], measure_memory=False):
            save(f"{name}_grid", rows, args.record)
        return
    for rows in run([shortened(c) for c in cases if c.main], peer_seconds=SHORT_SECONDS):
        save(name, rows)


def shortened(case: Case) -> Case:
    """The case for `make bench`: few rounds, the last mode, no provider that compiles or is slow."""
    quick = {n: p for n, p in case.providers.items() if p.seconds <= PEER_SECONDS and not p.compiles}
    return case._replace(rounds=min(case.rounds, SHORT_ROUNDS), modes=case.modes[-1:], providers=quick)


def save(name: str, rows: list[dict], record: bool = False) -> None:
    """Writes rows; they replace earlier rows of the same case, dtype, mode and class of CPU."""
    path = (RESULTS if record else OWN) / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)

    def key(row: dict) -> tuple:
        return row.get("isa"), row.get("case"), row.get("dtype"), row.get("mode")

    found: dict[tuple, list[dict]] = {}
    old = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for row in old:
        found.setdefault(key(row), []).append(row)
    found |= {key(row): [] for row in rows}  # new rows keep the position of those they replace
    for row in rows:
        found[key(row)].append(row)
    ordered = sorted(found.items(), key=lambda item: str(item[0][0]))
    with path.open("w") as f:
        f.writelines(json.dumps(row) + "\n" for _, group in ordered for row in group)


def run(
    cases: list[Case], measure_memory: bool = True, peer_seconds: float = PEER_SECONDS
) -> Iterator[list[dict]]:
    """Runs and prints the cases in order; yields a list of rows for each combination of name and dtype.

    Memory is measured first, because it forks: OpenMP does not work in a fork of a process that has used it.
    """
    for package in {p.package for case in cases for p in case.providers.values()} & MODULES.keys():
        with suppress(ImportError):
            import_module(MODULES[package])  # once, not in every forked process
    memory: list[dict] = [{} for _ in cases]
    for case, measured in zip(cases, memory, strict=True):
        measurable = measure_memory and "fwd_bwd" in case.modes and not emulated(case)
        for name, p in case.providers.items() if measurable else ():
            if p.memory <= MEMORY_LIMIT and p.seconds <= TIME_LIMIT:
                measured[name] = peak_memory(case, p)
    together = groupby(zip(cases, memory, strict=True), lambda pair: (pair[0].name, pair[0].dtype))
    for _, group in together:
        rows = []
        for case, measured in group:
            rows += run_case(case, measured, EMULATED if emulated(case) else None, peer_seconds)
        yield rows


def emulated(case: Case) -> bool:
    """Whether the case trains in bfloat16 on a CPU without bfloat16 instructions."""
    trains = case.dtype == torch.bfloat16 and "fwd_bwd" in case.modes
    return trains and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def run_case(
    case: Case,
    memory: dict[str, float | None],
    skipped: str | None = None,
    peer_seconds: float = PEER_SECONDS,
) -> list[dict]:
    dtype = str(case.dtype).removeprefix("torch.")
    print(f"\n{case.op} · {case.name} · {dtype} · " + " ".join(f"{k}={v}" for k, v in case.shape.items()))
    base = {"op": case.op, "case": case.name, "dtype": dtype, "shape": case.shape, **machine()}
    gates = {}
    for name, p in case.providers.items():
        if skipped:
            gates[name] = {"skipped": skipped}
            continue
        if p.memory > MEMORY_LIMIT:
            gates[name] = {"skipped": f"predicted memory {p.memory / 2**30:.1f} GiB is above 8 GiB"}
            continue
        if p.seconds > TIME_LIMIT:
            gates[name] = {"skipped": f"predicted time {p.seconds:.0f} s is above 60 s"}
            continue
        try:
            gates[name] = check(case, p) if p.same else {"gate": True}
        except Exception as error:  # record the error of a peer in its row and go on
            if p.ours:
                raise
            gates[name] = {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    rows = []
    for mode in case.modes:
        ready = {n: p for n, p in case.providers.items() if gates[n].get("gate")}
        timed = time_providers(case, mode, ready, peer_seconds) if ready else {}
        for name, p in case.providers.items():
            row = base | {"provider": name, "version": version(p.package), "mode": mode}
            row |= gates[name] | timed.get(name, {})
            if mode == "fwd_bwd" and memory.get(name):
                row["memory_mib"] = round(memory[name] / 2**20, 1)
            rows.append(row)
            print_row(row)
    return rows


def check(case: Case, provider: Provider) -> dict:
    """Errors against float64, over results and gradients, of the provider and of the reference."""
    inputs = case.small()

    def outcome(make, cast=None):
        given = {n: leaf(t, cast) for n, t in inputs.items()}
        result = make(given)()
        grads = torch.autograd.grad(result.sum(), parameters(given)) if parameters(given) else ()
        return [result.detach().double()] + [g.double() for g in grads]

    exact = outcome(case.exact, torch.float64)
    low, ours = outcome(case.exact), outcome(provider.make)
    error, allowed = 0.0, 0.0
    for e, lo, o in zip(exact, low, ours, strict=True):
        size = e.abs().max().item() or 1.0
        error = max(error, (o - e).abs().max().item() / size)
        allowed = max(allowed, (lo - e).abs().max().item() / size)
    eps = torch.finfo(case.dtype).eps
    return {
        "error": error,
        "error_reference": allowed,
        "gate": error <= 2 * allowed + 4 * eps,
        **({} if error <= 2 * allowed + 4 * eps else {"skipped": f"wrong: error {error:.2g}"}),
    }


def time_providers(
    case: Case, mode: str, providers: dict[str, Provider], peer_seconds: float = PEER_SECONDS
) -> dict[str, dict]:
    inputs, timer = case.make(), clock if case.device == "cpu" else device_clock
    calls = {n: step(p.make(inputs), parameters(inputs), mode, timer) for n, p in providers.items()}
    bare = case.products(inputs) if case.products and mode == case.modes[-1] else None
    times: dict[str, list[float]] = {n: [] for n in calls}
    ratios: dict[str, list[float]] = {n: [] for n in calls}
    for name, call in calls.items():
        if providers[name].compiles or case.device != "cpu":
            call()  # the other providers were warmed up by the check on small inputs
    for _ in range(case.rounds):
        reference = timer(bare) if bare else None
        for name, call in calls.items():
            if not providers[name].ours and sum(times[name]) > peer_seconds:
                continue
            times[name].append(call())
            if reference:
                ratios[name].append(times[name][-1] / reference)
    out = {}
    for name, t in times.items():
        out[name] = {f"p{q}_ms": round(1e3 * quantile(t, q), 3) for q in (20, 50, 80)} | {"rounds": len(t)}
        if ratios[name]:
            out[name] |= {f"ratio_p{q}": round(quantile(ratios[name], q), 5) for q in (20, 50, 80)}
    return out


def clock(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    kept = f()
    seconds = time.perf_counter() - start
    del kept
    return seconds


def device_clock(f: Callable[[], object]) -> float:
    """Seconds between two CUDA events; the L2 cache is overwritten before the first."""
    torch.empty(256 << 20, dtype=torch.uint8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    kept = f()
    end.record()
    end.synchronize()
    del kept
    return start.elapsed_time(end) / 1e3


def step(
    call: Callable[[], Tensor], params: list[Tensor], mode: str, timer: Callable[..., float] = clock
) -> Callable[[], float]:
    """A function that runs `mode` once and returns its seconds, without the time to free the gradients."""

    def timed() -> float:
        if mode == "fwd_nograd":
            with torch.no_grad():
                return timer(call)
        if mode == "fwd":
            return timer(call)
        if mode == "bwd":
            result = call()
            return timer(lambda: torch.autograd.grad(result, params, torch.ones_like(result)))
        return timer(lambda: torch.autograd.grad(result := call(), params, torch.ones_like(result)))

    return timed


def peak_memory(case: Case, provider: Provider) -> float | None:
    """Peak bytes of a forward and backward in a forked process, without the gradients; None if it fails."""
    read, write = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            inputs = case.make()
            call = step(provider.make(inputs), parameters(inputs), "fwd_bwd")
            if provider.compiles:
                call()
            else:
                small = case.small()
                step(provider.make(small), parameters(small), "fwd_bwd")()  # loads code and starts threads
            ctypes.CDLL(None).malloc_trim(0)
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            call()
            grads = sum(t.numel() * t.element_size() for t in parameters(inputs))
            os.write(write, str(resident("VmHWM") - before - grads).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as f:
        text = f.read()
    os.waitpid(child, 0)
    return float(text) if text else None


def test_provider(benchmark, case: Case, provider: Provider) -> None:
    """Times one provider of one case with pytest-benchmark."""
    inputs = case.make()
    call = step(provider.make(inputs), parameters(inputs), case.modes[-1])
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"no {field} in /proc/self/status")


def leaf(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    if not t.is_floating_point():
        return t
    return t.detach().to(dtype or t.dtype, copy=True).requires_grad_(t.requires_grad)


def parameters(inputs: Inputs) -> list[Tensor]:
    return [t for t in inputs.values() if t.requires_grad]


def quantile(values: list[float], q: int) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(q / 100).item()


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def machine() -> dict:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.processor(),
    )  # fmt: skip

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout

    return {
        "machine": cpu,
        "isa": torch.ops.sukhops.cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": git("rev-parse", "--short", "HEAD").strip(),
        "dirty": bool(git("status", "--porcelain", "-uno", ":!results").strip()),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def print_row(row: dict) -> None:
    name = f"  {row['provider']:<24} {row['mode']:<10}"
    if row.get("skipped"):
        print(f"{name} {row['skipped']}")
        return
    text = f"{name} {row['p50_ms']:>9.1f} ms  (p20 {row['p20_ms']:.1f}, p80 {row['p80_ms']:.1f})"
    if "ratio_p50" in row:
        text += f"  {row['ratio_p50']:.3g}x bare ({row['ratio_p20']:.3g} to {row['ratio_p80']:.3g})"
    if "memory_mib" in row:
        text += f"  {row['memory_mib']:.0f} MiB"
    if "error" in row:
        text += f"  error {row['error']:.1e} (reference {row['error_reference']:.1e})"
    print(text, flush=True)
