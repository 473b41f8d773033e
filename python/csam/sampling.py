"""The sampling engine: a certificate whose cost falls with every pruned weight.

A certificate is thousands of forward passes of one image plus noise. `plan` readies a trained network for that: masks
and batch norms folded, dead channels removed, convolutions fused (`csam.inference`), and then, where so few weights are
left that it pays, convolutions with the samples as vector lanes, whose time is proportional to the surviving weights
(`csam_kernels.sample_conv2d`). Every thread takes its own tile of samples through all layers.

A plan is measured on the machine it is made on. What it runs is fixed from then on: its votes depend on nothing but
(plan, image, sigma, seed, stream, samples), and `choices` makes the same plan again elsewhere.
"""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn

from csam import inference, smoothing
from csam.inference import FusedConv2d
from csam.smoothing import Prepared
from csam_kernels import checks, compress

ENGINES = ("dense", "sparse")
DENSITY = 0.5  # from which a sparse convolution is not tried
TILE = 32  # samples of a tile of a network with sparse layers: one cache line of bfloat16
_ROUNDS, _SECONDS = 5, 0.1  # of timing what is compared, at least


class SampleConv2d(nn.Module):
    """A `FusedConv2d` over images whose samples lie innermost in memory, without its zero weights.

    [B, C, H, W] with strides of [C, H, W, B] goes in and comes out: elementwise operations keep that layout, so
    only neighbours of another kind cost a copy.
    """

    def __init__(self, layer: FusedConv2d) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        self.values, self.taps, self.rows = compress(weight, groups=layer.groups)
        self.bias = None if layer.bias is None else layer.bias.detach().float()
        self.geometry: Any = [list(layer.kernel_size), list(layer.stride), list(layer.padding), list(layer.dilation)]
        self.relu = layer.activation == "relu"

    def forward(self, input: Tensor, other: Tensor | None = None) -> Tensor:
        added = None if other is None else inference.lanes(other)
        weight = (self.values, self.taps, self.rows)
        run = torch.ops.csam.sample_conv2d
        out: Tensor = run(inference.lanes(input), *weight, self.bias, added, *self.geometry, self.relu)
        return out.permute(3, 0, 1, 2)


@dataclass(frozen=True)
class Layer:
    """A convolution of a plan.

    Attributes:
        name: in the prepared network.
        weight: its shape, [O, I/groups, kH, kW].
        image: (C, H, W) of its input.
        density: share of its weights that are not zero.
        gflop: operations a sample of the dense layer, a multiplication and an addition each one, / 1e9.
        dense, sparse: measured milliseconds a sample on one thread; None where it was not tried.
        engine: the one chosen.
    """

    name: str
    weight: tuple[int, ...]
    image: tuple[int, ...]
    density: float
    gflop: float
    dense: float | None = None
    sparse: float | None = None
    engine: str = "dense"


@dataclass(frozen=True)
class Plan:
    """A network ready to vote: see `plan`.

    Attributes:
        prepared: what runs; `csam.Smooth(plan.prepared, ...)` and `csam.CCCert(plan.prepared, ...)` take it.
        layers: the convolutions in the order they run.
        sample_ms: measured milliseconds a sample and thread, by candidate.
    """

    prepared: Prepared
    layers: tuple[Layer, ...]
    sample_ms: Mapping[str, float]

    @property
    def choices(self) -> dict[str, str]:
        """Layer -> engine, for `plan(..., choices=...)`."""
        return {layer.name: layer.engine for layer in self.layers}

    def votes(
        self,
        x: Tensor,
        sigma: float,
        n: int,
        seed: int = 0,
        first_sample: int = 0,
        *,
        stream: int = 0,
        batch_size: int = 400,
    ) -> Tensor:
        """Votes of samples first_sample .. first_sample + n - 1 of x + sigma * eps, int64 [K], on the CPU.

        The same for every batch size and number of threads; those of adjacent ranges add up. Arguments and errors as in
        `csam.Smooth` and its `counts`.
        """
        x = smoothing.image(x)
        sigma = checks.real("sigma", sigma, above=0)
        n = checks.integer("n", n, low=1)
        checks.seed(seed)
        return smoothing.checked(smoothing.votes(self.prepared, x, sigma, n, seed, first_sample, batch_size, stream), n)

    def explain(self) -> str:
        """A table: each layer's engine, density, operations and measured times, then what was done to the network."""
        table = Table("layer", "weight", "density", "GFLOP", "dense ms", "sparse ms", "engine")
        for layer in self.layers:
            shown = ["-" if ms is None else f"{ms:.3f}" for ms in (layer.dense, layer.sparse)]
            shape = "x".join(map(str, layer.weight))
            table.add_row(layer.name, shape, f"{layer.density:.1%}", f"{layer.gflop:.4f}", *shown, layer.engine)
        text = io.StringIO()
        console = Console(file=text, width=120)
        console.print(table)
        for step in self.prepared.steps:
            console.print(step, markup=False, highlight=False)
        times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in self.sample_ms.items())
        console.print(
            f"a sample on one thread: {times or 'not measured'}; tiles of {self.prepared.tile}", highlight=False
        )
        return text.getvalue()


