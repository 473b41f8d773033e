"""Decoded images on disk, so that a source is decoded once.

One safetensors file for each source path and split, in the folder `CSAM_CACHE` (default ~/.cache/csam). It
records the stamp of its source and a checksum; whatever is missing, stale, cut short or altered counts as not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from csam.data.source import Source
from csam.runs import TEMPORARY, write_atomic

_VERSION = "1"
_ABANDONED_SECONDS = 3600


class Split(NamedTuple):
    """Images uint8 [N, C, H, W], labels int64 [N], names of the classes."""

    x: Tensor
    y: Tensor
    classes: list[str]


def folder() -> Path:
    """Where things are kept. Raises FileNotFoundError if `CSAM_CACHE` does not say it, and nobody knows a home."""
    try:
        return Path(os.environ.get("CSAM_CACHE") or "~/.cache/csam").expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"{error}; CSAM_CACHE says where to keep things instead") from error


def fetch(source: Source, split: str) -> Split | None:
    """The decoded split, or None where it has to be decoded (again)."""
    try:
        with safetensors.safe_open(_file(source, split), framework="pt") as stored:
            notes = stored.metadata() or {}
            if notes.get("version") != _VERSION or notes.get("stamp") != source.stamp:
                return None
            found = Split(stored.get_tensor("x"), stored.get_tensor("y"), json.loads(notes["classes"]))
    except (OSError, safetensors.SafetensorError, KeyError, ValueError):
        return None
    return found if notes.get("checksum") == _checksum(found) else None


def keep(source: Source, split: str, found: Split) -> None:
    """Store a split; where that cannot be done (full disk, read-only folder) warn and go on without."""
    notes = {
        "version": _VERSION,
        "stamp": source.stamp,
        "checksum": _checksum(found),
        "classes": json.dumps(found.classes),
    }
    try:
        file = _file(source, split)
        file.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(file.parent)
        write_atomic(file, safetensors.torch.save({"x": found.x, "y": found.y}, notes))
    except OSError as error:
        warnings.warn(f"decoded images are not kept: {error}; set CSAM_CACHE to a folder with space", stacklevel=2)


def _file(source: Source, split: str) -> Path:
    key = hashlib.sha256(os.fsencode(source.path.resolve())).hexdigest()[:16]
    return folder() / f"{key}-{split}.safetensors"


def _checksum(found: Split) -> str:
    return f"{zlib.crc32(found.y.numpy().data, zlib.crc32(found.x.numpy().data)):08x}"


def _remove_leftovers(place: Path) -> None:
    """Unfinished files of killed processes; younger ones may still be growing."""
    for part in place.glob(f"{TEMPORARY}*"):
        with suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > _ABANDONED_SECONDS:
                part.unlink()
