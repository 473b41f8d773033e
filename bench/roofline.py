"""How near the convolution-bound benchmarks come to what the processor can multiply: `make roofline`, on x86-64.

Compiles peak.cpp, runs it on every core at once, and sets the rows of bench/results that are bound by convolutions
against it: the operations of the network, counted, over the median time. AMX tiles are not measured.
"""

from __future__ import annotations

import csv
import os
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from bench_smooth import N
from conftest import results_path
from csam import models

BATCH = 64
PASSES = 2 * 3  # of a C-SAM step: forward, input gradient, weight gradient, at the clean and at the perturbed mask


def peaks() -> dict[str, float]:
    """FLOP/s of all cores together, by dtype."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "peak")
        source = Path(__file__).with_name("peak.cpp")
        subprocess.run(["g++", "-O2", source, "-o", program], check=True)
        runs = [subprocess.Popen([program], stdout=subprocess.PIPE, text=True) for _ in range(os.cpu_count() or 1)]
        lines = [line.split() for run in runs for line in run.communicate()[0].splitlines()]
    total: Counter[str] = Counter()
    for dtype, rate in lines:
        total[dtype] += float(rate) * 1e9
    if torch.cpu.get_capabilities().get("amx_bf16"):
        del total["bfloat16"]  # oneDNN multiplies with tiles there
    return dict(total)


def sample_flops(name: str) -> int:
    """Operations of one 3x32x32 sample, a multiplication and an addition each one."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        models.build(name).eval()(torch.rand(1, 3, 32, 32))
    return int(counter.get_total_flops())


def main() -> None:
    flops = {
        f"test_smooth[{name}-{dtype}]": (N * sample_flops(name), dtype)
        for name in ("resnet20", "resnet18")
        for dtype in ("bfloat16", "float32")
    }
    step = BATCH * PASSES * sample_flops("resnet18")
    flops |= {
        f"test_csam_step_adversarial_resnet18_b64[{d}]": (step, t)
        for d, t in (("bf16", "bfloat16"), ("f32", "float32"))
    }
    peak = peaks()
    with results_path().open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["benchmark"] in flops]
    table = Table("benchmark", "GFLOP", "GFLOP/s", "of peak", "torch GFLOP/s", "ratio", "ratio at peak")
    for row in rows:
        work, dtype = flops[row["benchmark"]]
        ours, torchs = (work / float(row[f"{side}_ms_p50"]) / 1e-3 for side in ("ours", "torch"))
        bound = f"{peak[dtype] / torchs:.2f}" if dtype in peak else "-"
        share = f"{ours / peak[dtype]:.0%}" if dtype in peak else "-"
        shown = (f"{work / 1e9:.0f}", f"{ours / 1e9:.0f}", share, f"{torchs / 1e9:.0f}", row["ratio_p50"], bound)
        table.add_row(escape(row["benchmark"]), *shown)
    console = Console(width=140)
    console.print("peak, all cores:", ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in peak.items()))
    console.print(table)


if __name__ == "__main__":
    main()
