"""Class folders of images, as ImageNet comes and as torchvision's ImageFolder reads them."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from csam.data import images
from csam.data.dataset import Dataset, choose, evenly_spaced
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
    train_images: int | None,
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
        raise ValueError(f"data_dir must hold {_WANTED}; {_held(path, found)}")
    splits = {split: found[split] for split in ("train", test) if found[split]}
    classes = images.class_names(source, splits)
    if len(classes) < 2:
        raise ValueError(f"data_dir must hold {_WANTED}, of two classes or more; {path} holds {classes[0]}/ alone")
    for split in splits if path.is_dir() else ():
        _check_folders(path / split, classes)

    def decoded(split: str, argument: str, count: int | None, most: int | None) -> tuple[Tensor, Tensor]:
        names = splits[split]
        y = images.labels(names, classes)
        chosen = choose(argument, y, count, seed)
        if most is not None:
            chosen = chosen[evenly_spaced(len(chosen), min(most, len(chosen)))]
        kept, fit = [names[i] for i in chosen.tolist()], images.Fit(resize, crop)
        return images.decode_all(source, kept, f"decoding {split or 'test'} images", fit=fit), y[chosen]

    test_x, test_y = decoded(test, "test_subset", test_subset, None)
    if train_images == 0 or "train" not in splits:
        return Dataset("images", classes, test_x[:0], test_y[:0], test_x, test_y)
    train_x, train_y = decoded("train", "train_subset", train_subset, train_images)
    if train_x.shape[1:] != test_x.shape[1:]:
        shapes = [f"{x.shape[3]}x{x.shape[2]}" for x in (train_x, test_x)]
        raise ValueError(f"train and test images must be of one size (resize and crop), got {' and '.join(shapes)}")
    return Dataset("images", classes, train_x, train_y, test_x, test_y)


def _open(path: Path) -> tuple[Source, dict[str, list[str]]]:
    """The files, and the names of the images by split; under "" where there are no splits."""
    above: dict[str, str] = {}  # what lies before each name, in a tar

    def select(name: str) -> str | None:
        match = _FILE.search(name)
        if match is None or any(part.startswith(".") for part in name.removeprefix("./").split("/")):
            return None
        above[match.group(1)] = name[: match.start(1)].removeprefix("./") or "./"
        return match.group(1)

    source: Source = Folder(path, select) if path.is_dir() else Archive(path, select)
    found: dict[str, list[str]] = {split: [] for split in ("train", *TESTS)}
    for name in source.names():
        *split, _, _ = name.split("/")
        found["".join(split)].append(name)
    if any(found[split] for split in ("train", "test", "val")):
        found[""] = []
    places = {above[name] for names in found.values() for name in names}
    if len(places) > 1 and not path.is_dir():
        raise ValueError(f"data_dir must hold {_WANTED}; {path} holds such in {' and '.join(sorted(places))}")
    return source, found


def _check_folders(folder: Path, classes: list[str]) -> None:
    """Refuse folders that hold no images: they would be no classes, and the labels of those behind them would shift."""
    for inside in sorted(folder.iterdir()):
        if inside.is_dir() and not inside.name.startswith(".") and inside.name not in classes:
            raise ValueError(f"{inside} must hold images ({', '.join(images.SUFFIXES)}), or not lie beside the classes")


def _held(path: Path, found: dict[str, list[str]]) -> str:
    """What there is instead of images to test on."""
    if found["train"]:
        return f"{path} holds train/ alone"
    if not path.is_dir():
        return f"{path} holds no such images"
    inside = sorted(entry.name for entry in path.iterdir())
    return f"{path} holds {', '.join(inside[:5]) or 'nothing'}" + (" and more" if len(inside) > 5 else "")
