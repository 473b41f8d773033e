"""csam_kernels._C with AMX tiles in C++ (CSAM_EMULATE_AMX); AVX-512 stands in for the narrower kernels, left out."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

CPU = Path(__file__).resolve().parents[1] / "csrc/cpu"
COMMON = (CPU.parent / "bindings.cpp", *(CPU / f"{name}.cpp" for name in ("dispatch", "binarize", "percentile_init")))
AVX512 = [f"-m{name}" for name in ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl")]
FLAGS = ["-std=c++17", "-O1", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-Wno-psabi", "-Wno-ignored-attributes", "-DCSAM_X86", "-DCSAM_EMULATE_AMX"]
STAND_INS = [f"-D{name}_kernels=avx512_kernels" for name in ("generic", "avx2")]


def build(folder: Path) -> Path:
    common = [*COMMON, CPU / "memory.cpp"]
    kernels = [source for source in CPU.glob("*.cpp") if source not in common]
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]

    def compile_one(source: Path) -> Path:
        flags = STAND_INS if source in common else [*AVX512, "-DCSAM_ISA=avx512"]
        target = folder / f"{source.stem}.o"
        subprocess.run(["g++", *FLAGS, *includes, *flags, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*common, *kernels]))
    module = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", "-fopenmp", *objects, "-o", module], check=True)
    return module


def load(module: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("amx_on_host._C", module)
    assert spec
    assert spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
