"""Certifying data sets, the field's TSV record, and the accuracies that are read off it.

The record has one line an image, `idx label predict radius correct time`, as in the code published with
Cohen, Rosenfeld and Kolter (2019): predict is -1 where the smoothed classifier abstains, correct is 0 or 1,
time is in seconds (h:mm:ss is read too). Every line is flushed to the disk before the next image is started.
Only a line that ends in a newline counts: what a killed run left of its last line is dropped when the run
goes on.
"""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from csam.data import to_unit
from csam.smoothing import ABSTAIN, Smooth
from csam_kernels import checks

COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
HEADER = "\t".join(COLUMNS)


@dataclass(frozen=True)
class Row:
    """One image of a record; str(row) is its line, the radius to the last bit."""

    idx: int
    label: int
    predict: int
    radius: float
    correct: bool
    time: float

    def __str__(self) -> str:
        values = (self.idx, self.label, self.predict, self.radius, int(self.correct), round(self.time, 3))
        return "\t".join(map(str, values))


def read_tsv(path: str | os.PathLike[str]) -> list[Row]:
    """Rows of a record in file order. A last line without a newline counts only if it is whole.

    A file that was killed before its header was whole has no rows.

    Raises:
        OSError: the file cannot be read.
        ValueError: another header, a malformed line or an index given twice, naming file and line.
    """
    lines, torn = _lines(Path(path))
    if torn and lines:
        with suppress(ValueError):
            _row(torn)
            lines.append(torn)
    return _rows(Path(path), lines)


class TsvWriter:
    """Appends rows to a record, each flushed to the disk before `append` returns; a context manager.

    A new file gets its header; of an existing one the torn last line is cut off and the rest read into
    `rows`. Should an append fail (a full disk), the file is cut back to its last whole line.

    Raises:
        OSError: the file cannot be written; the message names it.
        ValueError: as in `read_tsv`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        lines = _lines(self.path)[0] if self.path.exists() else []
        self.rows = _rows(self.path, lines)
        self._file = self.path.open("ab", buffering=0)
        self._size = sum(len(line.encode()) + 1 for line in lines)
        try:
            self._file.truncate(self._size)
            if not lines:
                self._write(HEADER)
        except BaseException:
            self.close()
            raise

    def append(self, row: Row) -> None:
        self._write(str(row))
        self.rows.append(row)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TsvWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, line: str) -> None:
        data = f"{line}\n".encode()
        try:
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except BaseException as error:
            with suppress(OSError):
                self._file.truncate(self._size)
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            raise
        self._size += len(data)


def certify_dataset(
    smooth: Smooth,
    x: Tensor,
    y: Tensor | Sequence[int],
    path: str | os.PathLike[str],
    *,
    indices: Sequence[int] | None = None,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    batch_size: int = 400,
    on_result: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Certify images one by one into a record; images that the record already holds are not done again.

    Image i uses stream i, so its certificate does not depend on which images were done before it, or when.
    The record does not hold sigma, seed, n0, n and alpha: whoever resumes must pass the same.

    Args:
        smooth: the smoothed classifier.
        x: images [N, C, H, W]; uint8 (divided by 255) or floating point in the unit the model takes.
        y: labels [N], >= 0.
        path: of the TSV file, made or continued.
        indices: of the images to certify, default all.
        n0, n, alpha, batch_size: as in `Smooth.certify`.
        on_result: called with each new row, after it is on the disk.

    Returns:
        The rows of `indices`, in their order.

    Raises:
        OSError: the file cannot be read or written.
        TypeError: a label or an index that is not an integer.
        ValueError: x and y of different length, a negative label, an index out of range, or a record that is
            malformed or holds another label for an image (it is of another data set).
    """
    labels = [checks.integer("y", label, low=0) for label in y]
    if not isinstance(x, Tensor) or x.dim() != 4 or len(x) != len(labels):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a tensor [N, C, H, W] with one label each, got {got} and {len(labels)} labels")
    asked = range(len(labels)) if indices is None else indices
    wanted = [checks.integer("indices", i, low=0, high=len(labels) - 1) for i in asked]
    with TsvWriter(path) as record:
        done = {row.idx: row for row in record.rows}
        for row in record.rows:
            if row.idx >= len(labels) or row.label != labels[row.idx]:
                has = f"label {labels[row.idx]}" if row.idx < len(labels) else f"only {len(labels)} images"
                raise ValueError(
                    f"{record.path} is the record of another data set: image {row.idx} has label {row.label} "
                    f"there, the data set has {has}"
                )
        for i in wanted:
            if i in done:
                continue
            start = time.perf_counter()
            pixels = to_unit(x[i]) if x.dtype == torch.uint8 else x[i]
            predict, radius = smooth.certify(pixels, n0, n, alpha, batch_size, stream=i)
            seconds = time.perf_counter() - start
            done[i] = Row(i, labels[i], predict, radius, predict == labels[i], seconds)
            record.append(done[i])
            if on_result is not None:
                on_result(done[i])
    return [done[i] for i in wanted]


