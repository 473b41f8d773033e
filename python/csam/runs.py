"""Run folders: a long job's settings, log, metrics, checkpoints and results, safe against a kill at any moment.

A run folder holds

- ``config.json``     what was asked for last (compared on every start) and the environment of the first start
- ``log.txt``         one line an event
- ``metrics.jsonl``   one JSON object a line, at most one for each (stage, epoch)
- ``checkpoints/``    safetensors, one for each unfinished stage, replaced whole
- ``models/``         safetensors, the plain state dict of each finished model
- ``certificates/``   for each model one TSV (smoothing, a line an image) with its votes (see `csam.records`) beside
  it, and one JSON-lines file (CC-Cert: what decides its bounds, then a line an image)
- ``results/``        JSON, one for each finished stage

Every file that is replaced is written to a temporary file beside it, flushed to the disk and renamed, so a reader
never meets half a file; a line cut short at the end of an append-only file is dropped on the next start.

Of several processes (`csam.processes`) the first alone reads and writes a run folder, and tells the others what is
there.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import platform
import re
import secrets
import subprocess
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from csam.processes import Team

FORMAT = 1
TEMPORARY = ".csam-tmp-"
_STATE_KEY = "csam"
_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]*")


class RunError(ValueError):
    """A run folder that cannot be used: busy, foreign, damaged, or made with other settings."""


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` in one step: a reader finds the old file or the new one, never a part.

    Raises OSError naming `path` (a full disk, no permission); the old file is then untouched, the temporary removed.
    """
    path = Path(path)
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}"
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _naming(path, error) from error
        raise
    _sync_folder(path.parent)


def _naming(path: Path, error: OSError) -> OSError:
    """The error of the file that was asked for: a full disk names none, and nobody knows the temporary one."""
    return OSError(error.errno, error.strerror, str(path))


