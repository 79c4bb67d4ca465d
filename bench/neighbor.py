"""Times every operator and eager PyTorch while another program is busy on all cores.

Each provider is timed alone, and then while as many busy processes run as there are threads. Providers take
turns, call by call. Rows say how much slower each became. `--record` writes to bench/results instead of
bench/own.
"""

import subprocess
import sys
import time
from contextlib import contextmanager

import bench_adaptive_span
import bench_director
import bench_preference
import bench_segmentation
import bench_vocab_head
import harness
import torch

SECONDS = 6.0  # per case, once alone and once with the busy processes


@contextmanager
def busy_processes():
    """Runs as many busy processes as there are threads."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(torch.get_num_threads())]
    time.sleep(0.5)  # wait until they have started
    try:
        yield
    finally:
        for p in processes:
            p.kill()
            p.wait()


def chosen() -> list[harness.Case]:
    """One or two cases of each operator, with its eager peer or its floor."""
    modules = (bench_vocab_head, bench_preference, bench_director, bench_adaptive_span, bench_segmentation)
    wanted = {
        "by rows D 512 float32": {256},
        "CRINGE, k = 5": {4096},
        "decoding": {8},
        "training": {2048},
        "learned spans": {None},
        "log-partition and gradient": {None},
    }
    cases = [c for module in modules for c in module.cases()]
    cases = [c for c in cases if c.shape.get("rows") in wanted.get(c.name, ()) and c.dtype == torch.float32]
    return [c for c in cases if c.modes[-1] == "fwd_bwd" or c.name == "decoding"]


def calls(case: harness.Case) -> dict:
    inputs = case.make()
    mode, params = case.modes[-1], harness.parameters(inputs)
    beside = {n: case.providers[n] for n in ("sukhops", "eager", "a loop") if n in case.providers}
    found = {n: harness.step(p.make(inputs), params, mode) for n, p in beside.items()}
    if case.products:
        bare = case.products(inputs)
        found["floor"] = lambda: harness.clock(bare)
    return found


def median_times(timed: dict) -> dict[str, float]:
    """Median seconds of each provider, over at least 5 rounds."""
    times: dict[str, list[float]] = {n: [] for n in timed}
    start = time.perf_counter()
    while len(times["sukhops"]) < 5 or time.perf_counter() - start < SECONDS:
        for name, call in timed.items():
            times[name].append(call())
    return {n: harness.quantile(t, 50) for n, t in times.items()}


def main() -> None:
    rows = []
    for case in chosen():
        timed = calls(case)
        median_times(timed)
        alone = median_times(timed)
        with busy_processes():
            beside = median_times(timed)
        base = {
            "op": case.op,
            "case": case.name,
            "dtype": "float32",
            "shape": case.shape,
            **harness.machine(),
        }
        for name in timed:
            slower = beside[name] / alone[name]
            times = {"alone_ms": 1e3 * alone[name], "beside_ms": 1e3 * beside[name], "slowdown": slower}
            rows.append(base | {"provider": name} | {k: round(v, 3) for k, v in times.items()})
            print(f"{case.op} · {case.name:<28} {name:<10}", end="")
            print(
                f"{1e3 * alone[name]:9.1f} ms alone {1e3 * beside[name]:9.1f} ms beside: {slower:.2f}x",
                flush=True,
            )
    harness.save("neighbor", rows, "--record" in sys.argv)


if __name__ == "__main__":
    main()
