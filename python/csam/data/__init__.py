"""Data sets as uint8 tensors: scikit-learn's handwritten digits, CIFAR-10 in any of its usual forms, CIFAR-10-C, and
class folders of images such as ImageNet's.

dataset = data.load("cifar10", "path/to/cifar-10-python.tar.gz", train_subset=10_000)
x = data.to_unit(dataset.test_x[:8])  # float32 [8, 3, 32, 32] in [0, 1]
"""

from __future__ import annotations

from pathlib import Path

from csam.data import cifar10, cifar10c, digits, folders
from csam.data.dataset import Dataset, balanced_order, check_subset, evenly_spaced, to_unit

__all__ = ["NAMES", "Dataset", "balanced_order", "evenly_spaced", "load", "to_unit"]

NAMES = ("digits", "cifar10", "cifar10c", "images")


def load(
    name: str,
    data_dir: str | Path | None = None,
    *,
    train_subset: int | None = None,
    test_subset: int | None = None,
    seed: int = 0,
    corruption: str | None = None,
    severity: int | None = None,
    resize: int | None = None,
    crop: int | None = None,
    train_images: int | None = None,
) -> Dataset:
    """Load a data set, whole or a stratified part of it.

    "digits" comes with scikit-learn and takes no `data_dir`. "cifar10" is read from `data_dir`, whose form is
    found by looking at it: class folders of images (`train/<class>/*.jpg`, `test/<class>/*.jpg`), the python
    batches (`data_batch_1`, ..., `test_batch`) or the binary batches (`data_batch_1.bin`, ...); each either a
    folder, a tar (plain, gzip, bzip2 or xz), or a folder that holds one of these. Nothing is unpacked to disk.
    A split of images that was decoded whole is kept in the folder `CSAM_CACHE` (default ~/.cache/csam) until its
    source changes. "cifar10c" is the unpacked folder of CIFAR-10-C, and has test images only.

    "images" is a folder or a tar of images in two class folders or more, labelled by the folders' sorted names:
    `<class>/*.jpg`, which are test images, or `train/<class>/*.jpg` (none is needed to certify) and
    `test/<class>/*.jpg`, or where there is no `test`, `val/<class>/*.jpg`. They become RGB, and are of one size or
    brought to one by `resize` and `crop`: 256 and 224 are what ImageNet's networks are evaluated with. Only those that
    are kept are decoded.

    Args:
        name: "digits", "cifar10", "cifar10c" or "images".
        data_dir: where the files are; see above.
        train_subset, test_subset: how many images of the split to keep, chosen by `balanced_order`; all by
            default, in the order of the source.
        seed: chooses which images a subset holds; a smaller subset is the beginning of a larger one.
        corruption, severity: of CIFAR-10-C, such as "fog" and 3, and of no other.
        resize, crop: of "images": what their shorter side becomes, and the side of the central square that is kept, in
            pixels; as torchvision's Resize (bilinear, antialiased) and CenterCrop do it. None leaves out the step.
        train_images: of "images": so many of the training images at most, evenly spaced; 0 for none.

    Raises:
        FileNotFoundError: `data_dir` does not exist, or a batch file is missing in it.
        TypeError, ValueError: a bad argument; a truncated, damaged or foreign file, named in the message.
    """
    check_subset("train_subset", train_subset)
    check_subset("test_subset", test_subset)
    for owner, options in (
        ("cifar10c", {"corruption": corruption, "severity": severity}),
        ("images", {"resize": resize, "crop": crop}),
    ):
        for option, value in options.items():
            if value is not None and name != owner:
                raise ValueError(f"{option} must be None for {name}, got {value!r}")
    if name == "cifar10c":
        if data_dir is None:
            raise ValueError("data_dir must say where CIFAR-10-C is (its unpacked folder), got None")
        return cifar10c.load(Path(data_dir).expanduser(), corruption, severity).subset(train_subset, test_subset, seed)
    if name == "cifar10":
        if data_dir is None:
            raise ValueError("data_dir must say where CIFAR-10 is (a folder or a tar), got None")
        return cifar10.load(Path(data_dir).expanduser(), train_subset, test_subset, seed)
    if name == "images":
        if data_dir is None:
            raise ValueError("data_dir must say where the images are (a folder or a tar), got None")
        return folders.load(Path(data_dir).expanduser(), train_subset, test_subset, seed, resize, crop, train_images)
    if name != "digits":
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    if data_dir is not None:
        raise ValueError(f"data_dir must be None for digits, got {str(data_dir)!r}")
    return digits.load().subset(train_subset, test_subset, seed)
