"""Memory does not grow; failed allocations and interrupts do no harm; threads give the same bits."""

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import harness
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import sukhops
from sukhops import testing

D = 16


def inputs(seed: int = 0, times: int = 1) -> dict[str, Tensor]:
    """Small inputs; `times` scales their lengths."""
    g = torch.Generator().manual_seed(seed)
    rows, v = 24 * times, 300 * times
    sizes = {
        "hidden": (rows, D), "weight": (v, D), "other": (v, D), "scores": (2, 40 * times, 4),
        "q": (times, 2, 40, D),
    }  # fmt: skip
    made = {name: torch.randn(size, generator=g).requires_grad_() for name, size in sizes.items()}
    return made | {"target": torch.randint(0, v, (rows,), generator=g), "label": torch.ones(rows).long()}


# each call returns a scalar from `inputs`
CALLS: dict[str, Callable[[dict], Tensor]] = {
    "linear_logp": lambda x: sukhops.linear_logp(x["hidden"], x["weight"], x["target"]).sum(),
    "linear_token_stats": lambda x: sukhops.linear_token_stats(
        x["hidden"], x["weight"], x["target"], outputs=("logp", "entropy")
    ).entropy.sum(),
    "linear_topk": lambda x: sukhops.linear_topk(x["hidden"], x["weight"], 3).values.sum(),
    "director_logp": lambda x: sukhops.director_logp(x["hidden"], x["weight"], x["other"])[:, 0].sum(),
    "director_topk": lambda x: sukhops.director_topk(
        *(x[name].detach() for name in ("hidden", "weight", "other")), 3
    ).values.sum(),
    "DirectorLoss": lambda x: sukhops.nn.DirectorLoss(norm_weight=0.1)(
        x["hidden"], x["weight"], x["other"], x["target"], x["label"]
    ).loss,
    "adaptive_span_attention": lambda x: sukhops.adaptive_span_attention(
        x["q"], x["q"], x["q"], torch.tensor([3.0, 20.0])
    ).sum(),
    "segmentation_logz": lambda x: sukhops.segmentation_logz(x["scores"]).sum(),
    "segmentation_marginals": lambda x: sukhops.segmentation_marginals(x["scores"])[..., 0].sum(),
    "segmentation_entropy": lambda x: sukhops.segmentation_entropy(x["scores"]).sum(),
    "segmentation_viterbi": lambda x: sukhops.segmentation_viterbi(x["scores"].detach()).score.sum(),
    "segmentation_sample": lambda x: sukhops.segmentation_sample(
        x["scores"].detach(), 3, generator=torch.Generator().manual_seed(0)
    ).double().sum(),
}  # fmt: skip
calls = pytest.mark.parametrize("name", CALLS)
SOME = ("linear_logp", "adaptive_span_attention")  # the others are marked full, because they take long
long_calls = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SOME else pytest.mark.full) for name in CALLS]
)


def gradients(name: str, x: dict[str, Tensor]) -> list[Tensor]:
    """The result and all gradients."""
    out = CALLS[name](x)
    leaves = [t for t in x.values() if t.requires_grad]
    grads = torch.autograd.grad(out, leaves, allow_unused=True) if out.requires_grad else []
    return [out.detach(), *(g for g in grads if g is not None)]


@long_calls
def test_memory_does_not_grow(name):
    """Resident memory grows by less than 1 MiB in 2,000 calls, about 500 bytes per call."""
    x = inputs()
    for _ in range(300):
        gradients(name, x)
    ctypes.CDLL(None).malloc_trim(0)
    before = harness.resident("VmRSS")
    for _ in range(2000):
        gradients(name, x)
    ctypes.CDLL(None).malloc_trim(0)
    assert harness.resident("VmRSS") - before < 2**20