def certified_accuracy(rows: Sequence[Row], radius: float) -> float:
    """Fraction of images that are correct with a certified radius of at least `radius` (>= 0).

    Raises:
        ValueError: no rows, or a negative or NaN radius.
    """
    if not rows:
        raise ValueError("rows must hold at least one image, got none")
    if not radius >= 0:
        raise ValueError(f"radius must be >= 0, got {radius}")
    return sum(row.correct and row.radius >= radius for row in rows) / len(rows)


def pca(bounds: Sequence[float], correct: Sequence[bool], eps: float) -> float:
    """Probabilistically certified accuracy of CC-Cert: fraction with bound < eps and the clean prediction
    correct.

    Raises:
        ValueError: no images, lists of different length, a bound outside [0, 1], or eps outside (0, 1].
    """
    if not len(bounds) or len(bounds) != len(correct):
        raise ValueError(f"bounds and correct must have one entry an image, got {len(bounds)} and {len(correct)}")
    if not 0 < eps <= 1:
        raise ValueError(f"eps must be in (0, 1], got {eps}")
    if not all(0 <= bound <= 1 for bound in bounds):
        raise ValueError("bounds must be in [0, 1]")
    return sum(bound < eps and bool(right) for bound, right in zip(bounds, correct, strict=True)) / len(bounds)


def _lines(path: Path) -> tuple[list[str], str]:
    """The lines that end in a newline, the first of them the header, and what stands after the last one."""
    *lines, torn = path.read_bytes().split(b"\n")
    try:
        text = [line.decode() for line in lines]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}") from error
    rest = torn.decode(errors="replace")
    if not (text[0].split() == list(COLUMNS) if text else HEADER.startswith(rest)):
        raise ValueError(f"{path}, line 1: header must be {' '.join(COLUMNS)}, got {(text or [rest])[0][:80]!r}")
    return text, rest


def _rows(path: Path, lines: list[str]) -> list[Row]:
    rows: dict[int, Row] = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            row = _row(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if row.idx in rows:
            raise ValueError(f"{path}, line {number}: idx {row.idx} was given before")
        rows[row.idx] = row
    return list(rows.values())


def _row(line: str) -> Row:
    fields = line.split()
    if len(fields) != len(COLUMNS):
        raise ValueError(f"a row must have {len(COLUMNS)} fields, got {len(fields)} in {line[:80]!r}")
    idx, label, predict, radius, correct, seconds = fields
    if correct not in ("0", "1"):
        raise ValueError(f"correct must be 0 or 1, got {correct!r}")
    row = Row(int(idx), int(label), int(predict), float(radius), correct == "1", _seconds(seconds))
    if row.idx < 0 or row.label < 0 or row.predict < ABSTAIN:
        raise ValueError(f"idx and label must be >= 0 and predict >= {ABSTAIN}, got {line!r}")
    if not 0 <= row.radius < math.inf:
        raise ValueError(f"radius must be finite and >= 0, got {radius}")
    return row


def _seconds(text: str) -> float:
    """Seconds from `12.3` or from `0:00:12.3`, the form of Cohen's code."""
    seconds = 0.0
    for part in text.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds
