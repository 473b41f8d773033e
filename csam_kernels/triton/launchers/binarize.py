"""Binarisation: a selection (nine launches), then three that rank the ties and mark what is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from csam_kernels.triton import tuning
from csam_kernels.triton.kernels import binarize as kernels
from csam_kernels.triton.launch import launch
from csam_kernels.triton.launchers.selection import select


def binarize(scores: list[Tensor], keep: list[int], scope: str) -> list[Tensor]:
    scores = [s.contiguous() for s in scores]
    if len({s.dtype for s in scores}) > 1:
        scores = [s.to(torch.float32) for s in scores]
    masks = [torch.empty_like(s, dtype=torch.bool) for s in scores]
    chosen = select(scores, masks, keep, scope, magnitude=False)
    ties = torch.empty(len(chosen.chunks), dtype=torch.int64, device=scores[0].device)
    work = {**chosen.common(), "list_ptr": chosen.listed, "ties_ptr": ties, **chosen.constants}
    launch(
        kernels.count_ties,
        (len(chosen.chunks),),
        reads=[chosen.candidates, chosen.found, chosen.chunks],
        writes=[ties],
        **work,
    )
    launch(
        kernels.ties_before,
        (len(chosen.selections),),
        reads=[ties, chosen.selections],
        writes=[ties],
        selections_ptr=chosen.selections,
        ties_ptr=ties,
        **tuning.TOTALS,
    )
    launch(
        kernels.mark,
        (len(chosen.chunks),),
        reads=[chosen.candidates * 3 // 2, chosen.found, chosen.chunks, ties],
        writes=[chosen.candidates // 4],
        place_ptr=chosen.places,
        **work,
    )
    return masks
