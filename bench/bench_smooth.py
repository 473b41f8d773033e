"""Certification throughput: `Smooth` against the loop that was published with randomized smoothing, n = 2,000."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import csam
from conftest import versus

N, BATCH, SIGMA = 2000, 400, 0.25


def cohen_counts(model: nn.Module, x: Tensor) -> Callable[[], np.ndarray]:
    """The sampling loop of Cohen et al. (2019) in our words: repeat, draw, forward, count votes one by one."""

    def run() -> np.ndarray:
        counts = np.zeros(10, dtype=int)
        with torch.no_grad():
            for first in range(0, N, BATCH):
                batch = x.repeat((min(BATCH, N - first), 1, 1, 1))
                votes = model(batch + torch.randn_like(batch) * SIGMA).argmax(1)
                for vote in votes.cpu().numpy():
                    counts[vote] += 1
        return counts

    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=["bfloat16", "module"])
@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_smooth(benchmark: Any, name: str, dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = csam.models.build(name).eval()
    x = torch.rand(3, 32, 32)
    smooth = csam.Smooth(model, num_classes=10, sigma=SIGMA, dtype=dtype, choices="auto" if dtype else "module")
    rounds = 5 if name == "resnet20" else 3
    versus(benchmark, lambda: smooth.counts(x, N, batch_size=BATCH), cohen_counts(model, x), rounds=rounds, warmup=1)
