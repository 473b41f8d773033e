"""Data sets: every form of CIFAR-10 gives the same pixels, and no bad file passes for a good one."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from conftest import shared_data
from csam import data, models
from csam.data import cache, cifar10, images
from csam.data.source import Source

TRAIN, TEST = 40, 20


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CSAM_CACHE", str(folder))
    return folder


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that were decoded and not taken from the cache."""
    names: list[str] = []
    decode = images.decode_all

    def record(source: Source, chosen: Sequence[str], description: str, **options: Any) -> Tensor:
        names.extend(chosen)
        return decode(source, chosen, description, **options)

    monkeypatch.setattr(images, "decode_all", record)
    return names


def synthetic(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random pixels [count, 3, 32, 32] and labels, sorted by class as class folders are."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), np.arange(count) * 10 // count


TWO = np.zeros((2, 3072), np.uint8)
SPLITS = {"train": synthetic(TRAIN, 0), "test": synthetic(TEST, 1)}


def batches() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    x, y = SPLITS["train"]
    parts = zip(np.split(x, 5), np.split(y, 5), strict=True)
    return {**dict(zip(cifar10.BATCHES["train"], parts, strict=True)), "test_batch": SPLITS["test"]}


def pickled(x: np.ndarray, y: np.ndarray, protocol: int = 2) -> bytes:
    return pickle.dumps({b"batch_label": b"a batch", b"labels": y.tolist(), b"data": x.reshape(len(x), -1)}, protocol)


def pickled_by_python2(x: np.ndarray, y: np.ndarray) -> bytes:
    """What cPickle of Python 2 wrote, the published form: byte strings, and numpy's old module name."""
    rows = x.reshape(len(x), -1)
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"K\x01" + b"".join(b"M" + struct.pack("<H", n) for n in rows.shape) + b"\x86"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    state = b"(" + shape + dtype + b"I00\nT" + struct.pack("<i", rows.nbytes) + rows.tobytes() + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in y) + b"e"
    return b"\x80\x02}(U\x04data" + array + state + b"U\x06labels" + labels + b"u."


def write_python(folder: Path, dump: Callable[[np.ndarray, np.ndarray], bytes] = pickled) -> None:
    folder.mkdir(parents=True)
    for name, (x, y) in batches().items():
        (folder / name).write_bytes(dump(x, y))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": cifar10.CLASSES}, 2))


