"""The sampling engine, looked into: what runs when a network certifies, and why.

A certificate is thousands of forward passes of one image plus noise. `csam.Smooth` and `csam.CCCert` ready a network
for that; `plan` does the same ahead of time, for one kind of image, with a choice of how
each layer runs, and explains it. On a CPU the samples lie innermost in memory and each thread takes its own tile of
them through all layers, noise and votes included, in time proportional to the surviving weights (`csam.engine`).

What a plan runs is fixed: its votes depend on nothing but (plan, image, sigma, seed, stream, samples), and `choices`
makes the same plan again elsewhere.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from csam import engine, smoothing
from csam.engine import Choices
from csam.nn import MaskedConv2d, MaskedLinear
from csam.smoothing import Prepared
from csam_kernels import checks
from csam_kernels.laws import checked_law


@dataclass(frozen=True)
class Layer:
    """A layer of a plan whose samples lie innermost.

    Attributes:
        name: of its node in the traced network.
        weight: what is alive of it, (filters, channels, kH, kW).
        image: (C, H, W) of its input.
        density: share of that which is not zero.
        gflop: operations a sample on the surviving weights, a multiplication and an addition each one, / 1e9.
        predicted: milliseconds a sample on one thread, by the cost model.
        engine: "dense", "sparse" or "winograd", of `csam_kernels.ops.sample_network.Step`.
    """

    name: str
    weight: tuple[int, ...]
    image: tuple[int, ...]
    density: float
    gflop: float
    predicted: float
    engine: str


@dataclass(frozen=True)
class Plan:
    """A network ready to vote: see `plan`.

    Attributes:
        prepared: what runs; `csam.Smooth(plan.prepared, ...)` and `csam.CCCert(plan.prepared, ...)` take it,
            the latter but in int8, which `plan` calibrates on noise.
        layers: in the order they run; empty where torch runs the network.
        model: that was planned.
        made_of: its parameters and buffers then, with their versions.
    """

    prepared: Prepared
    layers: tuple[Layer, ...]
    model: nn.Module = field(repr=False)
    made_of: Sequence[smoothing.Version] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "made_of", smoothing.versions(self.model))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are of the model too, whose tensors begin to count anew."""
        self._refuse_changed()
        return Plan, (self.prepared, self.layers, self.model)

    @property
    def choices(self) -> dict[str, str] | str:
        """For `plan(..., choices=...)`: layer -> engine, or "module"."""
        return {layer.name: layer.engine for layer in self.layers} or "module"

    @property
    def memory(self) -> int | None:
        """Bytes that a thread takes while it votes; None where torch runs the network, which does not say."""
        return None if self.prepared.sampler is None else self.prepared.sampler.memory

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
        noise: str = "gaussian",
    ) -> Tensor:
        """Votes of samples first_sample .. first_sample + n - 1 of x + sigma * eps, int64 [K], on the CPU.

        The same for every batch size and number of threads; those of adjacent ranges add up. Arguments and errors as in
        `csam.Smooth` and its `counts`. What was planned is the model as it was: a change through `.data` or of a plain
        attribute (eps, stride) neither counts nor is noticed; plan again then.

        Raises:
            ValueError: a parameter, buffer or mask of the model has changed or been replaced since it was planned, as
                far as torch's version counters show.
        """
        self._refuse_changed()
        x = smoothing.image(x)
        sigma, noise = checks.real("sigma", sigma, above=0), checked_law("noise", noise)
        self.prepared.refuse_uncalibrated(smoothing.noisy_words(sigma, noise))
        n = checks.integer("n", n, low=1)
        checks.seed(seed)
        where = (first_sample, batch_size, stream, None, noise)
        found = smoothing.votes(self.prepared, x, sigma, n, seed, *where)
        return smoothing.checked(smoothing.read(x.to(found.device), [found])[0], n)

    def _refuse_changed(self) -> None:
        if not smoothing.unchanged(self.made_of, smoothing.versions(self.model)):
            raise ValueError("the plan's model has changed since it was planned (a weight or a mask): plan it again")

    def explain(self) -> str:
        """A table: each layer's engine, density, operations, predicted and measured time; what was done to the network,
        and why torch runs it if it does. Measures for some ten tiles."""
        text = io.StringIO()
        console = Console(file=text, width=120)
        sampler = self.prepared.sampler
        if sampler is not None:
            times = sampler.times(_ROUNDS)
            measured = [t for step, t in zip(sampler.program.steps, times, strict=True) if step.weight is not None]
            table = Table("layer", "weight", "engine")
            for heading in ("density", "MFLOP", "predicted us", "measured us"):
                table.add_column(heading, justify="right")
            for layer, ms in zip(self.layers, measured, strict=True):
                numbers = f"{layer.density:.1%}", *(_digits(1e3 * v) for v in (layer.gflop, layer.predicted, ms))
                table.add_row(layer.name, "x".join(map(str, layer.weight)), layer.engine, *numbers)
            console.print(table)
            console.print(
                f"a sample on one thread: {sum(layer.predicted for layer in self.layers):.3f} ms predicted, "
                f"{sum(times):.3f} measured; {sampler.lanes} samples a tile, {sampler.memory / 2**20:.1f} MiB a "
                f"thread; fingerprint {sampler.fingerprint}",
                highlight=False,
                soft_wrap=True,
            )
        for step in self.prepared.steps:
            console.print(step, markup=False, highlight=False, soft_wrap=True)
        return text.getvalue()


_ROUNDS = 5  # tiles to time; the least of each step counts


