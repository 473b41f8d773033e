"""The sampling engine against what a user would certify with instead, all in one run: `make peers`, on x86-64.

Every candidate votes N noisy samples of one image, 3x32x32 (of ResNet-50 3x224x224), noise included; rounds go through
all candidates in turn, so that a drift of the machine meets all alike. Peers run the dense network, and for shared
filters a network that is really narrower; each at its best batch size, found before the rounds. Weights are random;
batch-norm statistics and the head's bias are set so that one class wins most samples, but not nearly all.

Written to bench/results/peers-<processor>.csv, a row a candidate, and drawn beside it:

- removed: "70 % weights" the smallest of each layer but the first and the last; "50 % filters, own" each layer its own,
  likewise; "50 % filters, shared" the same channels in all layers that are summed, which leaves a narrower network;
- gflop: operations on surviving weights a sample, a multiplication and an addition each one, / 1e9;
- samples_s: quantiles over the rounds; spread over both cores;
- ratio_cohen, ratio_float: medians over the rounds of the speed against Cohen's loop and against the fastest other peer
  in floating point (bfloat16, or float32 where the processor multiplies no bfloat16), both on the dense network;
  ratio_narrow: against the fastest such peer on the network of the same row;
- agreement: share of LABELLED samples that get the label of the float32 module on the same noise.
"""

from __future__ import annotations

import argparse
import csv
import logging
import multiprocessing
import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import matplotlib
import nncf
import numpy as np
import openvino
import torch
from torch import Tensor, fx, nn
from torch._inductor import config as inductor
from torch.fx.experimental.optimization import fuse

import csam
import networks
from bench_smooth import SIGMA, N, cohen_counts
from conftest import QUANTILES, _commit, results_path
from csam import lanes, models
from csam.runs import processor
from csam_kernels import _C, smoothing_noise

matplotlib.use("Agg")
from matplotlib import pyplot

CLASSES, LABELLED, TUNED = 10, 400, 400
DTYPES = ("int8", "bfloat16", "float32")  # of the sampling engine
WEIGHTS, FILTERS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99), (0.5, 0.75)
EAGER, COMPILED, OPENVINO = (50, 64, 100, 128, 200, 400), (50, 100, 200), (8, 16, 50, 100, 200)  # batch sizes
FLOAT = torch.bfloat16 if torch.cpu.get_capabilities().get("avx512_bf16") else torch.float32  # what peers multiply
FLOAT_NAME = str(FLOAT).removeprefix("torch.")
PEERS = (
    ("Cohen's loop", "float32"),
    ("eager", FLOAT_NAME),
    ("inductor", FLOAT_NAME),
    ("OpenVINO", FLOAT_NAME),
    ("OpenVINO", "int8"),
)
MOST_PANELS = 4  # of the picture side by side
OWN = ("csam", "Cohen's loop")  # which are compared with the fastest of the others
KEY = ("network", "removed", "engine", "dtype")


@dataclass
class Candidate:
    """What votes: `votes(n)` gives counts of the classes, `labels(images)` int64 [n] of float32 [n, 3, H, W]."""

    engine: str
    dtype: str
    votes: Callable[[int], Any]
    labels: Callable[[Tensor], Tensor]
    setting: str = ""
    removed: str = ""
    gflop: float = 0.0
    agreement: float = 0.0
    rates: list[float] = field(default_factory=list)


# Networks


def build(name: str, width: float = 1.0) -> nn.Module:
    """A network with batch-norm parameters as training leaves them, or the same at `width` times the channels."""
    torch.manual_seed(0)
    if name in models.ARCHITECTURES:
        architecture = models.ARCHITECTURES[name]
        widths = tuple(round(width * w) for w in architecture.widths)
        model: nn.Module = models.CifarResNet(replace(architecture, widths=widths), num_classes=CLASSES)
    else:
        model = networks.build(name)
    for norm in _norms(model):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.1)
    return model


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """The model in eval mode, its batch norm and head set by noisy samples of x, which one class wins most often."""
    images = smoothing_noise(x, 128, SIGMA, seed=1)
    for norm in _norms(model.eval()):
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        model(images)
        for norm in _norms(model):  # a channel that is all but constant would magnify its rounding
            norm.running_var.clamp_(min=0.1 * float(norm.running_var.mean()))
        logits = model.eval()(images)
        head.bias -= logits.mean(0)
        head.bias[0] += 3 * logits.std(0).mean()
    return model


