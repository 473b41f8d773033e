"""Which tiles are fastest on this card: the masked convolution's rows of `csam_kernels/triton/tuning.py`, measured.

`python bench/gpu_tune.py` times every candidate tile on every layer of `gpu_cases.convolution_cases` that a row serves
(median of a CUDA graph's replays, cold L2 cache, kernels compiled ahead on all cores) and prints, for each kernel and
arithmetic, the time of the fastest and of the tile in the table for each layer, then the tiles by the geometric mean
of their loss against each layer's fastest. `--out FILE` keeps every time as CSV, `--only REGEX` the rows so named.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
from collections import defaultdict
from itertools import product
from pathlib import Path

import torch

from csam_kernels import triton as provider
from csam_kernels.triton import tuning
from csam_kernels.triton.launch import Launch
from csam_kernels.triton.launchers import masked_conv2d as launchers
from csam_kernels.triton.tuning import ConvTile
from gpu_cases import Case, allow_tf32, convolution_cases
from gpu_check import capability, median_ms, replayed
from gpu_ledger import called, compile_ahead

SHARED = 220 << 10  # bytes of shared memory that a program may have
NEED = {"input_gradient": [True, False, False], "weight_gradient": [False, True, True]}


def candidates(kernel: str, arithmetic: str) -> list[ConvTile]:
    """Of a listed kernel's stages two bring a tile's number and the tile, so that about half are in flight."""
    listed, half = "weight_gradient" not in kernel, arithmetic == "half"
    rows, columns, warps = (64, 128), (64, 128, 256) if half else (64, 128), (4, 8)
    inner, stages = (32, 64) if half else (16, 32), (3, 5) if listed else (3, 4)
    tiles = []
    for r, p, k, w, s in product(rows, columns, inner, warps, stages):
        registers = r * p / (32 * w)  # a thread's part of the accumulator
        shared = ((s + 1) // 2 if listed else s) * k * (p + r) * (2 if half else 4)
        if 16 <= registers <= (64 if w == 4 else 128) and shared <= SHARED:
            tiles.append(ConvTile(r, p, k, w, s))
    return tiles


def layers(device: torch.device) -> dict[tuple[str, str], list[Case]]:
    """The calls that each row of the table serves; the backward pass in its two parts."""
    found: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in convolution_cases(device):
        if "depthwise" in case.name or "mask" in case.name or case.peak == "tf32" or case.name.endswith(" float16"):
            continue
        flat = "flat_" if case.name.startswith("3->") else ""
        arithmetic = "float32" if case.peak == "float32" else "half"
        if case.op in ("masked_conv2d", "masked_conv2d_inference"):
            found["forward", arithmetic].append(case)
        elif case.op == "masked_conv2d_backward":
            for kernel, need in NEED.items():
                kernel = flat + kernel if kernel == "weight_gradient" else kernel
                found[kernel, arithmetic].append(case._replace(arguments=(*case.arguments[:-1], need)))
    return found


def use(where: str, kernel: str, arithmetic: str, tile: ConvTile | None) -> None:
    """Put one tile in the place of a row's, or the row's own back."""
    row = dict(tuning._CONV)
    if tile is not None:
        row[kernel, arithmetic] = (tile,)
    tuning.MASKED_CONV2D[where] = row
    for plan in (launchers._forward_plan, launchers._input_plan, launchers._weight_plan):
        plan.cache_clear()


def jobs_on(device: torch.device, only: str, tiles: list[ConvTile]) -> list[tuple[str, str, ConvTile | None, Case]]:
    return [
        (kernel, arithmetic, tile, case)
        for (kernel, arithmetic), calls in layers(device).items()
        if re.search(only, f"{kernel} {arithmetic}")
        for tile in (None, *(tiles or candidates(kernel, arithmetic)))
        for case in calls
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="a regular expression for `kernel arithmetic`")
    parser.add_argument(
        "--tile", action="append", help="rows,columns,inner,num_warps,num_stages instead of all candidates"
    )
    parser.add_argument("--out", type=Path, help="a CSV file for every time")
    options = parser.parse_args()
    tiles = [ConvTile(*(int(n) for n in text.split(","))) for text in options.tile or []]
    arch = capability()
    where = tuning.CLASSES[arch // 10]
    allow_tf32(False)
    with tuning.forced(where):
        launches: list[Launch] = []
        for kernel, arithmetic, tile, case in jobs_on(torch.device("meta"), options.only, tiles):
            use(where, kernel, arithmetic, tile)
            launches += called(case)
        failed = compile_ahead(launches, arch)
    jobs = jobs_on(torch.device("cuda"), options.only, tiles)
    print(f"{len(jobs)} calls to time, {failed} kernels do not compile", flush=True)
    times: dict[tuple[str, str], dict[str, dict[ConvTile | None, float]]] = defaultdict(lambda: defaultdict(dict))
    rows = []
    for kernel, arithmetic, tile, case in jobs:
        use(where, kernel, arithmetic, tile)
        try:
            graph = replayed(lambda case=case: getattr(provider, case.op)(*case.arguments))
            ms = median_ms([graph], 15)[0] if graph else math.inf
        except Exception as error:
            print(f"{kernel} {arithmetic} {tile} {case.name}: {' '.join(str(error).split())[:100]}", flush=True)
            torch.cuda.synchronize()
            continue
        times[kernel, arithmetic][case.name][tile] = ms
        rows.append((kernel, arithmetic, case.name, *(tile or ("table",) * 6), f"{ms:.4f}"))
        if options.out and len(rows) % 100 == 0:
            save(options.out, rows)
    if options.out:
        save(options.out, rows)
    for (kernel, arithmetic), named in times.items():
        print(f"{kernel} {arithmetic}")
        losses: dict[ConvTile | None, list[float]] = defaultdict(list)
        for name, ms_of in named.items():
            best = min(ms_of, key=lambda tile: ms_of[tile])
            print(f"  {name:36} table {ms_of.get(None, math.nan):.4f} ms, best {ms_of[best]:.4f} ms {best}")
            for tile, ms in ms_of.items():
                losses[tile].append(math.log(ms / ms_of[best]))
        whole = {t: math.exp(sum(v) / len(v)) for t, v in losses.items() if len(v) == len(named)}
        for tile, loss in sorted(whole.items(), key=lambda item: item[1])[:5]:
            print(f"  {loss:.3f} of the fastest: {tile or 'table'}")
    return 0


def save(path: Path, rows: list[tuple]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("kernel", "arithmetic", "case", *ConvTile._fields, "ms"), *rows])


if __name__ == "__main__":
    sys.exit(main())