def write_binary(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, (x, y) in batches().items():
        records = np.concatenate([y.astype(np.uint8)[:, None], x.reshape(len(x), -1)], axis=1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(cifar10.CLASSES))


def write_images(folder: Path) -> None:
    for split, (x, y) in SPLITS.items():
        for i, (image, label) in enumerate(zip(x, y, strict=True)):
            file = folder / split / cifar10.CLASSES[label] / f"{i:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(file, compress_level=0)


WRITERS = {"images": write_images, "python": write_python, "binary": write_binary}


def pack(folder: Path, compression: str = "", root: str = "cifar") -> Path:
    path = folder.with_name(f"{folder.name}.tar" + (f".{compression}" if compression else ""))
    with tarfile.open(path, f"w:{compression}") as tar:
        tar.add(folder, root)
    return path


def load(path: Path, **options: int) -> data.Dataset:
    return data.load("cifar10", path, **options)


def assert_is_synthetic(dataset: data.Dataset) -> None:
    assert dataset.name == "cifar10"
    assert dataset.classes == cifar10.CLASSES
    for split, x, y in (("train", dataset.train_x, dataset.train_y), ("test", dataset.test_x, dataset.test_y)):
        assert (x.dtype, y.dtype) == (torch.uint8, torch.int64)
        assert torch.equal(x, torch.from_numpy(SPLITS[split][0]))
        assert torch.equal(y, torch.from_numpy(SPLITS[split][1]))


class TestForms:
    @pytest.mark.parametrize("form", WRITERS)
    def test_folder(self, tmp_path: Path, form: str) -> None:
        WRITERS[form](tmp_path / "data")
        assert_is_synthetic(load(tmp_path / "data"))

    @pytest.mark.parametrize("form", WRITERS)
    def test_folder_inside_a_folder(self, tmp_path: Path, form: str) -> None:
        WRITERS[form](tmp_path / "outer" / "data")
        assert_is_synthetic(load(tmp_path / "outer"))

    def test_only_tar_inside_a_folder(self, tmp_path: Path) -> None:
        write_binary(tmp_path / "data")
        (tmp_path / "downloads").mkdir()
        pack(tmp_path / "data", "gz").rename(tmp_path / "downloads" / "cifar-10-binary.tar.gz")
        assert_is_synthetic(load(tmp_path / "downloads"))

    @pytest.mark.parametrize("form", WRITERS)
    @pytest.mark.parametrize("compression", ["", "gz", "bz2", "xz"], ids=lambda c: c or "plain")
    def test_tar(self, tmp_path: Path, form: str, compression: str) -> None:
        WRITERS[form](tmp_path / "data")
        assert_is_synthetic(load(pack(tmp_path / "data", compression)))

    @pytest.mark.parametrize("root", [".", "a/b/cifar"])
    def test_tar_roots(self, tmp_path: Path, root: str) -> None:
        write_images(tmp_path / "data")
        assert_is_synthetic(load(pack(tmp_path / "data", root=root)))

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_python_batches_of_any_protocol(self, tmp_path: Path, protocol: int) -> None:
        write_python(tmp_path / "data", lambda x, y: pickled(x, y, protocol))
        assert_is_synthetic(load(tmp_path / "data"))

    def test_python_batches_written_by_python_2(self, tmp_path: Path) -> None:
        write_python(tmp_path / "data", pickled_by_python2)
        assert_is_synthetic(load(tmp_path / "data"))

    def test_text_path_and_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_binary(tmp_path / "data")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert_is_synthetic(data.load("cifar10", "~/data"))

    def test_hidden_and_other_files_are_no_images(self, tmp_path: Path) -> None:
        write_images(tmp_path / "data")
        for name in (".DS_Store", "._0000.png", "readme.txt"):
            (tmp_path / "data" / "train" / "cat" / name).write_bytes(b"no image")
        assert_is_synthetic(load(tmp_path / "data"))
        assert_is_synthetic(load(pack(tmp_path / "data")))

    def test_grey_jpeg_and_upper_case_suffix(self, tmp_path: Path) -> None:
        write_images(tmp_path / "data")
        old = next((tmp_path / "data" / "test" / "ship").iterdir())
        Image.new("L", (32, 32), 77).save(old.with_suffix(".JPG"), "JPEG")
        old.unlink()
        dataset = load(tmp_path / "data")
        assert (dataset.test_x[dataset.test_y == 8] == 77).flatten(1).all(1).any()

    def test_other_class_names(self, tmp_path: Path) -> None:
        write_images(tmp_path / "data")
        for folder in tmp_path.glob("data/*/*"):
            folder.rename(folder.with_name(f"class_{cifar10.CLASSES.index(folder.name)}"))
        dataset = load(tmp_path / "data")
        assert dataset.classes == [f"class_{i}" for i in range(10)]
        assert torch.equal(dataset.train_y, torch.from_numpy(SPLITS["train"][1]))


class TestSubsets:
    @given(
        labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
        seed=st.integers(0, 2**31),
        share=st.floats(0, 1),
    )
    def test_every_beginning_is_stratified(self, labels: list[int], seed: int, share: float) -> None:
        y = torch.tensor(labels)
        order = data.balanced_order(y, seed)
        assert order.sort().values.tolist() == list(range(len(y)))
        m = int(share * len(y))
        counts, shares = y[order[:m]].bincount(minlength=5), y.bincount(minlength=5) / len(y)
        bound = (1 + shares * max(len(y.unique()) - 2, 0)) / 2
        assert bool(((counts - shares * m).abs() <= bound + 1e-4).all())

    def test_equal_classes_get_equal_shares(self) -> None:
        y = torch.arange(10).repeat(30)
        for m in (1, 7, 10, 55, 300):
            counts = y[data.balanced_order(y, 3)[:m]].bincount(minlength=10)
            assert counts.max() - counts.min() <= 1

    def test_seed_chooses(self) -> None:
        y = torch.arange(10).repeat(30)
        assert torch.equal(data.balanced_order(y, 1), data.balanced_order(y, 1))
        assert not torch.equal(data.balanced_order(y, 1), data.balanced_order(y, 2))

    @pytest.mark.parametrize("form", WRITERS)
    def test_subset_is_the_beginning_of_a_larger_one(self, tmp_path: Path, form: str) -> None:
        WRITERS[form](tmp_path / "data")
        small = load(tmp_path / "data", train_subset=10, test_subset=5, seed=3)
        large = load(tmp_path / "data", train_subset=30, test_subset=20, seed=3)
        assert small.train_y.bincount().tolist() == [1] * 10
        assert large.train_y.bincount().tolist() == [3] * 10
        assert torch.equal(small.train_x, large.train_x[:10])
        assert torch.equal(small.test_x, large.test_x[:5])

    def test_only_the_subset_is_decoded_and_equals_the_cached(self, tmp_path: Path, decoded: list[str]) -> None:
        write_images(tmp_path / "data")
        fresh = load(tmp_path / "data", train_subset=10, test_subset=5)
        assert len(decoded) == 15
        load(tmp_path / "data")
        decoded.clear()
        cached = load(tmp_path / "data", train_subset=10, test_subset=5)
        assert not decoded
        assert torch.equal(fresh.train_x, cached.train_x)
        assert torch.equal(fresh.test_y, cached.test_y)

    def test_global_generator_is_left_alone(self) -> None:
        state = torch.get_rng_state()
        data.load("digits", train_subset=50, seed=9)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize(
        ("value", "error", "message"),
        [
            (0, ValueError, "train_subset must be >= 1, got 0"),
            (-3, ValueError, "train_subset must be >= 1, got -3"),
            (10_000, ValueError, "train_subset must be <= 1437, the images there are, got 10000"),
            (1.5, TypeError, "train_subset must be an int or None, got 1.5"),
            (True, TypeError, "train_subset must be an int or None, got True"),
        ],
        ids=str,
    )
    def test_refuses(self, value: int, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            data.load("digits", train_subset=value)


class TestDigits:
    def test_pixels_and_split(self) -> None:
        dataset = data.load("digits")
        assert dataset.train_x.shape == (1437, 1, 8, 8)
        assert dataset.test_x.shape == (360, 1, 8, 8)
        assert dataset.num_classes == 10
        assert dataset.in_channels == 1
        levels = torch.cat([dataset.train_x, dataset.test_x]).unique()
        assert levels.tolist() == [round(v * 255 / 16) for v in range(17)]
        assert dataset.test_y.bincount().min() >= 34

    def test_every_image_is_in_one_split(self) -> None:
        from sklearn.datasets import load_digits

        dataset = data.load("digits")
        levels = torch.from_numpy(load_digits().images) * 255 / 16
        rows = torch.cat([dataset.train_x, dataset.test_x]).flatten(1).tolist()
        assert sorted(rows) == sorted(levels.round().flatten(1).int().tolist())

    def test_to_unit(self) -> None:
        x = torch.tensor([0, 51, 255], dtype=torch.uint8)
        assert data.to_unit(x).tolist() == pytest.approx([0.0, 0.2, 1.0])
        assert x.tolist() == [0, 51, 255]
        with pytest.raises(TypeError, match=r"x must be uint8 pixels, got torch.float32"):
            data.to_unit(x.float())
        with pytest.raises(TypeError, match=r"x must be a torch.Tensor of uint8 pixels, got int"):
            data.to_unit(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mnist",), "name must be one of digits, cifar10, cifar10c, images, got 'mnist'"),
        (("cifar10",), "data_dir must say where CIFAR-10 is"),
        (("digits", "somewhere"), "data_dir must be None for digits, got 'somewhere'"),
    ],
    ids=["unknown_name", "no_data_dir", "needless_data_dir"],
)
def test_load_refuses(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load(*arguments)


class TestBadFiles:
    @staticmethod
    def refuses(path: Path, message: str, named: str | None = None, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message) as caught:
            load(path)
        assert named is None or named in str(caught.value)

    def test_path_that_does_not_exist(self, tmp_path: Path) -> None:
        path = tmp_path / "nowhere"
        self.refuses(path, "data_dir must be a folder or a tar of CIFAR-10", str(path), FileNotFoundError)

    def test_empty_folder(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        self.refuses(tmp_path / "data", "data_dir must hold train/<class>/.* holds none of these")

    def test_several_tars(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        for name in ("a.tar", "b.tgz"):
            (tmp_path / "data" / name).touch()
        self.refuses(tmp_path / "data", r"several tars \(a.tar, b.tgz\): name one")

    def test_tar_of_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "notes.txt").write_text("hello")
        path = pack(tmp_path / "data")
        self.refuses(path, "data_dir must hold train/<class>/", str(path))

    @pytest.mark.parametrize(
        "content",
        [b"", b"plain text, no tar at all" * 100, b"\x1f\x8bxx", b"\xfd7zXZ\x00xx", b"BZhxx"],
        ids=["empty", "text", "gz", "xz", "bz2"],
    )
    def test_foreign_file(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "cifar.tar"
        path.write_bytes(content)
        self.refuses(path, "is damaged, truncated or not a tar", str(path))

    @pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.9999])
    def test_truncated_compressed_tar(self, tmp_path: Path, compression: str, share: float) -> None:
        write_images(tmp_path / "data")
        path = pack(tmp_path / "data", compression)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        self.refuses(path, "is damaged, truncated or not a tar", str(path))

    def test_plain_tar_cut_anywhere(self, tmp_path: Path) -> None:
        write_binary(tmp_path / "data")
        path = pack(tmp_path / "data")
        content = path.read_bytes()
        end = len(content.rstrip(b"\0"))
        whole = -(-end // 512) * 512
        for cut in [*range(512, whole, 4096 + 512), whole - 512, whole - 1, whole]:
            path.write_bytes(content[:cut])
            self.refuses(path, "is damaged, truncated or not a tar", str(path))

    def test_damaged_header_inside_a_tar(self, tmp_path: Path) -> None:
        write_images(tmp_path / "data")
        path = pack(tmp_path / "data")
        content = bytearray(path.read_bytes())
        with tarfile.open(path) as tar:
            middle = tar.getmembers()[40].offset
        content[middle : middle + 8] = b"\xff" * 8
        path.write_bytes(content)
        self.refuses(path, "a header is damaged", str(path))

    def test_tar_of_two_data_sets(self, tmp_path: Path) -> None:
        write_binary(tmp_path / "data" / "a")
        write_binary(tmp_path / "data" / "b")
        self.refuses(pack(tmp_path / "data"), "more than once; give a tar of one data set")

    @pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
    @pytest.mark.parametrize("damage", ["truncated", "empty", "foreign"])
    def test_corrupt_image(self, tmp_path: Path, damage: str, packed: bool, cache_folder: Path) -> None:
        write_images(tmp_path / "data")
        file = sorted((tmp_path / "data" / "train" / "dog").iterdir())[1]
        content = file.read_bytes()
        file.write_bytes({"truncated": content[:-200], "empty": b"", "foreign": b"GIF89a no picture"}[damage])
        path = pack(tmp_path / "data") if packed else tmp_path / "data"
        self.refuses(path, "is not a whole image", f"train/dog/{file.name}")
        assert not list(cache_folder.glob("*"))

    def test_truncated_jpeg(self, tmp_path: Path) -> None:
        write_images(tmp_path / "data")
        stream = io.BytesIO()
        Image.fromarray(SPLITS["test"][0][0].transpose(1, 2, 0)).save(stream, "JPEG")
        (tmp_path / "data" / "test" / "cat" / "cut.jpg").write_bytes(stream.getvalue()[:-60])
        self.refuses(tmp_path / "data", "is not a whole image", "cut.jpg")

    def test_image_of_another_size(self, tmp_path: Path) -> None:
        write_images(tmp_path / "data")
        Image.new("RGB", (64, 48)).save(tmp_path / "data" / "test" / "cat" / "large.png")
        self.refuses(tmp_path / "data", "must be 32x32 pixels, got 64x48", "test/cat/large.png")

    def test_image_of_sixteen_bits(self, tmp_path: Path) -> None:
        write_images(tmp_path / "data")
        Image.fromarray(np.full((32, 32), 300, np.uint16)).save(tmp_path / "data" / "train" / "cat" / "deep.png")
        self.refuses(tmp_path / "data", "must have 8 bits a channel, got Pillow's mode I", "train/cat/deep.png")

    @pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
    @pytest.mark.parametrize("emptied", [False, True], ids=["missing", "empty"])
    def test_missing_class_folder(self, tmp_path: Path, emptied: bool, packed: bool) -> None:
        write_images(tmp_path / "data")
        folder = tmp_path / "data" / "test" / "frog"
        for file in folder.iterdir():
            file.unlink()
        if not emptied:
            folder.rmdir()
        path = pack(tmp_path / "data") if packed else tmp_path / "data"
        self.refuses(path, "must hold images, got none", "test/frog")

    def test_class_missing_in_both_splits(self, tmp_path: Path) -> None:
        write_images(tmp_path / "data")
        for folder in tmp_path.glob("data/*/truck"):
            for file in folder.iterdir():
                file.unlink()
        self.refuses(tmp_path / "data", "must have 10 class folders, got 9 .*; missing: truck")

    def test_missing_split(self, tmp_path: Path) -> None:
        write_images(tmp_path / "data")
        (tmp_path / "data" / "test").rename(tmp_path / "data" / "validation")
        self.refuses(tmp_path / "data", "must hold images, got none", "test/airplane")

    @pytest.mark.parametrize("form", ["python", "binary"])
    @pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
    def test_missing_batch(self, tmp_path: Path, form: str, packed: bool) -> None:
        WRITERS[form](tmp_path / "data")
        (gone,) = tmp_path.glob("data/data_batch_3*")
        gone.unlink()
        path = pack(tmp_path / "data") if packed else tmp_path / "data"
        self.refuses(path, "is missing beside the other batches", gone.name, FileNotFoundError)

    @pytest.mark.parametrize("cut", [0, 1, 3072, 3074, -1], ids=lambda c: f"cut_at_{c}")
    def test_fraction_of_a_binary_record(self, tmp_path: Path, cut: int) -> None:
        write_binary(tmp_path / "data")
        file = tmp_path / "data" / "data_batch_2.bin"
        file.write_bytes(file.read_bytes()[:cut])
        self.refuses(tmp_path / "data", "must hold whole records of 3073 bytes", str(file))

    def test_binary_label_above_nine(self, tmp_path: Path) -> None:
        write_binary(tmp_path / "data")
        file = tmp_path / "data" / "test_batch.bin"
        file.write_bytes(b"\x0a" + file.read_bytes()[1:])
        self.refuses(tmp_path / "data", r"must hold labels 0..9, got 0..10", str(file))

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99], ids=lambda s: f"kept_{s}")
    @pytest.mark.parametrize("dump", [pickled, pickled_by_python2])
    def test_truncated_pickle(self, tmp_path: Path, dump: Callable[..., bytes], share: float) -> None:
        write_python(tmp_path / "data", dump)
        file = tmp_path / "data" / "data_batch_5"
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])
        self.refuses(tmp_path / "data", "is not a whole and safe python batch", str(file))

    @pytest.mark.parametrize("protocol", [0, 2, 4])
    def test_unsafe_pickle_is_refused_before_it_acts(self, tmp_path: Path, protocol: int) -> None:
        class Attack:
            def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
                return os.mkdir, (str(tmp_path / "attacked"),)

        write_python(tmp_path / "data")
        file = tmp_path / "data" / "test_batch"
        file.write_bytes(pickle.dumps({b"labels": [0], b"data": Attack()}, protocol))
        self.refuses(tmp_path / "data", r"is not a whole and safe python batch: it asks for \w+.mkdir", str(file))
        assert not (tmp_path / "attacked").exists()

    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            ([1, 2], "must hold 'data', .* got NoneType"),
            ({"data": TWO, "fine_labels": [0, 1]}, "must hold 'labels', 2 integers"),
            (
                {"data": TWO.astype(np.float32), "labels": [0, 1]},
                r"must hold 'data', .*got float32 \[2, 3072\]",
            ),
            ({"data": TWO[:, :784], "labels": [0, 1]}, r"must hold 'data', .*got uint8 \[2, 784\]"),
            (
                {"data": TWO, "labels": [0]},
                "must hold 'labels', 2 integers 0..9, got a list of 1",
            ),
            ({"data": TWO, "labels": [0, 2**70]}, "must hold 'labels'"),
            ({"data": TWO, "labels": np.array([0, 99])}, "must hold labels 0..9, got 0..99"),
            ({"data": TWO[:0], "labels": []}, "must hold at least one image"),
        ],
        ids=["list", "cifar100", "float", "mnist", "few_labels", "huge_label", "label_99", "no_images"],
    )
    def test_foreign_pickle(self, tmp_path: Path, batch: object, message: str) -> None:
        write_python(tmp_path / "data")
        file = tmp_path / "data" / "data_batch_1"
        file.write_bytes(pickle.dumps(batch))
        self.refuses(tmp_path / "data", message, str(file))


