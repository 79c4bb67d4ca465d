"""Starts the ranks of a test: processes with one thread, gloo, a time limit, and cleanup."""

import os
import tempfile
from collections.abc import Callable, Iterable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 30
# Ranks are forked from one process per pytest worker that has imported these and started no OpenMP thread.
mp.set_forkserver_preload(
    ["torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo", "sukhops", "transformers.trainer"]
)


def on_ranks(count: int, work: Callable, *arguments: object) -> list:
    """Runs `work(rank, *arguments)` on each of `count` ranks and returns the results in a list.

    `work` must be a module-level function. For a rank that raises, the result is the text of the exception.
    """
    context = mp.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(count)]
        processes = [
            context.Process(target=_run, args=(rank, count, folder, end, work, arguments), daemon=True)
            for rank, (_, end) in enumerate(pipes)
        ]
        for process, (_, end) in zip(processes, pipes, strict=True):
            process.start()
            end.close()  # only the rank holds this end, so that the pipe closes if it dies
        try:
            found = []
            for rank, (end, _) in enumerate(pipes):
                assert end.poll(2 * SECONDS), f"rank {rank} of {count} did not answer for {2 * SECONDS} s"
                found.append(torch.load(end.recv(), weights_only=False))
            return found
        finally:
            for process in processes:
                process.join(5)
                process.kill()


def outcomes(work: Callable, counts: Iterable[int]) -> Callable:
    """A fixture with the results of `work(rank)` on all ranks; it runs once for each number of ranks."""

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
    dist.barrier()  # all are connected before any rank can fail
    try:
        result = work(rank, *arguments)
        dist.barrier()  # no rank exits while another still communicates with it
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    path = os.path.join(folder, f"result-{rank}")
    torch.save(result, path)
    end.send(path)
    dist.destroy_process_group()
