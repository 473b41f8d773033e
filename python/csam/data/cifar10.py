"""CIFAR-10 (Krizhevsky 2009) from class folders of images, the python batches or the binary batches."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from csam.data import cache, images
from csam.data.batches import parse_binary, parse_python
from csam.data.cache import Split
from csam.data.dataset import Dataset, choose
from csam.data.source import Archive, Folder, Source

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}

_LANDMARKS = ("train", "test", "data_batch_1", "test_batch", "data_batch_1.bin", "test_batch.bin")
_FILE = re.compile(
    r"(?:^|/)("
    rf"(?:train|test)/{images.FILE}"
    r"|(?:data_batch_[1-5]|test_batch)(?:\.bin)?"
    r")$"
)
_WANTED = (
    "train/<class>/ and test/<class>/ with images, or data_batch_1..5 and test_batch, with or without .bin, "
    "as a folder or as a tar"
)


def load(path: Path, train_subset: int | None, test_subset: int | None, seed: int) -> Dataset:
    """See `csam.data.load`; `path` is a folder or a tar."""
    source = _open(path)
    train = _load_split(source, "train", train_subset, seed)
    test = _load_split(source, "test", test_subset, seed)
    return Dataset("cifar10", train.classes, train.x, train.y, test.x, test.y)


def _open(path: Path) -> Source:
    place = _locate(path)
    return Folder(place, _select) if place.is_dir() else Archive(place, _select)


def _locate(path: Path) -> Path:
    """The folder or tar meant by `path`: itself, a folder just inside it, or the only tar just inside it."""
    if not path.exists():
        raise FileNotFoundError(f"data_dir must be a folder or a tar of CIFAR-10, {path} does not exist")
    if not path.is_dir():
        return path
    inside = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    for place in [path, *(entry for entry in inside if entry.is_dir())]:
        if any((place / landmark).exists() for landmark in _LANDMARKS):
            return place
    archives = [entry for entry in inside if re.search(r"\.(tar(\.\w+)?|t[gbx]z2?)$", entry.name)]
    if len(archives) == 1:
        return archives[0]
    found = f"several tars ({', '.join(a.name for a in archives)}): name one" if archives else "none of these"
    raise ValueError(f"data_dir must hold {_WANTED}; {path} holds {found}")


def _select(name: str) -> str | None:
    match = _FILE.search(name)
    return match.group(1) if match else None


def _load_split(source: Source, split: str, count: int | None, seed: int) -> Split:
    whole = cache.fetch(source, split) or _read_batches(source, split)
    if whole is None:
        return _decode_images(source, split, count, seed)
    if count is None:
        return whole
    chosen = choose(f"{split}_subset", whole.y, count, seed)
    return Split(whole.x[chosen], whole.y[chosen], whole.classes)


def _read_batches(source: Source, split: str) -> Split | None:
    """The split from python or binary batches; None where the source holds class folders of images."""
    there = set(source.names())
    if not there:
        raise ValueError(f"data_dir must hold {_WANTED}; {source.path} holds none of these")
    batches = {name for names in BATCHES.values() for name in names}
    for suffix, parse in (("", parse_python), (".bin", parse_binary)):
        if not there.isdisjoint(name + suffix for name in batches):
            files = [name + suffix for name in BATCHES[split]]
            missing = [source.label(name) for name in files if name not in there]
            if missing:
                raise FileNotFoundError(f"{missing[0]} is missing beside the other batches; get it again")
            parts = [parse(source.read(name), source.label(name)) for name in files]
            x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            return Split(x, y, list(CLASSES))
    return None


def _decode_images(source: Source, split: str, count: int | None, seed: int) -> Split:
    """The chosen images of class folders; kept in the cache when they are the whole split."""
    splits = {each: [name for name in source.names() if name.startswith(f"{each}/")] for each in ("train", "test")}
    classes, names = images.class_names(source, splits), splits[split]
    if len(classes) != len(CLASSES):
        lacking = [name for name in CLASSES if name not in classes]
        raise ValueError(
            f"{source.path} must have {len(CLASSES)} class folders, got {len(classes)} ({', '.join(classes)})"
            + (f"; missing: {', '.join(lacking)}" if lacking else "")
        )
    y = images.labels(names, classes)
    chosen = choose(f"{split}_subset", y, count, seed)
    x = images.decode_all(source, [names[i] for i in chosen.tolist()], f"decoding {split} images", side=32)
    found = Split(x, y[chosen], classes)
    if count is None:
        cache.keep(source, split, found)
    return found
