"""The TSV record: strict about what it reads, whole after a kill; published results come out as published."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest

from conftest import shared_data
from csam.records import Row, TsvWriter, certified_accuracy, pca, read_tsv
from csam.smoothing import ABSTAIN

HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
ROWS = [Row(3, 1, 1, 0.1 + 0.2, True, 1.5), Row(0, 2, ABSTAIN, 0.0, False, 0.25), Row(7, 0, 1, 0.5, False, 2.0)]


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "record.tsv"
    with TsvWriter(path) as writer:
        for row in ROWS:
            writer.append(row)
    return path


# The file


def test_rows_come_back_to_the_last_bit(record: Path) -> None:
    assert record.read_text().startswith(HEADER + "3\t1\t1\t0.30000000000000004\t1\t1.5\n0\t2\t-1\t0.0\t0\t0.25\n")
    assert read_tsv(record) == ROWS


def test_each_row_is_there_before_the_next_and_on_the_disk_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "record.tsv", []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(path.read_text().count("\n")))
    with TsvWriter(path) as writer:
        for row in ROWS:
            writer.append(row)
            assert read_tsv(path)[-1] == row
    assert synced == [1, 4]


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


@pytest.mark.parametrize(("days", "seconds"), [("1 day", 86412.3), ("12 days", 1036812.3)])
def test_days_and_a_byte_order_mark_are_read(days: str, seconds: float, tmp_path: Path) -> None:
    path = tmp_path / "other.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + f"{HEADER}0\t1\t1\t0.5\t1\t{days}, 0:00:12.3\n".encode())
    assert read_tsv(path) == [Row(0, 1, 1, 0.5, True, pytest.approx(seconds))]
    before = path.read_bytes()
    with TsvWriter(path) as writer:
        writer.append(ROWS[0])
    assert path.read_bytes() == before + f"{ROWS[0]}\n".encode()


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
        ("1\t1\t1\t0.5\t0\t1", "correct must be 1 where predict is the label and 0 elsewhere"),
        ("1\t1\t0\t0.5\t1\t1", "correct must be 1 where"),
        ("1\t1\t-1\t0.0\t1\t1", "correct must be 1 where"),
        ("1\t1\t-1\t0.5\t0\t1", "radius must be 0 where predict is -1, got 0.5"),
        ("1\t1\t1\t0.5\t1\tnan", "time must be finite and >= 0, got 'nan'"),
        ("1\t1\t1\t0.5\t1\t-1.2", "time must be finite and >= 0, got '-1.2'"),
        ("1\t1\t1\t0.5\t1\t-1 day, 23:59:59", "time must be finite and >= 0, got '-1 day"),
        ("1\t1\t1\t0.5\t1\t1\t2", "could not convert string to float"),
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
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[:5])

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    whole = record.read_bytes()
    with TsvWriter(record) as writer, Full(record, "ab") as file, monkeypatch.context() as patch:
        patch.setattr(writer, "_file", file)
        with pytest.raises(OSError, match="No space left") as error:
            writer.append(Row(9, 0, 0, 1.0, True, 1.0))
    assert error.value.filename == str(record)
    assert record.read_bytes() == whole
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error, TsvWriter(record):
        pass
    assert error.value.filename == str(record)


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
