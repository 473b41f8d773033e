"""For whoever has a GPU: `make gpu-check` runs every provider on the card against the reference, then times it.

Correctness comes first; a difference beyond the tolerance table of the tests, or a call that fails, ends with exit
code 1. Timings are medians of interleaved rounds against torch's own operators (cuDNN convolution on the materialised
product and the rest of `gpu_cases.py`), with a cold L2 cache: `ms` of the call as Python makes it, `kernels_ms` of its
kernels alone, replayed from a CUDA graph; `gb_per_s` and `peak_share` (of the card's published memory or arithmetic
peak, whichever is nearer; A100, H100, H200 and B200) are those of the kernels. They are written to
bench/results/gpu-<card>.csv. `--case TEXT` keeps the cases whose operation or name holds TEXT.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import csam
from bench_search import CORE, LR, RHO, SPARSITY, TAU, TorchStep
from bench_smooth import BATCH, SIGMA, N, cohen_counts
from csam_kernels import backend, reference
from gpu_cases import Case, allow_tf32, cases, tensors
from gpu_ledger import CARDS, H200, called, compile_ahead

ROUNDS = 51
# (rtol, atol) by the dtype that the operands had: the table of tests/conftest.py
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1.6e-2, 1e-2), torch.float16: (2e-3, 2e-3)}
CALL = ("op", "case", "provider", "ms", "twin_ms", "ratio")
KERNELS = ("kernels_ms", "kernels_twin_ms", "kernels_ratio", "gb_per_s", "peak_share", "max_error")
FIELDS = ("device", "torch", "triton", *CALL, *KERNELS)


def fresh(values: Any) -> Any:
    """Arguments that a call may write to."""
    if isinstance(values, Tensor):
        return values.clone() if values.dtype is torch.int64 else values
    return type(values)(fresh(v) for v in values) if isinstance(values, (list, tuple)) else values


def widened(values: Any) -> Any:
    """Arguments in float64: cuDNN's long sums in float32 and what it rounds to halves are no reference for others'."""
    if isinstance(values, Tensor):
        return values.double() if values.is_floating_point() else values
    if isinstance(values, (list, tuple)):
        return type(values)(widened(v) for v in values)
    return torch.float64 if values is torch.float32 else values


def results(function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
    """What a call returns, or what it wrote where it returns nothing."""
    given = fresh(arguments)
    out = function(*given)
    return tensors(out if out is not None else given[-1])


def difference(actual: list[Tensor], expected: list[Tensor], case: Case) -> tuple[float, bool]:
    """Largest absolute error, and whether all values are within the table; integers must be equal."""
    worst, good = 0.0, len(actual) == len(expected)
    dtypes = [t.dtype for t in case.inputs() + expected if t.dtype in TOLERANCE]
    dtypes += [torch.float16] * (case.peak == "tf32")  # it rounds operands to as many bits
    rtol, atol = max((TOLERANCE[d] for d in dtypes), default=(0.0, 0.0))
    for a, e in zip(actual, expected, strict=False):
        a, e = a.to("cpu", torch.float64), e.to("cpu", torch.float64)
        if e.numel():
            worst = max(worst, float((a - e).abs().max()))
        # errors of long sums grow with the size of what is summed
        sums = any(name in case.op for name in ("conv", "linear", "gradients"))
        good &= torch.allclose(a, e, rtol=rtol, atol=atol * max(1.0, float(e.abs().max())) if sums else atol)
    return worst, good


def median_ms(functions: list[Callable[[], Any]], rounds: int = ROUNDS) -> list[float]:
    """Median time of each function, one call of each in turn, by CUDA events; the L2 cache is cleared in between."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times: list[list[float]] = [[] for _ in functions]
    for function in functions * 3:
        function()
    for _ in range(rounds):
        for function, mine in zip(functions, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            function()
            end.record()
            end.synchronize()
            mine.append(start.elapsed_time(end))
    return [statistics.median(t) for t in times]


def replayed(function: Callable[[], Any]) -> Callable[[], Any] | None:
    """The kernels of a call without the Python around them; None for a call that waits for the device."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:
        return None
    return graph.replay


def whole_jobs(device: torch.device) -> Iterator[tuple[str, Callable[[], list[Callable[[], Any]]]]]:
    """What people run, and what makes it and its twin: a C-SAM step against the compiled plain-torch step, Smooth
    against Cohen's loop."""

    def step() -> list[Callable[[], Any]]:
        x = torch.rand(64, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
        y = torch.randint(0, 10, (64,), device=device)
        model = csam.models.build("resnet18").to(device, memory_format=torch.channels_last).train()
        search = csam.MaskSearch(csam.convert(model), SPARSITY, rho=RHO, lr=LR, tau=TAU, dtype=torch.bfloat16, **CORE)
        step = TorchStep(model, torch.bfloat16, **CORE)
        step.model.compile()
        return [lambda: search.step(x, y), lambda: step.step(x, y)]

    def smooth(name: str) -> list[Callable[[], Any]]:
        x, network = torch.rand(3, 32, 32, device=device), csam.models.build(name).to(device).eval()
        smooth = csam.Smooth(network, num_classes=10, sigma=SIGMA, dtype=torch.bfloat16, tile=BATCH)
        return [lambda: smooth.counts(x, N), cohen_counts(network, x)]

    for name in ("resnet20", "resnet18"):
        yield f"Smooth, {name}, n = {N}, bf16", lambda name=name: smooth(name)  # type: ignore[misc]
    yield "C-SAM step, ResNet-18, batch 64, bf16", step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", default="", help="only operations or cases that hold this text")
    parser.add_argument("--no-timing", action="store_true", help="correctness only")
    parser.add_argument("--no-whole", action="store_true", help="leave out the whole jobs (torch compiles their twins)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device; nothing was run", file=sys.stderr)
        return 2
    picked = [case for case in cases(torch.device("meta")) if options.case in f"{case.op} {case.name}"]
    compile_ahead([launch for case in picked for launch in called(case)], capability())
    device, card = torch.device("cuda"), torch.cuda.get_device_name()
    reasons = {name: backend.backends()[name] for name in ("triton", "cuda")}
    print(card, "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    providers = {n: importlib.import_module(f"csam_kernels.{n}") for n, r in reasons.items() if r == "available"}
    base = {"device": card, "torch": torch.__version__, "triton": _triton_version()}
    rows, faults = [], 0
    for case in cases(device):
        if options.case not in f"{case.op} {case.name}":
            continue
        allow_tf32(False)
        exact = "backward" in case.op or (case.peak == "float32" and ("conv" in case.op or "linear" in case.op))
        expected = results(getattr(reference, case.op), widened(case.arguments) if exact else case.arguments)
        allow_tf32(case.peak == "tf32")
        for name, module in providers.items():
            serve = getattr(module, case.op, None)
            if serve is None:
                continue
            row = {"op": case.op, "case": case.name, "provider": name}
            try:
                error, good = difference(results(serve, case.arguments), expected, case)
                row["max_error"] = f"{error:.3g}"
                if not options.no_timing:
                    row |= timing(case, serve)
            except Exception as problem:
                good, row["max_error"] = False, " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
            faults += not good
            told = ", ".join(f"{key} {row[key]}" for key in (*CALL[3:], *KERNELS) if row.get(key))
            print(f"{'ok  ' if good else 'FAIL'} {name:7}{case.op:24}{case.name:36} {told}", flush=True)
            rows.append(base | row)
    allow_tf32(False)
    if not options.no_timing:
        write(rows, card)
        for name, make in [] if options.no_whole else whole_jobs(device):
            if options.case not in f"whole {name}":
                continue
            row = {"op": "whole", "case": name, "provider": "all"} | _compared(median_ms(make(), rounds=15), "")
            print(f"     {name}: {row['ms']} ms, torch {row['twin_ms']} ms", flush=True)
            rows.append(base | row)
        write(rows, card)
    print(f"{len(rows)} calls, {faults} beyond tolerance")
    return 1 if faults else 0


def write(rows: list[dict[str, Any]], card: str) -> None:
    path = Path(__file__).parent / "results" / f"gpu-{re.sub(r'[^a-z0-9]+', '-', card.lower())}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}", flush=True)


def timing(case: Case, serve: Callable[..., Any]) -> dict[str, Any]:
    given = fresh(case.arguments)
    functions = [lambda: serve(*given)]
    if case.twin:
        twin = case.twin
        functions.append(lambda: twin(*given))
    row = _compared(median_ms(functions), "")
    graphs = [replayed(function) for function in functions]
    if graphs[0]:
        row |= _compared(median_ms([graph for graph in graphs if graph]), "kernels_")
    kernels = float(row.get("kernels_ms", row["ms"]))
    least = sum(t.nbytes for t in case.inputs() + results(serve, case.arguments))
    row["gb_per_s"] = f"{least / kernels / 1e6:.0f}"
    return row | {"peak_share": peak_share(case, least, kernels, torch.cuda.get_device_name())}


def _compared(times: list[float], prefix: str) -> dict[str, str]:
    names = (f"{prefix}ms", f"{prefix}twin_ms")
    row = {name: f"{time:.4f}" for name, time in zip(names, times, strict=False)}
    return row | ({f"{prefix}ratio": f"{times[1] / times[0]:.2f}"} if len(times) > 1 else {})


def peak_share(case: Case, least: int, ms: float, device: str) -> str:
    """Time that the card's published bandwidth or arithmetic allows, over the time taken; "" for an unlisted card."""
    card = next((card for card in (*CARDS.values(), H200) if card.name in device), None)
    return (
        f"{card.seconds(least, sum(launch.flops for launch in called(case)), case.peak) / ms * 1e3:.3f}" if card else ""
    )


def capability() -> int:
    """As in sm_90, asked without making a CUDA context: the processes that compile are forks."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0].replace(".", ""))


def _triton_version() -> str:
    return str(importlib.import_module("triton").__version__)


if __name__ == "__main__":
    sys.exit(main())