def plan(
    model: nn.Module,
    example: Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    choices: Mapping[str, str] | str = "auto",
) -> Plan:
    """The fastest way, of those known here, to label noisy copies of images like `example` with `model`.

    Args:
        model: maps [B, C, H, W] pixels to logits [B, K]; masked layers count with their hard masks. It is copied.
        example: image [C, H, W].
        dtype: torch.bfloat16, float16 or float32; sparse layers need bfloat16 or float32.
        choices: "auto" measures dense and sparse convolutions, layer by layer and the whole network; "dense" or
            "sparse" (wherever fewer than half of the weights are left); or a plan's `choices`, to make that plan again.

    Raises:
        TypeError, ValueError: as `csam.Smooth`, and choices that are not of this network.
    """
    checks.choice("dtype", dtype, smoothing.DTYPES)
    example = smoothing.image(example)
    dense = smoothing.TiledClassifier(model, dtype, None).prepare(example)
    layers = _layers(dense, example.shape)
    few = {layer.name for layer in layers if layer.density < DENSITY and dtype != torch.float16}
    asked = _asked(choices, layers, few)
    sample_ms: dict[str, float] = {}
    if asked is None:
        layers = [_timed(layer, dense) if layer.name in few else layer for layer in layers]
        faster = {layer.name for layer in layers if layer.sparse and layer.dense and layer.sparse < layer.dense}
        sets = {"dense": set(), "sparse": few, "the faster of each layer": faster}
        plans = {title: _with_sparse(dense, layers, names, example.shape) for title, names in sets.items()}
        seconds = _least_seconds([(p.module, _batch(p, example.shape)) for p in plans.values()])
        sample_ms = {title: 1e3 * t / p.tile for (title, p), t in zip(plans.items(), seconds, strict=True)}
        fastest = min(sample_ms, key=sample_ms.__getitem__)
        made, asked = plans[fastest], sets[fastest]
    else:
        made = _with_sparse(dense, layers, asked, example.shape)
    engines = (replace(layer, engine="sparse" if layer.name in asked else "dense") for layer in layers)
    return Plan(made, tuple(engines), sample_ms)


def _asked(choices: Mapping[str, str] | str, layers: list[Layer], few: set[str]) -> set[str] | None:
    """The layers to run sparse; None to find out which of `few`."""
    if isinstance(choices, str):
        checks.choice("choices", choices, ("auto", *ENGINES))
        return {"auto": None if few else set(), "dense": set(), "sparse": few}[choices]
    names = {layer.name for layer in layers}
    wrong = sorted(
        {f"{name}: {engine}" for name, engine in choices.items() if name not in names or engine not in ENGINES}
    )
    wrong += [f"no {name}" for name in sorted(names - choices.keys())]
    if wrong:
        raise ValueError(f"choices must give dense or sparse for every layer of the plan, got {', '.join(wrong)}")
    return {name for name, engine in choices.items() if engine == "sparse"}


