"""The sampling engine: which network runs on samples that lie innermost, and which way each of its layers.

A network is lowered to steps (`csam.lanes`), checked against the network itself, and every step runs the way that the
cost model (`csam.costs`) says is fastest, or of two that it takes for about as fast the one that was measured to be:
sparse, in time proportional to the surviving weights; dense, filters sharing what they load; or dense after Winograd's
transform, with half to a quarter of the multiplications. Where torch's own convolutions are predicted to be faster
still, the network is left to them. Where torch.fx cannot trace a network, or traces what has no steps, torch.export is
asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from csam import lanes
from csam.aliases import Aliased, settled
from csam.costs import kept, least_ms, rates
from csam.inference import moved_by, trace
from csam_kernels import checks, sample_network
from csam_kernels.ops.sample_conv2d import DTYPES
from csam_kernels.ops.sample_network import ENGINES, Program, SampleNetwork, Step, step_costs, winograd_tile

Choices = Mapping[str, str] | str
_ROUNDS = 3
_CLOSE = 1.5  # of a predicted time: another that is less may be the faster one
_SHARE, _LEAST_MS = 0.05, 0.01  # of such layers in a sample's time, and of that, from which it pays to measure them
_TIMED_MS, _MOST_ROUNDS = 5.0, 10  # of a sample: how many tiles of each way are timed


class Rival(NamedTuple):
    """A call by which torch labels a tile of noise: so many images, in a memory format."""

    label: Callable[[], object]
    tile: int
    layout: torch.memory_format


def ready(
    network: nn.Module,
    probe: Tensor,
    wanted: Tensor,
    dtype: torch.dtype,
    choices: Choices = "auto",
    rival: Rival | None = None,
    quantized: Callable[[Program], Program] | None = None,
) -> tuple[SampleNetwork | None, str]:
    """The network on samples that lie innermost, or None; and in words what was decided and why.

    Args:
        network: folded, in its own dtype.
        probe: images [B, C, H, W]; wanted: the network's logits on them.
        choices: "auto", by predicted times, and by measured ones where these are close; "module" for torch's own;
            "sparse", "dense", "winograd" (dense where that is not offered), or layer -> one of these.
        rival: how torch would run it. Where that is predicted to be faster, both are measured, once a machine and
            architecture.
        quantized: gives the program in int8; for dtype torch.int8, which torch is not asked for.

    Raises:
        ValueError: choices that are not of this network.
    """
    if choices == "module" or dtype not in (*DTYPES, torch.int8):
        return None, f"run by torch: {'as chosen' if choices == 'module' else f'{dtype} is not offered otherwise'}"
    program, gone, reason = _lowered(network, probe, wanted)
    if program is None:
        return None, f"run by torch: {reason}"
    if quantized is not None:
        program = quantized(program)
    lanes.join(program)
    choose(program, dtype, choices)
    if dtype is torch.bfloat16:
        lanes.balance(program)
    made = sample_network(program, dtype)
    layers = [step for step in program.steps if step.weight is not None]
    kinds = [step.engine for step in layers]
    split = ", ".join(f"{kinds.count(engine)} {engine}" for engine in ENGINES if engine in kinds)
    step = f"samples innermost: layers {split}; {gone} dead values of a sample removed"
    if choices != "auto" or dtype is torch.int8:
        return made, step
    ours, torchs, how = sum(milliseconds(program, dtype)), module_ms(network, probe, dtype), "predicted"
    if torchs < ours and rival is not None:
        ours, torchs, how = *_raced(made, probe[0], rival), "measured"
    if ours <= torchs:
        return made, step
    return None, f"run by torch, which is faster: {torchs:.3f} ms a sample {how}, {ours:.3f} with samples innermost"


def _lowered(network: nn.Module, probe: Tensor, wanted: Tensor) -> tuple[Program | None, int, str]:
    """The simplified program of the network, and how many values of a sample are gone; or None, and why.

    The reason is that of the trace that came further: a step that is missing, if there is a trace at all.
    """
    reasons = []
    for made in (lambda: _traced(network), lambda: lanes.exported(network, probe)):
        try:
            program = lanes.lower(settled(made(), probe), probe.shape[1:])
            gone = lanes.simplify(program)
            moved = moved_by(sample_network(program, torch.float32).logits(probe), wanted)
        except Exception as error:  # tracing runs the model's own code on proxies: it may raise anything
            reasons.append((isinstance(error, lanes.NotLowered | Aliased), _told(error)))
            continue
        if not moved:
            return program, gone, ""
        reasons.append((True, f"in steps the logits would move by {moved:.2g}"))
    return None, 0, max(reversed(reasons), key=lambda found: found[0])[1]


def _told(error: Exception) -> str:
    """The first line of what an error says, or the model's line whose outcome hangs on values."""
    _, _, place = str(error).partition("The following call raised this error:\n")  # of torch.export
    if place and type(error).__name__ == "GuardOnDataDependentSymNode":
        return f"control flow depends on values: {' '.join(map(str.strip, place.splitlines()[:2]))}"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _traced(network: nn.Module) -> fx.GraphModule:
    return network if isinstance(network, fx.GraphModule) else trace(network)


def _raced(network: SampleNetwork, x: Tensor, rival: Rival) -> tuple[float, float]:
    """Measured milliseconds a noisy sample of x by the network and by torch, on one thread."""

    def measure() -> dict[str, float]:
        tile, pixels = network.lanes, x.float()
        ours = least_ms(lambda: network.votes(pixels, 1.0, tile, seed=0), _ROUNDS) / tile
        return {"ours": ours, "torch": least_ms(rival.label, _ROUNDS) / rival.tile}

    steps = [(s.out.channels, s.out.height, s.out.width, s.kernel, s.stride, s.engine) for s in network.program.steps]
    costs = [round(cost) for cost in step_costs(network.program, network.dtype)]
    about = (str(network.dtype), network.shape, steps, costs, rival.tile, str(rival.layout))
    found = kept("race", about, measure, lambda times: times.keys() == {"ours", "torch"})
    return found["ours"], found["torch"]


def checked_choices(choices: Choices) -> Choices:
    """The choices, as far as they can be told without a network.

    Raises:
        TypeError, ValueError: neither a name nor a mapping, or another name.
    """
    if isinstance(choices, str):
        checks.choice("choices", choices, ("auto", "module", *ENGINES))
    elif not isinstance(choices, Mapping):
        raise TypeError(f"choices must be a name or layer -> {', '.join(ENGINES)}, got {type(choices).__name__}")
    return choices


def choose(program: Program, dtype: torch.dtype, choices: Choices) -> None:
    """Set every step's kind: the one that is fastest here (`_fastest`), or as chosen by name.

    Raises:
        TypeError, ValueError: as in `checked_choices`, and choices that are not of this network.
    """
    choices = checked_choices(choices)
    layers = [step for step in program.steps if step.weight is not None]
    if choices == "auto":
        choices = _fastest(program, layers, dtype)
    if isinstance(choices, str):
        choices = {step.name: _nearest(choices, step, dtype) for step in layers}
    offered = {step.name: [_nearest(engine, step, dtype) for engine in ENGINES] for step in layers}
    wrong = sorted(f"{name}: {kind}" for name, kind in choices.items() if kind not in offered.get(name, ()))
    wrong += [f"no {name}" for name in sorted(offered.keys() - choices.keys())]
    if wrong:
        raise ValueError(
            f"choices must give one of {', '.join(ENGINES)} for every layer of the plan that it is offered for, got "
            f"{', '.join(wrong)}"
        )
    for step in layers:
        step.engine = choices[step.name]


class _Way(NamedTuple):
    """How a layer may run: the predicted milliseconds a sample, and the cost that they are of."""

    ms: float
    cost: float
    engine: str


