"""Parallel calls on two processes with one thread each, compared with one process with two threads.

The vocabulary or the sequences are sliced among the processes. Calls alternate between the two setups. The
results are the time of a call, the time that a rank spends in collectives (including waiting for the other
rank), and the bytes that it sends per row. `--record` writes to bench/results instead of bench/own.
"""

import functools
import sys
import tempfile
import time
from collections.abc import Callable

import bench_vocab_head
import harness
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import sukhops
from sukhops.parallel import adaptive_span as parallel

RANKS, ROUNDS = 2, 7


class Traffic:
    """Counts the bytes that collectives of this process send, and their seconds."""

    def __init__(self):
        self.bytes, self.seconds = 0, 0.0
        for name, position in (("all_gather_single", 1), ("all_gather_into_tensor", 1), ("all_reduce", 0)):
            if hasattr(dist, name):
                setattr(dist, name, self.counted(getattr(dist, name), lambda args, i=position: [args[i]]))
        dist.batch_isend_irecv = self.counted(
            dist.batch_isend_irecv, lambda args: [step.tensor for step in args[0] if step.op is dist.isend]
        )
        parallel.Travel.wait = self.counted(parallel.Travel.wait, lambda args: [])

    def counted(self, call: Callable, sent: Callable) -> Callable:
        @functools.wraps(call)
        def wrapped(*args, **kwargs):
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            self.bytes += sum(t.numel() * t.element_size() for t in sent(args))
            return result

        return wrapped


def slice_of(given: dict, rank: int | None, names: tuple[str, ...], dim: int) -> dict:
    """The inputs, of which those in `names` are sliced for this rank; not sliced if rank is None."""
    if rank is None:
        return given
    parts = {n: given[n].detach().chunk(RANKS, dim)[rank].clone() for n in names}
    return given | {n: t.requires_grad_(given[n].requires_grad) for n, t in parts.items()}


def logp(rank: int | None, rows: int = 1024) -> tuple[Callable, list, int]:
    i = slice_of(bench_vocab_head.make(rows, 512, 32768, torch.float32, prompt=0.0), rank, ("weight",), 0)
    group = {} if rank is None else {"group": dist.group.WORLD}
    call = lambda: sukhops.linear_logp(i["hidden"], i["weight"], i["target"], **group).sum()  # noqa: E731
    return call, [i["hidden"], i["weight"]], rows


def dpo(rank: int | None, rows: int = 4096) -> tuple[Callable, list, int]:
    i = bench_vocab_head.make(rows, 512, 32768, torch.float32, pairs=True, prompt=0.0)
    i, loss = slice_of(i, rank, ("weight", "ref_weight"), 0), sukhops.nn.DPOLoss()
    group = {} if rank is None else {"group": dist.group.WORLD}
    reference = {"ref_hidden": i["ref_hidden"], "ref_weight": i["ref_weight"]}
    call = lambda: loss(i["hidden"], i["weight"], i["target"], **reference, **group).loss  # noqa: E731
    return call, [i["hidden"], i["weight"]], rows


def spans(rank: int | None, length: int = 4096) -> tuple[Callable, list, int]:
    g = torch.Generator().manual_seed(0)
    i = {n: torch.randn(1, 8, length, 64, generator=g).requires_grad_() for n in ("q", "k", "v")}
    i = slice_of(i, rank, ("q", "k", "v"), 2)
    span = torch.tensor([20.0] * 5 + [100.0, 500.0, 1000.0], requires_grad=True)
    group = {} if rank is None else {"group": dist.group.WORLD}
    call = lambda: sukhops.adaptive_span_attention(**i, span=span, **group).sum()  # noqa: E731
    return call, [*i.values(), span], length


CASES = {
    "linear_logp, 1,024 rows": logp,
    "DPO with a reference model, 4,096 rows": dpo,
    "attention, 4,096 positions, longest span 1,000": spans,
}


def timed(call: Callable, leaves: list) -> float:
    start = time.perf_counter()
    torch.autograd.grad(call(), leaves)
    return time.perf_counter() - start


def work(rank: int, folder: str, orders) -> None:
    """Runs a rank: it receives the name of a case, runs the case, and sends back times and bytes."""
    torch.set_num_threads(1)
    traffic = Traffic()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    name = None
    while (order := orders.recv()) is not None:
        if order != name:
            name, (call, leaves, rows) = order, CASES[order](rank)
        dist.barrier()
        traffic.bytes, traffic.seconds = 0, 0.0
        start = time.perf_counter()
        result = call()
        forward_bytes = traffic.bytes
        torch.autograd.grad(result, leaves)
        seconds = time.perf_counter() - start
        orders.send((seconds, traffic.seconds, forward_bytes / rows, traffic.bytes / rows))
    dist.destroy_process_group()


def main() -> None:
    torch.set_num_threads(RANKS)
    context = mp.get_context("spawn")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(RANKS)]
        ranks = [
            context.Process(target=work, args=(r, folder, end), daemon=True)
            for r, (_, end) in enumerate(pipes)
        ]
        for process in ranks:
            process.start()
        for name, make in CASES.items():
            call, leaves, _ = make(None)
            one, several = [], []
            for _ in range(ROUNDS + 1):
                one.append(timed(call, leaves))
                for here, _ in pipes:
                    here.send(name)
                found = [here.recv() for here, _ in pipes]
                several.append(max(found))
            one, several = one[1:], several[1:]  # the first call of each warms up
            ratio = harness.quantile([s[0] / o for s, o in zip(several, one, strict=True)], 50)
            slowest = sorted(several)[len(several) // 2]
            row = {
                "case": name, "dtype": "float32", **harness.machine(), "ranks": RANKS,
                "one_ms": 1e3 * harness.quantile(one, 50), "ranks_ms": 1e3 * slowest[0], "ratio": ratio,
                "collectives_ms": 1e3 * slowest[1], "bytes_forward": max(f[2] for f in found),
                "bytes": max(f[3] for f in found),
            }  # fmt: skip
            rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
            print(
                f"{name:<48} one process {row['one_ms']:8.1f} ms, {RANKS} ranks {row['ranks_ms']:8.1f} ms: "
                f"{ratio:.2f}x; {row['collectives_ms']:.1f} ms in collectives; bytes per row "
                f"{row['bytes_forward']:.1f} forward, {row['bytes']:.1f} with backward",
                flush=True,
            )
        for here, _ in pipes:
            here.send(None)
        for process in ranks:
            process.join(10)
    harness.save("ranks", rows, "--record" in sys.argv)


if __name__ == "__main__":
    main()
