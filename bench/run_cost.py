"""What a data-set run costs beyond its forward passes: journal, TSV, packing of images, stopping rule, progress bar.

    python bench/run_cost.py            # processor time of all threads over that spent in forward passes
    python bench/run_cost.py memory     # resident memory while n = 10^7 samples of one image are drawn

A run is `certify_dataset` with a record on the disk and the command line's progress bar on a terminal that nobody sees.
Median, least and most of ROUNDS runs; start and end of the run are in it.
"""

from __future__ import annotations

import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor

import csam
from csam import cli, evaluation, models, records, smoothing
from csam.smoothing import Smooth
from csam_kernels.ops.sample_network import SampleNetwork

T = TypeVar("T")
ROUNDS, SIGMA, ALPHA = 5, 0.25, 0.001


def smoothed(removed: float, kind: str) -> Smooth:
    """ResNet-20 with random weights, spread so that classes compete; `kind` "engine", "modules" or "callable"."""
    torch.manual_seed(0)
    model = models.build("resnet20").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.rand_like(p) >= removed if p.dim() == 4 else 1)
    if kind == "engine":
        return Smooth(model, 10, SIGMA, dtype=torch.bfloat16, choices="auto" if not removed else "sparse")
    return Smooth(model if kind == "modules" else lambda x: model(x), 10, SIGMA, choices="module")


def run(smooth: Smooth, x: Tensor, place: Path, n: int, stop: dict[str, Any]) -> None:
    with cli.bar("smoothing", len(x)) as advance:
        evaluation.certify_dataset(
            smooth,
            x,
            [0] * len(x),
            place,
            n=n,
            alpha=ALPHA,
            on_result=lambda row: advance(1),
            on_samples=lambda drawn: advance(0, drawn),
            **stop,
        )


@contextmanager
def forward() -> Iterator[list[float]]:
    """Processor seconds of the forward passes that run inside, noise and votes included."""
    spent: list[float] = []

    def timed(call: Callable[..., T]) -> Callable[..., T]:
        def wrapped(*args: Any, **kwargs: Any) -> T:
            start = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                spent.append(time.thread_time() - start)

        return wrapped

    votes, tiles = SampleNetwork.votes_of, smoothing.run_tiles
    SampleNetwork.votes_of = timed(votes)  # type: ignore[method-assign]
    smoothing.run_tiles = lambda evaluate, *where: tiles(timed(evaluate), *where)
    try:
        yield spent
    finally:
        SampleNetwork.votes_of, smoothing.run_tiles = votes, tiles  # type: ignore[method-assign]


def cost(title: str, smooth: Smooth, images: int, n: int, **stop: Any) -> str:
    x = torch.rand(images, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    smooth.counts(x[0], 1000)
    with tempfile.TemporaryDirectory() as folder:
        ratios, place = [], Path(folder)
        for k in range(ROUNDS):
            start = time.process_time()
            with forward() as spent:
                run(smooth, x, place / f"{k}.tsv", n, stop)
            ratios.append((time.process_time() - start) / sum(spent) - 1)
        samples = [int(votes["samples"]) for votes in records.read_votes(place / "0.tsv")[1].values()]
    return (
        f"{title}: {images} images of {sum(samples) / images:,.0f} samples, {sum(spent):.1f} s of forward passes, "
        f"{statistics.median(ratios):.2%} more ({min(ratios):.2%} to {max(ratios):.2%})"
    )


def resident() -> float:
    """MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(kind: str, **stop: Any) -> str:
    """Resident memory while one image is certified with n = 10^7, by a network that is fast enough for that."""
    model = csam.models.build("digits", seed=0).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.rand_like(p) >= 0.99 if p.dim() == 4 else 1)
    kinds: dict[str, Callable[[], Smooth]] = {
        "engine": lambda: Smooth(model, 10, SIGMA, dtype=torch.bfloat16, choices="sparse"),
        "callable": lambda: Smooth(lambda x: x.flatten(1)[:, :10], 10, SIGMA, tile=1000),
    }
    smooth, x, seen, drawn = kinds[kind](), torch.rand(1, 1, 8, 8), [], 0

    def watch(n: int) -> None:
        nonlocal drawn
        drawn += n
        seen.append((drawn, resident()))

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        evaluation.certify_dataset(
            smooth, x, [0], Path(folder) / "r.tsv", n=10**7, alpha=ALPHA, on_samples=watch, **stop
        )
    early = next(mib for n, mib in seen if n >= 10**5)
    most = max(mib for _, mib in seen)
    return (
        f"{kind} {stop or 'fixed'}: {drawn:,} samples in {time.perf_counter() - start:.0f} s, "
        f"{early:.1f} MiB after 10^5, {most:.1f} at the most"
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["memory"]:
        print(memory("engine"), flush=True)
        print(memory("engine", adaptive=True), flush=True)
        print(memory("callable"), flush=True)
    else:
        cli.messages = Console(file=io.StringIO(), force_terminal=True)
        print(cost("fixed, engine", smoothed(0.0, "engine"), 2, 12_000), flush=True)
        print(cost("fixed, engine, 99 % removed", smoothed(0.99, "engine"), 2, 50_000), flush=True)
        far = {"adaptive": True, "target_radius": 0.5}
        print(cost("target, engine", smoothed(0.0, "engine"), 50, 100_000, **far), flush=True)
        print(cost("target, engine, 99 % removed", smoothed(0.99, "engine"), 500, 100_000, **far), flush=True)
        print(cost("fixed, callable", smoothed(0.0, "callable"), 1, 4_000), flush=True)
