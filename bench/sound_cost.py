"""What noise on a grid costs: processor time of one thread a sample, `sound_float` over the plain mode.

    python bench/sound_cost.py

Networks of the sampling engine with random weights, dense and with 90 % of the weights removed, where noise is a larger
share; rounds take the modes in turn, the plain one first and last, and the ratio is the median over rounds.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from csam import models, sampling, sound
from csam_kernels.ops.sample_network import SampleNetwork

ROUNDS, SIGMA = 12, 0.25


def seconds(sampler: SampleNetwork, x: Tensor, n: int, grid: int | None) -> float:
    start = time.thread_time()
    sampler.votes(x, SIGMA, n, seed=1, grid=grid)
    return (time.thread_time() - start) / n


def cost(name: str, removed: float, dtype: Any, n: int) -> str:
    torch.manual_seed(0)
    x = torch.randint(0, 256, (3, 32, 32)) / 255
    model = models.build(name).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.rand_like(p) >= removed if p.dim() == 4 else 1)
    sampler = sampling.plan(model, x, dtype=dtype, sigma=SIGMA if dtype == "int8" else None).prepared.sampler
    if sampler is None:
        return f"{name}, {removed:.0%} removed, {dtype}: torch runs it"
    seconds(sampler, x, n, sound.GRID)
    rounds = [[seconds(sampler, x, n, grid) for grid in (None, sound.GRID, None)] for _ in range(ROUNDS)]
    plain = statistics.median((first + last) / 2 for first, _, last in rounds)
    ratio = statistics.median(2 * sure / (first + last) for first, sure, last in rounds)
    noise = statistics.median(last / first for first, _, last in rounds)
    return f"{name}, {removed:.0%} removed, {dtype}: {1e6 * plain:.0f} us, x {ratio:.4f} (plain again: {noise:.4f})"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, n in (("resnet20", 1024), ("resnet18", 128)):
        for removed in (0.0, 0.9):
            for dtype in (torch.bfloat16, "int8"):
                print(cost(name, removed, dtype, n), flush=True)