def _norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def pruned(name: str, granularity: str, sparsity: float) -> nn.Module:
    """Magnitude masks of equal share in every layer, but for the first and the last."""
    model = build(name)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    model = csam.convert(model, granularity=granularity, exclude=(layers[0], layers[-1]))
    csam.masks.global_magnitude(model, sparsity, "layer")
    return model


def narrowed(name: str, sparsity: float) -> nn.Module:
    """A CIFAR ResNet without a share of its channels: the same ones in all layers whose outputs are summed."""
    model: Any = csam.convert(build(name), granularity="filter", exclude=lambda _, layer: isinstance(layer, nn.Linear))

    def keep(pairs: list[tuple[Any, nn.BatchNorm2d]], also: Tensor | None = None) -> Tensor:
        norms = sum(csam.masks.group_norms(layer).flatten().square() for layer, _ in pairs)
        assert isinstance(norms, Tensor)
        if also is not None:
            norms[also] = torch.inf
        kept = norms.topk(round((1 - sparsity) * len(norms))).indices
        mask = torch.zeros(len(norms), dtype=torch.bool).index_fill(0, kept, True)
        for layer, norm in pairs:
            layer.set_mask(mask[:, None, None, None])
            norm.weight.data *= mask
            norm.bias.data *= mask
        return kept

    stream, also = [(model.conv1, model.bn1)], None
    for block in (m for m in model.modules() if isinstance(m, models.BasicBlock)):
        keep([(block.conv1, block.bn1)])
        shortcut = block.downsample
        if not isinstance(shortcut, nn.Identity):
            kept, also, stream = keep(stream, also), None, []
            if isinstance(shortcut, models.PadShortcut):
                also = kept + shortcut.channels[0]
            else:
                stream = [(shortcut[0], shortcut[1])]
        stream.append((block.conv2, block.bn2))
    keep(stream, also)
    return model


def operations(model: nn.Module, x: Tensor) -> float:
    """GFLOP a sample on the weights that survive, and whose input is alive."""
    program = lanes.lower(fx.symbolic_trace(fuse(csam.fold(model))), x.shape)
    lanes.simplify(program)
    layers = [(len(step.weight[0]), step.out) for step in program.steps if step.weight is not None]
    return sum(2e-9 * weights * out.height * out.width for weights, out in layers)


# Candidates


def planned(model: nn.Module, x: Tensor, dtype: str) -> Candidate:
    """The sampling engine."""
    if dtype == "int8":
        plan = csam.sampling.plan(model, x, dtype=dtype, sigma=SIGMA)
    else:
        plan = csam.sampling.plan(model, x, dtype=getattr(torch, dtype))
    prepared, sampler = plan.prepared, plan.prepared.sampler

    def labels(images: Tensor) -> Tensor:
        if sampler is not None:
            return sampler.logits(images).argmax(1)
        with torch.inference_mode():
            return prepared.module(images.to(prepared.dtype, memory_format=prepared.memory_format)).argmax(1)

    engines = [layer.engine for layer in plan.layers]
    setting = ", ".join(f"{engines.count(name)} {name}" for name in sorted(set(engines))) or "run by torch"
    return Candidate("csam", dtype, lambda n: plan.votes(x, SIGMA, n), labels, setting)


def cohen(model: nn.Module, x: Tensor) -> Candidate:
    """The published loop; it votes its own N whatever n is."""

    @torch.no_grad()
    def labels(images: Tensor) -> Tensor:
        return model(images).argmax(1)

    run = cohen_counts(model, x)
    return Candidate("Cohen's loop", "float32", lambda n: run(), labels, "batch 400")


def eager(model: nn.Module, x: Tensor) -> Candidate:
    """torch, batch norm folded, channels_last."""
    return fastest(EAGER, lambda batch: _torch("eager", _folded(model), x, batch))


def compiled(model: nn.Module, x: Tensor) -> Candidate:
    """torch.compile on the same network, with weights frozen."""
    return fastest(COMPILED, lambda batch: _torch("inductor", _frozen(_folded(model)), x, batch))


