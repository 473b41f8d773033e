"""Certifying data sets: which samples of which images are drawn where, and what of them is kept on the way.

A run that goes on takes up each image at its last votes (`csam.records`), which add up, and ends with the rows of one
that was not stopped.

An image's votes are on the disk before its line is written. Lines are left to the operating system until the run ends:
those that a power cut takes away are written again from the votes.

Where torch.distributed is initialised, all its processes draw samples of whichever images are under way, and process 0
alone reads and writes files and decides: votes add up, whoever counts them, so the rows are those of one process.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from heapq import heappop, heappush
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csam import smoothing
from csam.adapters import ModelError
from csam.data import to_unit
from csam.inference import laid_out
from csam.processes import Team
from csam.records import Row, TsvWriter, open_votes, votes_path
from csam.runs import RunError, agree
from csam.sequential import Certification, Rule, checked_alpha
from csam.smoothing import Prepared, Smooth, nchw
from csam.threads import one_intra_op_thread
from csam_kernels import checks
from csam_kernels.ops.sample_network import Range

SAVE_SECONDS = 10.0  # an image that takes longer is saved about as often
WRITE_SECONDS = 0.3  # what is finished waits for others to be written with, at most
PIECE_SECONDS = 0.06  # of samples that a thread takes at a time
Hand = Callable[[Sequence["Piece"]], Sequence[Sequence[int]]]  # draws pieces, and counts the votes of each


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
    on_samples: Callable[[int], None] | None = None,
    **stop: Any,
) -> list[Row]:
    """Certify images into a record, a row each in the order of `indices`; images that it holds are not done again.

    A record says by digests which network and which images it is of, and goes on with no others.

    Image i uses stream i, so its certificate does not depend on which images were done before it, or when. Several
    images are under way at once where samples of one are drawn by threads that do not wait for each other: on a CPU
    where the plan's samples lie innermost, and in several processes; `time` is then an image's part of the time that
    passed.

    A sample with NaN logits votes for no class and counts among the n, so it can only lower a certificate; how many
    there were is in the votes, and is warned of at the end.

    Where torch.distributed is initialised, all its processes call this with the same arguments and have the same rows;
    `path`, `on_result` and `on_samples` are process 0's. Choices of layers by measured times may differ from machine
    to machine: give the `Smooth` of the others process 0's (`recipe`).

    Args:
        smooth: the smoothed classifier.
        x: images [N, C, H, W], or in the layout of `smooth`; uint8 (divided by 255) or floating point in the unit the
            model takes.
        y: labels [N], classes of `smooth`.
        path: of the TSV file, made or continued; `votes_path(path)` is made or continued with it.
        indices: of the images to certify, default all.
        n0, n, alpha, batch_size: as in `Smooth.certify`.
        on_result: called with each new row, after its votes are on the disk.
        on_samples: called with numbers of samples as they are drawn.
        stop: adaptive, target_radius, rtol, method: as in `Smooth.certify`.

    Returns:
        The rows of `indices`, in their order.

    Raises:
        OSError: a file cannot be read or written.
        TypeError: a label or an index that is not an integer, images that are neither uint8 nor floating point.
        ValueError: x and y of different length, a label or an index out of range, an image to certify that is not
            finite or, with `sound_float`, off the grid, by its index; a record that is malformed or holds another
            label for an image (it is of another data set); processes whose networks, settings or images differ.
        ModelError: a callable failed (`csam.adapters`).
        Lost: another process has ended; what was finished is in the record (`csam.processes`).
        RunError: a record that another run is writing, that was begun with other settings, another network or plan or
            other images, or whose votes are damaged, missing or not those of its rows.
    """
    if not isinstance(y, Iterable):
        raise TypeError(f"y must be a tensor or a sequence of labels, got {type(y).__name__}")
    labels = [checks.integer("y", label, low=0, high=smooth.num_classes - 1) for label in y]
    if not isinstance(x, Tensor) or x.dim() != 4 or len(x) != len(labels):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a tensor [N, C, H, W] with one label each, got {got} and {len(labels)} labels")
    checks.tensor("x", x, dtypes=(torch.uint8, *checks.FLOATS))
    batch_size = checks.integer("batch_size", batch_size, low=1)
    asked = range(len(labels)) if indices is None else indices
    if not isinstance(asked, Iterable):
        raise TypeError(f"indices must be a sequence of integers or None, got {type(asked).__name__}")
    wanted = [checks.integer("indices", i, low=0, high=len(labels) - 1) for i in asked]
    if not wanted:
        return []

    smooth, x = smooth.nchw(), nchw(x.detach(), smooth.layout)

    def pixels(i: int) -> Tensor:
        return (to_unit(x[i]) if x.dtype == torch.uint8 else x[i].to(torch.float32)).contiguous()

    if x.dtype != torch.uint8 and (smooth.grid is not None or not bool(x.to(torch.float32).isfinite().all())):
        for i in wanted:
            with naming(i):
                smooth.check(x[i])

    rule = smooth.rule(pixels(wanted[0]), n0, n, alpha, **stop)
    recipe = {
        "n0": checks.integer("n0", n0, low=1),
        "n": rule.n,
        "alpha": checked_alpha(alpha),
        "method": type(rule).__name__.lower(),
        "target_radius": rule.target_radius,
        "rtol": rule.rtol,
        **smooth.recipe(pixels(wanted[0])),
        "looks": _digest([torch.tensor(rule.looks)]),
    }
    prepared = smooth.prepare(pixels(wanted[0]))
    if recipe["fingerprint"] is None:
        recipe["logits"] = logits_digest(prepared, x)
    vote = _voter(smooth, prepared, batch_size)
    threads = min(torch.get_num_threads(), prepared.threads or math.inf) if prepared.device.type == "cpu" else 1
    with Team() as team:
        if team.size > 1:
            shown = _digest(t for i in wanted for t in (torch.tensor([i, labels[i]]), pixels(i)))
            logits = recipe.get("logits") or logits_digest(prepared, x)
            agree(team, "network, settings and images", {**recipe, "logits": logits, "images": shown})
        hands = team.gathered(int(threads))
        if team.rank:
            team.serve(
                lambda i, n, first: torch.tensor(vote([(pixels(i), n, first, i)])[0]),
                smooth.num_classes,
                hands[team.rank],
                one_intra_op_thread,
            )
            return team.told([])

        def of_other(rank: int, hand: int) -> Hand:
            def asked(piece: Piece) -> list[int]:
                question = (piece.image.idx, piece.n, piece.first)
                votes: list[int] = team.ask(rank, hand, question, smooth.num_classes).tolist()
                return votes

            return lambda pieces: list(map(asked, pieces))

        def own(pieces: Sequence[Piece]) -> list[list[int]]:
            return vote([(piece.image.x, piece.n, piece.first, piece.image.idx) for piece in pieces])

        others = [of_other(rank, hand) for rank in range(1, team.size) for hand in range(hands[rank])]
        draw = partial(_one_by_one, smooth, prepared, batch_size)
        if others or prepared.sampler is not None:
            draw = partial(_together, prepared, [own] * hands[0] + others)
        with team.asking(hands), TsvWriter(path) as record:
            rows, known = _recorded(record, labels, wanted, pixels, rule, recipe, draw, on_result, on_samples)
        broken = {i: known[i]["nan"] for i in wanted if "nan" in known[i]}
        if broken:
            warnings.warn(
                f"{sum(broken.values())} samples of {len(broken)} of {len(wanted)} images had NaN logits and voted for "
                f"no class; {votes_path(path).name} has their numbers",
                RuntimeWarning,
                stacklevel=2,
            )
        return team.told([rows[i] for i in wanted])


def _recorded(
    record: TsvWriter,
    labels: Sequence[int],
    wanted: Sequence[int],
    pixels: Callable[[int], Tensor],
    rule: Rule,
    recipe: dict[str, Any],
    draw: Callable[[Iterator[_Image], Callable[[int], None]], Generator[list[dict[str, Any]], None, None]],
    on_result: Callable[[Row], None] | None,
    on_samples: Callable[[int], None] | None,
) -> tuple[dict[int, Row], dict[int, dict[str, Any]]]:
    """Rows and votes by image, those of `wanted` among them: what `certify_dataset` does once all is checked.

    `draw` gives what the journal is to keep of images, of each the last time with its certificate.
    """
    for row in record.rows:
        if row.idx >= len(labels) or row.label != labels[row.idx]:
            has = f"label {labels[row.idx]}" if row.idx < len(labels) else f"only {len(labels)} images"
            raise ValueError(
                f"{record.path} is the record of another data set: image {row.idx} has label {row.label} "
                f"there, the data set has {has}"
            )
    journal, known = open_votes(record, recipe)
    for i, votes in known.items():
        if i < len(labels) and votes.get("pixels") != _pixels(pixels(i)):
            raise RunError(
                f"{record.path} is the record of other images: image {i} has other pixels now; give the same images to "
                "continue it, or choose another file"
            )
    rows = {row.idx: row for row in record.rows}
    pending = deque(i for i in dict.fromkeys(wanted) if i not in rows)
    finished: dict[int, Row] = {}

    def finish(votes: Mapping[str, Any]) -> None:
        """Append the row of these votes, and those that waited for it, once it is its turn."""
        i, predict = votes["idx"], votes["predict"]
        finished[i] = Row(i, labels[i], predict, votes["radius"], predict == labels[i], votes["time"])
        while pending and pending[0] in finished:
            row = finished.pop(pending.popleft())
            record.append(row)
            rows[row.idx] = row
            if on_result is not None:
                on_result(row)

    images = (
        _Image(i, pixels(i), Certification(rule, recipe["n0"], state=known.get(i)), known.get(i, {}))
        for i in list(pending)
        if "reason" not in known.get(i, {})
    )
    for i in list(pending):
        if "reason" in known.get(i, {}):
            finish(known[i])
    with closing(draw(images, on_samples or (lambda n: None))) as drawn:
        for kept in drawn:
            journal.append(*({**votes, "pixels": _pixels(pixels(votes["idx"]))} for votes in kept))
            for votes in kept:
                known[votes["idx"]] = votes
                if "reason" in votes:
                    finish(votes)
    return rows, known


class Piece(NamedTuple):
    """Samples `first` .. `first + n - 1` of an image, in a range of those that it wants; in the order to draw them."""

    place: int
    range: int
    first: int
    n: int
    image: _Image


class _Image:
    """An image under way.

    Attributes:
        place: how many were begun before.
        ended: it is decided.
        seconds: its part of the time so far.
        saved: when it was saved last, or begun.
        votes: of each range wanted, [num_classes], so far.
        left: samples of these ranges that are missing.
    """

    def __init__(self, idx: int, x: Tensor, certification: Certification, known: Mapping[str, Any]) -> None:
        self.idx, self.x, self.certification, self.place, self.ended = idx, x, certification, 0, False
        self.seconds, self.saved = float(known.get("time", 0.0)), time.monotonic()
        self.votes: list[list[int]] = []
        self.left = 0
        self._ranges: list[tuple[int, int]] = []

    def take(self, most: int) -> list[tuple[int, int]]:
        """Begin the next (number, first sample) of each range wanted, `most` at most."""
        ranges = self._ranges
        if not ranges:
            self.certification.most = most  # they end at its multiples
            ranges = self.certification.wanted
            self.votes = [[] for _ in ranges]
        self._ranges = []
        if max(ranges)[0] > most:
            self._ranges = [(max(n - most, 0), first + most) for n, first in ranges]
            ranges = [(min(n, most), first) for n, first in ranges]
        self.left = sum(n for n, _ in ranges)
        return ranges

    def cut(self, most: int, piece: int, aligned: bool) -> list[Piece]:
        """The same in pieces of so many samples; if they are aligned, they end at multiples of `piece`."""
        pieces = []
        for k, (n, begin) in enumerate(self.take(most)):
            end = begin + n
            while begin < end:
                room = piece - begin % piece if aligned else piece
                pieces.append(Piece(self.place, k, begin, min(room, end - begin), self))
                begin += room
        return pieces

    def add(self, k: int, n: int, found: Sequence[int], seconds: float) -> None:
        """Count the votes of n samples of a range."""
        self.votes[k] = [*map(sum, zip(self.votes[k], found, strict=True))] if self.votes[k] else [*found]
        self.left -= n
        self.seconds += seconds

    def tell(self) -> dict[str, Any] | None:
        """Hand over the votes of ranges that are complete.

        Returns:
            What the journal is to keep of it now besides its pixels: its certificate, or every few seconds its state,
            or nothing.
        """
        if self._ranges:
            return None
        certificate = self.certification.tell(self.votes)
        if certificate is None:
            if time.monotonic() - self.saved <= SAVE_SECONDS:
                return None
            self.saved = time.monotonic()
            return {"idx": self.idx, **self.certification.state, "time": self.seconds}
        self.ended = True
        label, radius, samples, reason = certificate
        votes: dict[str, Any] = {"idx": self.idx, "predict": label, "radius": radius, "samples": samples}
        votes |= {"votes": self.certification.votes, "reason": reason, "time": round(self.seconds, 4)}
        if self.certification.nan:
            votes["nan"] = self.certification.nan
        return votes


def _one_by_one(
    smooth: Smooth, prepared: Prepared, batch_size: int, images: Iterator[_Image], on_samples: Callable[[int], None]
) -> Generator[list[dict[str, Any]], None, None]:
    """What the journal is to keep of each image; the threads share the tiles of one image."""
    most = 20 * prepared.tile
    for one in images:
        while not one.ended:
            start = time.perf_counter()
            parts = [(k, n, first) for k, (n, first) in enumerate(one.take(most)) if n]
            with naming(one.idx):
                found = smooth.cast(one.x, [(n, first) for _, n, first in parts], batch_size, one.idx)
            seconds, n = time.perf_counter() - start, one.left
            for (k, m, _), votes in zip(parts, found, strict=True):
                one.add(k, m, votes.tolist(), seconds * m / n)
            most = prepared.tile * max(1, int(SAVE_SECONDS * n / seconds / prepared.tile))
            kept = one.tell()
            on_samples(n)
            if kept is not None:
                yield [kept]


class _Desk:
    """Where the hands fetch what to draw and hand in what they found.

    Attributes:
        over: set when all images are decided, or a hand has failed.
        errors: of the hands.
    """

    def __init__(self, images: Iterator[_Image], hands: int, tile: int, aligned: bool) -> None:
        self.over, self.errors = threading.Event(), list[BaseException]()
        self._images, self._hands, self._tile, self._aligned = images, hands, tile, aligned
        self._changed = threading.Condition()  # all below is used under it
        self._ready: list[Piece] = []  # a heap
        self._kept: list[dict[str, Any]] = []
        self._piece, self._most, self._drawn = 2 * tile, 64 * tile, 0
        self._begun, self._ended, self._more = 0, 0, True

    def exchange(self, pieces: Sequence[Piece], found: Sequence[Sequence[int]], seconds: float) -> list[Piece]:
        """Hand in pieces with their votes and the seconds they took, and fetch the next ones; nothing at the end."""
        with self._changed:
            complete = self._counted(pieces, found, seconds)
        kept = [one.tell() for one in complete]  # others need not wait for a bound, which may take milliseconds
        with self._changed:
            self._kept += [votes for votes in kept if votes is not None]
            for one in complete:
                if one.ended:
                    self._ended += 1
                else:
                    self._cut(one)
            return self._next()

    def collected(self) -> tuple[int, list[dict[str, Any]]]:
        """How many samples were drawn since the last call, and what the journal is to keep of them."""
        with self._changed:
            drawn, kept = self._drawn, self._kept
            self._drawn, self._kept = 0, []
        return drawn, kept

    def close(self, *errors: BaseException) -> None:
        """Let no hand fetch any more."""
        with self._changed:
            self.errors += errors
            self.over.set()
            self._changed.notify_all()

    def _next(self) -> list[Piece]:
        """Enough to do for a while, of the images that were begun first before others."""
        pieces: list[Piece] = []
        room = self._piece
        while room > 0 and not self.over.is_set():
            if self._more and not self._ready:
                self._begin()
            if self._ready:
                pieces.append(heappop(self._ready))
                room -= max(pieces[-1].n, self._piece // 32)
                if not self._more and len(pieces) * self._hands >= len(self._ready):
                    break  # the last ones are shared
            elif pieces:
                break
            elif self._begun == self._ended:
                self.close()
            elif not self._more:
                self._changed.wait()
        if self._ready:
            self._changed.notify()
        return pieces

    def _counted(self, pieces: Sequence[Piece], found: Sequence[Sequence[int]], seconds: float) -> list[_Image]:
        """The images of which nothing is missing any more that they wanted."""
        complete, n, tile = [], sum(piece.n for piece in pieces), self._tile
        for piece, votes in zip(pieces, found, strict=True):
            piece.image.add(piece.range, piece.n, votes, seconds * piece.n / n / self._hands)
            if not piece.image.left:
                complete.append(piece.image)
        self._drawn += n
        if seconds:
            self._piece = 2 * tile * max(1, int(PIECE_SECONDS * n / seconds / (2 * tile)))
            self._most = tile * max(1, int(SAVE_SECONDS * self._hands * n / seconds / tile))
        return complete

    def _begin(self) -> None:
        one = next(self._images, None)
        if one is None:
            self._more = False
            return
        one.place = self._begun
        self._begun += 1
        self._cut(one)

    def _cut(self, one: _Image) -> None:
        for piece in one.cut(self._most, self._piece, self._aligned):
            heappush(self._ready, piece)


def _together(
    prepared: Prepared, hands: Sequence[Hand], images: Iterator[_Image], on_samples: Callable[[int], None]
) -> Generator[list[dict[str, Any]], None, None]:
    """The same where each hand, on a thread of its own, draws pieces of whichever images have some.

    An image between two looks has none: others are begun, so that no hand waits. Short pieces of several images are
    drawn one after another, for what is done between them takes less time when it is done at a stretch.
    """
    desk = _Desk(
        images, len(hands), prepared.sampler.lanes if prepared.sampler else prepared.tile, not prepared.sampler
    )

    def work(hand: Hand) -> None:
        try:
            one_intra_op_thread()
            pieces = desk.exchange([], [], 0.0)
            while pieces:
                start = time.perf_counter()
                found = hand(pieces)
                pieces = desk.exchange(pieces, found, time.perf_counter() - start)
        except BaseException as error:
            desk.close(error)

    threads = [threading.Thread(target=work, args=(hand,), name=f"csam-images-{i}") for i, hand in enumerate(hands)]
    try:
        for thread in threads:
            thread.start()
        over = False
        while not over:
            over = desk.over.wait(WRITE_SECONDS)
            n, kept = desk.collected()
            if n:
                on_samples(n)
            if kept:
                yield kept
        for error in desk.errors:
            raise error
    finally:
        desk.close()
        for thread in threads:
            if thread.is_alive():
                thread.join()


@contextmanager
def naming(idx: int) -> Iterator[None]:
    """Put the image in front of what an error says of its input or network."""
    try:
        yield
    except (ValueError, ModelError) as error:
        raise (ModelError if isinstance(error, ModelError) else ValueError)(f"image {idx}: {error}") from error


def _voter(smooth: Smooth, prepared: Prepared, batch_size: int) -> Callable[[Sequence[Range]], list[list[int]]]:
    """Votes [num_classes] of each range of samples, whose stream is its image; NaN logits cast none."""
    sampler, device = prepared.sampler, prepared.device
    seed, sigma, grid, law = smooth.seed, smooth.sigma, smooth.grid, smooth.noise

    def one(x: Tensor, n: int, first: int, stream: int) -> list[int]:
        on = torch.cuda.device(device) if device.type == "cuda" else nullcontext()  # a thread begins on the first
        with naming(stream), on:
            return smoothing.votes(prepared, x, sigma, n, seed, first, batch_size, stream, grid, law).tolist()

    def vote(ranges: Sequence[Range]) -> list[list[int]]:
        if sampler is not None:
            return sampler.votes_of(ranges, sigma, seed=seed, grid=grid, law=law).tolist()
        return [one(*wanted) for wanted in ranges]

    return vote


def logits_digest(prepared: Prepared, x: Tensor) -> str:
    """A digest of the network's logits of a tile of images like those in x: weights and arithmetic, to the last bit."""
    found: list[Tensor] = []
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (prepared.tile, *x.shape[1:])
    tile = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    tile = laid_out(tile.to(prepared.device, prepared.dtype), prepared.memory_format)
    prepared.run(lambda start: tile, lambda logits, start: found.append(logits), 0, prepared.tile, prepared.tile)
    return _digest(found)


def _pixels(x: Tensor) -> str:
    """A digest of an image's pixels, contiguous in float32."""
    return hashlib.sha1(x.numpy(force=True).data).hexdigest()[:16]


def _digest(tensors: Iterable[Tensor]) -> str:
    total = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        total.update(tensor.detach().to("cpu", torch.float64).contiguous().numpy().tobytes())
    return total.hexdigest()
