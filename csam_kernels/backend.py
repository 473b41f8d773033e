"""Who serves a call, and why not the others.

A provider is a module with one function an operation, named as the operation. `CSAM_BACKEND` forces one
(`cpu`, `cuda`, `triton` or `reference`); otherwise the first provider that has the operation and serves the device is
taken. The reference is never taken unasked, but for what no provider can do (`plain`): it would be a silent loss of
speed. Under `TRITON_INTERPRET=1` the triton provider serves CPU tensors, on request only, through Triton's interpreter.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, cuda, device
from torch.autograd import forward_ad

PROVIDERS = ("cpu", "cuda", "triton", "reference")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_UNASKED = ("cpu", "cuda") if INTERPRETED else ("cpu", "cuda", "triton")
_DEVICE = {"cpu": "cpu", "cuda": "cuda", "triton": "cpu" if INTERPRETED else "cuda"}
_ON_HOST = ("philox_uniform",)  # takes no tensor and gives one on the CPU, whoever is forced for the rest
_MISSING = {
    "cpu": "csam_kernels._C does not load ({}); build it with `pip install .` (needs g++)",
    "cuda": "csam_kernels._CUDA does not load ({}); it is built by `pip install .` where nvcc is found",
    "triton": "Triton does not import ({}); `pip install triton` brings it",
}


class BackendUnavailable(RuntimeError):
    """No provider can serve the call; the message says what each one lacks."""


@cache
def _load(provider: str) -> tuple[ModuleType | None, str]:
    """The provider's module, or None and the reason in words."""
    try:
        return importlib.import_module(f"csam_kernels.{provider}"), ""
    except ImportError as error:
        return None, _MISSING.get(provider, "{}").format(error)


@cache
def cpu_build() -> str:
    """16 hex digits of the CPU kernels' binary: what was measured with others says nothing of these."""
    binary = importlib.import_module("csam_kernels._C").__file__
    with open(str(binary), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def instruction_set() -> str:
    """The one whose CPU kernels run, or why there are none."""
    module, reason = _load("cpu")
    return f"none: {reason}" if module is None else str(module._C.isa())


def _why_not(op: str, provider: str, where: device) -> str:
    module, reason = _load(provider)
    if module is None:
        return reason
    if provider != "reference" and where.type != _DEVICE[provider]:
        return f"serves {_DEVICE[provider]} tensors, the call is on {where}"
    if not hasattr(module, op):
        return f"has no {op}"
    return ""


def backends() -> dict[str, str]:
    """Every provider, and `"available"` or the reason why it is not."""
    return {name: _load(name)[1] or _no_device(name) or "available" for name in PROVIDERS}


def _no_device(provider: str) -> str:
    if _DEVICE.get(provider) == "cuda" and not cuda.is_available():
        return "loads, but torch sees no CUDA device (torch.cuda.is_available() is False)"
    return ""


def serve(op: str, where: device) -> Callable[..., Any]:
    """The function that serves `op` for tensors on `where`.

    Raises:
        ValueError: `CSAM_BACKEND` names no provider.
        BackendUnavailable: nothing can serve the device, or the forced provider cannot.
    """
    return _function(op, os.environ.get("CSAM_BACKEND", ""), where)


@cache
def _function(op: str, forced: str, where: device) -> Callable[..., Any]:
    asked = _asked(op, forced)
    if taken := _first(op, asked, where):
        function: Callable[..., Any] = getattr(_load(taken)[0], op)
        return function
    message = f"{op}: " + "; ".join(f"{name}: {_why_not(op, name, where)}" for name in asked)
    if forced and (free := _first(op, _UNASKED, where)):
        message += f"; unset CSAM_BACKEND={forced}, and {free} serves it"
    raise BackendUnavailable(message)


def _asked(op: str, forced: str) -> tuple[str, ...]:
    """The providers that may serve `op`, the one to prefer first."""
    if forced and forced not in PROVIDERS:
        raise ValueError(f"CSAM_BACKEND must be one of {', '.join(PROVIDERS)}, got {forced!r}")
    if op in _ON_HOST and _DEVICE.get(forced) == "cuda":
        return ("cpu",)
    return (forced,) if forced else _UNASKED


def _first(op: str, providers: tuple[str, ...], where: device) -> str:
    """The first that serves, or none: those after it are not imported."""
    return next((name for name in providers if not _why_not(op, name, where)), "")


def plain(op: str) -> Callable[..., Any] | None:
    """The reference of `op` under a transform of torch.func or in forward-mode AD, None elsewhere.

    They see through torch's own operators alone: a custom one has no tangent, which jvp takes for zero in silence.
    """
    if not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0:
        return None
    function: Callable[..., Any] = getattr(importlib.import_module("csam_kernels.reference"), op)
    return function


def explain(op: str, *args: Any) -> str:
    """Who would serve `op` on these arguments, and why the others would not; one line a provider.

    Raises:
        ValueError: `op` is not an operation of this library, or `CSAM_BACKEND` names no provider.
    """
    import csam_kernels

    if op not in csam_kernels.OPERATIONS:
        raise ValueError(f"op must be one of {', '.join(csam_kernels.OPERATIONS)}, got {op!r}")
    where = next((t.device for t in _tensors(args)), device("cpu"))
    forced = os.environ.get("CSAM_BACKEND", "")
    asked = _asked(op, forced)
    lines, taken = [], _first(op, asked, where)
    for name in PROVIDERS:
        unasked = f"CSAM_BACKEND={forced}" if forced else f"only on request (CSAM_BACKEND={name})"
        reason = _why_not(op, name, where) or ("an earlier provider serves the call" if name in asked else unasked)
        lines.append(f"{name}: {'serves ' + op if name == taken else 'no, ' + reason}")
    return "\n".join(lines)


def _tensors(args: Any) -> list[Tensor]:
    if isinstance(args, Tensor):
        return [args]
    if isinstance(args, (list, tuple)):
        return [t for a in args for t in _tensors(a)]
    return []
