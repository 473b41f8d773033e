"""Class folders of images, as ImageNet comes and as torchvision's ImageFolder reads them."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from csam.data import images
from csam.data.dataset import Dataset, choose
from csam.data.source import Archive, Folder, Source
from csam_kernels import checks

TESTS = ("test", "val", "")  # the first that has images
_FILE = re.compile(rf"(?:^|/)((?:(?:train|test|val)/)?{images.FILE})$")
_WANTED = "<class>/ with images, or train/<class>/ and val/<class>/ or test/<class>/, as a folder or as a tar"


def load(
    path: Path,
    train_subset: int | None,
    test_subset: int | None,
    seed: int,
    resize: int | None,
    crop: int | None,
    train: bool,
) -> Dataset:
    """See `csam.data.load`; `path` is a folder or a tar."""
    for name, side in (("resize", resize), ("crop", crop)):
        if side is not None:
            checks.integer(name, side, low=1)
    if not path.exists():
        raise FileNotFoundError(f"data_dir must be a folder or a tar of images, {path} does not exist")
    source, found = _open(path)
    test = next((split for split in TESTS if found[split]), None)
    if test is None:
        raise ValueError(f"data_dir must hold {_WANTED}; {path} holds no images to test on")
    splits = {split: found[split] for split in ("train", test) if found[split]}
    classes = images.class_names(source, splits)
    numbers = {name: number for number, name in enumerate(classes)}

    def decoded(split: str, argument: str, count: int | None) -> tuple[Tensor, Tensor]:
        names = splits[split]
        y = torch.tensor([numbers[name.split("/")[-2]] for name in names])
        chosen = choose(argument, y, count, seed)
        kept, fit = [names[i] for i in chosen.tolist()], images.Fit(resize, crop)
        return images.decode_all(source, kept, f"decoding {split or 'test'} images", fit=fit), y[chosen]

    test_x, test_y = decoded(test, "test_subset", test_subset)
    if not train or "train" not in splits:
        return Dataset("images", classes, test_x[:0], test_y[:0], test_x, test_y)
    train_x, train_y = decoded("train", "train_subset", train_subset)
    if train_x.shape[1:] != test_x.shape[1:]:
        shapes = [f"{x.shape[3]}x{x.shape[2]}" for x in (train_x, test_x)]
        raise ValueError(f"train and test images must be of one size (resize and crop), got {' and '.join(shapes)}")
    return Dataset("images", classes, train_x, train_y, test_x, test_y)


def _open(path: Path) -> tuple[Source, dict[str, list[str]]]:
    """The files, and the names of the images by split; under "" where there are no splits."""

    def select(name: str) -> str | None:
        match = _FILE.search(name)
        return match.group(1) if match else None

    source: Source = Folder(path, select) if path.is_dir() else Archive(path, select)
    found: dict[str, list[str]] = {split: [] for split in ("train", *TESTS)}
    for name in source.names():
        *split, _, _ = name.split("/")
        found["".join(split)].append(name)
    if any(found[split] for split in ("train", "test", "val")):
        found[""] = []
    return source, found
