"""Fixtures shared by the whole suite: the tolerance table, and every instruction set forced in turn."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run on CPU tensors here

os.environ["CSAM_CACHE"] = tempfile.mkdtemp()  # what is measured or decoded once belongs to this run

import pytest
import torch

from csam_kernels import _C

# The one table of tolerances, (rtol, atol) by dtype; no test loosens it for itself.
TOLERANCE = {
    torch.float64: (1e-10, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-2),
    torch.float16: (2e-3, 2e-3),
}
NO_FLOAT64 = "must not be float64 on a GPU: use float32, move all tensors to the CPU, or set CSAM_BACKEND=reference"
ISAS = [name for name in ("generic", "avx2", "avx512", "amx") if not _C.isa_supported(name)]
SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    rtol, atol = TOLERANCE[dtype or expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("auto")


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# Started in the background, a suite and its children would ignore Ctrl-C, and tests of it would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def shared_data(name: str) -> Path:
    """A file of the shared data folder beside the repository, or a skip that says what is missing."""
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"real data not found: ../shared/data/{name}")
    return path
