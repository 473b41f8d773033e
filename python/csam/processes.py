"""Any number of processes: those that torchrun has started do the work of one command together.

Process 0 alone owns files. To certify, it asks questions of a few integers, which the threads of the others answer;
whoever is done with one gets the next, so the faster ones do more. To train, each process takes its share of a batch,
and gradients are averaged. Messages travel through gloo, which tells at once when the other end has died: the run then
ends, and one that torchrun starts again goes on from the files.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Thread
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
MEET = timedelta(minutes=5)  # until every process is there
SILENT = timedelta(minutes=30)  # of one whose machine may be gone: longer than any step that others wait for
_ASKED, _DISMISSED, _FAILED = 1, 0, -1  # what a message to a thread begins with
_NUMBERS = 3  # of a question


class Lost(RuntimeError):
    """Another process has ended or was not there; started again, the run goes on."""


@contextmanager
def joined() -> Iterator[int]:
    """Meet the processes that torchrun started with this one, and part from them; gives this one's rank, 0 if alone.

    Raises:
        ValueError: WORLD_SIZE is set, but not the rest of what torchrun sets.
        Lost: not all of them came within five minutes.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        yield 0
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE must be set with RANK, MASTER_ADDR and MASTER_PORT, as torchrun does, got {size} without "
            f"{', '.join(missing)}; start with torchrun --nproc-per-node {size} -m csam -- COMMAND, or unset WORLD_SIZE"
        )
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, count = next(iter(dist.rendezvous("env://", timeout=MEET)))
        own = _own(store, rank, count)
        dist.init_process_group("gloo", store=own, timeout=SILENT, rank=rank, world_size=count)
    except RuntimeError as error:
        raise Lost(f"the {size} processes of WORLD_SIZE did not meet at {place}: {_line(error)}") from error
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def _own(store: dist.Store, rank: int, size: int) -> dist.Store:
    """The part of the store that is this start's alone: torchrun's keeps the addresses of processes that have died.

    Process 0 names the start and says whom it has seen there; the others show themselves under the name they find until
    it is them.
    """
    me = uuid.uuid4().hex
    if rank == 0:
        store.set("csam", me)
        others = [f"{me}/{other}" for other in range(1, size)]
        store.wait(others)
        store.set(f"{me}/seen", " ".join(store.get(other).decode() for other in others))
        return dist.PrefixStore(me, store)
    end = time.monotonic() + MEET.total_seconds()
    while time.monotonic() < end:
        name = store.get("csam").decode()
        store.set(f"{name}/{rank}", me)
        if store.check([f"{name}/seen"]) and me in store.get(f"{name}/seen").decode():
            return dist.PrefixStore(name, store)
        time.sleep(0.05)
    raise RuntimeError("process 0 has not come")


class Team:
    """The processes of torch.distributed; one alone where it is not initialised. A context manager.

    Every process makes it and calls its methods in the same order, but for `ask` and `serve`.

    Attributes:
        rank: of this process; 0 asks, the others serve.
        size: how many they are.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        # None: the processes' own group, unless it is for a GPU: questions and answers lie in the host's memory
        self._group: dist.ProcessGroup | None = None
        if together and dist.get_backend() != "gloo":
            with _reached("another process"):
                self._group = dist.new_group(backend="gloo", timeout=SILENT)

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up what was made to talk to the others."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    @property
    def first(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def gathered(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks. Raises Lost."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _reached("another process"):
            dist.all_gather_object(values, value, group=self._group)
        return values

    def told(self, value: T) -> T:
        """Process 0's value. Raises Lost."""
        if self.size == 1:
            return value
        values = [value]
        with _reached("process 0"):
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def ask(self, rank: int, hand: int, question: Sequence[int], width: int) -> Tensor:
        """Process 0's: the answer int64 [width] of a thread of another process to three integers.

        Raises:
            Lost: the process has ended, or has failed and will say why.
        """
        answer = torch.empty(1 + width, dtype=torch.int64)
        with _reached(f"process {rank}"):
            dist.send(torch.tensor([_ASKED, *question]), rank, self._group, hand)
            dist.recv(answer, rank, self._group, hand)
        if int(answer[0]) != _ASKED:
            raise Lost(f"process {rank} has failed; it says why")
        return answer[1:]

    @contextmanager
    def asking(self, hands: Sequence[int]) -> Iterator[None]:
        """Process 0's: dismiss the threads of the others, `hands` a process, when it has no more questions."""
        last = _FAILED
        try:
            yield
            last = _DISMISSED
        finally:
            message = torch.tensor([last] + [0] * _NUMBERS)
            for rank, hand in ((r, h) for r in range(1, self.size) for h in range(hands[r])):
                with suppress(RuntimeError):  # of one that is lost
                    dist.send(message, rank, self._group, hand)

    def serve(
        self,
        answer: Callable[..., Tensor],
        width: int,
        hands: int,
        initializer: Callable[[], None] | None = None,
    ) -> None:
        """The others': answer process 0's questions, on so many threads, until it dismisses them.

        Args:
            answer: maps the three integers of a question to int64 [width].
            initializer: called in each thread before all else.

        Raises:
            Lost: process 0 has ended or failed. What `answer` raises, once process 0 knows that there will be none.
        """

        def work(hand: int) -> None:
            error: BaseException | None = None
            message = torch.empty(1 + _NUMBERS, dtype=torch.int64)
            while True:
                with _reached("process 0"):
                    dist.recv(message, 0, self._group, hand)
                state, *question = message.tolist()
                if error is not None:
                    raise error
                if state == _FAILED:
                    raise Lost("process 0 has failed or was stopped; it says why")
                if state == _DISMISSED:
                    return
                reply = torch.full((1 + width,), _ASKED)
                try:
                    reply[1:] = answer(*question)
                except BaseException as failure:
                    error, reply[0] = failure, _FAILED
                with _reached("process 0"):
                    dist.send(reply, 0, self._group, hand)

        errors: list[BaseException] = []

        def run(hand: int) -> None:
            try:
                if initializer is not None:
                    initializer()
                work(hand)
            except BaseException as found:
                errors.append(found)

        # daemons: Ctrl-C here ends the process though they wait for a question
        threads = [Thread(target=run, args=(hand,), name=f"csam-serve-{hand}", daemon=True) for hand in range(hands)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for found in sorted(errors, key=lambda e: isinstance(e, Lost)):
            raise found


def average(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one dtype and device by their means over the processes of torch.distributed, if there are."""
    if not (tensors and dist.is_available() and dist.is_initialized()):
        return
    flat = torch.cat([t.flatten() for t in tensors])
    with _reached("another process"):
        dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


@contextmanager
def _reached(who: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise Lost(f"{who} has ended before its work was done ({_line(error)})") from error


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]


__all__ = ["Lost", "Team", "average", "joined"]
