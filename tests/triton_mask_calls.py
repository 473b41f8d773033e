"""Compile the kernels of the mask operations' calls ahead of time; a script, for a process without the interpreter.

`python tests/triton_mask_calls.py OP...` prints "op kernel arch registers spills" for every kernel and architecture.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csam_kernels import triton as provider
from csam_kernels.triton import tuning
from csam_kernels.triton.launch import record


def calls() -> dict[str, list[Callable[[], Any]]]:
    """Calls on meta tensors that reach every kernel in every form of its layout."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    full, filters, kernels = new(64, 32, 3, 3), new(64, 1, 1, 1), new(64, 32, 1, 1)
    last = full.to(memory_format=torch.channels_last)
    half, hard = full.to(torch.bfloat16), full.to(torch.bool)

    def step(kind: str, grad: Tensor | None = None) -> tuple[Any, ...]:
        return kind, 0.1, 0.05, [] if grad is None else [grad], "global", 7, 3

    def effective(w: Tensor, m: Tensor, kind: str, grad: Tensor | None = None) -> Callable[[], Any]:
        return lambda: provider.effective_weights([w], [m], *step(kind, grad), torch.bfloat16, 0)

    def triple(g: Tensor, w: Tensor, m: Tensor) -> Callable[[], Any]:
        return lambda: provider.mask_gradients([g], [w], [m], 0, True, True)

    return {
        "perturb_masks": [
            lambda: provider.perturb_masks([full], *step("uniform")),
            lambda: provider.perturb_masks([full], *step("adversarial", full)),
        ],
        "effective_weights": [
            effective(half, hard, "plain"),
            effective(full, filters, "plain"),
            effective(full, full, "uniform"),
            effective(last, last, "uniform"),
            effective(full, full, "adversarial", full),
        ],
        "mask_gradients": [
            triple(half, full, hard),
            triple(full, last, full),
            triple(full, full, filters),
            triple(half, full, kernels),
            triple(half, last, new(1, 32, 1, 1)),
            triple(new(64, 9), new(64, 9), new(64, 1)),
        ],
        "binarize": [
            lambda: provider.binarize([full, full], [99], "global"),
            lambda: provider.binarize([half], [99], "layer"),
        ],
        "percentile_init": [lambda: provider.percentile_init([full], 0.9)],
    }


def compiled(op: str) -> Iterator[tuple[str, str, str, int, int]]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
    from gpu_ledger import CARDS, compile_source, source_of, specialization

    for arch in CARDS:
        seen = set()
        with tuning.forced(tuning.CLASSES[arch // 10]), record() as launches:
            for call in calls()[op]:
                call()
        for launch in launches:
            job = source_of(launch, arch)
            key = specialization(*job)
            if key not in seen:
                seen.add(key)
                result = compile_source(*job)
                yield op, launch.kernel.__name__, f"sm_{arch}", result.registers, result.spill_bytes


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for line in compiled(name):
            print(*line)