@contextmanager
def cut_back(path: Path, size: int) -> Iterator[None]:
    """Should what appends to a file fail, the file is cut back to its size before; an OSError names it."""
    try:
        yield
    except BaseException as error:
        with suppress(OSError):
            os.truncate(path, size)
        if isinstance(error, OSError):
            raise _naming(path, error) from error
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of `value` as indented JSON; NaN and infinity are refused with ValueError."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`. Raises RunError naming a damaged file."""
    try:
        return json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged: {error}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Journal:
    """A file of JSON objects, one a line, that only grows; each `append` is on the disk when it returns.

    A line ends in the CRC-32 of the rest of it. Opening cuts a half line off the end, as a kill or a full disk may
    leave one; what is whole is in `records`. Raises RunError naming file and line where a whole line is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.records, self._size = self._read(self.path)
        if self.path.exists() and self._size < self.path.stat().st_size:
            os.truncate(self.path, self._size)

    @classmethod
    def read(cls, path: Path) -> list[dict[str, Any]]:
        """The records of a journal that another process may be writing; none if there is no file."""
        return cls._read(Path(path))[0]

    @staticmethod
    def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
        content = path.read_bytes() if path.exists() else b""
        size = content.rfind(b"\n") + 1
        records: list[dict[str, Any]] = []
        for number, line in enumerate(content[:size].splitlines(), 1):
            try:
                record = dict(json.loads(line))
            except (ValueError, TypeError) as error:
                raise RunError(f"{path} line {number} is damaged: {error}") from error
            if record.pop("crc32", None) != _crc32(json.dumps(record)):
                raise RunError(f"{path} line {number} is damaged: its checksum is not that of its content")
            records.append(record)
        return records, size

    def append(self, *records: Mapping[str, Any]) -> None:
        """Add objects. Raises OSError naming the file (a full disk); it then ends in its last whole line before."""
        data = "".join(map(_line, records)).encode()
        with cut_back(self.path, self._size), open(self.path, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._size += len(data)
        self.records += map(dict, records)


def _line(record: Mapping[str, Any]) -> str:
    content = json.dumps(dict(record))
    return f'{content[:-1]}{", " if record else ""}"crc32": "{_crc32(content)}"}}\n'


def _crc32(content: str) -> str:
    return f"{zlib.crc32(content.encode()):08x}"


def flatten(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Split nested dicts, lists, tuples, tensors and JSON scalars into named tensors and a JSON skeleton.

    `unflatten` is the inverse. Raises TypeError for anything else (an object would need pickle).
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            while path in tensors:
                path += "+"
            # A copy of its own: safetensors refuses tensors that share memory.
            tensors[path] = value.detach().to("cpu").contiguous().clone()
            return {"tensor": path}
        if isinstance(value, Mapping):
            return {"dict": [[key, walk(item, f"{path}.{key}" if path else str(key))] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [walk(item, f"{path}.{i}" if path else str(i)) for i, item in enumerate(value)]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(
            f"state must hold tensors, numbers, strings, lists and dicts, got {type(value).__name__} at {path!r}"
        )

    return tensors, walk(state, "")


def unflatten(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """Rebuild what `flatten` took apart. Raises KeyError naming a tensor that is missing."""
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unflatten(tensors, item) for key, item in content}
    items = [unflatten(tensors, item) for item in content]
    return items if kind == "list" else tuple(items)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor of any dtype, on any device, one after another; no copy if they lie so on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def save_state(path: Path, state: Any) -> None:
    """Write any state that `flatten` accepts as one safetensors file, atomically."""
    tensors, skeleton = flatten(state)
    note = json.dumps({"format": FORMAT, "state": skeleton})
    write_atomic(path, to_safetensors(tensors, metadata={_STATE_KEY: note}))


def load_state(path: Path) -> Any:
    """Read what `save_state` wrote. Raises RunError naming a damaged or foreign file, and the key if one is missing."""
    tensors, notes = read_safetensors(path)
    if _STATE_KEY not in notes:
        raise RunError(f"{path} is not a csam checkpoint (its metadata has no {_STATE_KEY!r} entry)")
    try:
        return unflatten(tensors, json.loads(notes[_STATE_KEY])["state"])
    except KeyError as error:
        raise RunError(f"{path} is damaged: key {error} is missing") from error


def save_model(path: Path, model: torch.nn.Module, description: Mapping[str, Any]) -> None:
    """Write a model's plain state dict with a JSON `description` in the metadata; any safetensors reader opens it."""
    tensors = {key: value.detach().to("cpu").contiguous().clone() for key, value in model.state_dict().items()}
    write_atomic(path, to_safetensors(tensors, metadata={_STATE_KEY: json.dumps(dict(description))}))


def read_description(path: Path) -> dict[str, Any]:
    """The description `save_model` stored, or {} for a safetensors file of another program."""
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise RunError(f"{path} is not a whole safetensors file: {error}") from error
    description = json.loads(notes.get(_STATE_KEY, "{}"))
    return dict(description) if isinstance(description, dict) else {}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file. Raises RunError naming a truncated or foreign file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise RunError(f"{path} is not a whole safetensors file: {error}") from error


def environment() -> dict[str, Any]:
    """What may change the last bits of a number: versions, processor, threads, backend, commit (None if unknown)."""
    return {
        "csam-kernels": version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "backend": os.environ.get("CSAM_BACKEND") or "auto",
        "commit": commit(),
    }


def version() -> str:
    """The installed version of csam-kernels, or "unknown" in a checkout that was never installed."""
    try:
        return metadata.version("csam-kernels")
    except metadata.PackageNotFoundError:
        return "unknown"


