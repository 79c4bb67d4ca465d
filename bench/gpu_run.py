"""Measures the cases of one operation on the CUDA device; for bench/gpu.py.

python bench/gpu_run.py OPERATION ROWS.jsonl
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import gpu_cases
import harness
import roofline
import torch
from gpu_cases import Measured
from harness import Case, Provider


def peak_memory(case: Case, provider: Provider) -> float:
    """Peak bytes that a step allocates on the CUDA device, without the gradients."""
    inputs = case.make()
    params = harness.parameters(inputs)

    def once(f: Callable) -> float:
        f()
        return 0.0

    step = harness.step(provider.make(inputs), params, case.modes[-1], once)
    step()  # loads code, runs autotuning
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    grads = sum(t.numel() * t.element_size() for t in params) if case.modes[-1] == "fwd_bwd" else 0
    return torch.cuda.max_memory_allocated() - before - grads


def run(measured: Measured, device: roofline.Device) -> list[dict]:
    """The rows of a case: one per provider; the row of sukhops also has the predicted time and the goals."""
    case, memory, ready, broken = measured.case, {}, {}, {}
    limit = torch.cuda.get_device_properties(0).total_memory * 0.9
    for name, provider in case.providers.items():
        try:
            if provider.memory > limit:
                raise MemoryError(f"predicted memory {provider.memory / 2**30:.0f} GiB does not fit")
            memory[name] = peak_memory(case, provider)
            ready[name] = provider
        except Exception as error:  # record a missing or failing peer in its row and go on
            if provider.ours:
                raise
            why = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            broken[name] = {"skipped": why}
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    rows = harness.run_case(case._replace(providers=ready), memory)
    for row in rows:
        row["machine"] = torch.cuda.get_device_name()
    base = {n: rows[0][n] for n in ("op", "case", "dtype", "shape", "machine", "torch", "commit", "time")}
    rows += [base | {"provider": n, "mode": case.modes[-1]} | why for n, why in broken.items()]
    ours = next(row for row in rows if row["provider"] == "sukhops")
    if (build := roofline.builder(case.name)) is not None:
        work = build(**case.shape)
        ours["floor_ms"] = 1e3 * work.floor.seconds(device)
        ours["predicted_ms"] = 1e3 * work.predicted(device)
    if measured.goals:
        found = {row["provider"]: row for row in rows}
        ours["reach"] = [goal.verdict(found) for goal in measured.goals]
    return rows


def ceilings() -> roofline.Device:
    """Measures bandwidth (a copy of 1 GiB) and matrix throughput (a square product) of this device."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    y, c = torch.empty_like(x), torch.empty_like(a)

    def best(f: Callable) -> float:
        return harness.quantile([harness.device_clock(f) for _ in range(12)][2:], 50)

    copy, product = best(lambda: y.copy_(x)), best(lambda: torch.mm(a, a, out=c))
    rates = 2 * 8192**3 / product, 2 * x.numel() / copy
    return roofline.Device(torch.cuda.get_device_name(), *rates, roofline.H200.clock)


def main() -> int:
    """Returns 1 if sukhops failed or was wrong in any case."""
    op, path = sys.argv[1], Path(sys.argv[2])
    if why := gpu_cases.missing(op):
        path.write_text(json.dumps({"op": op, "failed": why}) + "\n")
        print(why)
        return 0
    torch._dynamo.config.automatic_dynamic_shapes = False  # compile peers for static shapes
    device = ceilings()
    bad = False
    print(f"{device.name}: {device.half / 1e12:.0f} TFLOP/s, {device.bandwidth / 1e12:.2f} TB/s measured")
    with path.open("w") as file:
        for measured in gpu_cases.OPS[op][1]("cuda"):
            try:
                rows = run(measured, device)
            except Exception as error:  # continue with the next case, unless the device has crashed
                why = f"{type(error).__name__}: {error}"[:300]
                rows = [{"op": op, "case": measured.case.name, "failed": why}]
                print(f"FAILED {measured.case.name}: {why}")
                torch.cuda.synchronize()
            bad |= any("failed" in row or (row["provider"] == "sukhops" and "skipped" in row) for row in rows)
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
