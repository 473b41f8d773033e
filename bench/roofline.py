"""How near convolutions come to what the processor can multiply: `make roofline`, on x86-64.

First the rows of bench/results that are bound by convolutions: the operations of the network, counted, over the median
time, against all cores at once. Then every layer of the sampling engine on one thread, written to
bench/results/layers-<processor>.csv, a row a layer and a row a network ("total", poolings included, noise not):

- removed: share of the smallest weights that is gone, the same in every layer but the first and the last; random
  weights, batch norm estimated;
- default: what `csam.sampling.plan` runs unasked; where that is torch, the layers are those that the engine would run;
- weight, image, engine, density: as `csam.sampling.Layer`; gflop: operations a sample on surviving weights, a
  multiplication and an addition each one, / 1e9; executed: on what is multiplied: dense the zeros too, winograd 36
  places a tile of 4x4 outputs, with a stride 81, in int8 of 16 bits, which count twice; or 16 a tile of 2x2, in
  bfloat16 17 (its transforms are not counted). Zeros around an image count as pixels;
- ms: processor time a sample, the least of --rounds tiles;
- of_loop, executed_of_loop: gflop and executed over ms, against what one core makes of independent multiply-adds in
  registers (peak.cpp: float32 FMA; VDPBF16PS and VPDPBUSD, or AMX tiles where there are such); of_product: gflop over
  ms against torch's product of two large matrices on one thread. All measured in the same run. By its fewer
  multiplications winograd may pass both peaks.

Where there are AMX tiles sparse layers, which have no use for them, are set against them all the same.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import csam
import networks
from bench_smooth import SIGMA, N
from conftest import _commit, results_path
from csam import engine, models, sampling
from csam.runs import processor
from csam_kernels import _C
from csam_kernels.ops.sample_network import Step, winograd_tile

BATCH = 64
PASSES = 2 * 3  # of a C-SAM step: forward, input gradient, weight gradient, at the clean and at the perturbed mask
SIZE = 2048  # of the large matrices
PRODUCTS, SECONDS = 7, 10  # of them, at most, in so much time: the fastest counts
DTYPES = ("float32", "bfloat16", "int8")
KEY = ("network", "dtype", "removed")
SHOWN = ("layer", "weight", "image", "engine", "density", "gflop", "ms", "gflop_s")
SHARES = ("of_loop", "of_product", "executed_of_loop")


# Peaks


def loops(cores: int) -> dict[str, float]:
    """FLOP/s in registers of so many cores at once, all together, by dtype."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "peak")
        source = Path(__file__).with_name("peak.cpp")
        subprocess.run(["g++", "-O2", source, "-o", program], check=True)
        runs = [subprocess.Popen([program], stdout=subprocess.PIPE, text=True) for _ in range(cores)]
        lines = [line.split() for run in runs for line in run.communicate()[0].splitlines()]
    total = {dtype: sum(1e9 * float(rate) for name, rate in lines if name == dtype) for dtype, _ in lines}
    return total


def products(dtypes: Iterable[str]) -> dict[str, float]:
    """FLOP/s of one thread in a product of two large matrices, by dtype."""
    found, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    for name in dtypes:
        a, b = torch.randint(-5, 6, (2, SIZE, SIZE)).to(getattr(torch, name))
        multiply = torch._int_mm if name == "int8" else torch.mm
        seconds: list[float] = []
        while len(seconds) < PRODUCTS and sum(seconds) < SECONDS:  # a dtype that torch emulates takes minutes
            start = time.thread_time()
            multiply(a, b)
            seconds.append(time.thread_time() - start)
        found[name] = 2 * SIZE**3 / min(seconds)
    torch.set_num_threads(threads)
    return found


def told(rates: dict[str, float]) -> str:
    return ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in rates.items())


# Whole benchmarks