def processor() -> str:
    """The processor's name where the system tells it, with family and model where the name has no number, as on virtual
    machines, which call generations apart in speed by the same name."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        about = {key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in lines) if colon}
        name = about.get("model name", "")
        if name and not re.search(r"\d", name):
            generation = (("family", "cpu family"), ("model", "model"))
            name += "".join(f" {word} {about[key]}" for word, key in generation if key in about)
        if name:
            return name
    return platform.processor() or "unknown"


def commit() -> str | None:
    """The commit of the checkout this package lies in, with "+changes" if it is not clean; None outside of one."""
    here = Path(__file__).resolve().parent
    try:
        inside = subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", __file__],
            capture_output=True,
            timeout=10,
            check=False,
        )
        # An installed copy may lie inside somebody else's repository: its commit says nothing about this code.
        if inside.returncode != 0:
            return None
        head, status = (
            subprocess.run(
                ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True
            ).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + ("+changes" if status.strip() else "")


class Run:
    """One job's folder, locked while open; use as a context manager.

    `config` (JSON values) says what is asked for. A folder made with another config is refused, never overwritten, but
    for the dotted keys in `free` and what lies below them, which may be others on every start, and the dotted keys in
    `kept`, which are not asked about and stay as the folder has them.
    All processes of torch.distributed open it together; the first of the `team` alone reads and writes.
    Raises RunError if another run holds the folder, if it holds something else, or if its config differs; ValueError
    if the processes name different folders or configs.
    """

    def __init__(
        self, folder: str | Path, config: Mapping[str, Any], free: Sequence[str] = (), kept: Sequence[str] = ()
    ) -> None:
        self.folder = Path(folder)
        self.free, self.kept = tuple(free), tuple(kept)
        self.config: dict[str, Any] = json.loads(json.dumps(config, allow_nan=False))
        self._lock: int | None = None
        self._recorded: set[tuple[str, int]] = set()
        self._metrics: Journal

    def __enter__(self) -> Run:
        self.team = Team()
        try:
            agree(self.team, "run folder, settings and data", {"folder": str(self.folder), **self.config})
            if self.team.first:
                self._begin()
            self.team.told(None)  # the folder is there
        except BaseException:
            self.close()
            raise
        return self

    def _begin(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise RunError(f"run folder {self.folder} is a file; choose another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._refuse_foreign()
        self._take_lock()
        self._open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            # The log is a courtesy: on a full disk it must not hide the error that is on its way out.
            with suppress(OSError):
                self.log(f"stopped: {kind.__name__ if kind else 'error'}: {error}")
        self.close()

    def close(self) -> None:
        """Release the lock, and part from the team."""
        self.team.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def stage(self, name: str) -> Stage:
        """The part of the folder that belongs to one named stage (letters, digits and ``. _ @ + -``)."""
        if not _STAGE_NAME.fullmatch(name):
            raise ValueError(f"stage name must consist of letters, digits and . _ @ + -, got {name!r}")
        return Stage(self, name)

    def log(self, message: str) -> None:
        """Append one line with the time to log.txt."""
        if not self.team.first:
            return
        stamp = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        with open(self.folder / "log.txt", "a") as file:
            file.write(f"{stamp} {message}\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl in order."""
        return list(self._metrics.records)

    def _record(self, stage: str, epoch: int, values: Mapping[str, Any]) -> None:
        # An epoch repeated after a kill gives the same values again; it must not be counted twice.
        if not self.team.first or (stage, epoch) in self._recorded:
            return
        self._metrics.append({"stage": stage, "epoch": epoch, **values})
        self._recorded.add((stage, epoch))

    def _refuse_foreign(self) -> None:
        known = {"config.json", "log.txt"}
        others = [p.name for p in self.folder.iterdir() if p.name not in known and not p.name.startswith(".")]
        if others and not (self.folder / "config.json").exists():
            raise RunError(
                f"{self.folder} is not a run folder (it holds {sorted(others)[0]!r} but no config.json); "
                "choose a new or empty folder with --out"
            )

    def _take_lock(self) -> None:
        self._lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._lock, 32).decode(errors="replace").strip()
            raise RunError(
                f"run folder {self.folder} is in use by process {holder or '?'}; wait for it or choose another folder"
            ) from None
        os.ftruncate(self._lock, 0)
        os.write(self._lock, f"{os.getpid()}\n".encode())

    def _open(self) -> None:
        for leftover in self.folder.glob(f"**/{TEMPORARY}*"):
            leftover.unlink(missing_ok=True)
        path = self.folder / "config.json"
        now = environment()
        if path.exists():
            self._resume(read_json(path), now)
        else:
            write_json(path, {"format": FORMAT, "config": self.config, "environment": now})
            self.log(f"started: {json.dumps(now)}")
        # After config.json: killed between the two, the folder is still a run folder.
        for name in ("checkpoints", "models", "results", "certificates"):
            (self.folder / name).mkdir(exist_ok=True)
        self._metrics = Journal(self.folder / "metrics.jsonl")
        self._recorded = {(record["stage"], record["epoch"]) for record in self.metrics()}

    def _resume(self, stored: Any, now: dict[str, Any]) -> None:
        path = self.folder / "config.json"
        if not isinstance(stored, dict) or not {"config", "environment"} <= stored.keys():
            raise RunError(f"{path} was not written by csam; choose a new or empty folder with --out")
        for key in self.kept:
            *groups, name = key.split(".")
            there, here = stored["config"], self.config
            for group in groups:
                there, here = there.get(group) if isinstance(there, dict) else None, here[group]
            here.pop(name, None)
            here |= {name: there[name]} if isinstance(there, dict) and name in there else {}
        changes = differences(stored["config"], self.config)
        different = [change for change in changes if not f"{change[0]}.".startswith(tuple(f"{k}." for k in self.free))]
        if different:
            shown = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, old, new in different[:4])
            more = f" and {len(different) - 4} more" if len(different) > 4 else ""
            raise RunError(
                f"run folder {self.folder} was made with other settings ({shown}{more}); "
                "give the same settings to continue it, or choose a new folder with --out"
            )
        changed = "; ".join(f"{key}: {old!r} -> {new!r}" for key, old, new in differences(stored["environment"], now))
        self.log("resumed" + (f" in another environment ({changed}): last bits may differ" if changed else ""))
        if changes:
            write_json(path, {**stored, "config": self.config})
            self.log("asked for " + "; ".join(f"{key}: {new!r} instead of {old!r}" for key, old, new in changes))


