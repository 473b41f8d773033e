"""Tuning tables: block sizes, warps and stages by device class and shape, apart from the kernels they tune.

The tiles of half arithmetic were measured on an H200 (bench/gpu_tune.py), which stands for the other classes too; the
other numbers come from occupancy and tile arithmetic (bench/gpu_ledger.csv).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch

CLASSES = {8: "sm80", 9: "sm90", 10: "sm100"}  # by major compute capability


_forced: str | None = None


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Use the row of one device class whatever the device: for compiling ahead of time."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def device_class(device: torch.device) -> str:
    """Row of the tables for a device: its own class or the nearest older one; sm80 without a GPU."""
    return _forced or _class_of(device)


@cache
def _class_of(device: torch.device) -> str:
    if device.type != "cuda":
        return "sm80"
    major = torch.cuda.get_device_capability(device)[0]
    return CLASSES[max(m for m in CLASSES if m <= max(major, min(CLASSES)))]


class ConvTile(NamedTuple):
    """Rows (filters or channels) x columns (pixels, or weights for the weight's gradient) x inner dimension."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int
    maxnreg: int = 255


# masked_conv2d and masked_linear by (kernel, arithmetic), narrow tiles first, then those with few columns: see `tile`.
# Of the stages of a kernel that reads a list of tiles, two bring a number and its tile. The bound on registers is
# the hardware's: without any, ptxas trades a few spills for occupancy. "flat" is FLAT in kernels/masked_conv2d.py; its
# tighter one spills nothing.
_CONV: dict[tuple[str, str], tuple[ConvTile, ...]] = {
    ("forward", "half"): (ConvTile(32, 128, 32, 8, 3), ConvTile(64, 64, 32, 4, 7), ConvTile(64, 128, 32, 4, 7)),
    ("forward", "float32"): (ConvTile(32, 64, 16, 4, 2), ConvTile(64, 64, 16, 8, 2)),
    ("input_gradient", "half"): (ConvTile(32, 128, 32, 8, 3), ConvTile(64, 64, 32, 4, 7), ConvTile(64, 128, 32, 4, 7)),
    ("input_gradient", "float32"): (ConvTile(32, 64, 16, 4, 2), ConvTile(64, 64, 16, 8, 2)),
    ("weight_gradient", "half"): (ConvTile(32, 64, 32, 4, 3), ConvTile(64, 64, 64, 8, 3)),
    ("weight_gradient", "float32"): (ConvTile(32, 64, 16, 4, 2), ConvTile(64, 64, 16, 8, 2)),
    ("flat_weight_gradient", "half"): (ConvTile(32, 64, 32, 4, 3), ConvTile(64, 64, 32, 8, 3, 128)),
    ("flat_weight_gradient", "float32"): (ConvTile(32, 64, 16, 4, 2), ConvTile(64, 64, 16, 8, 2)),
}
MASKED_CONV2D = dict.fromkeys(CLASSES.values(), _CONV)
# Depthwise kernels: channels x pixels, for pixels (NCHW) or channels (channels_last) next to each other in memory.
DEPTHWISE: dict[bool, ConvTile] = {False: ConvTile(1, 512, 1, 4, 2), True: ConvTile(64, 16, 1, 4, 2)}
MULTIPROCESSORS = {"sm80": 108, "sm90": 132, "sm100": 148}
LISTED_FROM = 4  # blocks of pixels that share a weight tile from which looking for dead tiles first pays
SPLIT_PIXELS = 256  # pixels a part of a split reduction should have at least
PROGRAMS = {name: 2 * n for name, n in MULTIPROCESSORS.items()}  # how far a reduction is split
SPLIT_REGISTERS = 128  # a thread of a split reduction may use at least: two programs of eight warps are resident


def tile(where: str, kernel: str, arithmetic: str, rows: int, columns: int) -> ConvTile:
    """The last of the narrowest tiles that hold so many rows, or of the widest, that gives every multiprocessor a
    program; if none does, the first of them."""
    tiles = MASKED_CONV2D[where][kernel, arithmetic]
    height = min((t.rows for t in tiles if t.rows >= rows), default=max(t.rows for t in tiles))
    fitting = [t for t in tiles if t.rows == height]
    for t in reversed(fitting):
        if -(-rows // t.rows) * -(-columns // t.columns) >= MULTIPROCESSORS[where]:
            return t
    return fitting[0]


# programs: enough to fill the card for several waves; samples: at most so many share one reading of the image.
SMOOTHING_NOISE = {
    name: {"QUADS": 256, "num_warps": 4, "programs": 32 * n, "samples": 32} for name, n in MULTIPROCESSORS.items()
}
GRID_NOISE = {name: {**row, "QUADS": 128} for name, row in SMOOTHING_NOISE.items()}  # a thread holds its words longer
PHILOX_UNIFORM = {name: {"QUADS": 256, "num_warps": 4} for name in CLASSES.values()}

# By the largest number of classes a row serves: values of logits a program holds, and how winners are counted.
_FEW_CLASSES = {"BLOCK": 128, "values": 1024, "num_warps": 4, "histogram": True}
_MANY_CLASSES = {"BLOCK": 512, "values": 2048, "num_warps": 4, "histogram": False}
COUNT_VOTES = {
    name: {
        128: {**_FEW_CLASSES, "programs": 8 * n},
        2**31: {**_MANY_CLASSES, "programs": 8 * n},
    }
    for name, n in MULTIPROCESSORS.items()
}
SEMANTIC_BATCH = {name: {"BLOCK": 512, "num_warps": 4} for name in CLASSES.values()}

# The multi-tensor mask passes: values of a chunk (one program's) where mask and weight lie alike, and where not.
MASKS = {
    name: {True: {"BLOCK": 2048, "num_warps": 4}, False: {"BLOCK": 1024, "num_warps": 4}} for name in CLASSES.values()
}
TOTALS = {"BLOCK": 1024, "num_warps": 4}
# Broadcast masks' gradients: TILE = mask values x weights under each, by one of the COVER lengths; PART weights a sum.
BROADCAST = {name: {"TILE": 1024, "PART": 8192, "num_warps": 8} for name in CLASSES.values()}
COVER = (16, 64, 512)
ADD_PARTS = {"BLOCK": 256, "num_warps": 4}
# LIST: candidates that a chunk of BLOCK scores can list; SAMPLE: scores that one program ranks.
BINARIZE = {
    name: {"BLOCK": 2048, "LIST": 256, "SAMPLE": 16384, "num_warps": 8, "maxnreg": 128, "bracket_warps": 32}
    for name in CLASSES.values()
}
