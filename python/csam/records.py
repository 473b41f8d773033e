"""Files of certificates: the field's TSV record with its votes, CC-Cert's bounds, and the accuracies read off them.

The record has one line an image, `idx label predict radius correct time`, as in the code published with
Cohen, Rosenfeld and Kolter (2019): predict is -1 where the smoothed classifier abstains, correct is 0 or 1,
time is in seconds (h:mm:ss is read too, after days). Only a line that ends in a newline counts: what a killed run left
of its last line is dropped when the run goes on.

Beside the record NAME.tsv lies NAME.votes.jsonl, a `csam.runs.Journal`: first all that decides a certificate, then what
each image's votes were when it was finished, and every few seconds those of images under way. The law of the noise is
there too, and the norm of the radii: the lines of the record itself have no place for it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any

from csam.runs import Journal, RunError, cut_back, differences
from csam.sequential import ABSTAIN

COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
HEADER = "\t".join(COLUMNS)
BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"  # which some editors put in front
GAUSSIAN = {"noise": "gaussian", "norm": "l2"}  # records that do not say are from before there were other laws
BOUND_COLUMNS = ("idx", "label", "predict", "bound", "correct", "margin", "flips", "time")


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
    """Appends rows to a record; a context manager. Readers see a row at once; it is flushed to the disk at the end.

    A new file gets its header; of an existing one the torn last line is cut off and the rest read into
    `rows`, up to the first line with a zero byte, which is what a power cut may leave of data that was not yet written.
    Should an append fail (a full disk), the file is cut back to its last whole line.

    Raises:
        OSError: the file cannot be written; the message names it.
        RunError: another writer has it open.
        ValueError: as in `read_tsv`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = self.path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lines = list(takewhile(lambda line: "\0" not in line, _lines(self.path)[0]))
            self.rows = _rows(self.path, lines)
            self._size = sum(len(line.encode()) + 1 for line in lines)
            self._file.truncate(self._size)
            if not lines:
                self._write(HEADER)
                self._sync()
        except BlockingIOError:
            self.close()
            raise RunError(f"{self.path} is being written by another run; wait for it or choose another file") from None
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
        try:
            if error is None:
                self._sync()
        finally:
            self.close()

    def _sync(self) -> None:
        with cut_back(self.path, self._size):
            os.fsync(self._file.fileno())

    def _write(self, line: str) -> None:
        data = f"{line}\n".encode()
        with cut_back(self.path, self._size):
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size += len(data)


def votes_path(path: str | os.PathLike[str]) -> Path:
    """Where the votes of the record at `path` are kept."""
    return Path(path).with_name(f"{Path(path).stem}.votes.jsonl")


