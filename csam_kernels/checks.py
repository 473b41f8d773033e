"""Argument checks shared by the public operations: every message names the argument, what came, what would do."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

WORD = 2**64 - 1  # of a seed, which operators' schemas carry as an int64 and kernels take unsigned
_MOST = 2**63 - 1  # of an int64
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dense(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}; call .to_dense()")
    return value


def tensor(name: str, value: Any, *, dtypes: Sequence[torch.dtype] = FLOATS, ndim: int | None = None) -> Tensor:
    dense(name, value)
    if value.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must have dtype {allowed}, got {str(value.dtype).removeprefix('torch.')}")
    if ndim is not None and value.dim() != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(value.shape)}")
    return value


def tensors(name: str, value: Any, **kwargs: Any) -> list[Tensor]:
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list of tensors, got {type(value).__name__}")
    return [tensor(f"{name}[{i}]", t, **kwargs) for i, t in enumerate(value)]


def vector(name: str, value: Any, length: int, *, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """Refuse what is given and is no tensor [length]."""
    if value is not None and tensor(name, value, dtypes=dtypes).shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), got {tuple(value.shape)}")


def same_length(**lists: Sequence[Any]) -> None:
    if len({len(v) for v in lists.values()}) > 1:
        sizes = ", ".join(f"len({k})={len(v)}" for k, v in lists.items())
        raise ValueError(f"lists must have one entry a layer and equal length, got {sizes}")


def no_float64(**named: Tensor | Sequence[Tensor]) -> None:
    """Refuse what the GPU kernels of an operation have no arithmetic for."""
    for name, value in named.items():
        group = {name: value} if isinstance(value, Tensor) else {f"{name}[{i}]": t for i, t in enumerate(value)}
        for which, t in group.items():
            if t.dtype is torch.float64:
                raise TypeError(
                    f"{which} must not be float64 on a GPU: use float32, move all tensors to the CPU, or set "
                    "CSAM_BACKEND=reference"
                )


def same_device(**named: Tensor | Sequence[Tensor] | None) -> torch.device:
    found: dict[torch.device, str] = {}
    for name, value in named.items():
        group = [value] if isinstance(value, Tensor) else (value or [])
        for t in group:
            found.setdefault(t.device, name)
    if len(found) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in found.items())
        raise ValueError(f"all tensors must be on one device, got {where}")
    return next(iter(found), torch.device("cpu"))


def choice(name: str, value: Any, options: Sequence[Any]) -> Any:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def integer(name: str, value: Any, *, low: int, high: int = _MOST) -> int:
    try:
        if _is_truth(value):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not low <= number <= high:
        wanted = f">= {low}" if number < low and high == _MOST else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {wanted}, got {number}")
    return number


def real(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> float:
    """A finite number, > above or >= least, and < below or <= most."""
    try:
        if _is_truth(value) or isinstance(value, str | bytes):
            raise TypeError
        value = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    except OverflowError:
        raise ValueError(f"{name} must be finite in float64, got an integer that is not") from None
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    low, high = least if above is None else above, most if below is None else below
    if value in (above, below) or (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{name} must be {_range(low, high, above is not None, below is not None)}, got {value:g}")
    return value


def _range(low: float | None, high: float | None, above: bool, below: bool) -> str:
    if high is None:
        return f"{'>' if above else '>='} {low:g}"
    if low is None:
        return f"{'<' if below else '<='} {high:g}"
    return f"in {'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}"


def _is_truth(value: Any) -> bool:
    """Whether it is True or False, numpy's and torch's too, which Python would take for 1 or 0."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def sparsity(value: Any) -> float:
    return real("sparsity", value, least=0, below=1)


def seed(value: Any) -> int:
    """A seed of 0..2^64-1."""
    return integer("seed", value, low=0, high=WORD)


def signed(value: Any) -> int:
    """A seed as the int64 that operators' schemas carry."""
    value = seed(value)
    return value - 2**64 if value > _MOST else value


def block_size(value: Any) -> int:
    """Weights under one value of a mask, 0 where it has the weight's axes (None)."""
    return 0 if value is None else integer("block_size", value, low=1)


def mask_for(name: str, mask: Any, weight: Tensor, block_size: int) -> Tensor:
    """A mask that lies over the weight: broadcastable of equal rank, or [O, ceil(cols/n)] with block_size=n."""
    mask = tensor(name, mask, dtypes=(torch.bool, *FLOATS))
    shape, target = tuple(mask.shape), tuple(weight.shape)
    if block_size:
        want = (*target[:1], math.ceil(math.prod(target[1:]) / block_size))
        if shape != want:
            raise ValueError(f"{name} must have shape {want} with block_size={block_size}, got {shape}")
    elif len(shape) != len(target) or any(m not in (1, w) for m, w in zip(shape, target, strict=True)):
        raise ValueError(f"{name} must broadcast to the weight's shape {target} axis by axis, got {shape}")
    return mask
