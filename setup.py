"""Builds csam_kernels._C: plain C++17 with OpenMP, no torch headers; kernels are compiled once an instruction set.
On x86-64 the assembler must know AMX and AVX512-FP16, as binutils does from 2.38 on (2022).

Where nvcc is found (PATH or CUDA_HOME; CSAM_CUDA=0 turns it off) csam_kernels._CUDA is built too, with or without a
GPU at hand. Should that fail, the rest is installed without it.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError

CPU = Path("csrc/cpu")
KERNELS = (
    "smoothing_noise",
    "masks",
    "count_votes",
    "discrepancy",
    "semantic_batch",
    "sample_conv2d",
    "sample_network",
    "select_scan",
    "table",
)
COMMON = ("dispatch", "binarize", "percentile_init", "memory")
X86 = platform.machine() in ("x86_64", "AMD64")
ISAS: dict[str, list[str]] = {"generic": []}
if X86:
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = [
        *ISAS["avx2"],
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mprefer-vector-width=512",
    ]
# No contraction: every fused multiply-add is written out, so that the bits agree between instruction sets.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
]

CUDA = Path("csrc/cuda")
CUDA_ARCHITECTURES = (80, 90, 100)  # binaries; newer cards compile the PTX of the last when they load it
CUDA_FLAGS = ["-std=c++17", "-O3", "--ftz=false", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def find_nvcc() -> str | None:
    if os.environ.get("CSAM_CUDA") == "0":
        return None
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))


NVCC = find_nvcc()


class BuildKernels(build_ext):
    """Compiles each kernel file once an instruction set, with CSAM_ISA as its namespace, and links them all."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        if ext.name.endswith("_CUDA"):
            self.build_cuda(ext)
            return
        jobs = [(isa, f"{CPU}/{name}.cpp") for isa in ISAS for name in KERNELS]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = pool.map(lambda job: self.compile_for(*job), jobs)
            ext.extra_objects = [o for group in objects for o in group]
        super().build_extension(ext)

    def compile_for(self, isa: str, source: str) -> list[str]:
        return self.compiler.compile(
            [source],
            output_dir=f"{self.build_temp}/{isa}",
            macros=[("CSAM_ISA", isa)],
            extra_postargs=[
                *FLAGS,
                "-Wno-psabi",
                "-Wno-ignored-attributes",
                "-Wno-maybe-uninitialized",
                *ISAS[isa],
            ],
        )

    def build_cuda(self, ext: Pybind11Extension) -> None:
        """nvcc compiles for every architecture it knows of ours, and links the CUDA runtime statically."""
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        known = run_nvcc("--list-gpu-code").split()
        architectures = [a for a in CUDA_ARCHITECTURES if f"sm_{a}" in known]
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
        codes += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in architectures[-1:]]
        includes = [f"-I{path}" for path in ext.include_dirs + self.include_dirs]

        def compile_one(source: str) -> str:
            target = str(folder / f"{Path(source).stem}.o")
            run_nvcc(*CUDA_FLAGS, *(codes if source.endswith(".cu") else []), *includes, "-c", source, "-o", target)
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        library = Path(str(NVCC)).resolve().parents[1] / "lib"  # the PyPI packages have no lib64, where nvcc looks
        run_nvcc("-shared", "-cudart", "static", f"-L{library}", *objects, "-o", str(target))


def run_nvcc(*arguments: str) -> str:
    result = subprocess.run([str(NVCC), *arguments], capture_output=True, text=True)
    if result.returncode:
        raise CompileError(f"{NVCC} {' '.join(arguments)}\n{result.stderr}")
    return result.stdout


extensions = [
    Pybind11Extension(
        "csam_kernels._C",
        ["csrc/bindings.cpp", *(f"{CPU}/{name}.cpp" for name in COMMON)],
        depends=[str(p) for p in Path("csrc").rglob("*.*")],
        define_macros=[("CSAM_X86", "1")] if X86 else [],
        extra_compile_args=FLAGS,
        extra_link_args=["-fopenmp"],
    )
]
if NVCC:
    sources = [*sorted(CUDA.glob("*.cu")), CUDA / "bindings.cpp"]
    extensions += [Pybind11Extension("csam_kernels._CUDA", [str(p) for p in sources], optional=True)]

setup(ext_modules=extensions, cmdclass={"build_ext": BuildKernels})