def compiled_twice(model: nn.Module, x: Tensor, batch: int) -> Candidate:
    """The same in two processes, each on one thread and a core of its own."""
    pipes = []
    for core in sorted(os.sched_getaffinity(0))[:2]:
        pipe, end = multiprocessing.get_context("spawn").Pipe()
        multiprocessing.get_context("spawn").Process(
            target=_serve, args=(end, core, model, x, batch), daemon=True
        ).start()
        end.close()
        pipes.append(pipe)

    def votes(n: int) -> Tensor:
        for i, pipe in enumerate(pipes):
            pipe.send((n + i) // len(pipes))
        return sum(pipe.recv() for pipe in pipes)

    def labels(images: Tensor) -> Tensor:
        for pipe in pipes:
            pipe.send(images.numpy())
        return torch.from_numpy([pipe.recv() for pipe in pipes].pop())

    return Candidate("inductor, 2 processes", FLOAT_NAME, votes, labels, f"batch {batch}")


def _serve(pipe: Connection, core: int, model: nn.Module, x: Tensor, batch: int) -> None:
    """Votes for each number that comes, labels for images; until the other end closes."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    candidate = _torch("inductor", _frozen(_folded(model)), x, batch)
    try:
        while True:
            asked = pipe.recv()
            if isinstance(asked, int):
                pipe.send(candidate.votes(asked))
            else:
                pipe.send(candidate.labels(torch.from_numpy(asked)).numpy())
    except EOFError:
        pass


def _folded(model: nn.Module) -> nn.Module:
    return fuse(model).to(FLOAT, memory_format=torch.channels_last)


def _frozen(model: nn.Module) -> Any:
    torch.compiler.reset()
    inductor.freezing = True
    return torch.compile(model, dynamic=False)


def _torch(engine: str, model: Any, x: Tensor, batch: int) -> Candidate:
    @torch.no_grad()
    def label(images: Tensor) -> Tensor:
        return model(images.to(FLOAT, memory_format=torch.channels_last)).argmax(1)

    def votes(n: int) -> Tensor:
        counts = torch.zeros(CLASSES, dtype=torch.int64)
        for images in noisy(x, n, batch):
            counts += label(images)[:n].bincount(minlength=CLASSES)
            n -= batch
        return counts

    def labels(images: Tensor) -> Tensor:
        return torch.cat([label(part)[: len(images) - i] for i, part in batches(images, batch)])

    return Candidate(engine, FLOAT_NAME, votes, labels, f"batch {batch}")


def openvinos(model: nn.Module, x: Tensor) -> Iterator[Candidate]:
    """OpenVINO in floating point, and after NNCF's post-training quantization on noisy samples of x."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x[None])
        network = openvino.convert_model(traced, input=[-1, *x.shape])
    yield fastest(OPENVINO, lambda batch: _openvino(network, FLOAT_NAME, x, batch))
    samples = nncf.Dataset([images.numpy() for images in noisy(x, 300, 10)])
    quantized = nncf.quantize(network, samples, subset_size=30)
    yield fastest(OPENVINO, lambda batch: _openvino(quantized, "int8", x, batch))


def _openvino(network: Any, dtype: str, x: Tensor, batch: int) -> Candidate:
    network = network.clone()
    network.reshape([batch, *x.shape])
    hints = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "bf16" if FLOAT is torch.bfloat16 else "f32"}
    made = openvino.Core().compile_model(network, "CPU", hints)
    queue = openvino.AsyncInferQueue(made)

    def votes(n: int) -> np.ndarray:
        found: list[np.ndarray] = []
        queue.set_callback(
            lambda request, size: found.append(
                np.bincount(request.get_output_tensor().data[:size].argmax(1), minlength=CLASSES)
            )
        )
        with one_thread():  # the others are at work on the network
            for images in noisy(x, n, batch):
                queue.start_async({0: images.numpy()}, n)
                n -= batch
            queue.wait_all()
        return np.sum(found, 0)

    def labels(images: Tensor) -> Tensor:
        found = [made(part.numpy())[0][: len(images) - i].argmax(1) for i, part in batches(images, batch)]
        return torch.from_numpy(np.concatenate(found))

    return Candidate("OpenVINO", dtype, votes, labels, f"batch {batch}, {len(queue)} streams")


def noisy(x: Tensor, n: int, batch: int) -> Iterator[Tensor]:
    """Batches of x + SIGMA * eps until there are n; drawn in the memory order that torch draws fastest in."""
    for _ in range(0, n, batch):
        yield torch.randn(batch, *x.shape).mul_(SIGMA).add_(x)


def batches(images: Tensor, batch: int) -> Iterator[tuple[int, Tensor]]:
    """(first image, images) of full batches; the last repeats its own."""
    for i in range(0, len(images), batch):
        part = images[i : i + batch]
        yield i, part[torch.arange(batch) % len(part)]


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fastest(sizes: Iterable[int], make: Callable[[int], Candidate]) -> Candidate:
    """The candidate of the batch size that votes TUNED samples fastest."""
    found = []
    for batch in sizes:
        candidate = make(batch)
        candidate.votes(batch)
        found.append((seconds(candidate, TUNED), batch, candidate))
    return min(found)[2]


