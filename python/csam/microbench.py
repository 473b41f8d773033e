"""A few operations beside the same written in plain torch operators, timed in turn in one process.

The bench/ folder of a checkout does this for every operation, and for whole training steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import csam_kernels

Call = Callable[[], Any]
SIZE = (512, 512, 3, 3)


@dataclass(frozen=True)
class Case:
    """`prepare` makes the inputs and returns our call and the plain one."""

    name: str
    prepare: Callable[[torch.Generator], tuple[Call, Call]]


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, 20 % and 80 % percentiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}..{self.high:.2f})"


def compare(case: Case, *, rounds: int = 15, seed: int = 0) -> tuple[Timing, Timing]:
    """Time both calls of a case alternately, so that a busy machine disturbs both alike."""
    calls = case.prepare(torch.Generator().manual_seed(seed))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 2):
        for call, kept in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            kept.append(1e3 * (time.perf_counter() - started))
    first, second = (_timing(kept[2:]) for kept in times)
    return first, second


def _timing(milliseconds: list[float]) -> Timing:
    cuts = statistics.quantiles(milliseconds, n=5)
    return Timing(statistics.median(milliseconds), cuts[0], cuts[-1])


def _noise(generator: torch.Generator) -> tuple[Call, Call]:
    x = torch.rand(3, 32, 32, generator=generator)

    def plain() -> Tensor:
        noisy = x.repeat(400, 1, 1, 1)
        noisy = noisy + 0.25 * torch.randn_like(noisy)
        return noisy.to(torch.bfloat16, memory_format=torch.channels_last)

    def ours() -> Tensor:
        return csam_kernels.smoothing_noise(
            x, 400, 0.25, seed=0, dtype=torch.bfloat16, memory_format=torch.channels_last
        )

    return ours, plain


def _weights(generator: torch.Generator) -> tuple[Call, Call]:
    theta = torch.randn(SIZE, generator=generator)
    mask = torch.rand(SIZE, generator=generator)

    def plain() -> Tensor:
        return (theta * (mask + (torch.rand_like(mask) * 2 - 1) * 0.1).clamp(0, 1)).to(torch.bfloat16)

    def ours() -> list[Tensor]:
        return csam_kernels.effective_weights([theta], [mask], kind="uniform", dtype=torch.bfloat16)

    return ours, plain


def _binarize(generator: torch.Generator) -> tuple[Call, Call]:
    scores = torch.rand(SIZE, generator=generator)

    def plain() -> Tensor:
        return scores > scores.flatten().kthvalue(int(0.7 * scores.numel())).values

    return lambda: csam_kernels.binarize([scores], 0.7), plain


def _gradients(generator: torch.Generator) -> tuple[Call, Call]:
    grad, theta, mask = (torch.randn(SIZE, generator=generator) for _ in range(3))

    def plain() -> tuple[Tensor, Tensor, Tensor]:
        dmask = grad * theta
        return grad * mask, dmask, dmask.double().square().sum()

    return lambda: csam_kernels.mask_gradients([grad], [theta], [mask]), plain


CASES = (
    Case("smoothing_noise 400×3×32×32 → bf16", _noise),
    Case("effective_weights uniform, 2.4 M → bf16", _weights),
    Case("binarize 70 %, 2.4 M", _binarize),
    Case("mask_gradients, 2.4 M", _gradients),
)
