"""Every operation on a CUDA device: budgets, determinism, compile, autocast, graphs, streams, large tensors.

Tests that do not need CUDA also run on the CPU with the small cases, so that they are known to work.
"""

import contextlib

import pytest
import torch
from device_cases import CASES, LARGE, on

import sukhops
from sukhops import _library, reference, testing

LOW = [torch.float32, torch.bfloat16, torch.float16]
gpu = pytest.mark.gpu
pytestmark = pytest.mark.filterwarnings("ignore")  # about nondeterministic operations of the reference


def label(case):
    return f"{case.op}-{case.name}-{'small' if case.small else 'large'}"


SMALL = [case for case in CASES if case.small]
EVERYWHERE = [pytest.param(case, "cpu", id=f"{label(case)}-cpu") for case in SMALL] + [
    pytest.param(case, "cuda", id=f"{label(case)}-cuda", marks=gpu) for case in CASES
]
ON_CUDA = [pytest.param(case, id=f"{label(case)}-cuda", marks=gpu) for case in CASES]


def given(case, device, dtype):
    """Inputs on a device; floating-point tensors have `dtype`."""
    torch.manual_seed(0)
    return rounded(on(device, case.inputs()), dtype)


def rounded(inputs, dtype):
    """Copies of the inputs as new leaves; floating-point tensors have `dtype`."""
    return {
        n: t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)
        if isinstance(t, torch.Tensor) and t.is_floating_point()
        else t
        for n, t in inputs.items()
    }


def outcome(call, inputs):
    """Results and gradients as a list of tensors."""
    found = results(call, inputs)
    return found + gradients(found, inputs)


def results(call, inputs):
    out = call(**inputs)
    return [t for t in out if t is not None] if isinstance(out, tuple) else [out]


def gradients(found, inputs):
    paths = [t for t in found if t.requires_grad]
    leaves = [t for t in inputs.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    if not paths or not leaves:
        return []
    upstream = [torch.linspace(0.5, 1.5, t.numel(), device=t.device).view(t.shape).to(t) for t in paths]
    return [t for t in torch.autograd.grad(paths, leaves, upstream, allow_unused=True) if t is not None]


def same(one, other):
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("case, device", EVERYWHERE)
def test_budget(case, device, dtype):
    torch.manual_seed(0)
    testing.assert_close(case.call, case.reference, on(device, case.inputs()), dtype)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("case, device", EVERYWHERE)
def test_bitwise_deterministic(case, device, dtype):
    inputs = given(case, device, dtype)
    first = outcome(case.call, inputs)
    for _ in range(3):
        assert same(outcome(case.call, inputs), first)


@gpu
@pytest.mark.parametrize("case", ON_CUDA)
def test_compiled_fullgraph(case):
    torch._dynamo.reset()
    compiled = torch.compile(case.call, fullgraph=True)
    testing.assert_close(compiled, case.reference, on("cuda", case.inputs()), torch.bfloat16)


@pytest.mark.parametrize("case, device", EVERYWHERE)
def test_autocast(case, device):
    """Results have the dtype and accuracy of bfloat16 inputs; gradients have the dtype of their input."""
    inputs = given(case, device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        ours = outcome(case.call, inputs)
    low = outcome(case.reference, given(case, device, torch.bfloat16))
    exact = outcome(case.reference, given(case, device, torch.float64))
    count = len(results(case.reference, given(case, device, torch.bfloat16)))
    for i, (a, rough, true) in enumerate(zip(ours, low, exact, strict=True)):
        if a.is_floating_point():
            assert a.dtype == (rough.dtype if i < count else torch.float32)
            assert testing.distance(a, true) <= testing.budget(a.bfloat16(), rough, true)


@gpu
@pytest.mark.parametrize("backward", ["captured", "eager"])
@pytest.mark.parametrize("case", ON_CUDA)
def test_cuda_graph(case, backward):
    """Captures one or both passes in a CUDA graph and replays it on other values."""
    inputs = given(case, "cuda", torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outcome(case.call, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(case.call, inputs)
        if backward == "captured":
            captured += gradients(captured, inputs)
    for t in inputs.values():
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            t.data.mul_(0.5)  # autograd does not see the change, so the eager backward pass may follow
    graph.replay()
    if backward == "eager":
        captured += gradients(captured, inputs)
    eager = outcome(case.call, inputs)
    exact = outcome(case.reference, rounded(inputs, torch.float64))
    for a, b, true in zip(captured, eager, exact, strict=True):
        if a.is_floating_point():
            assert testing.distance(a, true) <= testing.budget(a, b, true)
        else:
            assert torch.equal(a, b)


@gpu
@pytest.mark.parametrize("case", ON_CUDA)
def test_another_stream(case):
    inputs = given(case, "cuda", torch.bfloat16)
    first = outcome(case.call, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # kernels on a wrong stream would read before the copies
        second = outcome(case.call, rounded(inputs, torch.bfloat16))
    stream.synchronize()
    assert same(first, second)


@gpu
@pytest.mark.parametrize("case", ON_CUDA)
def test_another_device(case):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices; test_launchers_run_on_the_device_of_their_tensors needs none")
    first = outcome(case.call, given(case, "cuda:0", torch.bfloat16))
    second = outcome(case.call, given(case, "cuda:1", torch.bfloat16))
    assert torch.cuda.current_device() == 0
    assert same(first, [t.to("cuda:0") for t in second])


def test_launchers_run_on_the_device_of_their_tensors(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def device(which):
        entered.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    launch = _library.launcher("operator:add")
    assert launch(torch.ones(2), torch.ones(2)).tolist() == [2, 2]
    assert launch([torch.ones(1)], []) == [torch.ones(1)]
    assert entered == [torch.device("cpu")] * 2


@gpu
@pytest.mark.parametrize("large", [pytest.param(x, id=f"{x.op}-{n}") for n, x in enumerate(LARGE)])
def test_more_than_2_31_elements(large):
    if not hasattr(sukhops, large.function):
        pytest.skip(f"sukhops.{large.function} is not in this build")
    if torch.cuda.get_device_properties(0).total_memory < large.gigabytes * 1e9:
        pytest.skip(f"needs {large.gigabytes} GB")
    whole = large.make()
    assert any(t.numel() > 2**31 for t in whole.values()) or large.op == "director"
    out = getattr(sukhops, large.function)(**whole)[-2:].clone()
    few = large.rows(whole)
    plain = getattr(reference, large.function)
    low = plain(**few)
    exact = plain(**{n: t.double() if t.is_floating_point() else t for n, t in few.items()})
    assert testing.distance(out, exact) <= testing.budget(out, low, exact)


@gpu
def test_gradients_of_more_than_2_31_elements_vocab_head():
    v, d = 530_000, 4096
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB")
    hidden = torch.randn(32, d, device="cuda").bfloat16().requires_grad_()
    weight = torch.empty(v, d, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02).requires_grad_()
    target = v - torch.arange(1, 33, device="cuda")
    logp, lse = sukhops.linear_logp(hidden, weight, target, return_lse=True)
    (grad,) = torch.autograd.grad(-logp.sum(), weight)
    rows = slice(v - 100, v)
    logits = hidden.detach().double() @ weight.detach()[rows].double().T
    p = torch.exp(logits - lse.double().unsqueeze(1))
    p[torch.arange(32), target - (v - 100)] -= 1.0
    exact = p.T @ hidden.detach().double()
    low = p.bfloat16().T @ hidden.detach()
    assert testing.distance(grad[rows], exact) <= testing.budget(grad, low, exact)