def read_votes(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """What decides the certificates of the record at `path`, and the last that is known of the votes of each image.

    A finished image has idx, predict, radius, samples (n0 included), votes, reason, time, pixels (a digest), and nan
    where samples had NaN logits; one under way the state of its `csam.sequential.Certification`, time and pixels.
    ({}, {}) where no votes are kept.

    Raises:
        RunError: a damaged or foreign file.
    """
    try:
        header, *records = Journal.read(votes_path(path)) or [{"recipe": {}}]
        recipe = dict(header["recipe"])
        return {**GAUSSIAN, **recipe} if recipe else {}, {int(record["idx"]): record for record in records}
    except KeyError as error:
        raise RunError(f"{votes_path(path)} does not hold votes: {error} is missing") from error


def open_votes(record: TsvWriter, recipe: dict[str, Any]) -> tuple[Journal, dict[int, dict[str, Any]]]:
    """The journal beside a record, begun if there is none, and the last that it holds of each image.

    Raises:
        RunError: as in `open_bounds`, or a row that does not have its votes there.
    """
    place = votes_path(record.path)
    journal = Journal(place)
    if not journal.records:
        if record.rows:
            raise RunError(
                f"{record.path} holds {len(record.rows)} rows, but {place.name}, which says how they were made, is "
                "missing; bring it back or choose another file"
            )
        journal.append({"recipe": recipe})
    begun, known = read_votes(record.path)
    _same_recipe(record.path, begun, recipe)
    _check_rows(record.path, record.rows, known)
    return journal, known


def _check_rows(path: str | os.PathLike[str], rows: Iterable[Row], known: Mapping[int, Mapping[str, Any]]) -> None:
    for row in rows:
        votes = known.get(row.idx, {})
        if (row.predict, row.radius) != (votes.get("predict"), votes.get("radius")):
            raise RunError(
                f"{path} is damaged: the row of image {row.idx} is not the one of its votes in "
                f"{votes_path(path).name}; without its row the image is written again"
            )


def mean_samples(path: str | os.PathLike[str], rows: Sequence[Row]) -> tuple[float, int] | None:
    """(mean samples of these rows, the most that an image may take), n0 included; None if the record has no votes.

    Raises:
        RunError: a damaged or foreign file, or a row that does not have its votes there.
    """
    recipe, known = read_votes(path)
    if not recipe or not rows:
        return None
    _check_rows(path, rows, known)
    drawn = [int(known[row.idx]["samples"]) for row in rows]
    return sum(drawn) / len(rows), int(recipe["n0"]) + int(recipe["n"])


def read_bounds(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """What decides the bounds of CC-Cert in the journal at `path`, and the record of each image, by `BOUND_COLUMNS`.

    The first is {} in a journal that was begun before it was kept. ({}, {}) where there is none.

    Raises:
        RunError: a damaged or foreign file.
    """
    records = Journal.read(Path(path))
    recipe = dict(records.pop(0)["recipe"]) if records and "recipe" in records[0] else {}
    missing = {name for record in records for name in BOUND_COLUMNS if name not in record}
    if missing:
        raise RunError(f"{path} does not hold bounds of CC-Cert: {', '.join(sorted(missing))} is missing")
    return recipe, {int(record["idx"]): record for record in records}


def open_bounds(path: str | os.PathLike[str], recipe: Mapping[str, Any]) -> tuple[Journal, dict[int, dict[str, Any]]]:
    """The journal at `path`, begun with the recipe if there is none, and the record of each image that it holds.

    Raises:
        RunError: a damaged or foreign file, or one that was begun with another recipe.
    """
    journal = Journal(Path(path))
    if not journal.records:
        journal.append({"recipe": recipe})
    begun, known = read_bounds(path)
    if begun:
        _same_recipe(path, begun, recipe)
    return journal, known


def holds_bounds(path: str | os.PathLike[str]) -> bool:
    """Whether the TSV at `path` is one that `bounds_tsv` made."""
    with open(path, "rb") as file:
        return file.readline().removeprefix(BOM.encode()).split() == [name.encode() for name in BOUND_COLUMNS]


def bounds_tsv(records: Sequence[Mapping[str, Any]]) -> str:
    """Records of CC-Cert as a table: idx label predict bound correct margin flips time, a line an image."""
    shown = ({**record, "correct": int(record["correct"]), "time": round(record["time"], 3)} for record in records)
    lines = ("\t".join(str(record[name]) for name in BOUND_COLUMNS) for record in shown)
    return "\n".join(["\t".join(BOUND_COLUMNS), *lines]) + "\n"


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


def _same_recipe(path: str | os.PathLike[str], begun: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Refuse to go on with the record at `path`, begun with one recipe, with another."""
    different = differences(begun, json.loads(json.dumps(recipe)))
    if not different:
        return
    shown = "; ".join(f"{key}: {old!r:.40} there, {new!r:.40} now" for key, old, new in different[:4])
    advice = "give the same settings to continue it, or choose another folder or file"
    if {key.split(".")[0] for key, _, _ in different} <= {"choices", "fingerprint", "logits", "looks"}:
        advice = (
            "the network runs another way than when it was begun, and votes of two plans must not be mixed: "
            "continue it with the model, processor and version that began it, or choose another folder or file"
        )
    raise RunError(f"{path} was made with other settings ({shown}); {advice}")


def _lines(path: Path) -> tuple[list[str], str]:
    """The lines that end in a newline, the first of them the header, and what stands after the last one."""
    *lines, torn = path.read_bytes().split(b"\n")
    try:
        text = [line.decode() for line in lines]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}") from error
    rest = torn.decode(errors="replace")
    if not (text[0].removeprefix(BOM).split() == list(COLUMNS) if text else HEADER.startswith(rest)):
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
    fields = line.strip().split(maxsplit=len(COLUMNS) - 1)
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
    if row.correct != (row.predict == row.label):
        raise ValueError(f"correct must be 1 where predict is the label and 0 elsewhere, got {line!r}")
    if row.predict == ABSTAIN and row.radius:
        raise ValueError(f"radius must be 0 where predict is {ABSTAIN}, got {radius}")
    return row


def _seconds(text: str) -> float:
    """Seconds from `12.3`, or from `0:00:12.3` or `1 day, 0:00:12.3`, the forms of Cohen's code."""
    days, _, clock = text.rpartition(", ")
    whole, parts = int(days.removesuffix("s").removesuffix(" day") or 0), [float(part) for part in clock.split(":")]
    if not all(0 <= part < math.inf for part in (whole, *parts)):
        raise ValueError(f"time must be finite and >= 0, got {text!r}")
    seconds = 0.0
    for part in parts:
        seconds = 60 * seconds + part
    return 86400 * whole + seconds