def _fastest(program: Program, layers: Sequence[Step], dtype: torch.dtype) -> dict[str, str]:
    """Layer -> the engine that is predicted to be fastest; of two that are close, the one that was measured to be."""
    found: dict[Step, dict[float, _Way]] = {step: {} for step in layers}  # by time: what takes the same is the same
    for engine in ENGINES:
        for step in layers:
            step.engine = _nearest(engine, step, dtype)
        costs = step_costs(program, dtype)
        for step, ms, cost in zip(program.steps, milliseconds(program, dtype, costs), costs, strict=True):
            if step in found:
                found[step].setdefault(ms, _Way(ms, cost, step.engine))
    ways = {step: sorted(way.values()) for step, way in found.items()}
    total = sum(first.ms for first, *_ in ways.values())
    close = [(s, way[0], way[1]) for s, way in ways.items() if len(way) > 1 and way[1].ms < _CLOSE * way[0].ms]
    best = {step.name: way[0].engine for step, way in ways.items()}
    if total >= _LEAST_MS and sum(first.ms for _, first, _ in close) >= _SHARE * total:
        rounds = min(_MOST_ROUNDS, 1 + int(_TIMED_MS / total))
        best |= _timed(program, dtype, best, close, rounds)
    return best


def _timed(
    program: Program, dtype: torch.dtype, best: dict[str, str], close: Sequence[tuple[Step, _Way, _Way]], rounds: int
) -> dict[str, str]:
    """The faster one of two ways of these layers, timed within the network: once a machine and network, in which layers
    may have other weights, but about as many.
    """
    pairs = [[f"{step.name} {way.engine}" for way in both] for step, *both in close]

    def measure() -> dict[str, float]:
        networks = []
        for which in (0, 1):
            for step in program.steps:
                step.engine = best.get(step.name, step.engine)
            for step, *both in close:
                step.engine = both[which].engine
            networks.append(sample_network(program, dtype))
        times: dict[str, float] = {}
        for which in (0, 1) * rounds:
            measured = dict(zip(program.steps, networks[which].times(1), strict=True))
            for (step, *_), pair in zip(close, pairs, strict=True):
                times[pair[which]] = min(measured[step], times.get(pair[which], math.inf))
        return times

    shapes = [(s.out.channels, s.out.height, s.out.width, s.kernel, s.stride) for s in program.steps]
    about = (str(dtype), shapes, pairs, [[f"{way.cost:.2g}" for way in both] for _, *both in close])
    found = kept("layers", about, measure, lambda times: times.keys() == {name for pair in pairs for name in pair})
    faster = (min(pair, key=lambda name: found[name]) for pair in pairs)
    return dict(name.rsplit(" ", 1) for name in faster)


def _nearest(engine: str, step: Step, dtype: torch.dtype) -> str:
    """The engine, or dense where Winograd's is not offered."""
    return "dense" if engine == "winograd" and not winograd_tile(step, dtype) else engine


def milliseconds(program: Program, dtype: torch.dtype, costs: Sequence[float] | None = None) -> list[float]:
    """Predicted times a sample of the steps, on one thread; `costs` are their `step_costs` if these are known."""
    rate = rates(dtype)
    each = (rate.sparse if step.engine == "sparse" else rate.dense for step in program.steps)
    return [1e-6 * ns * cost for ns, cost in zip(each, costs or step_costs(program, dtype), strict=True)]


def module_ms(network: nn.Module, probe: Tensor, dtype: torch.dtype) -> float:
    """Predicted milliseconds a sample, on one thread, of the convolutions that torch runs for such images."""
    rate, total = rates(dtype), 0.0

    def count(layer: Any, _: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        channels = max(1, min(layer.in_channels, layer.out_channels) // layer.groups)
        total += 1e-6 * layer.weight.numel() * out[0, 0].numel() * (rate.module + rate.narrow / channels)

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, nn.Conv2d)]
    try:
        with torch.inference_mode():
            network(probe.clone())
    finally:
        for hook in hooks:
            hook.remove()
    return total


__all__ = ["ENGINES", "Choices", "choose", "milliseconds", "module_ms", "ready"]
