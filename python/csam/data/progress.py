"""Progress bars of long reads, on standard error and only where a person can see them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, TypeVar

import rich.progress
from rich.console import Console

T = TypeVar("T")


def track(items: Sequence[T], description: str) -> Iterable[T]:
    """The items one by one, counted by a bar."""
    console = Console(stderr=True)
    return rich.progress.track(items, description, console=console, transient=True, disable=not console.is_terminal)


def open_binary(path: Path) -> AbstractContextManager[BinaryIO]:
    """The file opened for reading, with a bar of the bytes read."""
    console = Console(stderr=True)
    return rich.progress.open(
        path,
        "rb",
        description=f"reading {path.name}",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