def _digits(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:#.3g}".removesuffix(".") if value < 999.5 else f"{value:,.0f}"


def plan(
    model: nn.Module,
    example: Tensor,
    *,
    dtype: torch.dtype | str = torch.bfloat16,
    choices: Choices = "auto",
    sigma: float | None = None,
    noise: str = "gaussian",
    memory: int | None = None,
) -> Plan:
    """What `csam.Smooth(model, ..., dtype=dtype)` runs on images like `example`, or another choice of it.

    With dtype "int8" the network is quantised (`csam.quantization`): calibrated on the examples with noise of `sigma`,
    and to be used with that sigma and no other. What is certified is then the quantised network.

    Args:
        model: maps [B, C, H, W] pixels to logits [B, K], in eval mode; masked layers run with their hard masks, and
            soft ones are refused. It is copied.
        example: image [C, H, W]; or images [N, C, H, W], all of which calibrate int8.
        dtype: torch.bfloat16, float16 or float32, or its name; or "int8".
        choices: "auto" takes what is predicted, or of two that are close measured, to be fastest; "module" leaves all
            layers to torch; "dense", "sparse" or "winograd" (dense where that does not go) is for all layers; or a
            plan's `choices`, to make that plan again.
        sigma: of the noise of the calibration, > 0; for "int8" alone.
        noise: its law, as in `csam.Smooth`.
        memory: bytes that voting may take for values and sums, all threads together; fewer threads run if need be.
            Calibration of int8, which is over before, takes its own (`csam.quantization`).

    Raises:
        TypeError, ValueError: as `csam.Smooth`; a model in train mode or with weights that are NaN or inf, but for -inf
            in a bias or a constant of the model's own, which keeps a class from winning; choices that are not of this
            network; a limit of memory below what one thread takes, or on a network that torch runs;
            int8 without sigma or of a network that has no such steps.
    """
    dtype = checks.choice("dtype", smoothing.named_dtype(dtype), (*smoothing.DTYPES, torch.int8))
    engine.checked_choices(choices)
    if (dtype is torch.int8) != (sigma is not None):
        raise ValueError(f"sigma must be given for dtype 'int8', calibrated with it, and for no other, got {sigma}")
    memory = None if memory is None else checks.integer("memory", memory, low=1)
    examples = checks.tensor("example", example)
    examples = examples[None] if examples.dim() == 3 else examples
    image = smoothing.image(examples[0] if examples.dim() == 4 and len(examples) else examples, name="example")
    _check(model)
    before = smoothing.versions(model)
    noise = checked_law("noise", noise)
    shown = None if sigma is None else smoothing.noisy("example", examples, checks.real("sigma", sigma, above=0), noise)
    prepared = smoothing.TiledClassifier(model, dtype, None, choices, shown).prepare(image)
    if prepared.sampler is None and (memory is not None or not isinstance(choices, str)):
        asked = "choices" if memory is None else "memory"
        raise ValueError(f"{asked} needs a network whose samples lie innermost: {prepared.steps[-1]}")
    if memory is not None:
        prepared = _bounded(prepared, memory)
    made = Plan(prepared, tuple(_layers(prepared)), model)
    if not smoothing.unchanged(before, made.made_of):
        raise ValueError("model must not change while it is planned (a weight or a mask did): plan it again")
    return made


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if any(module.training for module in model.modules()):
        raise ValueError("model must be in eval mode, got one in train mode; call model.eval() first")
    check_finite(model)


def check_finite(model: nn.Module, buffers: bool = True) -> None:
    """Raise ValueError naming a weight or buffer that is NaN or inf, or has no values; what masks a class may be -inf.

    Without `buffers` those of layers of one's own are left out: nobody knows what they are for.
    """
    smoothing.refuse_meta(model)
    for prefix, module in model.named_modules():
        layer = type(module).__module__.startswith("torch.nn") or isinstance(module, MaskedConv2d | MaskedLinear)
        kept = module.named_buffers(recurse=False) if layer or buffers else ()
        for name, tensor in (*module.named_parameters(recurse=False), *kept):
            masks = name == "bias" or not layer  # a class that cannot win has -inf added to its logit
            if tensor.is_floating_point() and not bool(_finite(tensor.detach().float(), masks).all()):
                raise ValueError(
                    f"model must have finite weights, got NaN or inf in {f'{prefix}.{name}' if prefix else name}"
                )


def _finite(tensor: Tensor, masks: bool) -> Tensor:
    return tensor.isfinite() | (tensor == -torch.inf) if masks else tensor.isfinite()


def _layers(prepared: Prepared) -> list[Layer]:
    if prepared.sampler is None:
        return []
    program = prepared.sampler.program
    layers = []
    for step, ms in zip(program.steps, engine.milliseconds(program, prepared.sampler.dtype), strict=True):
        if step.weight is None:
            continue
        values, taps, rows = step.weight
        area = step.kernel[0] * step.kernel[1]
        shape = (int((rows.diff() > 0).sum()), len((taps // area).unique()), *step.kernel)
        density = len(values) / max(1, shape[0] * shape[1] * area)
        image = (step.input.channels, step.input.height, step.input.width)
        gflop = 2e-9 * len(values) * step.out.height * step.out.width
        layers.append(Layer(step.name, shape, image, density, gflop, ms, step.engine))
    return layers


def _bounded(prepared: Prepared, memory: int) -> Prepared:
    assert prepared.sampler is not None
    threads = memory // prepared.sampler.memory
    if not threads:
        raise ValueError(f"memory must be at least the {prepared.sampler.memory} bytes of one thread, got {memory}")
    return replace(prepared, threads=threads)


__all__ = ["Choices", "Layer", "Plan", "plan"]
