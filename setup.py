"""Builds the CPU operators (sukhops/_C.so), the CUDA operators (sukhops/_C_cuda.so) and sukhops/_lexicon.

The CUDA operators are built if nvcc and a CUDA build of torch are installed. Both libraries of operators use
torch's stable ABI, so one build works with every Python and every torch >= 2.11. sukhops._lexicon is a
pybind11 module (torch contains pybind11). It works only with the Python version that built it, which is part
of its file name and of the wheel's.
"""

import os
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, include_paths

STABLE = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
SANITIZE = ["-fsanitize=address,undefined"] if os.environ.get("SUKHOPS_SANITIZE") else []  # make sanitize
# the segmentations' error bounds need fused multiply-add, which gcc forms from expensive-optimizations on
SANITIZED = ["-O1", "-fexpensive-optimizations", "-g1", "-fno-omit-frame-pointer", *SANITIZE]
SPEED = SANITIZED if SANITIZE else ["-O3", "-g0"]
# no -ffast-math: it breaks NaN and sets flush-to-zero in the whole process of the user
CXX = ["-std=c++20", *SPEED, "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
       "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unused-function"]  # fmt: skip
LEXICON = "sukhops._lexicon"
HEADERS = [str(p) for p in Path("csrc").glob("*.h")]


def extensions():
    cpu = sorted(str(p) for p in Path("csrc").glob("*.cpp") if p.name != "lexicon.cpp")
    built = [
        CppExtension(
            "sukhops._C",
            cpu,
            depends=HEADERS,
            py_limited_api=True,
            extra_compile_args={"cxx": CXX + STABLE},
            extra_link_args=SANITIZE,
        ),
        Extension(
            LEXICON,
            ["csrc/lexicon.cpp"],
            include_dirs=include_paths(),
            language="c++",
            extra_compile_args={"cxx": CXX},
            extra_link_args=SANITIZE,
        ),
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
        # operators are loaded with torch.ops.load_library and have no PyInit function
        return super().get_export_symbols(ext) if ext.name == LEXICON else []

    def get_ext_filename(self, name):
        self.no_python_abi_suffix = name not in (LEXICON, LEXICON.split(".")[-1])
        return super().get_ext_filename(name)


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
