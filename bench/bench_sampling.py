"""The sampling engine on pruned networks against the dense bf16 engine (`Smooth`) on the same network unpruned.

Scattered zeros make no dense engine faster. Bounds: the
dense engine's is the processor's bf16 peak (`make roofline`); a sparse layer reads 64 bytes of activations, 32 samples
of one pixel, for every surviving weight and 2 * 32 operations with it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import csam
from bench_smooth import SIGMA, N
from conftest import versus


def pruned(name: str, granularity: str, sparsity: float) -> nn.Module:
    """Magnitude masks of equal share in every layer, but for the first and the last."""
    torch.manual_seed(0)
    model = csam.models.build(name)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    model = csam.convert(model, granularity=granularity, exclude=(layers[0], layers[-1]))
    csam.masks.global_magnitude(model, sparsity, "layer")
    return model.eval()


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
@pytest.mark.parametrize(
    ("granularity", "sparsity"), [("weight", 0.7), ("weight", 0.9), ("weight", 0.97), ("filter", 0.5), ("filter", 0.75)]
)
def test_sampling(benchmark: Any, name: str, granularity: str, sparsity: float) -> None:
    model, x = pruned(name, granularity, sparsity), torch.rand(3, 32, 32)
    plan = csam.sampling.plan(model, x)
    unpruned = csam.models.build(name).eval()
    smooth = csam.Smooth(unpruned, num_classes=10, sigma=SIGMA, dtype=torch.bfloat16)
    versus(benchmark, lambda: plan.votes(x, SIGMA, N), lambda: smooth.counts(x, N), rounds=5, warmup=1)
