"""What binarize and percentile_init share: the launches from scores to the threshold's key of every selection."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from csam_kernels.triton import tables, tuning
from csam_kernels.triton.kernels import binarize as kernels
from csam_kernels.triton.launch import launch
from csam_kernels.triton.launchers.mask_layers import TYPES, aligned

_EXPECTED = 1 / 32  # share of scores that the bracket leaves as candidates: 4 sqrt(S) of S = 16384 sampled


class Selection(NamedTuple):
    """The tables and scratch of a selection, after its threshold is known."""

    layers: Tensor  # rows of kernels/binarize.py
    chunks: Tensor
    selections: Tensor
    state: Tensor
    found: Tensor  # candidates of a chunk
    listed: Tensor  # their keys and places
    places: Tensor
    constants: dict[str, Any]
    candidates: int  # bytes of the lists' keys that a pass over them is expected to read

    def common(self) -> dict[str, Any]:
        return {"layers_ptr": self.layers, "chunks_ptr": self.chunks, "state_ptr": self.state, "found_ptr": self.found}


def select(scores: list[Tensor], masks: list[Tensor], keep: list[int], scope: str, magnitude: bool) -> Selection:
    """Find the threshold of each selection: all scores together, or each tensor alone (scope "layer").

    With masks, what lies above the bracket is marked on the way. Byte counts are those of scores spread so that the
    bracket holds its expected share of them; a chunk full of ties is read again by every pass.
    """
    device, dtype, per_layer = scores[0].device, scores[0].dtype, scope == "layer"
    tune = tuning.BINARIZE[tuning.device_class(device)]
    block = tune["BLOCK"]
    sizes = tuple(s.numel() for s in scores)
    counts = tables.chunk_counts(sizes, block)
    addresses = [(s.data_ptr(), masks[i].data_ptr() if masks else 0) for i, s in enumerate(scores)]
    layers = tables.table(tuple((*a, n) for a, n in zip(addresses, sizes, strict=True)), device)
    chunks = tables.chunk_table(sizes, block, device)
    if per_layer:
        rows = tuple((sum(counts[:i]), counts[i], keep[i], n) for i, n in enumerate(sizes))
    else:
        rows = ((0, len(chunks), keep[0], sum(sizes)),)
    selections = tables.table(rows, device)
    state = torch.empty((len(rows), kernels.STATE.value), dtype=torch.int64, device=device)
    found = torch.empty(len(chunks), dtype=torch.int32, device=device)
    listed = torch.empty((len(chunks), tune["LIST"]), dtype=torch.int32, device=device)
    places = torch.empty((len(chunks), tune["LIST"]), dtype=torch.int16, device=device)
    constants = {
        "PER_LAYER": per_layer,
        "BLOCK": block,
        "LIST": tune["LIST"],
        "TYPE": TYPES[dtype],
        "ALIGNED": all(aligned(t.numel(), t) for t in (*scores, *masks)),
        "num_warps": tune["num_warps"],
        "maxnreg": tune["maxnreg"],
    }
    expected = int(_EXPECTED * sum(sizes))
    chosen = Selection(layers, chunks, selections, state, found, listed, places, constants, 4 * expected)
    launch(
        kernels.bracket,
        (len(rows),),
        reads=[min(tune["SAMPLE"] * dtype.itemsize * len(rows), sum(s.nbytes for s in scores)), selections],
        writes=[state],
        layers_ptr=layers,
        chunks_ptr=chunks,
        selections_ptr=selections,
        state_ptr=state,
        SAMPLE=tune["SAMPLE"],
        BLOCK=block,
        TYPE=TYPES[dtype],
        MAGNITUDE=magnitude,
        num_warps=tune["bracket_warps"],
    )
    launch(
        kernels.scan,
        (len(chunks),),
        reads=[*scores, layers, chunks],
        writes=[*masks, found, 6 * expected],
        **chosen.common(),
        list_ptr=listed,
        place_ptr=places,
        MAGNITUDE=magnitude,
        **constants,
    )
    launch(
        kernels.settle_bracket,
        (len(rows),),
        reads=[selections],
        writes=[],
        selections_ptr=selections,
        state_ptr=state,
        num_warps=1,
    )
    for i in range(kernels.COUNTS.value):
        launch(
            kernels.count,
            (len(chunks),),
            reads=[chosen.candidates, found, chunks],
            writes=[],
            **chosen.common(),
            list_ptr=listed,
            COUNT=i,
            MAGNITUDE=magnitude,
            **constants,
        )
        launch(
            kernels.narrow_range,
            (len(rows),),
            reads=[8 * kernels.BINS.value * len(rows)],
            writes=[],
            state_ptr=state,
            COUNT=i,
            num_warps=tune["num_warps"],
        )
    return chosen
