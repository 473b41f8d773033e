"""A folder or a tar, seen as one set of named files. A tar is read into memory; nothing is unpacked to disk."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from csam.data.progress import open_binary

Select = Callable[[str], str | None]
"""Maps a path inside the folder or tar to the name a loader knows it by; None for a file of no interest."""

_OPENERS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_DAMAGE = (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, OSError, ValueError)


class Source(Protocol):
    path: Path
    stamp: str
    """Sizes and modification times: differs when the content may have changed."""

    def names(self) -> list[str]:
        """Sorted names of the files of interest."""

    def read(self, name: str) -> bytes:
        """Content of one of them; FileNotFoundError if there is no such file."""

    def label(self, name: str) -> str:
        """How to name that file to a person."""


class Folder:
    """Files at most `depth` levels below `path`; hidden ones are left out."""

    def __init__(self, path: Path, select: Select, depth: int = 3) -> None:
        self.path = path
        self._names: list[str] = []
        digest = hashlib.sha256()
        for file, info in _walk(path, depth):
            name = file.relative_to(path).as_posix()
            if select(name) == name:
                self._names.append(name)
                digest.update(f"{name}\0{info.st_size}\0{info.st_mtime_ns}\0".encode())
        self.stamp = digest.hexdigest()

    def names(self) -> list[str]:
        return sorted(self._names)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def label(self, name: str) -> str:
        return str(self.path / name)


class Archive:
    """The files of a tar (plain, gzip, bzip2 or xz), read on first use and checked to be whole."""

    def __init__(self, path: Path, select: Select) -> None:
        self.path = path
        self._select = select
        info = path.stat()
        self.stamp = f"{info.st_size}-{info.st_mtime_ns}"

    def names(self) -> list[str]:
        return sorted(self._blobs)

    def read(self, name: str) -> bytes:
        if name not in self._blobs:
            raise FileNotFoundError(f"{self.label(name)} does not exist")
        return self._blobs[name]

    def label(self, name: str) -> str:
        return f"{self.path}: {name}"

    @cached_property
    def _blobs(self) -> dict[str, bytes]:
        blobs: dict[str, bytes] = {}
        for name, content in self._members():
            if name in blobs:
                raise ValueError(f"{self.path} holds {name} more than once; give a tar of one data set")
            blobs[name] = content
        return blobs

    def _members(self) -> list[tuple[str, bytes]]:
        try:
            return list(_read_tar(_decompress(self.path), self._select))
        except _DAMAGE as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's or the permissions' fault, not the content's
            raise ValueError(
                f"{self.path} is damaged, truncated or not a tar (plain, gzip, bzip2 or xz): {error}; "
                "get it again or give a folder"
            ) from error


def _decompress(path: Path) -> bytes:
    with open_binary(path) as file:
        magic = file.read(6)
        file.seek(0)
        for start, opener in _OPENERS.items():
            if magic.startswith(start):
                content: bytes = opener(file).read()
                return content
        return file.read()


def _read_tar(content: bytes, select: Select) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            name = select(member.name) if member.isfile() else None
            stream = tar.extractfile(member) if name is not None else None
            if name is not None and stream is not None:
                yield name, stream.read()
        # tarfile stops without a word at a damaged header, or where a cut falls between two members.
        end = content[tar.offset :]
    if not end or any(end):
        raise tarfile.ReadError("its end is missing or a header is damaged")


def _walk(folder: Path, depth: int) -> Iterator[tuple[Path, os.stat_result]]:
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in sorted(visible, key=lambda entry: entry.name):
        if entry.is_file():
            yield Path(entry.path), entry.stat()
        elif depth > 1 and entry.is_dir():
            yield from _walk(Path(entry.path), depth - 1)
