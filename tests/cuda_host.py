"""csam_kernels.cuda on CPU tensors: csrc/cuda compiled by g++ against tests/cuda_shim, loaded in place of `_CUDA`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pybind11
import torch

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
ALIGNMENT = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]  # a GPU refuses what a host lets pass
MULTIPROCESSORS = 3  # few, so that blocks of the persistent grids have several units of work


def build(folder: Path) -> Path:
    """The extension with kernels that run on the host."""
    include = [
        f"-I{path}" for path in (ROOT / "tests/cuda_shim", pybind11.get_include(), sysconfig.get_path("include"))
    ]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run(["g++", *FLAGS, *ALIGNMENT, *include, "-x", "c++", "-c", source, "-o", target], check=True)
        return target

    sources = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "csrc/cuda/bindings.cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    module = folder / f"_CUDA{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", *objects, "-o", module], check=True)
    return module


def load(module: Path) -> ModuleType:
    """The provider, its launches on a few multiprocessors and no stream."""
    extension = _module("cuda_on_host._CUDA", module)  # pybind11 gives the real one again under its own name
    with patch.dict(sys.modules, {"csam_kernels._CUDA": extension}):
        provider: Any = _module("cuda_on_host", ROOT / "csam_kernels/cuda.py")
    provider._CUDA = extension

    def run(function: Callable[..., None], where: torch.device, *args: Any) -> None:
        function(*args, MULTIPROCESSORS, 0)

    provider._run = run
    return provider


def _module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
