"""Tables on the device. Of a multi-tensor pass: what a program must know of its layer, and which chunk is its own. Of
noise on a grid: how its numbers are drawn.

A table is kept by its content (addresses, sizes, a law) and stream in a small LRU, so a repeated call copies nothing. A
miss builds it in pinned memory and copies it without waiting.

A call that is captured in a CUDA graph takes what calls before the capture left, such as tables of sizes, whatever
their stream: a graph is replayed after them. What it does not find, such as addresses in the graph's own memory, is
copied by a node of the graph, and that table belongs to the graph alone. Either way what the graph reads is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from csam_kernels.cells import cells
from csam_kernels.triton.launch import current

Row = tuple[int, ...]
_KEPT = 256


class _Key(NamedTuple):
    build: Callable[..., Tensor]
    content: tuple
    device: torch.device
    stream: int


_tables: dict[_Key, Tensor] = {}  # the one used last is last
_looking = threading.Lock()
_of_graphs: list[Tensor] = []  # what captured graphs read


def table(rows: tuple[Row, ...], device: torch.device) -> Tensor:
    """int64 [len(rows), fields]."""
    return _on_device(_rows, (rows,), (len(rows), len(rows[0])), torch.int64, device)


def chunk_table(sizes: Row, chunk: int, device: torch.device) -> Tensor:
    """int32 [chunks, 2]: layer and chunk within the layer, for every `chunk` values of every layer in turn."""
    return _on_device(_chunks, (sizes, chunk), (sum(chunk_counts(sizes, chunk)), 2), torch.int32, device)


def cell_tables(sigma: float, grid: int, law: str, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """columns, rest and bits of `csam_kernels.cells`."""
    content, bits = (sigma, grid, law), cells(sigma, grid, law).bits
    columns = _on_device(_columns, content, (2**bits,), torch.int32, device)
    return columns, _on_device(_rest, content, (2**bits,), torch.int64, device), bits


def chunk_counts(sizes: Row, chunk: int) -> list[int]:
    return [-(-n // chunk) for n in sizes]


def _rows(rows: tuple[Row, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _chunks(sizes: Row, chunk: int) -> Tensor:
    counts = torch.tensor(chunk_counts(sizes, chunk), device="cpu")  # whatever the default device is
    layer = torch.repeat_interleave(counts)
    own = torch.arange(len(layer), device="cpu") - (counts.cumsum(0) - counts)[layer]
    return torch.stack((layer, own), 1).to(torch.int32)


def _columns(sigma: float, grid: int, law: str) -> Tensor:
    return cells(sigma, grid, law).columns


def _rest(sigma: float, grid: int, law: str) -> Tensor:
    return cells(sigma, grid, law).rest


def _on_device(
    build: Callable[..., Tensor], content: tuple, shape: Row, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    if device.type != "cuda":
        return _resident(_Key(build, content, device, 0))
    with current(device):
        key = _Key(build, content, device, torch.cuda.current_stream().cuda_stream)
        return _captured(key) if torch.cuda.is_current_stream_capturing() else _resident(key)


def _resident(key: _Key) -> Tensor:
    with _looking:
        table = _tables.pop(key, None)
        if table is None:
            _, table = _sent(key)
        _tables[key] = table  # behind all others
        if len(_tables) > _KEPT:
            del _tables[next(iter(_tables))]
    return table


def _captured(key: _Key) -> Tensor:
    with _looking:
        table = next((t for other, t in _tables.items() if other[:3] == key[:3]), None)
    if table is not None:
        _of_graphs.append(table)
        return table
    host, table = _sent(key)
    _of_graphs.append(host)
    return table


def _sent(key: _Key) -> tuple[Tensor, Tensor]:
    """The table on the host and on the device."""
    host = key.build(*key.content)
    if key.device.type != "cuda":
        return host, host
    host = host.pin_memory()
    return host, host.to(key.device, non_blocking=True)
