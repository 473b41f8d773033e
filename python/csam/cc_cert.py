"""CC-Cert (Pautov et al., AAAI 2022): a probabilistic certificate against random semantic transforms.

For an image x with softmax output p, a transform T drawn from a distribution and p_T = p(T(x)), let
Y = max_c |p_c - p_T,c| and a = (p_1 - p_2)/2, half the gap of the top two. Y < a suffices for the prediction
to survive, so P(prediction changes) <= P(Y >= a) <= min_t E exp(tY) / exp(ta), the Chernoff bound. The
expectation is estimated in k blocks of n draws; the largest of the k estimates, divided by delta in (0, 1),
is reported.

What it promises: the reported number is random. It falls below the true Chernoff bound only if in every block
the sample mean of exp(tY) falls, at some t, below delta times its expectation. That becomes exponentially
unlikely in k, but how unlikely depends on the spread of exp(tY), which nobody knows: this is no confidence
interval of a stated level. Report n, k, delta and the t grid with every number (`CCCert.settings`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp
from torch import Tensor

import csam_kernels
from csam import engine, inference, quantization, smoothing
from csam.adapters import LAYOUTS, Classifier
from csam.transforms import Transform
from csam_kernels import checks

SMALLEST = float(np.nextafter(0.0, 1.0))


def default_t() -> NDArray[np.float64]:
    """The grid of the public code: linspace(1e-4, 1e4, 500)."""
    return np.linspace(1e-4, 1e4, 500)


def cc_cert_bound(
    discrepancy: Tensor | ArrayLike,
    margin: float,
    delta: float = 0.9,
    t: Tensor | ArrayLike | None = None,
) -> float:
    """Bound on P(prediction changes): max over blocks b of min over t of mean_j exp(t (Y_bj - a)) / delta.

    Computed in float64 as logsumexp, so nothing overflows; clipped to 1, and to the smallest positive float64
    rather than to 0, which would claim what no sample can show. A draw with Y >= a forces its block's ratio
    to at least 1/n: a bound below 1/(n delta) needs every Y < a.

    Args:
        discrepancy: Y [k, n], >= 0: k blocks of n draws.
        margin: a >= 0, half the gap of the top two probabilities.
        delta: in (0, 1).
        t: grid of Chernoff parameters, > 0; default `default_t()`.

    Returns:
        The bound in (0, 1].

    Raises:
        ValueError: not [k, n] with k, n >= 1, a negative or non-finite entry, delta outside (0, 1), t empty,
            not one dimension or not > 0.
    """
    y = _array("discrepancy", discrepancy)
    if y.ndim != 2 or y.size == 0:
        raise ValueError(f"discrepancy must be [k, n] with k, n >= 1, got shape {y.shape}")
    if not (np.isfinite(y).all() and (y >= 0).all()):
        raise ValueError("discrepancy must be finite and >= 0")
    margin = checks.real("margin", margin, least=0)
    delta = checks.real("delta", delta, above=0, below=1)
    grid = _grid(t)
    ratios = [(logsumexp(np.outer(grid, block - margin), axis=1) - np.log(block.size)).min() for block in y]
    return float(max(np.exp(min(max(ratios) - np.log(delta), 0.0)), SMALLEST))


@dataclass(frozen=True)
class CCResult:
    """What CC-Cert says of one image.

    Attributes:
        bound: on P(prediction changes under a drawn transform), in (0, 1].
        prediction: class of the untouched image.
        margin: a = (p_1 - p_2) / 2.
        discrepancy: Y, float64 [k, n].
        flips: how many of the k * n draws changed the prediction (an observation, not a bound).
        nan: images with NaN probabilities, of these draws and the untouched one; the bound is then 1, and the
            prediction -1 if that one is among them.
        n, k, delta, t: the settings that the bound was computed with.
    """

    bound: float
    prediction: int
    margin: float
    discrepancy: Tensor = field(repr=False)
    flips: int
    n: int
    k: int
    delta: float
    t: tuple[float, ...] = field(repr=False)
    nan: int = 0


class CCCert:
    """CC-Cert for a network and a distribution of transforms.

    Draw j of block b is sample b * n + j of (seed, stream): the same whatever the batch size or the thread
    count, and evaluated as there is said (`csam.smoothing`). The network is run as by
    `csam.Smooth`; its logits go through a float64 softmax, and in a low `dtype` carry that dtype's rounding.

    Args:
        model: maps [B, C, H, W], pixels in [0, 1], to logits [B, K]; any callable or a `Prepared` network, as in
            `csam.Smooth`.
        transform: distribution to draw from, e.g. `Rotation(10) | Brightness(0.2)`.
        n, k: draws a block, and blocks; >= 1.
        delta: in (0, 1).
        t: grid of Chernoff parameters, > 0; default linspace(1e-4, 1e4, 500).
        seed: 0 .. 2^64-1.
        dtype, tile, choices: as in `csam.Smooth`.
        calibration: images for dtype "int8", as there; pixels in [0, 1], to which draws of the transform are applied.
        layout: as there.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or range, by name.
    """

    def __init__(
        self,
        model: Classifier | smoothing.Prepared,
        transform: Transform,
        *,
        n: int = 100,
        k: int = 10,
        delta: float = 0.9,
        t: Sequence[float] | Tensor | NDArray[np.float64] | None = None,
        seed: int = 0,
        dtype: torch.dtype | str | None = None,
        tile: int | None = None,
        choices: engine.Choices = "auto",
        calibration: Tensor | None = None,
        layout: str = "NCHW",
    ) -> None:
        if not isinstance(transform, Transform):
            raise TypeError(f"transform must be a csam.transforms.Transform, got {type(transform).__name__}")
        self.transform = transform
        self.n = checks.integer("n", n, low=1)
        self.k = checks.integer("k", k, low=1)
        self.delta = checks.real("delta", delta, above=0, below=1)
        self.t = _grid(t)
        self.seed = checks.seed(seed)
        self.layout = checks.choice("layout", layout, LAYOUTS)
        if isinstance(model, smoothing.Prepared):
            model.refuse_uncalibrated(self._words)
        shown = None if calibration is None else self._shown(smoothing.nchw(calibration, layout))
        self._classifier = smoothing.TiledClassifier(model, dtype, tile, choices, shown, layout)

    @property
    def prepared(self) -> smoothing.Prepared | None:
        """The network as it is executed (`.module`, `.steps`), None before the first image."""
        return self._classifier.current

    @property
    def settings(self) -> dict[str, Any]:
        """What must be reported with a bound, as plain values; t as (first, last, number)."""
        return {
            "transform": str(self.transform),
            "n": self.n,
            "k": self.k,
            "delta": self.delta,
            "t": (float(self.t[0]), float(self.t[-1]), len(self.t)),
            "seed": self.seed,
            **self._classifier.settings,
        }

    def recipe(self, x: Tensor) -> dict[str, Any]:
        """What fixes the bound of an image like x; plain values for a run's record: `settings` and how layers run."""
        return {**self.settings, **smoothing.executed(self._classifier.prepare(smoothing.image(x, self.layout)))}

    def certify(self, x: Tensor, *, stream: int = 0, batch_size: int = 400) -> CCResult:
        """Bound the probability that a drawn transform changes the prediction at x.

        Args:
            x: image [C, H, W] or [1, C, H, W], floating point, pixels in [0, 1].
            stream: 0 .. 2^32-1, the image's index in its data set.
            batch_size: hint of how many draws are in flight; no effect on the result.

        Raises:
            TypeError, ValueError: an argument of the wrong kind or range, or NaN logits.
        """
        found = self.measure(x, stream=stream, batch_size=batch_size)
        if found.nan:
            raise ValueError(f"model returned NaN probabilities for {found.nan} of {1 + self.k * self.n} images")
        return found

    def measure(self, x: Tensor, *, stream: int = 0, batch_size: int = 400) -> CCResult:
        """`certify`, of which NaN probabilities are a result: they show nothing, so the bound is 1."""
        x = smoothing.image(x, self.layout)
        if x.device.type == "cpu":
            _in_range("x", *x.aminmax())
        stream = checks.integer("stream", stream, low=0, high=2**32 - 1)
        batch_size = checks.integer("batch_size", batch_size, low=1)
        prepared = self._classifier.prepare(x)
        x = smoothing.sent(x, prepared.device)
        count, tile, device = self.k * self.n, prepared.rows, prepared.device
        clean = torch.empty(prepared.num_classes, dtype=torch.float64, device=device)
        moved = torch.empty(count, dtype=torch.float64, device=device)
        flipped = torch.empty(count, dtype=torch.bool, device=device)
        draws = self.transform.parameters(-(-count // tile) * tile, seed=self.seed, stream=stream)
        draws = smoothing.sent(draws, device)

        def transformed(start: int) -> Tensor:
            batch = torch.ops.csam.semantic_batch(x, draws[start : start + tile])
            batch = self.transform.corrupted(batch, seed=self.seed, first_sample=start, stream=stream)
            return inference.laid_out(batch.to(prepared.dtype), prepared.memory_format)

        def untouched(start: int) -> Tensor:
            copies = x.to(prepared.dtype).expand(tile if prepared.sampler is None else 1, *x.shape)
            return inference.laid_out(copies, prepared.memory_format)

        def keep(logits: Tensor, start: int) -> None:
            clean[:] = logits[0]

        def compare(logits: Tensor, start: int) -> None:
            rows = slice(start, start + len(logits))
            moved[rows], flipped[rows] = csam_kernels.discrepancy(clean, logits)

        prepared.run(untouched, keep, 0, 1, batch_size)
        prepared.run(transformed, compare, 0, count, batch_size)
        probabilities = clean.softmax(0)
        broken = probabilities.isnan().any() + moved.isnan().sum()
        counts = [flipped.sum().double(), broken.double()]
        results = [*x.double().aminmax(), probabilities, moved.reshape(self.k, self.n), *counts]
        low, high, *rest = smoothing.read(x, results)
        _in_range("x", low, high)
        return self._result(*rest)

    @property
    def _words(self) -> str:
        return f"images under {self.transform}"

    def _shown(self, images: Tensor) -> quantization.Calibration:
        """What int8 is calibrated on: draws that no certificate takes."""

        def draw(x: Tensor, n: int, first_sample: int, stream: int) -> Tensor:
            rows = self.transform.parameters(n, seed=0, first_sample=first_sample, stream=stream)
            copies = csam_kernels.semantic_batch(x, rows)
            return self.transform.corrupted(copies, seed=0, first_sample=first_sample, stream=stream)

        shown = quantization.calibration("calibration", images, draw, self._words)
        _in_range("calibration", *images.aminmax())
        return shown

    def _result(self, clean: Tensor, discrepancy: Tensor, flips: Tensor, broken: Tensor) -> CCResult:
        silent = bool(clean.isnan().any())
        first, second = (0.0, 0.0) if silent else clean.topk(2).values.tolist()
        margin = (first - second) / 2
        return CCResult(
            bound=1.0 if broken else cc_cert_bound(discrepancy, margin, self.delta, self.t),
            prediction=smoothing.ABSTAIN if silent else int(clean.argmax()),
            margin=margin,
            discrepancy=discrepancy,
            flips=int(flips),
            n=self.n,
            k=self.k,
            delta=self.delta,
            t=tuple(self.t.tolist()),
            nan=int(broken),
        )


def _in_range(name: str, low: Tensor, high: Tensor) -> None:
    if low < 0 or high > 1:
        raise ValueError(f"{name} must have pixels in [0, 1], got {float(low):g} .. {float(high):g}")


def _array(name: str, values: Tensor | ArrayLike) -> NDArray[np.float64]:
    try:
        if isinstance(values, Tensor):
            values = values.detach().cpu().double().numpy()
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be an array of numbers, got {type(values).__name__}: {error}") from error


def _grid(t: Tensor | ArrayLike | None) -> NDArray[np.float64]:
    grid = default_t() if t is None else _array("t", t)
    if grid.ndim != 1 or grid.size == 0 or not (np.isfinite(grid).all() and (grid > 0).all()):
        raise ValueError(f"t must be a non-empty list of numbers > 0, got {t!r}")
    return grid


__all__ = ["CCCert", "CCResult", "cc_cert_bound", "default_t"]