def _layers(prepared: Prepared, image: torch.Size) -> list[Layer]:
    """The fused convolutions in the order they run."""

    def remember(name: str) -> Callable[[FusedConv2d, tuple[Tensor, ...], Tensor], None]:
        def hook(module: FusedConv2d, args: tuple[Tensor, ...], out: Tensor) -> None:
            weight = module.weight
            density = float((weight != 0).double().mean())
            gflop = 2e-9 * weight.numel() * out[0, 0].numel()
            layers.append(Layer(name, tuple(weight.shape), tuple(args[0].shape[1:]), density, gflop))

        return hook

    layers: list[Layer] = []
    named = [(name, m) for name, m in prepared.module.named_modules() if isinstance(m, FusedConv2d)]
    hooks = [module.register_forward_hook(remember(name)) for name, module in named]
    with torch.inference_mode():
        prepared.module(_batch(prepared, image))
    for hook in hooks:
        hook.remove()
    return layers


def _with_sparse(prepared: Prepared, layers: list[Layer], names: set[str], image: torch.Size) -> Prepared:
    """The network with the named ones of its layers sparse."""
    if not names:
        return prepared
    module = copy.deepcopy(prepared.module)
    assert isinstance(module, fx.GraphModule)
    for name in (layer.name for layer in layers if layer.name in names):
        module.set_submodule(name, SampleConv2d(module.get_submodule(name)))  # type: ignore[arg-type]
        _move_once(module, name)
    module.recompile()
    layout = torch.contiguous_format if layers[0].name in names else torch.channels_last
    steps = (*prepared.steps, f"{len(names)} of {len(layers)} convolutions sparse")
    made = replace(prepared, module=module, memory_format=layout, tile=TILE, steps=steps)
    inference.pack(module, _batch(made, image), TILE)
    return made


def _in_lanes(x: Tensor) -> Tensor:
    """The same images with the samples innermost in memory."""
    return inference.lanes(x).permute(3, 0, 1, 2)


def _move_once(module: fx.GraphModule, name: str) -> None:
    """Lay what a sparse convolution reads out anew where it is made, once for all its readers that are sparse."""
    (node,) = (n for n in module.graph.nodes if n.op == "call_module" and n.target == name)
    for source in node.args:
        if source.target is not _in_lanes:
            moved = next((user for user in source.users if user.target is _in_lanes), None)
            if moved is None:
                with module.graph.inserting_after(source):
                    moved = module.graph.call_function(_in_lanes, (source,))
            node.replace_input_with(source, moved)


def _timed(layer: Layer, prepared: Prepared) -> Layer:
    """The layer with its times in both engines."""
    dense = prepared.module.get_submodule(layer.name)
    sparse = SampleConv2d(dense)  # type: ignore[arg-type]
    batch = torch.rand(prepared.tile, *layer.image).to(prepared.dtype, memory_format=torch.channels_last)
    lanes = torch.rand(*layer.image, TILE).to(prepared.dtype).permute(3, 0, 1, 2)
    seconds = _least_seconds([(dense, batch), (sparse, lanes)])
    return replace(layer, dense=1e3 * seconds[0] / len(batch), sparse=1e3 * seconds[1] / len(lanes))


def _batch(prepared: Prepared, image: torch.Size) -> Tensor:
    """A tile of inputs as the network gets them."""
    return inference.laid_out(torch.rand(prepared.tile, *image).to(prepared.dtype), prepared.memory_format)


def _least_seconds(calls: list[tuple[Callable[[Tensor], Any], Tensor]]) -> list[float]:
    """The least time of each call over rounds of all of them, on one thread, as a tile is run."""
    times: list[list[float]] = [[] for _ in calls]

    def measure(_: int) -> None:
        for run, x in calls:
            run(x)
        while len(times[0]) < _ROUNDS or sum(map(sum, times)) < _SECONDS:
            for (run, x), mine in zip(calls, times, strict=True):
                start = time.perf_counter()
                run(x)
                mine.append(time.perf_counter() - start)

    smoothing.run_tiles(measure, [0], 1)
    return [min(mine) for mine in times]