class Stage:
    """One stage's checkpoint, metrics and result inside a run folder."""

    def __init__(self, run: Run, name: str) -> None:
        self.run = run
        self.name = name

    @property
    def checkpoint(self) -> Path:
        return self.run.folder / "checkpoints" / f"{self.name}.safetensors"

    def save(self, state: Any) -> None:
        """Replace this stage's checkpoint (see `flatten` for what a state may hold)."""
        if self.run.team.first:
            save_state(self.checkpoint, state)

    def load(self) -> Any | None:
        """The last checkpoint, or None before the first."""
        team = self.run.team
        return team.told(load_state(self.checkpoint) if team.first and self.checkpoint.exists() else None)

    def record(self, epoch: int, **values: Any) -> None:
        """Append one line to metrics.jsonl, once for each epoch of this stage."""
        self.run._record(self.name, epoch, values)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Store the stage's JSON result; its checkpoint has served its purpose and is removed."""
        if self.run.team.first:
            write_json(self.run.folder / "results" / f"{self.name}.json", dict(result))
        self.discard()

    def discard(self) -> None:
        """Remove the checkpoint, once something later makes it superfluous."""
        if self.run.team.first:
            self.checkpoint.unlink(missing_ok=True)

    def result(self) -> dict[str, Any] | None:
        """The stored result, or None while the stage is unfinished."""
        team, path = self.run.team, self.run.folder / "results" / f"{self.name}.json"
        return team.told(dict(read_json(path)) if team.first and path.exists() else None)


def agree(team: Team, about: str, value: Mapping[str, Any]) -> None:
    """Refuse to go on, in every process, if one has another value than process 0: ValueError names both."""
    first, *others = team.gathered(dict(value))
    for rank, other in enumerate(others, start=1):
        different = differences(first, other)
        if different:
            shown = "; ".join(
                f"{key}: {old!r:.60} in process 0, {new!r:.60} in process {rank}" for key, old, new in different[:4]
            )
            raise ValueError(f"all processes must have the same {about}, got {shown}")


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two nested JSON objects differ; an absent value reads as None."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [(prefix or "config", old, new)]
    keys = list(old) + [key for key in new if key not in old]
    found = (differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key)) for key in keys)
    return [item for group in found for item in group]
