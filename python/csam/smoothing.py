"""Randomized smoothing (Cohen, Rosenfeld and Kolter, ICML 2019): predictions that hold in an l2 ball.

The base classifier f is a network; the smoothed classifier is g(x) = argmax_c P(f(x + sigma eps) = c) with
eps ~ N(0, I). If g(x)'s class has probability at least p_A > 1/2, then g is constant in the open l2 ball of
radius sigma Phi^-1(p_A) around x (their Theorem 1 with p_B = 1 - p_A).

Certificates are a function of (network, x, sigma, seed, stream, n0, n, alpha) and of nothing else. Sample i
of an image always has the same noise, and it is always evaluated in the same canonical tile: `tile`
consecutive sample indices starting at a multiple of `tile`, in full even when only some of its rows are
wanted, from the noise to the logits on one thread. So neither the batch size nor the number of threads can
reorder a sum inside a matrix library.
"""

from __future__ import annotations

import copy
import itertools
import math
import operator
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

import csam_kernels
from csam import inference
from csam_kernels import checks

ABSTAIN = -1
TILE = {"cpu": 50, "cuda": 1000}  # on a CPU a tile stays in cache; a GPU must be filled
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNKNOWN = -1  # version of a tensor made in inference mode, which does not count its changes
_setting_threads = threading.Lock()


def lower_confidence_bound(successes: int, n: int, alpha: float) -> float:
    """Exact one-sided lower bound of Clopper and Pearson (1934) on the probability of a success.

    It is the alpha-quantile of Beta(successes, n - successes + 1), and 0 for no success: over repetitions it
    lies above the true probability with probability at most alpha, for every n and every probability.

    Raises:
        TypeError, ValueError: n < 1, successes outside [0, n], or alpha outside (0, 1).
    """
    n = checks.integer("n", n, low=1)
    successes = checks.integer("successes", successes, low=0, high=n)
    alpha = _probability("alpha", alpha)
    return float(stats.beta.ppf(alpha, successes, n - successes + 1)) if successes > 0 else 0.0


def certified_radius(successes: int, n: int, sigma: float, alpha: float) -> float | None:
    """Radius sigma Phi^-1(p_A) from `successes` votes in n fresh samples; None (abstain) if p_A < 1/2.

    Errors as in `lower_confidence_bound`, and a sigma that is not > 0.
    """
    sigma = checks.real("sigma", sigma, above=0)
    p_a = lower_confidence_bound(successes, n, alpha)
    return None if p_a < 0.5 else float(sigma * stats.norm.ppf(p_a))