# one process per limit, forked before OpenMP starts a thread: each limit makes a different allocation fail
LIMITED = """
import os, resource, sys
import torch
import sukhops
from test_reliability import gradients, inputs
name, *limits = sys.argv[1:]
for extra in map(int, limits):
    if os.fork() == 0:
        break
    if os.wait()[1] != 0:
        sys.exit(f"failed with a limit of {extra} bytes")
else:
    sys.exit()
torch.set_num_threads(2)
x, long = inputs(), inputs(0, 60)
torch.ones(10**6).exp()  # starts the worker threads
expected = [t.clone() for t in gradients(name, x)]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.RLIM_INFINITY))
try:
    gradients(name, long)
    found = "enough"
except (RuntimeError, MemoryError) as error:
    found = type(error).__name__
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert all(torch.equal(a, b) for a, b in zip(gradients(name, x), expected))
print(found, flush=True)
if extra > 0:
    os._exit(0)  # Python's own end takes seconds
"""


@long_calls
def test_failed_allocation_raises_and_later_calls_work(name):
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent / "bench")])}
    command = [sys.executable, "-c", LIMITED, name, *map(str, (0, 2**20, 2**22, 2**24, 2**34))]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-1500:]
    found = run.stdout.split()
    assert len(found) == 5
    assert found[0] != "enough" and found[-1] == "enough", found


INTERRUPTED = """
import signal
import torch
import sukhops
hidden, weight, target = torch.randn(4096, 256), torch.randn(32768, 256), torch.zeros(4096).long()
sukhops.linear_logp(hidden, weight, target)
calls = 0
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
try:
    print("ready", flush=True)
    for calls in range(100):
        sukhops.linear_logp(hidden, weight, target)
    print("not interrupted")
except KeyboardInterrupt:
    print("interrupted in call", calls)
assert sukhops.linear_logp(hidden[:2], weight, target[:2]).isfinite().all()
"""


def test_interrupt_is_raised_right_after_the_call():
    """Ctrl-C in a process of its own, because signals are handled in the main thread only."""
    command = [sys.executable, "-c", INTERRUPTED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "ready\n", run.stderr.read()
        run.send_signal(signal.SIGINT)
        out, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors[-1500:]
    assert re.fullmatch(r"interrupted in call [0-3]\n", out), out


@calls
def test_eight_concurrent_threads_give_the_same_bits(name):
    made = [inputs(seed) for seed in range(8)]
    expected = [gradients(name, x) for x in made]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            found = list(pool.map(lambda x: gradients(name, x), made))
            for ours, alone in zip(found, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))


@calls
def test_backward_in_another_thread(name):
    """The backward may use another number of threads, because set_num_threads applies to one thread only."""
    x = inputs()
    expected = gradients(name, x)[1:]
    if not expected:
        pytest.skip("has no gradient")
    out = CALLS[name](x)

    def backward() -> list[Tensor]:
        torch.set_num_threads(1)
        leaves = [t for t in x.values() if t.requires_grad]
        return [g for g in torch.autograd.grad(out, leaves, allow_unused=True) if g is not None]

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(backward).result(timeout=60)
    finally:
        torch.set_num_threads(threads)
    for ours, alone in zip(found, expected, strict=True):
        assert testing.distance(ours, alone) <= 2 * testing.budget(ours, alone, alone)


class Computed(Dataset):
    """A dataset whose items are computed with the operators."""

    def __len__(self):
        return 6

    def __getitem__(self, seed):
        lexicon = sukhops.Lexicon.from_text(["abab"], max_length=2, min_count=1)
        ids = lexicon.unit_ids(["ab" * (1 + seed)])[0][0]
        return [gradients(name, inputs(seed))[0] for name in CALLS], ids.sum()


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.full)])
def test_data_loader_workers(method):
    """Workers are forked from a process that has already used OpenMP threads, or spawned."""
    data = Computed()
    alone = [data[i] for i in range(len(data))]
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=method, timeout=100)
    for (ours, ids), (expected, same) in zip(loader, alone, strict=True):
        assert ids == same
        for a, b in zip(ours, expected, strict=True):  # workers use one thread, so rounding may differ
            assert testing.distance(a, b) <= 2 * testing.budget(a, b, b)