def seconds(candidate: Candidate, n: int) -> float:
    """Of one call, a sample."""
    start = time.perf_counter()
    counts = candidate.votes(n)
    return (time.perf_counter() - start) / float(counts.sum())


# The run


def candidates(name: str, x: Tensor, wanted: re.Pattern[str], dtypes: Iterable[str]) -> Iterator[Candidate]:
    """Those of one network whose "removed, engine, dtype" matches."""

    def asked(removed: str, engine: str, dtype: str) -> bool:
        return wanted.search(f"{removed}, {engine}, {dtype}") is not None

    def made(model: nn.Module, removed: str, found: Iterable[Candidate]) -> Iterator[Candidate]:
        images = smoothing_noise(x, LABELLED, SIGMA, seed=0)
        truth, gflop = cohen(model, x).labels(images), operations(model, x)
        for candidate in found:
            agreement = float((candidate.labels(images) == truth).double().mean())
            yield replace(candidate, removed=removed, gflop=gflop, agreement=agreement)

    def ours(model: nn.Module, removed: str) -> Iterator[Candidate]:
        chosen = [dtype for dtype in dtypes if asked(removed, "csam", dtype)]
        if chosen:
            yield from made(settled(model, x), removed, (planned(model, x, dtype) for dtype in chosen))

    def peers(width: float, removed: str) -> Iterator[Candidate]:
        def found(model: nn.Module) -> Iterator[Candidate]:
            if width == 1 and asked(removed, "Cohen's loop", "float32"):
                yield cohen(model, x)
            if asked(removed, "eager", FLOAT_NAME):
                yield eager(model, x)
            if asked(removed, "inductor", FLOAT_NAME):
                yield (one := compiled(model, x))
                yield compiled_twice(model, x, int(one.setting.split()[1]))
            if asked(removed, "OpenVINO", FLOAT_NAME) or asked(removed, "OpenVINO", "int8"):
                yield from openvinos(model, x)

        if any(asked(removed, engine, dtype) for engine, dtype in PEERS):
            yield from made(model := settled(build(name, width), x), removed, found(model))

    yield from peers(1.0, "nothing")
    yield from ours(build(name), "nothing")
    for share in WEIGHTS:
        yield from ours(pruned(name, "weight", share), f"{share:.0%} weights".replace("%", " %"))
    for share in FILTERS:
        removed = f"{share:.0%} filters".replace("%", " %")
        yield from ours(pruned(name, "filter", share), f"{removed}, own")
        if name in models.ARCHITECTURES:
            yield from ours(narrowed(name, share), f"{removed}, shared")
            yield from peers(1 - share, f"{removed}, shared")