class Smooth:
    """The smoothed classifier g of a network, with Cohen's `certify` and `predict`.

    The base classifier that is certified is the network as it is executed. With `dtype=None` that is a frozen
    copy of `model` in eval mode, computed by its own modules in its own dtype (noise is drawn in float32).
    With a `dtype` it is that copy rewritten for speed (`csam.inference`): masks and batch norms folded, cast to
    `dtype`, channels_last, convolutions fused with what follows. Its logits are the model's up to rounding in
    `dtype`, and `prepared.steps` lists what could be done. The copy is made at the first image and again when a
    parameter or buffer of `model` has changed (seen through torch's version counters; a change through `.data`
    or of a plain attribute is not: build a new Smooth then). `model` itself is never run and keeps its mode.
    `forward` must not keep state between calls: tiles run on several threads at once, outside the caller's
    autocast.

    Calls with the same seed and stream use the same noise: each guarantee holds alone, but an independent
    repetition takes another seed or stream.

    Args:
        model: maps [B, C, H, W] pixels to logits [B, num_classes]; or a `Prepared` network, such as that of a
            `csam.sampling.Plan`, which then runs as it is.
        num_classes: width of the logits, >= 2.
        sigma: standard deviation of the noise, in the pixels' unit, > 0.
        dtype: None, or torch.float32, bfloat16 or float16 for the fast path.
        seed: 0 .. 2^64-1.
        tile: samples evaluated together; part of what fixes the result, to the last bit of a near tie. Default 50
            for a model on the CPU, 1000 on a GPU.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or range, or a batch-norm layer without running
            statistics (its output for one sample depends on the others, so no certificate would hold).
    """

    ABSTAIN = ABSTAIN

    def __init__(
        self,
        model: nn.Module | Prepared,
        num_classes: int,
        sigma: float,
        *,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        tile: int | None = None,
    ) -> None:
        self.num_classes = checks.integer("num_classes", num_classes, low=2)
        self.sigma = checks.real("sigma", sigma, above=0)
        checks.seed(seed)
        self.seed = operator.index(seed)
        self._classifier = TiledClassifier(model, dtype, tile)

    @property
    def prepared(self) -> Prepared | None:
        """The network as it is executed (`.module`, `.steps`), None before the first image."""
        return self._classifier.current

    @property
    def settings(self) -> dict[str, Any]:
        """What, besides the network, the image and n, fixes a result; plain values for a run's record."""
        return {"sigma": self.sigma, "seed": self.seed, **self._classifier.settings}

    def certify(
        self,
        x: Tensor,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        batch_size: int = 400,
        *,
        stream: int = 0,
    ) -> tuple[int, float]:
        """Class of g at x and an l2 radius within which g keeps it (Cohen et al., CERTIFY).

        Samples 0 .. n0-1 choose the class, samples n0 .. n0+n-1 count it; the two sets are disjoint, so the
        count is binomial given the choice, and with probability at least 1 - alpha over the noise either the
        answer is correct or it is ABSTAIN. The guarantee takes the noise as exactly Gaussian; it is float32
        Box-Muller with |eps| <= 6.66.

        Args:
            x: image [C, H, W] or [1, C, H, W], floating point and finite.
            n0: samples for the choice of the class, >= 1.
            n: samples for the estimate, >= 1.
            alpha: probability of a wrong certificate, in (0, 1).
            batch_size: hint of how many samples are in flight; no effect on the result.
            stream: 0 .. 2^32-1, the image's index in its data set.

        Returns:
            (class, radius), or (ABSTAIN, 0.0).

        Raises:
            TypeError, ValueError: an argument of the wrong kind or range, or NaN logits.
        """
        n0 = checks.integer("n0", n0, low=1)
        n = checks.integer("n", n, low=1)
        alpha = _probability("alpha", alpha)
        # Both ranges are under way before the first look at a count: one wait for the device an image.
        selection, estimation = (self._votes(x, k, first, batch_size, stream) for k, first in ((n0, 0), (n, n0)))
        chosen = int(checked(selection, n0).argmax())
        radius = certified_radius(int(checked(estimation, n)[chosen]), n, self.sigma, alpha)
        return (ABSTAIN, 0.0) if radius is None else (chosen, radius)

    def predict(self, x: Tensor, n: int = 1000, alpha: float = 0.001, batch_size: int = 400, *, stream: int = 0) -> int:
        """Class of g at x, or ABSTAIN (Cohen et al., PREDICT): wrong with probability at most alpha.

        Two-sided binomial test of the top two counts against 1/2. That the test may look at which two classes
        came out on top was shown by Hung and Fithian, "Rank verification for exponential families" (2019).

        Args and errors as in `certify`.
        """
        n = checks.integer("n", n, low=1)
        alpha = _probability("alpha", alpha)
        counts = self.counts(x, n, 0, batch_size, stream).tolist()
        first, second = sorted(range(self.num_classes), key=lambda c: -counts[c])[:2]
        test = stats.binomtest(counts[first], counts[first] + counts[second], 0.5)
        return first if test.pvalue <= alpha else ABSTAIN

    def counts(self, x: Tensor, n: int, first_sample: int = 0, batch_size: int = 400, stream: int = 0) -> Tensor:
        """Votes of samples first_sample .. first_sample + n - 1, int64 [num_classes].

        Counts add up: those of two adjacent ranges sum to those of their union. Errors as in `certify`.
        """
        n = checks.integer("n", n, low=1)
        return checked(self._votes(x, n, first_sample, batch_size, stream), n)

    def _votes(self, x: Tensor, n: int, first_sample: int, batch_size: int, stream: int) -> Tensor:
        """`counts` as they come to be on the device, unread."""
        x = image(x)
        prepared = self._classifier.prepare(x)
        if prepared.num_classes != self.num_classes:
            raise ValueError(
                f"num_classes must be the width of the model's logits, {prepared.num_classes}, got {self.num_classes}"
            )
        return votes(prepared, x, self.sigma, n, self.seed, first_sample, batch_size, stream)


def votes(
    prepared: Prepared, x: Tensor, sigma: float, n: int, seed: int, first_sample: int, batch_size: int, stream: int
) -> Tensor:
    """Votes of the noisy samples first_sample .. first_sample + n - 1 of x [C, H, W], int64 [num_classes], on the
    network's device; samples with NaN logits cast none. Arguments and errors as in `Smooth.counts`.
    """
    batch_size = checks.integer("batch_size", batch_size, low=1)
    stream = checks.integer("stream", stream, low=0, high=2**32 - 1)
    first_sample = checks.integer("first_sample", first_sample, low=0, high=2**62 - n)
    x = x.to(prepared.device)
    out = torch.zeros(prepared.num_classes, dtype=torch.int64, device=prepared.device)
    counting = threading.Lock()

    def noisy(start: int) -> Tensor:
        return csam_kernels.smoothing_noise(
            x,
            prepared.tile,
            sigma,
            seed=seed,
            first_sample=start,
            stream=stream,
            dtype=prepared.input_dtype,
            memory_format=prepared.memory_format,
        )

    def count(logits: Tensor, start: int) -> None:
        with counting:
            csam_kernels.count_votes(logits, out=out)

    prepared.run(noisy, count, first_sample, n, batch_size)
    return out


