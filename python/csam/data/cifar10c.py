"""CIFAR-10-C (Hendrycks and Dietterich, ICLR 2019): the test images of CIFAR-10 under corruptions, as .npy files."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from csam.data.cifar10 import CLASSES
from csam.data.dataset import Dataset
from csam_kernels import checks

SEVERITIES = 5  # of each corruption, one after the other in a file


def load(folder: Path, corruption: str | None, severity: int | None) -> Dataset:
    """The images of one corruption at one severity; there are none for training.

    Args:
        folder: with <corruption>.npy, uint8 [5 N, 32, 32, 3], and labels.npy, [5 N].
        corruption: name of the file.
        severity: 1 .. 5.

    Raises:
        FileNotFoundError: no such folder or file.
        TypeError: severity is no integer.
        ValueError: a file of another form, or a severity out of range.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"data_dir must be the unpacked folder of CIFAR-10-C, {folder} is not a folder")
    there = sorted(path.stem for path in folder.glob("*.npy") if path.stem != "labels")
    if corruption not in there:
        shown = ", ".join(there) or "no .npy file"
        raise FileNotFoundError(f"corruption must be one of those in {folder} ({shown}), got {corruption!r}")
    if severity is None:
        raise ValueError(f"severity must be given, 1 to {SEVERITIES}")
    severity = checks.integer("severity", severity, low=1, high=SEVERITIES)
    images, labels = _array(folder / f"{corruption}.npy"), _array(folder / "labels.npy")
    if labels.ndim != 1:
        raise ValueError(f"{folder / 'labels.npy'} must be labels [5 N], got {labels.dtype} {list(labels.shape)}")
    rows = len(labels)
    if images.dtype != np.uint8 or images.shape != (rows, 32, 32, 3) or rows == 0 or rows % SEVERITIES:
        raise ValueError(
            f"{folder / corruption}.npy must be uint8 [5 N, 32, 32, 3] with as many labels, got "
            f"{images.dtype} {list(images.shape)} and {rows} labels"
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(CLASSES):
        raise ValueError(f"{folder / 'labels.npy'} must hold labels 0 to 9, got {labels.dtype} {list(labels.shape)}")
    part = slice((severity - 1) * rows // SEVERITIES, severity * rows // SEVERITIES)
    x = torch.from_numpy(np.array(images[part])).permute(0, 3, 1, 2).contiguous()
    y = torch.from_numpy(labels[part].astype(np.int64))
    return Dataset("cifar10c", CLASSES, x[:0], y[:0], x, y)


def _array(path: Path) -> np.ndarray:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} is not a whole .npy file: {error}") from error
    if not isinstance(found, np.ndarray):
        found.close()
        raise ValueError(f"{path} must be an .npy file of one array, got an .npz archive")
    return found
