"""The TSV record: resumable, strict about what it reads, and re-plotting published results."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from conftest import shared_data
from csam.evaluation import Row, TsvWriter, certified_accuracy, certify_dataset, pca, read_tsv
from csam.smoothing import ABSTAIN, Smooth

HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
ROWS = [Row(3, 1, 1, 0.1 + 0.2, True, 1.5), Row(0, 2, ABSTAIN, 0.0, False, 0.25), Row(7, 0, 1, 0.5, False, 2.0)]


class Brighter(nn.Module):
    """Class 1 where the mean pixel exceeds 1/2."""

    def forward(self, x: Tensor) -> Tensor:
        score = x.mean((1, 2, 3)) - 0.5
        return torch.stack([-score, score], 1)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "record.tsv"
    with TsvWriter(path) as writer:
        for row in ROWS:
            writer.append(row)
    return path


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(8, 1, 3, 3, generator=generator), torch.randint(2, (8,), generator=generator)


def certify(path: Path, images: tuple[Tensor, Tensor], **kwargs: object) -> list[Row]:
    return certify_dataset(Smooth(Brighter(), 2, 0.25), *images, path, n0=10, n=100, **kwargs)


def without_time(rows: list[Row]) -> list[tuple[object, ...]]:
    return [(r.idx, r.label, r.predict, r.radius, r.correct) for r in rows]


# The file


def test_rows_come_back_to_the_last_bit(record: Path) -> None:
    assert record.read_text().startswith(HEADER + "3\t1\t1\t0.30000000000000004\t1\t1.5\n0\t2\t-1\t0.0\t0\t0.25\n")
    assert read_tsv(record) == ROWS


def test_each_row_is_on_the_disk_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "record.tsv", []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(path.read_text().count("\n")))
    with TsvWriter(path) as writer:
        for row in ROWS:
            writer.append(row)
            assert read_tsv(path)[-1] == row
    assert synced == [1, 2, 3, 4]


def test_a_killed_run_resumes_from_any_byte(record: Path) -> None:
    whole = record.read_bytes()
    for length in range(len(whole) + 1):
        record.write_bytes(whole[:length])
        readable = read_tsv(record)
        with TsvWriter(record) as writer:
            kept = len(writer.rows)
            assert writer.rows == ROWS[:kept] == readable[:kept]
            assert kept == max(0, whole[:length].count(b"\n") - 1)
            for row in ROWS[kept:]:
                writer.append(row)
        assert record.read_bytes() == whole


def test_garbage_after_the_last_newline_is_a_torn_row(record: Path) -> None:
    whole = record.read_bytes()
    record.write_bytes(whole + b"\x00\xff\xfe")
    assert read_tsv(record) == ROWS
    with TsvWriter(record) as writer:
        assert writer.rows == ROWS
    assert record.read_bytes() == whole


def test_a_whole_last_line_without_newline_is_read_from_other_tools(tmp_path: Path) -> None:
    path = tmp_path / "other.tsv"
    path.write_text(HEADER + "0\t1\t1\t0.5\t1\t0:01:02.5\r\n5\t1\t1\t0.75\t1\t0:00:01")
    assert read_tsv(path) == [Row(0, 1, 1, 0.5, True, 62.5), Row(5, 1, 1, 0.75, True, 1.0)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1\t1\t1\t0.5\t1", "must have 6 fields, got 5"),
        ("x\t1\t1\t0.5\t1\t1", "invalid literal"),
        ("-1\t1\t1\t0.5\t1\t1", "idx and label must be >= 0"),
        ("1\t1\t-2\t0.5\t1\t1", "predict >= -1"),
        ("1\t1\t1\tnan\t1\t1", "radius must be finite"),
        ("1\t1\t1\t-0.5\t1\t1", "radius must be finite and >= 0"),
        ("1\t1\t1\t0.5\tyes\t1", "correct must be 0 or 1"),
        ("0\t1\t1\t0.5\t1\t1", "idx 0 was given before"),
        ("", "must have 6 fields, got 0"),
    ],
)
def test_a_malformed_line_is_an_error_that_names_it(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.tsv"
    path.write_text(HEADER + f"0\t1\t1\t0.5\t1\t1\n{line}\n2\t1\t1\t0.5\t1\t1\n")
    for read in (read_tsv, TsvWriter):
        with pytest.raises(ValueError, match=message) as error:
            read(path)
        assert f"{path}, line 3: " in str(error.value)


@pytest.mark.parametrize("content", [b"a\tb\n1\t2\n", b"not a record", b"\x89PNG\r\n\x1a\n\xff\n"])
def test_a_foreign_file_is_refused_and_kept(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    for read in (read_tsv, TsvWriter):
        with pytest.raises(ValueError, match=str(path)):
            read(path)
    assert path.read_bytes() == content


def test_a_full_disk_names_the_file_and_leaves_whole_lines(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    whole = record.read_bytes()
    with TsvWriter(record) as writer:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as error:
            writer.append(Row(9, 0, 0, 1.0, True, 1.0))
    assert error.value.filename == str(record)
    assert record.read_bytes() == whole


# Whole data sets


def test_certify_dataset_records_every_image(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    seen: list[Row] = []
    rows = certify(tmp_path / "r.tsv", images, on_result=seen.append)
    assert rows == seen
    assert [r.idx for r in rows] == list(range(8))
    for row in rows:
        answer = Smooth(Brighter(), 2, 0.25).certify(x[row.idx], n0=10, n=100, stream=row.idx)
        assert (row.predict, row.radius) == answer
        assert row.correct == (row.predict == int(y[row.idx]))
    assert without_time(read_tsv(tmp_path / "r.tsv")) == without_time(rows)


def test_an_interrupted_run_ends_with_the_same_rows(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    def interrupt(row: Row) -> None:
        if row.idx == 3:
            raise KeyboardInterrupt

    whole = certify(tmp_path / "whole.tsv", images)
    path = tmp_path / "killed.tsv"
    with pytest.raises(KeyboardInterrupt):
        certify(path, images, on_result=interrupt)
    assert [r.idx for r in read_tsv(path)] == [0, 1, 2, 3]
    with path.open("a") as file:
        file.write("4\t1\t1\t0.")
    again: list[Row] = []
    rows = certify(path, images, on_result=again.append)
    assert [r.idx for r in again] == [4, 5, 6, 7]
    assert without_time(rows) == without_time(whole)


def test_the_order_of_images_does_not_matter(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    forward = certify(tmp_path / "a.tsv", images)
    backward = certify(tmp_path / "b.tsv", images, indices=[6, 4, 2])
    assert without_time(backward) == without_time([forward[i] for i in (6, 4, 2)])


def test_bytes_are_pixels_over_255(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    x, y = (images[0] * 255).to(torch.uint8), images[1].tolist()
    as_bytes = certify(tmp_path / "bytes.tsv", (x, y))
    as_floats = certify(tmp_path / "floats.tsv", (x.float() / 255, y))
    assert without_time(as_bytes) == without_time(as_floats)


def test_the_record_of_another_data_set_is_refused(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    path = tmp_path / "r.tsv"
    certify(path, images)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"r.tsv is the record of another data set: image 0 has label"):
        certify(path, (images[0], 1 - images[1]))
    with pytest.raises(ValueError, match="the data set has only 5 images"):
        certify(path, (images[0][:5], images[1][:5]))
    assert path.read_bytes() == before


def test_wrong_arguments(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    path = tmp_path / "r.tsv"
    with pytest.raises(ValueError, match=r"x must be a tensor \[N, C, H, W\] with one label each"):
        certify(path, (images[0], images[1][:3]))
    with pytest.raises(ValueError, match=r"indices must be in \[0, 7\], got 8"):
        certify(path, images, indices=[0, 8])
    with pytest.raises(TypeError, match=r"indices must be an integer, got 1.5"):
        certify(path, images, indices=[1.5])
    with pytest.raises(ValueError, match=r"y must be in .* got -1"):
        certify(path, (images[0], -torch.ones_like(images[1])))
    with pytest.raises(TypeError, match=r"y must be an integer, got 0.5"):
        certify(path, (images[0], [0.5] * len(images[0])))
    with pytest.raises(ValueError, match="alpha must be in"):
        certify(path, images, alpha=2)
    assert not path.exists() or path.read_text() == HEADER


# Accuracies


def test_certified_accuracy_counts_the_radius_itself() -> None:
    rows = [*ROWS, Row(9, 1, 1, 0.75, True, 1.0)]
    assert [certified_accuracy(rows, r) for r in (0, 0.1 + 0.2, 0.5, 0.75, 0.76)] == [0.5, 0.5, 0.25, 0.25, 0]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("cohen-cifar10-sigma_0.25.tsv", {0.25: 0.60, 0.5: 0.43, 0.75: 0.27}),
        ("cohen-cifar10-sigma_0.50.tsv", {0.25: 0.55, 0.5: 0.41, 0.75: 0.32, 1.0: 0.23}),
    ],
)
def test_published_records_give_the_published_accuracies(name: str, published: dict[float, float]) -> None:
    rows = read_tsv(shared_data(name))
    assert len(rows) == 500
    got = {radius: certified_accuracy(rows, radius) for radius in published}
    assert got == pytest.approx(published, abs=0.0051)


def test_pca_needs_a_small_bound_and_a_right_answer() -> None:
    bounds, correct = [1e-9, 1e-3, 1e-9, 1.0], [True, True, False, True]
    assert [pca(bounds, correct, eps) for eps in (1e-3, 1e-2, 1.0)] == [0.25, 0.5, 0.5]


def test_accuracies_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="rows must hold at least one image"):
        certified_accuracy([], 0.5)
    with pytest.raises(ValueError, match="radius must be >= 0"):
        certified_accuracy(ROWS, -0.5)
    with pytest.raises(ValueError, match="one entry an image, got 2 and 1"):
        pca([0.1, 0.2], [True], 0.1)
    with pytest.raises(ValueError, match="eps must be in"):
        pca([0.1], [True], 0.0)
    with pytest.raises(ValueError, match=r"bounds must be in \[0, 1\]"):
        pca([2.0], [True], 0.1)