def measure(name: str, args: argparse.Namespace) -> list[dict[str, object]]:
    x = torch.rand(3, *2 * [networks.size_of(name)], generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    found = []
    for candidate in candidates(name, x, re.compile(args.only), args.dtypes):
        found.append(candidate)
        told = f"{candidate.removed}, {candidate.engine}, {candidate.dtype} ({candidate.setting})"
        print(f"{time.perf_counter() - start:6.0f} s  {name}: {told} agrees {candidate.agreement:.1%}", flush=True)
    for i in range(args.rounds):
        for candidate in found:
            candidate.rates.append(1 / seconds(candidate, args.n))
        print(f"{time.perf_counter() - start:6.0f} s  {name}: round {i + 1} of {args.rounds}", flush=True)

    def peer(removed: str) -> Candidate | None:
        these = [c for c in found if (c.removed, c.dtype) == (removed, FLOAT_NAME) and c.engine not in OWN]
        return max(these, key=lambda c: float(np.median(c.rates)), default=None)

    def ratio(ours: Candidate, peer: Candidate | None) -> str:
        return "" if peer is None else f"{np.median(np.divide(ours.rates, peer.rates)):.3g}"

    loop = next((c for c in found if c.engine == "Cohen's loop"), None)
    rows = []
    for c in found:
        row: dict[str, object] = dict(zip(KEY, (name, c.removed, c.engine, c.dtype), strict=True))
        row |= {"setting": c.setting, "gflop": f"{c.gflop:.4g}", "n": args.n, "rounds": args.rounds}
        row |= {f"samples_s_p{int(100 * q)}": f"{np.quantile(c.rates, q):.4g}" for q in QUANTILES}
        row |= {"ratio_cohen": ratio(c, loop), "ratio_float": ratio(c, peer("nothing"))}
        row |= {"ratio_narrow": ratio(c, peer(c.removed)), "agreement": f"{c.agreement:.4f}"}
        row |= {"device": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "isa": _C.isa()}
        row |= {"torch": torch.__version__, "openvino": openvino.__version__.split("-")[0], "nncf": nncf.__version__}
        row |= {"python": platform.python_version(), "commit": _commit()}
        rows.append(row | {"date": datetime.now(UTC).strftime("%Y-%m-%d")})
    return rows


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """The rows, and what the file holds of other candidates."""
    kept: dict[tuple[object, ...], dict[str, Any]] = {}
    if path.exists():
        with path.open(newline="") as file:
            kept = {tuple(row[k] for k in KEY): row for row in csv.DictReader(file)}
    kept |= {tuple(row[k] for k in KEY): row for row in rows}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(kept.values())


def draw(path: Path) -> None:
    """Samples a second over the operations that are left, a panel a network; the dense peers are horizontal lines."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(dict.fromkeys(row["network"] for row in rows))
    peers = list(dict.fromkeys(_told(row) for row in rows if row["engine"] != "csam"))
    colors = {"csam, int8": "C3", "csam, bfloat16": "C0", "csam, float32": "0.5"}
    colors |= dict(zip(peers, ("0.7", "C2", "C1", "C5", "C4", "C6"), strict=False))
    marks = {"weights": "o-", "filters, own": "s", "filters, shared": "D"}
    across = len(names) if len(names) <= MOST_PANELS else -(-len(names) // 2)
    down = -(-len(names) // across)
    size = (max(9.0, 5.4 * across), 5.0 * down + 1.4)
    figure, panels = pyplot.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    axes, unused = panels.flat[: len(names)], panels.flat[len(names) :]
    for axis in unused:
        axis.set_axis_off()
    for axis, name in zip(axes, names, strict=True):
        here = [row for row in rows if row["network"] == name]
        dense = max(float(row["gflop"]) for row in here)

        def points(these: list[dict[str, str]], dense: float = dense) -> list[list[float]]:
            pairs = sorted((100 * float(row["gflop"]) / dense, float(row["samples_s_p50"])) for row in these)
            return [[pair[i] for pair in pairs] for i in (0, 1)]

        for told in dict.fromkeys(map(_told, here)):
            these = [row for row in here if _told(row) == told]
            whole = [row for row in these if row["removed"] == "nothing"]
            if told in peers:
                for row in whole:
                    axis.axhline(
                        float(row["samples_s_p50"]), color=colors[told], linestyle="--", linewidth=1.2, label=told
                    )
                axis.plot(*points([row for row in these if row not in whole]), "x", color=colors[told])
                continue
            for mark, style in marks.items():
                chosen = [row for row in these if row["removed"].endswith(mark)]
                chosen += whole if mark == "weights" else []
                axis.plot(*points(chosen), style, color=colors[told], label=f"{told}: {mark}", markersize=5)
        axis.plot([], [], "x", color="black", label="peers on the narrower network")
        axis.set(xscale="log", yscale="log", title=name, xlabel="operations left (% of the dense network's)")
        axis.invert_xaxis()
        axis.grid(which="both", alpha=0.2)
    for row in panels:
        row[0].set_ylabel("noisy samples a second")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=3, fontsize="small")
    figure.savefig(path.with_suffix(".png"), dpi=140)
    pyplot.close(figure)


def _told(row: dict[str, str]) -> str:
    return f"{row['engine']}, {row['dtype']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet18"])
    parser.add_argument("--rounds", type=int, default=3, help="0: draw the file again")
    parser.add_argument("--n", type=int, default=N, help="votes a round")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, help="of the sampling engine")
    parser.add_argument("--only", default="", help='candidates whose "removed, engine, dtype" matches this expression')
    parser.add_argument("--out", type=Path, default=results_path().with_name(f"peers-{results_path().name}"))
    args = parser.parse_args()
    logging.getLogger("nncf").setLevel(logging.ERROR)
    for name in args.networks if args.rounds else ():
        rows = measure(name, args)
        write(args.out, rows)
        for row in rows:
            print("  ".join(str(row[k]) for k in (*KEY, "setting", "samples_s_p50", "ratio_cohen", "ratio_float")))
    draw(args.out)
    print(f"wrote {args.out} and the plot beside it")


if __name__ == "__main__":
    main()
