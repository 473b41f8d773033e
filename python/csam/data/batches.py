"""The python and the binary batches of CIFAR-10 (Krizhevsky 2009): an image is planes R, G, B of 32x32 bytes."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

IMAGE_BYTES = 3 * 32 * 32
CLASSES = 10


def parse_binary(content: bytes, label: str) -> tuple[Tensor, Tensor]:
    """Records of one label byte and one image -> (uint8 [N, 3, 32, 32], int64 [N]).

    Raises:
        ValueError: no whole number of records, or a label above 9; `label` names the file.
    """
    record = 1 + IMAGE_BYTES
    if not content or len(content) % record:
        raise ValueError(
            f"{label} is truncated or foreign: it must hold whole records of {record} bytes, got {len(content)} bytes"
        )
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, record)
    return _checked(rows[:, 1:], rows[:, 0].to(torch.int64), label)


def parse_python(content: bytes, label: str) -> tuple[Tensor, Tensor]:
    """A pickled dict of `data` (uint8 [N, 3072]) and `labels` -> (uint8 [N, 3, 32, 32], int64 [N]).

    Only numpy arrays and plain values are unpickled; anything else is refused before it is called.

    Raises:
        ValueError: an unsafe, truncated or foreign pickle; `label` names the file.
    """
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{label} is not a whole and safe python batch: {error}") from error
    fields = {_text(key): value for key, value in batch.items()} if isinstance(batch, dict) else {}
    data, labels = fields.get("data"), fields.get("labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (IMAGE_BYTES,):
        raise ValueError(f"{label} must hold 'data', uint8 [N, {IMAGE_BYTES}], got {_describe(data)}")
    if not _are_labels(labels) or len(labels) != len(data):
        raise ValueError(f"{label} must hold 'labels', {len(data)} integers 0..{CLASSES - 1}, got {_describe(labels)}")
    return _checked(torch.from_numpy(data.copy()), torch.tensor(np.asarray(labels, dtype=np.int64)), label)


def _checked(pixels: Tensor, y: Tensor, label: str) -> tuple[Tensor, Tensor]:
    if not len(y):
        raise ValueError(f"{label} must hold at least one image, got none")
    if int(y.min()) < 0 or int(y.max()) >= CLASSES:
        raise ValueError(f"{label} must hold labels 0..{CLASSES - 1}, got {int(y.min())}..{int(y.max())}")
    return pixels.reshape(-1, 3, 32, 32).contiguous(), y


def _are_labels(labels: Any) -> TypeGuard[Sequence[int]]:
    if isinstance(labels, np.ndarray):
        return labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    return isinstance(labels, list) and all(type(value) is int and value in range(CLASSES) for value in labels)


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"a list of {len(value)}" if isinstance(value, list) else type(value).__name__


def _text(key: Any) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """What protocols 0..2 call to write bytes; no other codec is offered."""
    return text.encode("latin1")


def _frombuffer(buffer: Any, dtype: np.dtype[Any], shape: Any, order: Any) -> np.ndarray[Any, Any]:
    """What protocol 5 calls to write an array."""
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


_RECONSTRUCT: Any = np.empty(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _RECONSTRUCT for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}


class _ArrayUnpickler(pickle.Unpickler):
    """Restricts globals as the Python manual's "Restricting Globals" advises."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return _ALLOWED[module, name]