class TestCache:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        write_images(tmp_path / "data")
        return pack(tmp_path / "data")

    @staticmethod
    def stored(folder: Path) -> list[Path]:
        return sorted(folder.glob("*-train.safetensors"))

    def test_second_load_decodes_nothing(self, source: Path, decoded: list[str], cache_folder: Path) -> None:
        load(source)
        assert len(decoded) == TRAIN + TEST
        decoded.clear()
        assert_is_synthetic(load(source))
        assert not decoded
        assert not list(cache_folder.glob(".*"))

    @pytest.mark.parametrize("damage", ["cut", "empty", "bit", "foreign"])
    def test_damaged_cache_is_rebuilt(self, source: Path, decoded: list[str], cache_folder: Path, damage: str) -> None:
        load(source)
        (file,) = self.stored(cache_folder)
        content = file.read_bytes()
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        file.write_bytes({"cut": content[:-5], "empty": b"", "bit": flipped, "foreign": b"hello" * 99}[damage])
        decoded.clear()
        assert_is_synthetic(load(source))
        assert len(decoded) == TRAIN
        assert_is_synthetic(load(source))
        assert len(decoded) == TRAIN

    @pytest.mark.parametrize("kind", ["tar", "folder"])
    def test_changed_source_is_decoded_again(
        self, source: Path, decoded: list[str], cache_folder: Path, kind: str
    ) -> None:
        path = source if kind == "tar" else source.with_suffix("")
        load(path)
        changed = path if kind == "tar" else next((path / "train" / "cat").iterdir())
        os.utime(changed, (1, 1))
        decoded.clear()
        load(path)
        assert len(decoded) == TRAIN + TEST
        assert len(self.stored(cache_folder)) == 1

    def test_interrupted_write_leaves_nothing(
        self, source: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(cache.os, "replace", interrupt)
            with pytest.raises(KeyboardInterrupt):
                load(source)
        assert not list(cache_folder.iterdir())
        assert_is_synthetic(load(source))

    def test_full_disk_is_only_a_warning(
        self, source: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(cache.os, "fsync", full)
        with pytest.warns(UserWarning, match=r"No space left on device: '.*\.safetensors'; set CSAM_CACHE"):
            assert_is_synthetic(load(source))
        assert not list(cache_folder.iterdir())

    def test_unusable_folder_is_only_a_warning(self, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CSAM_CACHE", str(source / "below_a_file"))
        with pytest.warns(UserWarning, match="decoded images are not kept"):
            assert_is_synthetic(load(source))

    def test_leftovers_of_a_killed_process_are_removed(self, source: Path, cache_folder: Path) -> None:
        load(source)
        (file,) = self.stored(cache_folder)
        old, young = (cache_folder / f".csam-tmp-{name}-{file.name}" for name in ("old", "young"))
        for part in (old, young):
            part.write_bytes(b"half")
        os.utime(old, (1, 1))
        file.unlink()
        load(source)
        assert not old.exists()
        assert young.exists()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> data.Dataset:
    archive = shared_data("cifar10-images.tar.xz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CSAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return data.load("cifar10", archive, train_subset=100, test_subset=500)


class TestRealImages:
    """The archive of real JPEG files, and the published network on it."""

    def test_what_it_holds(self, real: data.Dataset) -> None:
        assert real.classes == cifar10.CLASSES
        assert real.train_x.shape == (100, 3, 32, 32)
        assert real.train_y.bincount().tolist() == [10] * 10
        assert real.test_y.bincount().tolist() == [50] * 10
        assert len(real.test_x.flatten(1).unique(dim=0)) == 500
        assert 100 < real.test_x.float().mean() < 140

    def test_class_folders_are_read_alike(self, real: data.Dataset) -> None:
        same = data.load("images", shared_data("cifar10-images.tar.xz"), train_subset=100, test_subset=500)
        for name in ("train_x", "train_y", "test_x", "test_y"):
            assert torch.equal(getattr(same, name), getattr(real, name))
        assert same.classes == real.classes

    def test_published_network_reaches_its_accuracy(self, real: data.Dataset) -> None:
        model = models.build("resnet20", **models.NORMALIZATION["imagenet"]._asdict()).eval()
        models.load_weights(model, shared_data("cifar10-resnet20.safetensors"))
        with torch.no_grad():
            predicted = model(data.to_unit(real.test_x)).argmax(1)
        accuracy = (predicted == real.test_y).float().mean().item()
        # 0.81 on all 5,000: four standard errors of 500 images.
        assert abs(accuracy - 0.81) < 0.07


# CIFAR-10-C


def corrupted(folder: Path, rows: int = 15) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)
    np.save(folder / "fog.npy", images)
    np.save(folder / "labels.npy", (np.arange(rows) % (rows // 5)).astype(np.uint8))
    return images


def archived(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, images=np.zeros(3))


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_cifar10c_gives_the_images_of_a_severity(tmp_path: Path, severity: int) -> None:
    images = corrupted(tmp_path)
    found = data.load("cifar10c", tmp_path, corruption="fog", severity=severity)
    assert torch.equal(found.test_x, torch.from_numpy(images[3 * severity - 3 : 3 * severity]).permute(0, 3, 1, 2))
    assert found.test_y.tolist() == [0, 1, 2]
    assert (found.num_classes, found.in_channels, len(found.train_x)) == (10, 3, 0)


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (None, {"corruption": "rain"}, r"corruption must be one of those in .* \(fog\), got 'rain'"),
        (None, {"severity": 6}, r"severity must be in \[1, 5\], got 6"),
        (None, {"severity": None}, "severity must be given, 1 to 5"),
        (None, {"severity": 2.5}, "severity must be an integer, got 2.5"),
        (None, {"train_subset": 5}, "train_subset"),
        (lambda f: np.save(f / "fog.npy", np.zeros((14, 32, 32, 3), np.uint8)), {}, "with as many labels, got uint8"),
        (lambda f: np.save(f / "fog.npy", np.zeros((15, 32, 32, 3))), {}, "must be uint8"),
        (lambda f: np.save(f / "labels.npy", np.full(15, 10)), {}, "must hold labels 0 to 9"),
        (lambda f: (f / "fog.npy").write_bytes((f / "fog.npy").read_bytes()[:-1]), {}, "not a whole .npy file"),
        (lambda f: (f / "fog.npy").write_text("no"), {}, "not a whole .npy file"),
        (lambda f: (f / "fog.npy").write_bytes(b""), {}, "fog.npy is not a whole .npy file: No data"),
        (lambda f: (f / "fog.npy").write_bytes(b"PK\x03\x04"), {}, "fog.npy is not a whole .npy file"),
        (lambda f: archived(f / "fog.npy"), {}, "fog.npy must be an .npy file of one array, got an .npz archive"),
        (lambda f: np.save(f / "labels.npy", np.array(3)), {}, r"labels.npy must be labels \[5 N\], got int64 \[\]"),
    ],
)
def test_bad_cifar10c_is_refused(tmp_path: Path, spoil: Any, options: dict[str, Any], message: str) -> None:
    corrupted(tmp_path)
    if spoil:
        spoil(tmp_path)
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        data.load("cifar10c", tmp_path, **{"corruption": "fog", "severity": 2} | options)


def test_only_cifar10c_is_corrupted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="corruption must be None for digits, got 'fog'"):
        data.load("digits", corruption="fog")
    with pytest.raises(FileNotFoundError, match="unpacked folder of CIFAR-10-C"):
        data.load("cifar10c", tmp_path / "no", corruption="fog", severity=1)


# Class folders


def photograph(path: Path, size: tuple[int, int], seed: int, mode: str = "RGB") -> None:
    """Smooth random pixels of (width, height), as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path)


def album(folder: Path, *splits: str, size: tuple[int, int] = (12, 10)) -> Path:
    """Three images of "b", two of "a" in each split; "" for none."""
    for number, split in enumerate(splits):
        for i, name in enumerate(("b/0.png", "b/1.png", "b/2.PNG", "a/3.png", "a/4.png")):
            photograph(folder / split / name, size, 10 * number + i)
    (folder / "notes.txt").write_text("no image")
    return folder


def pixels(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)


def test_images_are_labelled_by_sorted_folders(tmp_path: Path) -> None:
    folder = album(tmp_path / "own", "")
    photograph(folder / "a" / "5.png", (12, 10), 5, mode="L")
    found = data.load("images", folder)
    assert (found.name, found.classes, found.test_y.tolist()) == ("images", ["a", "b"], [0, 0, 0, 1, 1, 1])
    files = [folder / name for name in ("a/3.png", "a/4.png", "a/5.png", "b/0.png", "b/1.png", "b/2.PNG")]
    assert torch.equal(found.test_x, torch.stack([pixels(file) for file in files]))
    assert (found.train_x.shape, found.in_channels) == ((0, 3, 10, 12), 3)
    packed = data.load("images", pack(folder, "gz"))
    assert torch.equal(packed.test_x, found.test_x)
    assert packed.test_y.tolist() == found.test_y.tolist()


@pytest.mark.parametrize(("splits", "test"), [(("train", "val"), "val"), (("val", "test"), "test"), (("val",), "val")])
def test_images_of_splits(tmp_path: Path, decoded: list[str], splits: tuple[str, ...], test: str) -> None:
    folder = album(tmp_path / "own", *splits)
    found = data.load("images", folder)
    assert torch.equal(found.test_x[0], pixels(folder / test / "a/3.png"))
    assert (len(found.test_x), len(found.train_x)) == (5, 5 if "train" in splits else 0)
    del decoded[:]
    apart = data.load("images", folder, train_images=0, train_subset=1, test_subset=2)
    assert (len(apart.train_x), sorted(apart.test_y.tolist())) == (0, [0, 1])
    assert len(decoded) == 2  # only what is kept
    if "train" in splits:
        for most, kept in ((2, [0, 2]), (9, [0, 1, 2, 3, 4])):
            assert torch.equal(data.load("images", folder, train_images=most).train_x, found.train_x[kept])
    assert torch.equal(data.load("images", pack(folder)).test_x, found.test_x)


@pytest.mark.parametrize("size", [(90, 60), (60, 91), (64, 64)])
def test_images_are_fitted_as_torchvision_does(tmp_path: Path, size: tuple[int, int]) -> None:
    folder = album(tmp_path / "own", "", size=size)
    found = data.load("images", folder, resize=32, crop=28).test_x[0]
    whole = pixels(folder / "a" / "3.png")
    width, height = (int(32 * side / min(size)) for side in size)
    small = torch.nn.functional.interpolate(whole[None].float(), (height, width), mode="bilinear", antialias=True)[0]
    top, left = round((height - 28) / 2), round((width - 28) / 2)
    assert (small[:, top : top + 28, left : left + 28] - found).abs().max() < 1.5  # Pillow rounds between the axes
    assert data.load("images", folder, resize=32).test_x.shape[2:] == (height, width)
    top, left = round((size[1] - 28) / 2), round((size[0] - 28) / 2)
    assert torch.equal(data.load("images", folder, crop=28).test_x[0], whole[:, top : top + 28, left : left + 28])


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (None, {"crop": 11}, r"3\.png: crop must be at most 10, the image's shorter side, got 11"),
        (None, {"crop": 0}, "crop must be >= 1, got 0"),
        (None, {"resize": 2.5}, "resize must be an integer, got 2.5"),
        (None, {"test_subset": 6}, "test_subset must be <= 5"),
        (None, {"corruption": "fog"}, "corruption must be None for images"),
        (lambda f: photograph(f / "b/9.png", (11, 10), 0), {}, r"9\.png must be 12x10 pixels as .*3\.png \(resize and"),
        (lambda f: Image.fromarray(np.zeros((9, 9), np.uint16)).save(f / "b/9.png"), {}, r"9\.png must have 8 bits a"),
        (lambda f: (f / "b/9.jpg").write_bytes(b"no"), {}, r"9\.jpg is not a whole image"),
        (lambda f: album(f, "train"), {}, "holds train/ alone"),
        (lambda f: (f / "c").mkdir(), {}, r"own/c must hold images \(jpg, .*\), or not lie beside the classes"),
        (lambda f: (album(f, "val") / "val" / "c").mkdir(), {}, "val/c must hold images"),
        (lambda f: shutil.rmtree(f / "b"), {}, "of two classes or more; .* holds a/ alone"),
        (lambda f: (f.rename(f.with_name("x")), f.mkdir(), f.with_name("x").rename(f / "x")), {}, "own holds x$"),
        (lambda f: album(album(f, "train"), "val", size=(9, 9)), {}, "must be of one size .*, got 12x10 and 9x9"),
        (lambda f: photograph(album(f, "train", "val") / "val/c/0.png", (12, 10), 0), {}, "train/c must hold images"),
    ],
)
def test_bad_images_are_refused(tmp_path: Path, spoil: Any, options: dict[str, Any], message: str) -> None:
    folder = album(tmp_path / "own", "")
    if spoil:
        spoil(folder)
    with pytest.raises((TypeError, ValueError), match=message):
        data.load("images", folder, **options)


def test_images_of_a_tar_lie_at_one_depth(tmp_path: Path) -> None:
    folder = album(tmp_path / "own", "val")
    photograph(folder / ".trash" / "val" / "c" / "0.png", (12, 10), 0)
    photograph(folder / "logo.png", (3, 4), 0)
    found = data.load("images", pack(folder, root="some/where"))
    assert torch.equal(found.test_x, data.load("images", folder).test_x)
    photograph(folder / "more" / "val" / "a" / "0.png", (12, 10), 0)
    with pytest.raises(ValueError, match=r"own\.tar holds such in some/where/ and some/where/more/"):
        data.load("images", pack(folder, root="some/where"))
    (tmp_path / "notes").mkdir()
    with pytest.raises(ValueError, match=r"notes\.tar holds no such images"):
        data.load("images", pack(tmp_path / "notes"))


def test_images_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"a folder or a tar of images, .*nowhere does not exist"):
        data.load("images", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="data_dir must say where the images are"):
        data.load("images")
    with pytest.raises(ValueError, match="crop must be None for digits, got 8"):
        data.load("digits", crop=8)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 4 * 3 * 12, "SC_PAGE_SIZE": 10}[name])
    with pytest.raises(ValueError, match="images must be at most 4, which this machine's memory holds, got 5; test"):
        data.load("images", album(tmp_path / "own", ""))
