"""Builds the compiled operators: sukhops/_C.so always, sukhops/_C_cuda.so where nvcc and a CUDA torch are.

Both libraries use torch's stable ABI, so one build serves every Python and every torch >= 2.11.
"""

import os
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1 takes it from the wheel package
    from wheel.bdist_wheel import bdist_wheel

STABLE = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
# no -ffast-math: it drops NaN semantics and sets flush-to-zero for the user's whole process
CXX = ["-std=c++20", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
       "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unused-function"]  # fmt: skip
HEADERS = [str(p) for p in Path("csrc").glob("*.h")]


def extensions():
    cpu = sorted(str(p) for p in Path("csrc").glob("*.cpp") if p.name != "lexicon.cpp")
    built = [
        CppExtension(
            "sukhops._C", cpu, depends=HEADERS, py_limited_api=True, extra_compile_args={"cxx": CXX + STABLE}
        )
    ]
    cuda = sorted(str(p) for p in Path("csrc").glob("*.cu"))
    if cuda and torch.version.cuda and CUDA_HOME:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0a;10.0")
        nvcc = ["-std=c++20", "-O3", "-DUSE_CUDA"]
        built.append(
            CUDAExtension(
                "sukhops._C_cuda",
                cuda,
                depends=HEADERS,
                py_limited_api=True,
                extra_compile_args={"cxx": CXX + STABLE, "nvcc": nvcc + STABLE},
            )
        )
    print("sukhops builds", ", ".join(e.name for e in built))
    return built


class Build(BuildExtension):
    def get_export_symbols(self, ext):
        return []  # loaded by torch.ops.load_library: there is no PyInit


class Wheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build.with_options(no_python_abi_suffix=True), "bdist_wheel": Wheel},
)