def checked(votes: Tensor, n: int) -> Tensor:
    """The votes on the host, all n of them."""
    votes = votes.cpu()
    missing = n - int(votes.sum())
    if missing:
        raise ValueError(f"model returned NaN logits for {missing} of {n} samples; they cast no vote")
    return votes


def image(x: Tensor) -> Tensor:
    """One image to certify as float32 [C, H, W]; [1, C, H, W] is taken too.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: another shape, or a pixel that is NaN or inf.
    """
    x = checks.tensor("x", x).detach()
    if x.dim() == 4 and x.shape[0] == 1:
        x = x[0]
    if x.dim() != 3 or x.numel() == 0:
        raise ValueError(f"x must be one image [C, H, W] or [1, C, H, W], got shape {tuple(x.shape)}")
    x = x.to(torch.float32).contiguous()
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(f"x must have finite pixels, got {bad} of {x.numel()} that are NaN or inf in float32")
    return x


@dataclass(frozen=True)
class Prepared:
    """A network ready to label tiles: see `TiledClassifier`.

    Attributes:
        module: the frozen copy that runs.
        dtype: of its inputs.
        memory_format: of its inputs.
        device: where it runs.
        num_classes: width of its logits.
        tile: rows of every batch it is given.
        steps: what was done to the model, and what could not be done and why.
    """

    module: nn.Module
    dtype: torch.dtype
    memory_format: torch.memory_format
    device: torch.device
    num_classes: int
    tile: int
    steps: tuple[str, ...]

    @property
    def input_dtype(self) -> torch.dtype:
        """The dtype to draw inputs in: `dtype` where the kernels offer it."""
        return self.dtype if self.dtype in DTYPES else torch.float32

    def run(
        self,
        draw: Callable[[int], Tensor],
        use: Callable[[Tensor, int], None],
        first: int,
        count: int,
        batch_size: int,
    ) -> None:
        """Label samples first .. first + count - 1 in canonical tiles.

        Args:
            draw: maps a sample index, a multiple of `tile`, to the `tile` inputs that start there, in
                `memory_format`.
            use: takes logits [m, num_classes] and the index of their first sample; called once a tile, from
                several threads, in any order.
            first, count: the wanted samples; a tile that sticks out is drawn in full and cut to them.
            batch_size: hint of how many samples are in flight.
        """

        def evaluate(start: int) -> None:
            logits = self.module(draw(start).to(self.dtype))
            low, high = max(first, start), min(first + count, start + self.tile)
            use(logits[low - start : high - start], low)

        workers = math.ceil(batch_size / self.tile) if self.device.type == "cpu" else 1
        run_tiles(evaluate, range(first - first % self.tile, first + count, self.tile), workers)


class TiledClassifier:
    """Keeps the frozen copy of a model that labels tiles, and makes it anew when the model has changed.

    Args:
        model: maps [B, C, H, W] to logits [B, K]; or a `Prepared` network, which fixes dtype and tile.
        dtype: None to run the model's own modules; otherwise masks and batch-norm are folded, the copy cast.
        tile: rows of a canonical tile, >= 1; None for the default of the model's device.

    Raises:
        TypeError, ValueError: wrong kind or range, or a batch-norm layer without running statistics.
    """

    # the copy, the shape of its images (None: any) and what it was made from
    _made: tuple[Prepared | None, torch.Size | None, list[tuple[Tensor, int]]]

    def __init__(self, model: nn.Module | Prepared, dtype: torch.dtype | None, tile: int | None) -> None:
        if isinstance(model, Prepared):
            for name, value, own in (("dtype", dtype, model.dtype), ("tile", tile, model.tile)):
                if value not in (None, own):
                    raise ValueError(f"{name} must be None or the prepared network's {own}, got {value}")
            self.model, self.dtype, self.tile = nn.Module(), model.dtype, model.tile
            self._made = (model, None, [])
            return
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise ValueError(
                    f"model layer {name!r} is a batch-norm without running statistics, so a sample's logits "
                    "would depend on the batch; set track_running_stats=True and estimate them"
                )
        self.model = model
        self.dtype = checks.choice("dtype", dtype, (None, *DTYPES))
        if tile is None:
            where = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0)).device.type
            tile = TILE.get(where, TILE["cpu"])
        self.tile = checks.integer("tile", tile, low=1)
        self._made = (None, torch.Size(), [])

    @property
    def current(self) -> Prepared | None:
        """The copy at hand."""
        return self._made[0]

    @property
    def settings(self) -> dict[str, Any]:
        dtype = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return {"dtype": dtype, "tile": self.tile}

    def prepare(self, x: Tensor) -> Prepared:
        """The copy for images like x [C, H, W]: the one at hand if neither the model nor the shape changed.

        Raises:
            ValueError: the model does not map [B, C, H, W] to [B, K] with K >= 2.
        """
        current, shape, versions = self._made
        now = _versions(self.model)
        same = len(now) == len(versions) and all(
            a is b and v == w != UNKNOWN for (a, v), (b, w) in zip(now, versions, strict=True)
        )
        if current is None or shape not in (None, x.shape) or not same:
            where = next((t.device for t, _ in now), x.device)
            with torch.autocast(where.type, enabled=False):  # the caller's does not reach the tiles' threads either
                current = _prepare(self.model, x.shape, where, self.dtype, self.tile)
            self._made = (current, x.shape, now)  # in one step, for callers on other threads
        return current


