"""Tracing, one network at a time and unseen by other threads.

torch.fx and torch.export replace `nn.Module.__call__` for all threads while they trace, and torch.export turns oneDNN
off and prints what fails. Here all that stays as it was for every thread but the one that traces, so that others run
networks meanwhile and get the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import torch
from torch import fx, nn

_lock = threading.RLock()


def _unlocked() -> None:
    """A forked child has no thread that could release the lock."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_unlocked)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While no other thread prepares or traces a network; what is traced inside is unseen by other threads."""
    with _lock:
        patcher: Any = fx._symbolic_trace._Patcher
        plain, me = patcher.patch_method, threading.get_ident()

        def patch(self: Any, kind: type, name: str, made: Callable[..., Any], deduplicate: bool = True) -> None:
            if kind is nn.Module and threading.get_ident() == me:
                made = _mine(made, getattr(kind, name))
            plain(self, kind, name, made, deduplicate)

        patcher.patch_method = patch
        try:
            yield
        finally:
            patcher.patch_method = plain


@contextlib.contextmanager
def exports() -> Iterator[None]:
    """`alone`, while torch.export leaves oneDNN and cuDNN on, as it would not lest recurrent layers become theirs."""
    import torch.export._trace as export  # which takes its time

    with alone():
        before = export._ignore_backend_decomps
        export._ignore_backend_decomps = contextlib.nullcontext  # type: ignore[assignment]
        try:
            yield
        finally:
            export._ignore_backend_decomps = before


def _mine(made: Callable[..., Any], before: Callable[..., Any]) -> Callable[..., Any]:
    """A method that is `made` for this thread and what was there before for all others."""
    me = threading.get_ident()

    @functools.wraps(made)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (made if threading.get_ident() == me else before)(*args, **kwargs)

    return call


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While this thread prints no warnings, logs below critical or messages to stderr.

    Python's filters of warnings are the process's: those of other threads are not shown either meanwhile.
    """
    heard, me = sys.stderr, threading.get_ident()
    muted: Any = _Muted(heard)
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {h for logger in loggers if isinstance(logger, logging.Logger) for h in logger.handlers}
    handlers |= {logging.lastResort} if logging.lastResort else set()

    def others(record: logging.LogRecord) -> bool:
        return record.thread != me or record.levelno > logging.ERROR

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for handler in handlers:
            handler.addFilter(others)
        sys.stderr = muted
        try:
            yield
        finally:
            muted.over = True
            if sys.stderr is muted:
                sys.stderr = heard
            for handler in handlers:
                handler.removeFilter(others)


class _Muted:
    """A stream without what the thread that made it writes before it is over."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.me, self.over = stream, threading.get_ident(), False

    def write(self, text: str) -> int:
        if threading.get_ident() == self.me and not self.over:
            return len(text)
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def exporting(x: Any) -> bool:
    """Whether a module that is called with x is being exported by torch.export, in this thread."""
    return torch.compiler.is_exporting() and type(x) is not torch.Tensor


__all__ = ["alone", "exporting", "exports", "quiet"]
