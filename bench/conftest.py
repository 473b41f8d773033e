"""Benchmarks against a plain-torch twin in the same run, written to one CSV a processor, a row a benchmark.

`versus(benchmark, ours, twin)` times the two in turn (twin, ours, twin, ours, ...), so that a drift of the machine
meets both alike; the ratio is the median of the round-by-round ratios twin/ours, above 1 when ours is faster.
"""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from csam.runs import processor
from csam_kernels import _C

RESULTS = Path(__file__).parent / "results"
QUANTILES = (0.2, 0.5, 0.8)


def versus(
    benchmark: Any, ours: Callable[[], object], twin: Callable[[], object], *, rounds: int = 21, warmup: int = 2
) -> None:
    for _ in range(1 if benchmark.disabled else warmup):
        twin()
        ours()
    if benchmark.disabled:
        return
    twin_seconds: list[float] = []

    def time_twin() -> None:
        start = time.perf_counter()
        twin()
        twin_seconds.append(time.perf_counter() - start)

    benchmark.pedantic(ours, setup=time_twin, rounds=rounds, iterations=1)
    benchmark.extra_info["twin_seconds"] = twin_seconds
    benchmark.extra_info["our_seconds"] = list(benchmark.stats.stats.data)


def _commit() -> str:
    """The commit that is measured, "-dirty" with changes other than in results/."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude){RESULTS.name}")
    return (git("describe", "--always") or "unknown") + ("-dirty" if changed else "")


def results_path() -> Path:
    """The CSV of this processor."""
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', processor().lower()).strip('-') or 'cpu'}.csv"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """One row a benchmark: quantiles in milliseconds of both sides, the ratio, and what it was measured on."""
    benches = getattr(getattr(session.config, "_benchmarksession", None), "benchmarks", [])
    rows = []
    for bench in benches:
        if "twin_seconds" not in bench.extra_info:
            continue
        ours, twin = (np.array(bench.extra_info.pop(k)) for k in ("our_seconds", "twin_seconds"))
        row: dict[str, object] = {"benchmark": bench.name, "rounds": len(ours)}
        for side, seconds in (("ours", ours), ("torch", twin)):
            for q in QUANTILES:
                row[f"{side}_ms_p{int(100 * q)}"] = f"{1e3 * np.quantile(seconds, q):.4g}"
        row["ratio_p50"] = f"{np.median(twin / ours):.3g}"
        row |= {"device": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "isa": _C.isa()}
        row |= {"torch": torch.__version__, "python": platform.python_version(), "commit": _commit()}
        rows.append(row | {"date": datetime.now(UTC).strftime("%Y-%m-%d")})
    if not rows:
        return
    RESULTS.mkdir(exist_ok=True)
    path = results_path()
    kept = {}
    if path.exists():
        with path.open(newline="") as file:
            kept = {row["benchmark"]: row for row in csv.DictReader(file)}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows((kept | {str(row["benchmark"]): row for row in rows}).values())
    print(f"\nwrote {path}")
    for row in rows:
        medians = f"ours {row['ours_ms_p50']:>9} ms   torch {row['torch_ms_p50']:>9} ms   x{row['ratio_p50']}"
        print(f"{row['benchmark']:45} {medians}")
