"""Processes of one thread that a test starts: gloo, a store in a file, a time limit, none left behind."""

import os
import tempfile
from collections.abc import Callable, Iterable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 30


def on_ranks(count: int, work: Callable, *arguments: object) -> list:
    """What `work(rank, *arguments)`, a function of a module, returns on each of `count` ranks.

    An exception on a rank comes back as its text.
    """
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(count)]
        processes = [
            context.Process(target=_run, args=(rank, count, folder, end, work, arguments), daemon=True)
            for rank, (_, end) in enumerate(pipes)
        ]
        for process, (_, end) in zip(processes, pipes, strict=True):
            process.start()
            end.close()  # the rank has its own: if it dies, the pipe says so
        try:
            found = []
            for rank, (end, _) in enumerate(pipes):
                assert end.poll(2 * SECONDS), f"rank {rank} of {count} said nothing for {2 * SECONDS} s"
                found.append(torch.load(end.recv(), weights_only=False))
            return found
        finally:
            for process in processes:
                process.join(5)
                process.kill()


def outcomes(work: Callable, counts: Iterable[int]) -> Callable:
    """A fixture: what `work(rank)` finds on each rank, started once for each number of ranks."""

    @pytest.fixture(scope="module", params=counts)
    def ranks(request):
        found = on_ranks(request.param, work)
        assert all(isinstance(r, dict) for r in found), found
        return found

    return ranks


def _run(rank: int, count: int, folder: str, end, work: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count,
        timeout=timedelta(seconds=SECONDS),
    )  # fmt: skip
    dist.barrier()  # a rank that fails at once must not break the connections of the others
    try:
        result = work(rank, *arguments)
        dist.barrier()  # nobody leaves while another still talks to it
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    path = os.path.join(folder, f"result-{rank}")
    torch.save(result, path)
    end.send(path)
    dist.destroy_process_group()