def sample_flops(name: str) -> int:
    """Operations of one 3x32x32 sample, a multiplication and an addition each one."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        models.build(name).eval()(torch.rand(1, 3, 32, 32))
    return int(counter.get_total_flops())


def benchmarks(peak: dict[str, float]) -> Table:
    """The rows of bench/results against FLOP/s of all cores."""
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
    return table


# Layers


def build(name: str, removed: float) -> nn.Module:
    """A network in eval mode with magnitude masks, its batch norms set by noise images."""
    torch.manual_seed(0)
    size = networks.size_of(name)
    model = models.build(name) if name in models.ARCHITECTURES else networks.build(name)
    if removed:
        layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        model = csam.convert(model, exclude=(layers[0], layers[-1]))
        csam.masks.global_magnitude(model, removed, "layer")
    norms = [m for m in model.eval().modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of what is seen
        norm.train()
    with torch.no_grad():
        model(torch.rand(64, 3, size, size))
    for norm in norms:  # a channel that is all but constant would magnify its rounding
        norm.running_var.clamp_(min=0.1 * float(norm.running_var.mean()))
    return model.eval()


def planned(model: nn.Module, dtype: str, size: int) -> tuple[sampling.Plan, str]:
    """The plan that the engine runs, each layer as the cost model says, and whether that is the default."""
    x = torch.rand(3, size, size)
    if dtype == "int8":
        return sampling.plan(model, x, dtype=dtype, sigma=SIGMA), "engine"
    kind = getattr(torch, dtype)
    plan = sampling.plan(model, x, dtype=kind)
    if plan.prepared.sampler is not None:
        return plan, "engine"
    program = sampling.plan(model, x, dtype=kind, choices="dense").prepared.sampler.program
    engine.choose(program, kind, "auto")
    choices = {step.name: step.engine for step in program.steps if step.weight is not None}
    return sampling.plan(model, x, dtype=kind, choices=choices), "torch"


def executed(layer: sampling.Layer, step: Step, dtype: torch.dtype) -> float:
    """GFLOP a sample that are multiplied, surviving or not."""
    filters, channels, *kernel = layer.weight
    height, width = step.out.height, step.out.width
    if layer.engine == "sparse":
        return layer.gflop
    side = winograd_tile(step, dtype) if layer.engine == "winograd" else 0
    if side:
        products = {2: 17 if dtype is torch.bfloat16 else 16, 4: 36 if step.stride == (1, 1) else 81}[side]
        words = 2 if dtype is torch.int8 else 1  # half as many of 16 bits are multiplied at once
        return 2e-9 * filters * channels * products * words * -(-height // side) * -(-width // side)
    return 2e-9 * filters * channels * kernel[0] * kernel[1] * height * width


def measure(
    model: nn.Module, size: int, dtype: str, rounds: int, loop: float | None, product: float | None
) -> list[dict[str, Any]]:
    """A row a layer and one of all, against two peaks in FLOP/s; images are `size` pixels wide and high."""
    plan, default = planned(model, dtype, size)
    sampler = plan.prepared.sampler
    assert sampler is not None
    about = {
        "loop_gflop_s": f"{loop / 1e9:.1f}" if loop else "",
        "product_gflop_s": f"{product / 1e9:.1f}" if product else "",
    }
    about |= {"device": processor(), "isa": _C.isa(), "torch": torch.__version__, "commit": _commit()}
    about |= {"date": datetime.now(UTC).strftime("%Y-%m-%d")}

    def row(what: dict[str, str], gflop: float, made: float, ms: float) -> dict[str, Any]:
        def share(work: float, peak: float | None) -> str:
            return f"{1e12 * work / ms / peak:.3f}" if peak else ""

        rate = {
            "gflop": f"{gflop:.4g}",
            "executed": f"{made:.4g}",
            "ms": f"{ms:.4g}",
            "gflop_s": f"{1e3 * gflop / ms:.1f}",
        }
        shares = (share(gflop, loop), share(gflop, product), share(made, loop))
        return {"default": default} | what | rate | dict(zip(SHARES, shares, strict=True)) | about

    timed = list(zip(sampler.program.steps, sampler.times(rounds), strict=True))
    convolutions = [(step, ms) for step, ms in timed if step.weight is not None]
    rows, made = [], 0.0
    for layer, (step, ms) in zip(plan.layers, convolutions, strict=True):
        work = executed(layer, step, sampler.dtype)
        made += work
        what = {"layer": layer.name, "weight": _by(layer.weight), "image": _by(layer.image), "engine": layer.engine}
        rows.append(row(what | {"density": f"{layer.density:.3f}"}, layer.gflop, work, ms))
    kinds = Counter(layer.engine for layer in plan.layers)
    mixture = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    what = {"layer": "total", "weight": "", "image": _by(sampler.shape), "engine": mixture, "density": ""}
    rows.append(row(what, sum(layer.gflop for layer in plan.layers), made, sum(ms for _, ms in timed)))
    return rows


def _by(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def show(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    title = f"{first['network']}, {first['dtype']}, {float(first['removed']):.0%} of the weights removed"
    ours = "" if first["default"] == "engine" else "; torch runs it unless asked"
    table = Table(*(key.replace("_", " ") for key in (*SHOWN, *SHARES)), title=title + ours)
    for row in rows:
        density = f"{float(row['density']):.1%}" if row["density"] else ""
        shares = [f"{float(row[share]):.0%}" if row[share] else "-" for share in SHARES]
        table.add_row(*(str(row[k]) if k != "density" else density for k in SHOWN), *shares)
    return table


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows, and what the file holds of other networks, dtypes and shares."""
    fresh, kept = {tuple(row[k] for k in KEY) for row in rows}, []
    if path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if tuple(row[k] for k in KEY) not in fresh]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(kept + rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["resnet20", "resnet18", "googlenet", "mobilenet_v2"]
    parser.add_argument("--networks", nargs="*", default=known, help="whose layers are timed; none: benchmarks alone")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--removed", nargs="+", type=float, default=[0.0, 0.9], help="shares of the weights")
    parser.add_argument("--rounds", type=int, default=10, help="tiles that each layer is timed on")
    parser.add_argument("--out", type=Path, default=results_path().with_name(f"layers-{results_path().name}"))
    args = parser.parse_args()
    console = Console(width=160)
    if results_path().exists():
        together = loops(os.cpu_count() or 1)
        console.print("GFLOP/s in registers, all cores:", told(together))
        console.print(benchmarks(together))
    loop, product = loops(1), products(args.dtypes)
    console.print(f"GFLOP/s of one core in registers: {told(loop)}; in a product of {SIZE}x{SIZE}: {told(product)}")
    for name, removed, dtype in itertools.product(args.networks, args.removed, args.dtypes):
        model, size = build(name, removed), networks.size_of(name)
        rows = measure(model, size, dtype, args.rounds, loop.get(dtype), product.get(dtype))
        rows = [dict(zip(KEY, (name, dtype, f"{removed:g}"), strict=True)) | row for row in rows]
        write(args.out, rows)
        console.print(show(rows))


if __name__ == "__main__":
    main()
