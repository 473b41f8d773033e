"""Where nvcc is, and what it says of the kernels in a .cu file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = (80, 90, 100)
FLAGS = ("-std=c++17", "-cubin", "-Xptxas", "-v", "--ftz=false", "-fmad=false")


class Kernel(NamedTuple):
    """One kernel as compiled, from `ptxas -v`; sizes in bytes."""

    name: str  # mangled
    registers: int
    spills: int  # stores and loads
    stack: int
    shared: int


def nvcc() -> list[str] | None:
    """The command, from the PyPI packages of requirements-nvcc.txt, PATH or CUDA_HOME; None where there is none."""
    home = os.environ.get("CUDA_HOME", "")
    packages = Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin/nvcc"
    candidates = (str(packages), shutil.which("nvcc"), home and f"{home}/bin/nvcc")
    return next(([path] for path in candidates if path and os.access(path, os.X_OK)), None)


def compile_kernels(command: list[str], source: Path, architecture: int, target: Path) -> list[Kernel]:
    """Compile `source` to the cubin `target`; what each kernel in it takes.

    Raises:
        RuntimeError: nvcc failed; its words.
    """
    arguments = [*command, *FLAGS, f"-arch=sm_{architecture}", str(source), "-o", str(target)]
    result = subprocess.run(arguments, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(arguments)}\n{result.stderr}{result.stdout}")
    reports = re.split(r"Compiling entry function '", result.stderr + result.stdout)[1:]
    return [
        Kernel(
            report.split("'", 1)[0],
            _bytes(r"Used (\d+) registers", report),
            _bytes(r"(\d+) bytes spill stores", report) + _bytes(r"(\d+) bytes spill loads", report),
            _bytes(r"(\d+) bytes stack frame", report),
            _bytes(r"(\d+) bytes smem", report),
        )
        for report in reports
    ]


def _bytes(pattern: str, report: str) -> int:
    found = re.search(pattern, report)
    return int(found[1]) if found else 0
