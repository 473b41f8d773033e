"""The one door through which every kernel is launched.

Launchers say what a launch reads and writes in full, so that the ledger can hold the traffic of an operation against
"each input once, each output once". `record()` collects launches instead of running them: given tensors on the meta
device, a launcher shows the kernels, configurations, grids and bytes of a call with no GPU and no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

LIMIT = 2**31 - 2**22  # what is counted in 32 bits: the last tile or step may reach past the end


class Launch(NamedTuple):
    kernel: Any  # triton.runtime.JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # run-time arguments and constexprs by parameter name
    options: dict[str, int]  # num_warps, num_stages, maxnreg where bounded
    bytes_read: int
    bytes_written: int
    flops: int


_record: list[Launch] | None = None


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect launches instead of running them; nothing is computed inside."""
    global _record
    before = _record
    _record = []
    try:
        yield _record
    finally:
        _record = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *,
    reads: Sequence[Tensor | int],
    writes: Sequence[Tensor | int],
    flops: int = 0,
    num_warps: int = 4,
    num_stages: int = 2,
    maxnreg: int | None = None,
    **arguments: Any,
) -> None:
    """Run `kernel` on `grid` with keyword `arguments`, constexprs included.

    Args:
        reads, writes: what memory traffic the launch causes, as tensors (all of their bytes) or plain byte counts.
        flops: floating-point operations of the whole launch.
        maxnreg: registers a thread may use; given one, ptxas no longer spills for the sake of occupancy.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages} | ({"maxnreg": maxnreg} if maxnreg else {})
    if _record is not None:
        traffic = (_bytes(reads), _bytes(writes))
        _record.append(Launch(kernel, grid, arguments, options, *traffic, flops))
    elif all(grid):
        with current(next(a.device for a in arguments.values() if isinstance(a, Tensor))):
            kernel[grid](**arguments, **options)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make the tensors' device the current one: Triton launches there, on its stream."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _bytes(parts: Sequence[Tensor | int]) -> int:
    return sum(part if isinstance(part, int) else part.nbytes for part in parts)
