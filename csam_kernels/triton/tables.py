"""Tables of a multi-tensor pass, on the device: what a program must know of its layer, and which chunk is its own.

A table is kept by its content (addresses, sizes) and stream in a small LRU, so a repeated call copies nothing. A miss
builds it in pinned memory and copies it without waiting. While a CUDA graph is being captured the copy becomes a node
of the graph: the table then belongs to that graph alone, and its host memory is never freed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from csam_kernels.triton.launch import current

Row = tuple[int, ...]
_captured: list[Tensor] = []


def table(rows: tuple[Row, ...], device: torch.device) -> Tensor:
    """int64 [len(rows), fields]."""
    return _on_device(_rows, (rows,), (len(rows), len(rows[0])), torch.int64, device)


def chunk_table(sizes: Row, chunk: int, device: torch.device) -> Tensor:
    """int32 [chunks, 2]: layer and chunk within the layer, for every `chunk` values of every layer in turn."""
    return _on_device(_chunks, (sizes, chunk), (sum(chunk_counts(sizes, chunk)), 2), torch.int32, device)


def chunk_counts(sizes: Row, chunk: int) -> list[int]:
    return [-(-n // chunk) for n in sizes]


def _rows(rows: tuple[Row, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _chunks(sizes: Row, chunk: int) -> Tensor:
    counts = torch.tensor(chunk_counts(sizes, chunk), device="cpu")  # whatever the default device is
    layer = torch.repeat_interleave(counts)
    own = torch.arange(len(layer), device="cpu") - (counts.cumsum(0) - counts)[layer]
    return torch.stack((layer, own), 1).to(torch.int32)


def _on_device(
    build: Callable[..., Tensor], content: tuple, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    if device.type != "cuda":
        return _resident(build, content, device, 0)
    with current(device):
        if torch.cuda.is_current_stream_capturing():
            _captured.append(build(*content).pin_memory())
            return _captured[-1].to(device, non_blocking=True)
        return _resident(build, content, device, torch.cuda.current_stream().cuda_stream)


@lru_cache(maxsize=256)
def _resident(build: Callable[..., Tensor], content: tuple, device: torch.device, stream: int) -> Tensor:
    host = build(*content)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
