"""Every test runs with a fixed seed and with new tensors filled with NaN, to detect unwritten outputs."""

import gc
import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts; makes cuBLAS deterministic

import pytest
import torch

import sukhops  # noqa: F401  (loads torch.ops.sukhops)

ISAS = torch.ops.sukhops.cpu_isas()
OWN_ISA = torch.ops.sukhops.cpu_capability().replace(" + bfloat16 products", "_bf16")  # the default


def pytest_generate_tests(metafunc):
    """Tests marked every_isa run for each instruction set of this CPU; all but the default are full."""
    if metafunc.definition.get_closest_marker("every_isa"):
        long = [pytest.mark.full if isa != OWN_ISA else () for isa in ISAS]
        isas = [pytest.param(isa, marks=marks) for isa, marks in zip(ISAS, long, strict=True)]
        metafunc.parametrize("isa", isas, indirect=True)


@pytest.fixture(autouse=True)  # pytest does not call a fixture that only pytest_generate_tests names
def isa(request):
    torch.ops.sukhops.use_cpu_isa(getattr(request, "param", OWN_ISA))
    yield
    torch.ops.sukhops.use_cpu_isa(OWN_ISA)


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection():
    """Leaves the objects of loaded modules out of later collections: trainers collect after every run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seeded_and_nan_filled(request):
    torch.manual_seed(0)
    # on CUDA, the reference uses operations without a deterministic kernel; this setting also fills new
    # tensors with NaN
    torch.use_deterministic_algorithms(True, warn_only="gpu" in request.keywords)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    """Skips tests that this process cannot run: Triton kernels are either all interpreted or all compiled."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if ("interpreter" in item.keywords) != interpreting:
            item.add_marker(
                pytest.mark.skip(
                    reason="runs with TRITON_INTERPRET=1"
                    if not interpreting
                    else "runs without TRITON_INTERPRET"
                )
            )
        elif "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
