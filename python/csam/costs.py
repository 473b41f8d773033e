"""What arithmetic takes on this machine: measured once and kept, so that every process and every later run agree."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import nn

from csam.data import cache as folders
from csam.inference import FusedConv2d, onednn
from csam.quantization import quantize
from csam.runs import processor, write_atomic
from csam.threads import one_intra_op_thread
from csam_kernels import backend, compress, sample_network
from csam_kernels.ops.sample_network import Program, Step, Value, step_costs

_CHANNELS, _FEW, _SIZE, _TILE, _DENSITY = 64, 16, 16, 64, 0.5  # of what is measured: a layer in the middle of a ResNet
_TURNS, _PAUSE = 20, 0.05  # seconds
_MEASURED: dict[str, dict[str, float]] = {}  # in this process, that says the same again though nothing can be kept
_PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
_RATED = ("sparse", "dense")  # Winograd's costs are in units of the dense loop


@dataclass(frozen=True)
class Rates:
    """What this machine takes on one thread.

    Attributes:
        sparse, dense: nanoseconds of a vector's multiply-add in a step of that kind.
        module, narrow: a multiply-add in torch's own convolution (oneDNN) takes module + narrow / channels nanoseconds,
            where channels is the lesser of a group's inputs and its filters; 0 in int8, which torch is not asked for.
    """

    sparse: float
    dense: float
    module: float
    narrow: float


@cache
def rates(dtype: torch.dtype) -> Rates:
    """The machine's rates, measured in one to two seconds; kept as by `kept`."""
    about = (str(dtype), [step_costs(_layer(engine, dtype), dtype) for engine in _RATED])
    names = {field.name for field in fields(Rates)}

    def valid(found: dict[str, float]) -> bool:
        return found.keys() == names and found["sparse"] > 0 and found["dense"] > 0

    return Rates(**kept("rates", about, lambda: asdict(_measured(dtype)), valid))


def kept(
    name: str, about: object, measure: Callable[[], dict[str, float]], valid: Callable[[dict[str, float]], bool]
) -> dict[str, float]:
    """What `measure` finds, times >= 0 by name: measured once a machine and kept in the cache folder (`CSAM_CACHE`).

    Of several processes that ask at once one measures while the others wait, and all use what it found. Where there is
    no such folder, or none that can be written, every process measures for itself.

    Args:
        about: what the times depend on besides processor, torch and our kernels; by its repr.
        valid: whether what a file holds is what `measure` would give.
    """
    key = repr((processor(), torch.__version__, backend.cpu_build(), about))
    try:
        file = folders.folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        found = _read(file, valid)
        if found is not None:
            return found
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.with_suffix(".lock").open("w")
    except OSError:
        return _measured_here(name + key, measure)
    with lock:
        with suppress(OSError):  # a file system without locks: the last one to measure wins
            fcntl.flock(lock, fcntl.LOCK_EX)
        found = _read(file, valid)
        if found is None and str(file) not in _MEASURED:
            found = measure()
            try:
                write_atomic(file, json.dumps(found))
            except OSError:
                _MEASURED[str(file)] = found
    return found or _MEASURED[str(file)]


def _measured_here(key: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    if key not in _MEASURED:
        _MEASURED[key] = measure()
    return _MEASURED[key]


def _read(file: os.PathLike[str], valid: Callable[[dict[str, float]], bool]) -> dict[str, float] | None:
    """Times that were kept; None for what is not there, or no such times."""
    try:
        with open(file) as stream:
            found = {str(name): float(value) for name, value in json.load(stream).items()}
    except (OSError, ValueError, TypeError, AttributeError, OverflowError):
        return None
    return found if all(value >= 0 and math.isfinite(value) for value in found.values()) and valid(found) else None


def _layer(engine: str, dtype: torch.dtype) -> Program:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_CHANNELS, _CHANNELS, 3, 3, generator=generator, **_PLAIN)
    if engine == "sparse":
        weight *= torch.rand(weight.shape, generator=generator, **_PLAIN) < _DENSITY
    image, out, logits = Value(_CHANNELS, _SIZE, _SIZE), Value(_CHANNELS, _SIZE, _SIZE), Value(1, 1, 1)
    one = compress(torch.ones(1, 1, 1, 1, **_PLAIN))
    corner = Step(out, logits, weight=(one[0], one[1], one[2]), stride=(_SIZE, _SIZE))
    layer = Step(image, out, weight=compress(weight), kernel=(3, 3), padding=(1, 1), engine=engine)
    program = Program(image, logits, [layer, corner])
    if dtype is torch.int8:
        program = quantize(program, torch.rand(1, _CHANNELS, _SIZE, _SIZE, generator=generator, **_PLAIN))
    return program


def _measured(dtype: torch.dtype) -> Rates:
    """The least of some turns a while apart: others on the machine slow one kind more than the other, and pass."""
    measures = [_step(engine, dtype) for engine in _RATED]
    if dtype is not torch.int8:
        measures += [_convolution(channels, size, dtype) for channels, size in ((_CHANNELS, _SIZE), (_FEW, 2 * _SIZE))]
    least = [math.inf] * len(measures)
    for _ in range(_TURNS):
        least = [min(before, measure()) for before, measure in zip(least, measures, strict=True)]
        time.sleep(_PAUSE)
    sparse, dense, *convolutions = least
    if not convolutions:
        return Rates(sparse, dense, 0.0, 0.0)
    wide, few = convolutions
    narrow = max(0.0, (few - wide) / (1 / _FEW - 1 / _CHANNELS))
    narrow = min(narrow, wide * _CHANNELS)  # no layer takes less than nothing
    return Rates(sparse, dense, max(0.0, wide - narrow / _CHANNELS), narrow)


def _step(engine: str, dtype: torch.dtype) -> Callable[[], float]:
    """Nanoseconds of a vector's multiply-add in a step of that kind."""
    program = _layer(engine, dtype)
    network, cost = sample_network(program, dtype), step_costs(program, dtype)[0]
    return lambda: 1e6 * network.times(1)[0] / cost


def _convolution(channels: int, size: int, dtype: torch.dtype) -> Callable[[], float]:
    """Nanoseconds of a multiply-add in torch's convolution, as the sampling engine calls it."""
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay what they were
        layer: nn.Conv2d = nn.Conv2d(channels, channels, 3, padding=1, **_PLAIN)
    if onednn(dtype):
        layer = FusedConv2d.of(layer, (), "relu")
    layer = layer.to(dtype)
    x = torch.full((_TILE, channels, size, size), 0.5, **_PLAIN).to(dtype).contiguous(memory_format=torch.channels_last)
    if isinstance(layer, FusedConv2d):
        layer.pack(tuple(x.shape))
    return lambda: 1e6 * least_ms(lambda: layer(x), 1) / (_TILE * layer.weight.numel() * size * size)


def least_ms(run: Callable[[], object], rounds: int) -> float:
    """The least milliseconds of processor time that a call took, on a thread of its own and without others."""

    def measured() -> float:
        least = math.inf
        with torch.inference_mode():
            for _ in range(rounds):
                start = time.thread_time()
                run()
                least = min(least, time.thread_time() - start)
        return 1e3 * least

    with ThreadPoolExecutor(1, "csam-costs", initializer=one_intra_op_thread) as pool:
        return pool.submit(measured).result()


__all__ = ["Rates", "kept", "least_ms", "rates"]