def run_tiles(evaluate: Callable[[int], None], tiles: Iterable[int], workers: int) -> None:
    """Call `evaluate(tile)` for every tile on `workers` threads, torch.get_num_threads() at most.

    Each runs in inference mode with one intra-op thread. The first exception of a tile, or KeyboardInterrupt
    in the caller, stops the threads at their next tile and is raised once they have ended. The caller's number
    of threads is not touched.
    """
    pending = deque(tiles)
    workers = min(workers, torch.get_num_threads(), len(pending))
    if workers < 1:
        return

    def work() -> None:
        try:
            with torch.inference_mode():
                while True:
                    try:
                        tile = pending.popleft()
                    except IndexError:
                        return
                    evaluate(tile)
        finally:
            pending.clear()

    with ThreadPoolExecutor(workers, "csam-tiles", initializer=_one_intra_op_thread) as pool:
        try:
            for future in [pool.submit(work) for _ in range(workers)]:
                future.result()
        finally:
            pending.clear()


def _one_intra_op_thread() -> None:
    """Give the calling thread, a new one, one intra-op thread, and threads to come what they had.

    torch.set_num_threads sets the number of the calling thread and of all threads to come. So a thread of its
    own puts the latter back, one caller at a time.
    """
    with _setting_threads:
        default = torch.get_num_threads()
        torch.set_num_threads(1)
        restore = threading.Thread(target=torch.set_num_threads, args=(default,))
        restore.start()
        restore.join()


def _prepare(
    model: nn.Module, shape: torch.Size, device: torch.device, dtype: torch.dtype | None, tile: int
) -> Prepared:
    network: nn.Module = copy.deepcopy(model).eval().requires_grad_(False)
    tensors = list(itertools.chain(network.parameters(), network.buffers()))
    own = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    # Two different rows, so that a rewrite which mixes samples up does not go unseen; and of no user's image, as one
    # that is black hides a change of the weights.
    generator = torch.Generator("cpu").manual_seed(0)
    probe = torch.rand(2, *shape, generator=generator, device="cpu").to(device, own)
    try:
        with torch.inference_mode():
            wanted = network(probe)
    except RuntimeError as error:
        raise ValueError(f"model does not take images x of shape {tuple(shape)}: {error}") from error
    if not isinstance(wanted, Tensor) or wanted.dim() != 2 or wanted.shape[0] != 2 or wanted.shape[1] < 2:
        got = f"shape {tuple(wanted.shape)}" if isinstance(wanted, Tensor) else type(wanted).__name__
        raise ValueError(f"model must map {tuple(probe.shape)} to logits (2, K) with K >= 2, got {got}")
    layout, steps = torch.contiguous_format, ["the model's own modules"]
    if dtype is not None:
        network, layout, steps = inference.ready(network, probe, wanted, dtype, tile)
    return Prepared(network, dtype or own, layout, device, wanted.shape[1], tile, tuple(steps))


def _versions(model: nn.Module) -> list[tuple[Tensor, int]]:
    """Every parameter and buffer with its version, which torch advances at each in-place change."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return [(t, UNKNOWN if t.is_inference() else t._version) for t in tensors]


def _probability(name: str, value: float) -> float:
    value = checks.real(name, value)
    if not 0 < value < 1:
        raise ValueError(f"{name} must be in (0, 1), got {value:g}")
    return value


__all__ = [
    "ABSTAIN",
    "Prepared",
    "Smooth",
    "TiledClassifier",
    "certified_radius",
    "checked",
    "image",
    "lower_confidence_bound",
    "run_tiles",
    "votes",
]
