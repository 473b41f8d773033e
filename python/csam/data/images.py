"""Class folders of images: `train/<class>/<image>` and `test/<class>/<image>`."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from csam.data.progress import track
from csam.data.source import Source

SUFFIXES = ("jpg", "jpeg", "png", "bmp", "webp", "ppm")
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM")


def class_names(source: Source, expected: Sequence[str]) -> list[str]:
    """Sorted class folders of a source whose names are all `<split>/<class>/<image>`.

    Raises:
        ValueError: a class that only one split has, or not as many classes as `expected` (whose names serve the
            message: other names are accepted).
    """
    found: dict[str, set[str]] = {"train": set(), "test": set()}
    for name in source.names():
        split, folder, _ = name.split("/")
        found[split].add(folder)
    classes = sorted(found["train"] | found["test"])
    for split, folders in found.items():
        lacking = [name for name in classes if name not in folders]
        if lacking:
            raise ValueError(f"{source.label(f'{split}/{lacking[0]}')} must hold images, got none")
    if len(classes) != len(expected):
        lacking = [name for name in expected if name not in classes]
        raise ValueError(
            f"{source.path} must have {len(expected)} class folders, got {len(classes)} ({', '.join(classes)})"
            + (f"; missing: {', '.join(lacking)}" if lacking else "")
        )
    return classes


def decode_all(source: Source, names: Sequence[str], description: str) -> Tensor:
    """Decode the named images to uint8 [N, 3, 32, 32].

    Raises:
        ValueError: an image that is damaged, empty, of another size or of more than 8 bits a channel, named.
    """
    pixels = np.empty((len(names), 3, 32, 32), dtype=np.uint8)
    for i, name in enumerate(track(names, description)):
        pixels[i] = _decode(source.read(name), source.label(name)).transpose(2, 0, 1)
    return torch.from_numpy(pixels)


def _decode(content: bytes, label: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            size, mode = image.size, image.mode
            wide = mode.startswith(("I", "F"))  # which Pillow would clip at 255
            if size == (32, 32) and not wide:
                return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError and more
        raise ValueError(f"{label} is not a whole image ({', '.join(_FORMATS)}): {error}") from error
    if wide:
        raise ValueError(f"{label} must have 8 bits a channel, got Pillow's mode {mode}")
    raise ValueError(f"{label} must be 32x32 pixels, got {size[0]}x{size[1]}")
