"""Class folders of images: their names, and their pixels."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from csam.data.progress import track
from csam.data.source import Source

SUFFIXES = ("jpg", "jpeg", "png", "bmp", "webp", "ppm")
FILE = rf"[^/.][^/]*/[^/.][^/]*\.(?i:{'|'.join(SUFFIXES)})"  # <class>/<image>, in a pattern
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM")


@dataclass(frozen=True)
class Fit:
    """How images are brought to one size, with torchvision's conventions.

    resize: what the shorter side becomes (bilinear with antialiasing, `transforms.Resize`); crop: side of the central
    square that is kept (`transforms.CenterCrop`). None leaves out the step.
    """

    resize: int | None = None
    crop: int | None = None

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if self.resize is not None:
            short, long = min(width, height), max(width, height)
            longer = int(self.resize * long / short)
            width, height = (self.resize, longer) if width <= height else (longer, self.resize)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        if self.crop is None:
            return image
        if self.crop > min(width, height):
            raise ValueError(f"crop must be at most {min(width, height)}, the image's shorter side, got {self.crop}")
        left, top = round((width - self.crop) / 2), round((height - self.crop) / 2)
        return image.crop((left, top, left + self.crop, top + self.crop))


def class_names(source: Source, splits: Mapping[str, Sequence[str]]) -> list[str]:
    """Sorted class folders of splits, whose names all end in `<class>/<image>`.

    Raises:
        ValueError: a class that only one split has.
    """
    found = {split: {name.split("/")[-2] for name in names} for split, names in splits.items()}
    classes = sorted(set().union(*found.values()))
    for split, folders in found.items():
        lacking = [name for name in classes if name not in folders]
        if lacking:
            raise ValueError(f"{source.label(f'{split}/{lacking[0]}')} must hold images, got none")
    return classes


def labels(names: Sequence[str], classes: Sequence[str]) -> Tensor:
    """Indices into the classes of names that end in `<class>/<image>`, int64 [N]."""
    numbers = {name: number for number, name in enumerate(classes)}
    return torch.tensor([numbers[name.split("/")[-2]] for name in names])


def decode_all(
    source: Source, names: Sequence[str], description: str, fit: Fit | None = None, side: int | None = None
) -> Tensor:
    """Decode the named images, at least one, to uint8 [N, 3, H, W], of `side` x `side` pixels or the first one's size.

    Raises:
        ValueError: an image that is damaged, empty, of another size or of more than 8 bits a channel, named; more
            images than this machine's memory holds.
    """
    pixels: np.ndarray[Any, np.dtype[np.uint8]] | None = None
    wanted = f"{side}x{side} pixels"
    for i, name in enumerate(track(names, description)):
        label = source.label(name)
        image = _decode(source.read(name), label, fit or Fit())
        if pixels is None:
            height, width = (side, side) if side else image.shape[:2]
            _check_memory(len(names), 3 * height * width)
            pixels = np.empty((len(names), 3, height, width), np.uint8)
            wanted = wanted if side else f"{width}x{height} pixels as {label} (resize and crop make images of one size)"
        if image.shape[:2] != pixels.shape[2:]:
            raise ValueError(f"{label} must be {wanted}, got {image.shape[1]}x{image.shape[0]}")
        pixels[i] = image.transpose(2, 0, 1)
    assert pixels is not None
    return torch.from_numpy(pixels)


def _check_memory(count: int, each: int) -> None:
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if count * each > there:
        raise ValueError(
            f"images must be at most {there // each}, which this machine's memory holds, got {count}; test_subset and "
            "train_subset take a part of them"
        )


def _decode(content: bytes, label: str, fit: Fit) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            mode = image.mode
            wide = mode.startswith(("I", "F"))  # which Pillow would clip at 255
            whole = None if wide else image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError and more
        raise ValueError(f"{label} is not a whole image ({', '.join(_FORMATS)}): {error}") from error
    if whole is None:
        raise ValueError(f"{label} must have 8 bits a channel, got Pillow's mode {mode}")
    try:
        return np.asarray(fit(whole))
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error
