"""The one door through which every kernel is launched.

Launchers say what a launch reads and writes in full, so that the ledger can hold the traffic of an operation against
"each input once, each output once". `record()` collects launches instead of running them: given tensors on the meta
device, a launcher shows the kernels, configurations, grids and bytes of a call with no GPU and no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csam_kernels.backend import INTERPRETED

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
_compiled: dict[Any, Any] = {}  # kernels by what they were compiled for
_KEPT = 8192


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
            (_interpreted if INTERPRETED else _run)(kernel, grid, arguments, options)


def _interpreted(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, int]) -> None:
    kernel[grid](**arguments, **options)


def _run(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, int]) -> None:
    """Launch what was compiled for such arguments before: Triton takes 50 us to find that out by itself."""
    names = _names(kernel)
    values = names.all(arguments)
    tensors = [v for v in values if isinstance(v, Tensor)]
    addresses = tuple([(t.dtype, t.data_ptr() % 16 == 0) for t in tensors])
    key = (kernel, tensors[0].device, *options.values(), addresses, names.specialized(arguments))
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*values)
        return
    if len(_compiled) >= _KEPT:
        _compiled.clear()
    _compiled[key] = kernel[grid](**arguments, **options)


class _Names(NamedTuple):
    """How to take from a launch's arguments all of them in the kernel's order, and those that shape its code."""

    all: Callable[[dict[str, Any]], tuple[Any, ...]]
    specialized: Callable[[dict[str, Any]], Any]


@cache
def _names(kernel: Any) -> _Names:
    plain = {p.name for p in kernel.params if p.name.endswith("_ptr") or p.annotation_type}
    specialized = [p.name for p in kernel.params if p.is_constexpr or p.name not in plain]
    take = itemgetter(*specialized) if specialized else lambda arguments: ()
    return _Names(itemgetter(*(p.name for p in kernel.params)), take)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make the tensors' device the current one: Triton launches there, on its stream."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _bytes(parts: Sequence[Tensor | int]) -> int:
    return sum(part if isinstance(part, int) else part.nbytes for part in parts)
