"""Randomized smoothing (Cohen, Rosenfeld and Kolter, ICML 2019): predictions that hold in a ball.

The base classifier f is a network; the smoothed classifier is g(x) = argmax_c P(f(x + sigma eps) = c) with
eps ~ N(0, I). If g(x)'s class has probability at least p_A > 1/2, then g is constant in the open l2 ball of
radius sigma Phi^-1(p_A) around x (their Theorem 1 with p_B = 1 - p_A). With uniform or Laplace noise the ball is
one of the l1 norm (`csam.laws`).

Certificates are a function of (network, x, noise, sigma, seed, stream, n0, n, alpha) and of nothing else. Sample i of
an image always has the same noise. In the sampling engine (on a CPU) its bits depend on no other sample. Where torch
runs the network it is always evaluated in the same canonical tile: `tile` consecutive sample indices starting at a
multiple of `tile`, in full even when only some of its rows are wanted, from the noise to the logits on one thread. So
neither the batch size nor the number of threads can reorder a sum inside a matrix library.

The theorem is about real numbers. `Smooth(..., sound_float=True)` is proved for what the program computes, on images
that are whole numbers / 255; without, nothing is claimed about rounding (`csam.sound` says what holds in each mode).
"""

from __future__ import annotations

import copy
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import csam_kernels
from csam import engine, inference, quantization, sequential, sound, tracing
from csam.adapters import LAYOUTS, Classifier, FromNCHW, Opaque, checked_logits, opaque, told
from csam.laws import LAWS
from csam.nn import copied, masked_layers, settle_weights
from csam.sequential import ABSTAIN, Certificate, checked_alpha
from csam.threads import one_intra_op_thread
from csam_kernels import checks
from csam_kernels.cells import cells, steps
from csam_kernels.laws import checked_law, checked_sigma
from csam_kernels.ops.sample_network import SampleNetwork

TILE = {"cpu": 50, "cuda": 1000}  # on a CPU a tile stays in cache; a GPU must be filled
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNKNOWN = -1  # version of a tensor made in inference mode, which does not count its changes
Version = tuple[Tensor, int, int]  # a tensor, its version, its address
_SHARE = 2  # tiles of a sampler that a thread takes at a time, if there are many
_TRIED = 8  # rows of a module's logits on which it is tried whether it is a function of each
_LANES = 64  # a multiple of the samples that every sampler takes together


def named_dtype(dtype: Any) -> Any:
    """torch's dtype of that name, such as "bfloat16"; anything else as it is."""
    return next((known for known in (*DTYPES, torch.int8) if dtype == str(known).removeprefix("torch.")), dtype)


def lower_confidence_bound(successes: int, n: int, alpha: float) -> float:
    """Exact one-sided lower bound of Clopper and Pearson (1934) on the probability of a success.

    Over repetitions it lies above the true probability with probability at most alpha, for every n and every
    probability.

    Raises:
        TypeError, ValueError: n outside [1, 10^10], successes outside [0, n], or alpha outside [1e-50, 1).
    """
    n = checks.integer("n", n, low=1, high=sequential.Fixed.most)
    successes = checks.integer("successes", successes, low=0, high=n)
    return sequential.clopper_pearson(successes, n, checked_alpha(alpha))


def certified_radius(successes: int, n: int, sigma: float, alpha: float, noise: str = "gaussian") -> float | None:
    """Radius of p_A from `successes` votes in n fresh samples, in the norm of the noise; None (abstain) if p_A < 1/2.

    Errors as in `lower_confidence_bound`, a sigma that is not > 0, and a noise that is not in `csam.laws.LAWS`.
    """
    law = LAWS[checked_law("noise", noise)]
    sigma = checks.real("sigma", sigma, above=0)
    p_a = lower_confidence_bound(successes, n, alpha)
    return None if not p_a >= 0.5 else float(sigma * law.radius(p_a))


class Smooth:
    """The smoothed classifier g of a network, with Cohen's `certify` and `predict`.

    The base classifier that is certified is the network as it is executed: a frozen copy of `model` in eval mode. On a
    CPU the sampling engine (`csam.sampling`) runs it where every node has a step and torch is not faster, in float32
    if no `dtype` is given. Otherwise, with `dtype=None`, it is computed by its own modules in its own dtype (noise is
    drawn in float32), as always with `choices="module"`. With a `dtype` it is rewritten for speed (`csam.inference`):
    masks and batch norms folded, cast to `dtype`, channels_last, convolutions fused with what follows, on a GPU in the
    library's own kernel, the first of which draws the noise that it reads. Its logits are the model's up to rounding
    in `dtype`, and `prepared.steps` lists what could be done; one with hooks is cast and no more. The copy is made at
    the first image and again when a parameter or buffer of `model` has changed (seen through torch's version counters;
    a change through `.data` or of a plain attribute is not: build a new Smooth then). `model` itself is never run and
    keeps its mode. `forward` must not keep state between calls: tiles run on several threads at once, outside the
    caller's autocast.

    Any other callable is run as it is, one call at a time, on the CPU, and never looked into: `csam.Opaque` says what
    that takes for granted, and gives it a name, another device or more threads. It is also what a module is made of
    where a part of it is no torch: `nn.Sequential(denoiser, csam.Opaque(session))`.

    Calls with the same seed and stream use the same noise: each guarantee holds alone, but an independent
    repetition takes another seed or stream.

    Args:
        model: maps [B, C, H, W] pixels to logits [B, num_classes], a module or any callable; or a `Prepared` network,
            such as that of a `csam.sampling.Plan`, which then runs as it is.
        num_classes: width of the logits, >= 2.
        sigma: standard deviation of the noise, in the pixels' unit, > 0 in float32 too.
        noise: its law, "gaussian", "uniform" or "laplace" (`csam_kernels.laws`, which says how wide each is by sigma).
        dtype: None, or torch.float32, bfloat16 or float16, or its name, for the fast path; or "int8", on a CPU: what is
            certified is then the quantised network (`csam.quantization`).
        seed: 0 .. 2^64-1.
        tile: samples evaluated together; part of what fixes the result, to the last bit of a near tie. Default 50
            for a model on the CPU, 1000 on a GPU.
        choices: how each layer runs, as in `csam.sampling.plan`; "module" for torch's own.
        calibration: for "int8", and for it alone: images [N, C, H, W] that set the ranges of its values, such as
            training images; pixels without noise, that of `sigma` is added.
        sound_float: noise on the grid of the pixels, so that the guarantee covers floating point (`csam.sound`); for
            images uint8 / 255.
        layout: "NCHW"; or "NHWC" for images [H, W, C] (and `calibration` [N, H, W, C]) and a model that takes
            [B, H, W, C]. A pixel gets the same noise in both. A `Prepared` network keeps its own.

    Attributes:
        norm: of the radii: "l2" under Gaussian noise, "l1" under the others (`csam.laws`).
        grid: steps to 1 of the noise, None for noise off the grid.
        distance: of the noise's law from the one of the proof, a coordinate; None if nothing is known of it.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or range, or a batch-norm layer without running
            statistics (its output for one sample depends on the others, so no certificate would hold). At the first
            image: a model with soft masks in force, or one that is random or depends on the other rows of a batch, as
            far as three tries show; int8 of a network that has no such steps, or calibrated on images of another shape;
            sound_float of an image off the grid.
    """

    ABSTAIN = ABSTAIN

    def __init__(
        self,
        model: Classifier | Prepared,
        num_classes: int,
        sigma: float,
        *,
        noise: str = "gaussian",
        dtype: torch.dtype | str | None = None,
        seed: int = 0,
        tile: int | None = None,
        choices: engine.Choices = "auto",
        calibration: Tensor | None = None,
        sound_float: bool = False,
        layout: str = "NCHW",
    ) -> None:
        self.num_classes = checks.integer("num_classes", num_classes, low=2)
        self.noise = checked_law("noise", noise)
        self.sigma = checked_sigma(sigma, self.noise)
        self.norm = LAWS[self.noise].norm
        self.seed = checks.seed(seed)
        self.grid = sound.GRID if checks.flag("sound_float", sound_float) else None
        self.distance = None if self.grid is None else cells(self.sigma, self.grid, self.noise).distance
        self.layout = checks.choice("layout", layout, LAYOUTS)
        if isinstance(model, Prepared):
            model.refuse_uncalibrated(noisy_words(self.sigma, self.noise))
        shown = None
        if calibration is not None:
            shown = noisy("calibration", nchw(calibration, layout), self.sigma, self.noise)
        self._classifier = TiledClassifier(model, dtype, tile, choices, shown, layout)

    @property
    def prepared(self) -> Prepared | None:
        """The network as it is executed (`.module`, `.steps`), None before the first image."""
        return self._classifier.current

    def nchw(self) -> Smooth:
        """The same for images [C, H, W], whatever the model takes."""
        twin = copy.copy(self)
        twin.layout = "NCHW"
        return twin

    @property
    def settings(self) -> dict[str, Any]:
        """What, besides the network, the image and n, fixes a result; plain values for a run's record."""
        on_grid = {} if self.grid is None else {"sound_float": {"grid": self.grid, "distance": self.distance}}
        law = {"noise": self.noise, "norm": self.norm, "sigma": self.sigma}
        return {**law, "seed": self.seed, **self._classifier.settings, **on_grid}

    def certify(
        self,
        x: Tensor,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        batch_size: int = 400,
        *,
        stream: int = 0,
        adaptive: bool = False,
        target_radius: float | None = None,
        rtol: float | None = None,
        method: str | None = None,
    ) -> tuple[int, float]:
        """Class of g at x and a radius within which g keeps it, in the norm `norm` (Cohen et al., CERTIFY).

        Samples 0 .. n0-1 choose the class, samples n0 .. n0+n-1 count it; the two sets are disjoint, so the
        count is binomial given the choice, and with probability at least 1 - alpha over the noise either the
        answer is correct or it is ABSTAIN. Unless `sound_float`, the guarantee takes arithmetic as exact and the
        noise as that of the law; it is float32 from 32-bit words, in a Gaussian |eps| <= 6.66
        (`csam_kernels.smoothing_noise`).

        An adaptive certificate stops before n as soon as the answer is settled, with the same guarantee
        (`csam.sequential`): when n samples would hardly certify anything, when `target_radius` is certified or
        would hardly be, or within the relative tolerance `rtol` of the radius that n samples could still give.

        Args:
            x: image [C, H, W] or [1, C, H, W], floating point and finite; with `sound_float` uint8 / 255 in float32. In
                the layout "NHWC" [H, W, C].
            n0: samples for the choice of the class, 1 .. 10^10.
            n: samples for the estimate, 1 .. 10^10; adaptive: the most, up to 10^7.
            alpha: probability of a wrong certificate, in [1e-50, 1).
            batch_size: hint of how many samples are in flight; no effect on the result.
            stream: 0 .. 2^32-1, the image's index in its data set.
            adaptive: stop early; the rest is for that only.
            target_radius: > 0, or None; in the norm `norm`.
            rtol: in (0, 1), or None.
            method: of `csam.sequential.METHODS`; None for the one that measured best.

        Returns:
            (class, radius), or (ABSTAIN, 0.0).

        Raises:
            TypeError, ValueError: an argument of the wrong kind or range, or NaN logits.
        """
        stop = {"adaptive": adaptive, "target_radius": target_radius, "rtol": rtol, "method": method}
        return self.certificate(x, n0, n, alpha, batch_size, stream=stream, **stop)[:2]

    def certificate(
        self,
        x: Tensor,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        batch_size: int = 400,
        *,
        stream: int = 0,
        **stop: Any,
    ) -> Certificate:
        """What `certify` returns, how many samples it took, n0 included, and why not more. Arguments as there."""
        _check_calls(batch_size, stream)
        certification = sequential.Certification(self.rule(x, n0, n, alpha, **stop), n0)
        found = None
        while found is None:
            votes = self.votes(x, certification.wanted, batch_size, stream)
            found = certification.tell([v.tolist() for v in votes])
        return found

    def rule(self, x: Tensor, n0: int, n: int, alpha: float, *, adaptive: bool = False, **stop: Any) -> sequential.Rule:
        """When to stop an image like x, with looks where whole tiles end. Arguments as in `certify`."""
        n0 = checks.integer("n0", n0, low=1, high=sequential.Fixed.most)
        n, alpha = checks.integer("n", n, low=1), checked_alpha(alpha)
        sequential.stopping(n, alpha, self.sigma, self.noise, adaptive, **stop)  # before the network is made
        tile, skip = self._ends(x, n0)
        alpha, sigma = self._level(x, n0 + n, alpha), self.sigma if self.grid is None else sound.scale(self.sigma)
        return sequential.rule(n, alpha, sigma, noise=self.noise, tile=tile, skip=skip, adaptive=adaptive, **stop)

    def _level(self, x: Tensor, samples: int, alpha: float) -> float:
        """Of alpha what the noise's law leaves."""
        return alpha if self.distance is None else sound.level(alpha, samples * x.numel(), self.distance)

    def prepare(self, x: Tensor) -> Prepared:
        """The network for images like x as it is executed. Raises TypeError or ValueError if it takes none such."""
        prepared = self._classifier.prepare(image(x, self.layout))
        if prepared.num_classes != self.num_classes:
            raise ValueError(
                f"num_classes must be the width of the model's logits, {prepared.num_classes}, got {self.num_classes}"
            )
        return prepared

    def recipe(self, x: Tensor) -> dict[str, Any]:
        """What, besides n, fixes a certificate of an image like x; plain values for a run's record.

        They are `settings`, with the layers' `choices` and the `fingerprint` of the plan, "module" and None where
        torch runs the network. Of a callable there is no more than its name.
        """
        return {**self.settings, **executed(self.prepare(x))}

    def _ends(self, x: Tensor, skip: int) -> tuple[int, int]:
        """(tile, skip) of `csam.sequential.Rule` for looks after `skip` samples: those of a sampler start anywhere."""
        prepared = self.prepare(x)
        return (prepared.tile, skip) if prepared.sampler is None else (_LANES, 0)

    def predict(
        self,
        x: Tensor,
        n: int = 1000,
        alpha: float = 0.001,
        batch_size: int = 400,
        *,
        stream: int = 0,
        adaptive: bool = False,
    ) -> int:
        """Class of g at x, or ABSTAIN (Cohen et al., PREDICT): wrong with probability at most alpha.

        Two-sided binomial test of the top two counts against 1/2. That the test may look at which two classes
        came out on top was shown by Hung and Fithian, "Rank verification for exponential families" (2019). An adaptive
        prediction stops before n as soon as the answer is settled, with the same guarantee
        (`csam.sequential.Prediction`).

        Args and errors as in `certify`.
        """
        _check_calls(batch_size, stream)
        n, alpha = checks.integer("n", n, low=1), checked_alpha(alpha)
        sequential.Prediction(n, alpha, self.num_classes, adaptive=adaptive)  # before the network is made
        tile, skip = self._ends(x, 0)
        alpha = self._level(x, n, alpha)
        test = sequential.Prediction(n, alpha, self.num_classes, adaptive=adaptive, tile=tile, skip=skip)
        counts, seen, answer = torch.zeros(self.num_classes, dtype=torch.int64, device="cpu"), 0, None
        while answer is None:
            look = next(look for look in test.looks if look > seen)
            counts, seen = counts + self.counts(x, look - seen, seen, batch_size, stream), look
            answer = test.decide(counts.tolist(), seen)
        return answer

    def counts(self, x: Tensor, n: int, first_sample: int = 0, batch_size: int = 400, stream: int = 0) -> Tensor:
        """Votes of samples first_sample .. first_sample + n - 1, int64 [num_classes].

        Counts add up: those of two adjacent ranges sum to those of their union. Errors as in `certify`.
        """
        n = checks.integer("n", n, low=1)
        return self.votes(x, ((n, first_sample),), batch_size, stream)[0]

    def votes(self, x: Tensor, ranges: Sequence[tuple[int, int]], batch_size: int, stream: int) -> list[Tensor]:
        """`counts` of every (n, first sample): all are under way before the one wait for the device."""
        found = self.cast(x, ranges, batch_size, stream)
        return [checked(v, n) for v, (n, _) in zip(found, ranges, strict=True)]

    def cast(self, x: Tensor, ranges: Sequence[tuple[int, int]], batch_size: int, stream: int) -> list[Tensor]:
        """`votes`, those of a range fewer than its samples where logits were NaN."""
        _check_calls(batch_size, stream)
        prepared = self.prepare(x)
        x = sent(self.check(x), prepared.device)
        where = (self.seed, batch_size, stream, self.grid, self.noise)
        found = [votes_in_turn(prepared, x, self.sigma, together, *where) for together in _adjacent(ranges)]
        return [v for part in read(x, found) for v in part]

    def check(self, x: Tensor) -> Tensor:
        """The image as float32 [C, H, W]. Raises TypeError or ValueError for one that cannot be certified."""
        x = image(x, self.layout)
        if self.grid is not None:
            steps(x, self.grid)
        return x


def _check_calls(batch_size: int, stream: int) -> None:
    checks.integer("batch_size", batch_size, low=1)
    checks.integer("stream", stream, low=0, high=2**32 - 1)


def votes(
    prepared: Prepared,
    x: Tensor,
    sigma: float,
    n: int,
    seed: int,
    first_sample: int,
    batch_size: int,
    stream: int,
    grid: int | None = None,
    noise: str = "gaussian",
) -> Tensor:
    """Votes of the noisy samples first_sample .. first_sample + n - 1 of x [C, H, W], int64 [num_classes], on the
    network's device; samples with NaN logits cast none. With a grid the noise is on it (`csam_kernels.grid_noise`).
    Only Gaussian noise off the grid is drawn by a network's head. Other arguments and errors as in `Smooth.counts`.
    """
    return votes_in_turn(prepared, x, sigma, ((n, first_sample),), seed, batch_size, stream, grid, noise)[0]


def _adjacent(ranges: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """The ranges of (n, first sample), those together that follow each other."""
    groups: list[list[tuple[int, int]]] = []
    for n, first in ranges:
        if groups and sum(groups[-1][-1]) == first:
            groups[-1].append((n, first))
        else:
            groups.append([(n, first)])
    return groups


def votes_in_turn(
    prepared: Prepared,
    x: Tensor,
    sigma: float,
    ranges: Sequence[tuple[int, int]],
    seed: int,
    batch_size: int,
    stream: int,
    grid: int | None = None,
    noise: str = "gaussian",
) -> Tensor:
    """`votes` of each (n, first sample), ranges that follow each other, int64 [ranges, num_classes]. No sample is run
    for more than one of them, though a tile of a network that torch runs may hold samples of several.
    """
    _check_calls(batch_size, stream)
    first_sample, n = ranges[0][1], sum(n for n, _ in ranges)
    first_sample = checks.integer("first_sample", first_sample, low=0, high=2**62 - n)
    x, head = sent(x, prepared.device), prepared.head if (grid, noise) == (None, "gaussian") else None
    out = torch.zeros(len(ranges), prepared.num_classes, dtype=torch.int64, device=prepared.device)
    counting = threading.Lock()

    if prepared.sampler is not None:
        sampler, few = prepared.sampler, 4 * torch.get_num_threads() * prepared.sampler.lanes
        share = (1 if n <= few else _SHARE) * sampler.lanes

        def tally(row: int, end: int, start: int) -> None:
            left = min(share, end - start)
            found = sampler.votes(x, sigma, left, seed=seed, first_sample=start, stream=stream, grid=grid, law=noise)
            with counting:
                out[row].add_(found)

        for row, (count, first) in enumerate(ranges):
            tiles = range(first, first + count, share)
            run_tiles(partial(tally, row, first + count), tiles, prepared.workers(batch_size, share))
        return out

    draw = csam_kernels.smoothing_noise if grid is None else partial(csam_kernels.grid_noise, grid=grid, on_grid=True)

    def noisy(start: int) -> Tensor:
        if head is not None:
            features: Tensor = head(x, prepared.tile, sigma, seed, start, stream)
            return features
        return draw(
            x,
            prepared.tile,
            sigma,
            seed=seed,
            first_sample=start,
            stream=stream,
            dtype=prepared.input_dtype,
            memory_format=prepared.memory_format,
            law=noise,
        )

    def tell(logits: Tensor, start: int) -> None:
        for row, (count, first) in enumerate(ranges):
            mine = logits[max(first - start, 0) : max(first + count - start, 0)]
            if len(mine):
                with counting:
                    csam_kernels.count_votes(mine, out=out[row])

    prepared.run(noisy, tell, first_sample, n, batch_size, head and head.rest)
    return out


def noisy(name: str, images: Tensor, sigma: float, noise: str = "gaussian") -> quantization.Calibration:
    """What int8 is calibrated on for such noise. Arguments and errors as in `csam.quantization.calibration`."""

    def draw(x: Tensor, n: int, first_sample: int, stream: int) -> Tensor:
        return csam_kernels.smoothing_noise(x, n, sigma, seed=0, first_sample=first_sample, stream=stream, law=noise)

    return quantization.calibration(name, images, draw, noisy_words(sigma, noise))


def noisy_words(sigma: float, noise: str) -> str:
    """What `noisy` calibrates on."""
    return f"noisy images of sigma {sigma:g}{'' if noise == 'gaussian' else f', {noise}'}"


def checked(votes: Tensor, n: int) -> Tensor:
    """The votes, which must be n."""
    missing = n - int(votes.sum())
    if missing:
        raise ValueError(f"model returned NaN logits for {missing} of {n} samples; they cast no vote")
    return votes


def image(x: Tensor, layout: str = "NCHW", name: str = "x") -> Tensor:
    """One image to certify, of a layout, as float32 [C, H, W]; [1, C, H, W] is taken too.

    Args:
        name: of the argument, for messages.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: another shape, no values (the meta device), or, in a tensor on the CPU, a pixel that is NaN or inf;
            `read` looks at others.
    """
    x = checks.tensor(name, x).detach()
    if x.dim() == 4 and x.shape[0] == 1:
        x = x[0]
    if x.dim() != 3 or x.numel() == 0:
        axes = ", ".join(layout[1:])
        raise ValueError(f"{name} must be one image [{axes}] or [1, {axes}], got shape {tuple(x.shape)}")
    if x.is_meta:
        raise ValueError(f"{name} must hold values, got a tensor on the meta device")
    x = nchw(x[None], layout)[0].to(torch.float32).contiguous()
    if x.device.type == "cpu" and not math.isfinite(x.sum()):  # or finite pixels with a sum that is not
        read(x, [], name)
    return x


def nchw(images: Tensor, layout: str) -> Tensor:
    """A view [N, C, H, W] of images of a layout; what is no such tensor as it is, for others to refuse."""
    last = layout == "NHWC" and isinstance(images, Tensor) and images.dim() == 4
    return images.permute(0, 3, 1, 2) if last else images


def sent(t: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; the way to a GPU leads through pinned memory and is not waited for."""
    if t.device.type == "cpu" and device.type == "cuda":
        return t.pin_memory().to(device, non_blocking=True)
    return t.to(device)


def read(x: Tensor, results: Sequence[Tensor], name: str = "x") -> list[Tensor]:
    """What came of the image x, tensors of one dtype on its device, on the CPU: the one wait for the device an image.

    Raises:
        ValueError: a pixel of x is NaN or inf.
    """
    wrong = (~torch.isfinite(x)).sum()
    flat = torch.cat([r.flatten() for r in (wrong.to(results[0].dtype) if results else wrong, *results)]).cpu()
    bad, *parts = flat.split([1, *(r.numel() for r in results)])
    if int(bad):
        raise ValueError(
            f"{name} must have finite pixels, got {int(bad)} of {x.numel()} that are NaN or inf in float32"
        )
    return [part.view(r.shape) for part, r in zip(parts, results, strict=True)]


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
        head: the beginning of the network that draws the noise of its inputs itself, and the rest; None if none does.
        sampler: the network on samples that lie innermost, which then runs instead of `module`; None if that does.
        threads: that may run at once; None for as many as there are.
        calibrated: what int8 was calibrated on, in words; None in other dtypes.
    """

    module: nn.Module
    dtype: torch.dtype
    memory_format: torch.memory_format
    device: torch.device
    num_classes: int
    tile: int
    steps: tuple[str, ...]
    head: inference.NoiseHead | None = None
    sampler: SampleNetwork | None = None
    threads: int | None = None
    calibrated: str | None = None
    _graphs: dict[Any, inference.Replayed] = field(default_factory=dict, init=False, repr=False, compare=False)

    def refuse_uncalibrated(self, words: str) -> None:
        """Raise ValueError for images of another kind than those that int8 was calibrated on."""
        if self.calibrated not in (None, words):
            raise ValueError(
                f"model in int8 must meet what it was calibrated on, {self.calibrated}, got {words}; plan it anew"
            )

    @property
    def input_dtype(self) -> torch.dtype:
        """The dtype to draw inputs in: `dtype` where the kernels offer it."""
        return self.dtype if self.dtype in DTYPES else torch.float32

    @property
    def rows(self) -> int:
        """Samples of a batch of `run`: the tile; in a sampler, which gives a sample the same bits in any batch, as much
        as fills its tiles."""
        return self.tile if self.sampler is None else self.tile + -self.tile % self.sampler.lanes

    def workers(self, batch_size: int, share: int) -> int:
        """Threads that put `batch_size` samples in flight, each a share."""
        wanted = math.ceil(batch_size / share)
        return wanted if self.threads is None else min(wanted, self.threads)

    def run(
        self,
        draw: Callable[[int], Tensor],
        use: Callable[[Tensor, int], None],
        first: int,
        count: int,
        batch_size: int,
        network: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Label samples first .. first + count - 1 in canonical tiles.

        On a GPU everything is launched from the calling thread, on its current stream, and nothing is waited for; the
        network's kernels as one CUDA graph once a second tile is labelled, unless it has an `Opaque` part.

        Args:
            draw: maps a sample index, a multiple of `rows`, to the `rows` inputs that start there, in
                `memory_format`; with a sampler to those that are wanted at least.
            use: takes logits [m, num_classes] and the index of their first sample; called once a tile, from
                several threads, in any order.
            first, count: the wanted samples; a tile that sticks out is drawn in full and cut to them.
            batch_size: hint of how many samples are in flight.
            network: what labels the inputs; default `sampler` or `module`.
        """
        label = network or (self.sampler.logits if self.sampler else self.module)

        def evaluate(start: int) -> None:
            logits = label(draw(start).to(self.dtype))
            if logits.shape[1] != self.num_classes:
                raise ValueError(f"model must give logits of one width, {self.num_classes}, got {logits.shape[1]}")
            low, high = max(first, start), min(first + count, start + self.rows)
            use(logits[low - start : high - start], low)

        tiles = range(first - first % self.rows, first + count, self.rows)
        if self.device.type == "cpu":
            run_tiles(evaluate, tiles, self.workers(batch_size, self.rows))
            return
        if torch.cuda.is_available() and not opaque(self.module):
            key = (label, threading.get_ident(), torch.cuda.current_stream(self.device))
            label = self._graphs.setdefault(key, inference.Replayed(label))
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            for start in tiles:
                evaluate(start)


def executed(prepared: Prepared) -> dict[str, Any]:
    """How the layers run ("choices") and the "fingerprint" of the plan; "module" and None where torch runs them."""
    sampler = prepared.sampler
    steps = sampler.program.steps if sampler else []
    kinds = {step.name: step.engine for step in steps if step.weight is not None}
    return {"choices": kinds or "module", "fingerprint": sampler.fingerprint if sampler else None}


class TiledClassifier:
    """Keeps the frozen copy of a model that labels tiles, and makes it anew when the model has changed.

    Args:
        model: maps [B, C, H, W] to logits [B, K], a module or any callable; or a `Prepared` network, which fixes dtype
            and tile.
        dtype: None for float32 in the sampling engine or else the model's own modules; otherwise masks and batch-norm
            are folded, the copy cast; "int8" is torch.int8.
        tile: rows of a canonical tile, >= 1; None for the default of the model's device.
        choices: as in `csam.engine.ready`.
        calibration: for int8 and for no other.
        layout: of the images that the model takes; those of a `Prepared` network are its own.

    Raises:
        TypeError, ValueError: wrong kind or range, or a batch-norm layer without running statistics.
    """

    # the copy, the shape of its images (None: any) and what it was made from
    _made: tuple[Prepared | None, torch.Size | None, list[Version]]

    def __init__(
        self,
        model: Classifier | Prepared,
        dtype: torch.dtype | str | None,
        tile: int | None,
        choices: engine.Choices = "auto",
        calibration: quantization.Calibration | None = None,
        layout: str = "NCHW",
    ) -> None:
        dtype = named_dtype(dtype)
        self.calibration = calibration
        choices = engine.checked_choices(choices)
        if isinstance(model, Prepared):
            arithmetic = model.dtype if model.sampler is None else model.sampler.dtype
            for name, value, own in (("dtype", dtype, arithmetic), ("tile", tile, model.tile)):
                if value not in (None, own):
                    raise ValueError(f"{name} must be None or the prepared network's {own}, got {value}")
            if calibration is not None:
                raise ValueError("calibration must be None for a prepared network, which has its own, got images")
            if choices != "auto":
                raise ValueError(f"choices must be 'auto' for a prepared network, which has its own, got {choices!r}")
            self.model, self.dtype, self.tile = nn.Module(), arithmetic, model.tile
            self._made = (model, None, [])
            return
        if not callable(model):
            raise TypeError(f"model must be a torch.nn.Module or another callable, got {type(model).__name__}")
        model = model if isinstance(model, nn.Module) else Opaque(model)
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise ValueError(
                    f"model layer {name!r} is a batch-norm without running statistics, so a sample's logits "
                    "would depend on the batch; set track_running_stats=True and estimate them"
                )
        self.model = model if layout == "NCHW" else FromNCHW(model)
        self.dtype = checks.choice("dtype", dtype, (None, *DTYPES, torch.int8))
        if (self.dtype is torch.int8) != (calibration is not None):
            got = "None" if calibration is None else "images"
            raise ValueError(f"calibration must be images for dtype int8 and None for others, got {got} for {dtype}")
        if opaque(model) and self.dtype not in (None, torch.float32):
            raise ValueError(
                f"dtype must be None or torch.float32 for a callable, which is run as it is on float32, got {dtype}"
            )
        if tile is None:
            tile = TILE.get(_device(model, torch.device("cpu")).type, TILE["cpu"])
        self.tile, self.choices = checks.integer("tile", tile, low=1), choices
        self._made = (None, torch.Size(), [])

    @property
    def current(self) -> Prepared | None:
        """The copy at hand."""
        return self._made[0]

    @property
    def settings(self) -> dict[str, Any]:
        dtype = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        functions = [part.name for part in opaque(self.model)]
        return {"dtype": dtype, "tile": self.tile, **({"functions": functions} if functions else {})}

    def prepare(self, x: Tensor) -> Prepared:
        """The copy for images like x [C, H, W]: the one at hand if neither the model nor the shape changed.

        Raises:
            ValueError: the model does not map [B, C, H, W] to [B, K] with K >= 2.
        """
        current = self._fitting(x)
        if current is None:
            with tracing.alone():
                current, now = self._fitting(x), versions(self.model)  # another thread may have made it meanwhile
                if current is None:
                    current = self._new(x)
                    self._made = (current, x.shape, now)  # in one step, for callers on other threads
        return current

    def _fitting(self, x: Tensor) -> Prepared | None:
        """The copy at hand if it is of the model as it is now and for images like x."""
        current, shape, before = self._made
        now = versions(self.model)
        same = unchanged(before, now) and all(version != UNKNOWN for _, version, _ in now)
        return current if same and shape in (None, x.shape) else None

    def _new(self, x: Tensor) -> Prepared:
        refuse_meta(self.model)
        where = _device(self.model, x.device)
        with torch.autocast(where.type, enabled=False):  # the caller's does not reach the tiles' threads either
            return _prepare(self.model, x.shape, where, self.dtype, self.tile, self.choices, self.calibration)


def run_tiles(evaluate: Callable[[int], None], tiles: Sequence[int], workers: int) -> None:
    """Call `evaluate(tile)` for every tile on `workers` threads, torch.get_num_threads() at most.

    Each runs in inference mode with one intra-op thread. The first exception of a tile, or KeyboardInterrupt
    in the caller, stops the threads at their next tile and is raised once they have ended. The caller's number
    of threads is not touched.
    """
    workers = min(workers, torch.get_num_threads(), len(tiles))
    if workers < 1:
        return
    pending, taking, over = iter(tiles), threading.Lock(), threading.Event()

    def work() -> None:
        try:
            with torch.inference_mode():
                while not over.is_set():
                    with taking:
                        tile = next(pending, None)
                    if tile is None:
                        return
                    evaluate(tile)
        finally:
            over.set()

    with ThreadPoolExecutor(workers, "csam-tiles", initializer=one_intra_op_thread) as pool:
        try:
            for future in [pool.submit(work) for _ in range(workers)]:
                future.result()
        finally:
            over.set()


def _prepare(
    model: nn.Module,
    shape: torch.Size,
    device: torch.device,
    dtype: torch.dtype | None,
    tile: int,
    choices: engine.Choices,
    calibration: quantization.Calibration | None,
) -> Prepared:
    if soft := [name for name, layer in masked_layers(model).items() if layer.soft]:
        raise ValueError(
            f"model must run with its hard masks, which `csam.fold` ships, got soft ones in {len(soft)} layers such as "
            f"{soft[0]!r}; set layer.soft = False, after search.apply() if a search is to choose the hard masks"
        )
    if calibration is not None and calibration.images.shape[1:] != shape:
        raise ValueError(
            f"calibration must hold images like x, of shape {tuple(shape)}, got {tuple(calibration.images.shape[1:])}"
        )
    try:
        network: nn.Module = copied(model).eval().requires_grad_(False)
        settle_weights(network)
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"model must be a module that can be put in eval mode and frozen, got {type(model).__name__} ({error}); a "
            "TorchScript or exported one in eval mode goes as a callable, lambda x: model(x)"
        ) from error
    tensors = list(itertools.chain(network.parameters(), network.buffers()))
    own = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    # Two different rows, so that a rewrite which mixes samples up does not go unseen; and of no user's image, as one
    # that is black hides a change of the weights. A rewrite is tried on noise too, which leaves the pixels' range.
    generator = torch.Generator("cpu").manual_seed(0)
    parts = opaque(network)
    plain: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    probe = torch.rand(2, *shape, **plain)
    if dtype is not None:
        probe += torch.randn(probe.shape, **plain)
    tried = torch.rand(tile if parts else min(tile, _TRIED), *shape, **plain) / 2 + 0.25
    probe, tried = (tried if parts else probe).to(device, own), tried.to(device, own)
    try:
        with torch.inference_mode():  # a model may change its images in place
            wanted = checked_logits(network(probe.clone()), probe)
            _refuse_dependent(network, tried, wanted if parts else network(tried.clone()))
    except ValueError:
        raise
    except Exception as error:  # of the model's own code
        raise ValueError(f"model does not take images x of shape {tuple(shape)}: {told(error)}") from error
    if dtype is not None and not parts and own in (torch.bfloat16, torch.float16):
        network, probe, wanted = _widened(network, probe, wanted)
    # what a model [B, H, W, C] permutes is contiguous where the tile is channels_last
    layout = torch.channels_last if isinstance(network, FromNCHW) else torch.contiguous_format
    made, sampler = inference.Ready(network, layout, ["the model's own modules"]), None
    exact = torch.float32 if dtype is torch.int8 else dtype
    if parts:
        made.steps.append(f"run as it is: {', '.join(part.extra_repr() for part in parts)}")
    elif dtype is not None and exact is not None:
        made = inference.ready(network, probe, wanted, exact, tile)
        sampler = _sampler(made, probe, wanted, dtype, tile, choices, calibration)
        if calibration is not None:
            if sampler is None:
                reason = made.steps[-1] if device.type == "cpu" else f"it runs on {device}"
                raise ValueError(f"dtype int8 needs a network whose samples lie innermost: {reason}")
            made.steps.append(f"int8, calibrated on {calibration.number} {calibration.words}")
    elif choices != "module" and device.type == "cpu" and all(t.dtype is own for t in tensors if t.is_floating_point()):
        if reason := inference.hooked(network):
            made.steps[0] += f", since {reason}"
        elif own is torch.float32:
            made, sampler = _unasked(made, probe + torch.randn(probe.shape, **plain), tile, choices)
    classes = wanted.shape[1]
    return Prepared(
        made.network,
        exact or own,
        made.layout,
        device,
        classes,
        tile,
        tuple(made.steps),
        made.head,
        sampler,
        calibrated=calibration and calibration.words,
    )


def _sampler(
    made: inference.Ready,
    probe: Tensor,
    wanted: Tensor,
    dtype: torch.dtype,
    tile: int,
    choices: engine.Choices,
    calibration: quantization.Calibration | None = None,
) -> SampleNetwork | None:
    """What runs the rewritten network on samples that lie innermost, if that is faster; what was decided is a step."""
    if made.exact is None:
        return None
    pixels, drawn = probe[0].float(), dtype if dtype in DTYPES else torch.float32

    def label() -> Tensor:
        noisy = csam_kernels.smoothing_noise(pixels, tile, 1.0, seed=0, dtype=drawn, memory_format=made.layout)
        logits: Tensor = made.network(noisy)
        return logits

    quantized = partial(quantization.quantize, noisy=calibration.images) if calibration is not None else None
    rival = engine.Rival(label, tile, made.layout)
    sampler, step = engine.ready(made.exact, probe, wanted, dtype, choices, rival, quantized)
    made.steps.append(step)
    return sampler


def _unasked(
    made: inference.Ready, probe: Tensor, tile: int, choices: engine.Choices
) -> tuple[inference.Ready, SampleNetwork | None]:
    """The network in float32 with what runs it on samples that lie innermost; or as it is, and why.

    The probe has noise, which leaves the pixels' range, and need not be what the network takes.
    """
    try:
        with torch.inference_mode():
            wanted = checked_logits(made.network(probe.clone()), probe)
        fast = inference.ready(copied(made.network), probe, wanted, torch.float32, tile)
    except Exception as error:  # of the model's own code
        made.steps.append(f"run by torch: {told(error)}")
        return made, None
    sampler = _sampler(fast, probe, wanted, torch.float32, tile, choices)
    if sampler is not None:
        return fast, sampler
    if fast.exact is not None:
        made.steps.append(fast.steps[-1])
    return made, None


def _widened(network: nn.Module, probe: Tensor, wanted: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    """The three in float32, where a rewrite can be told from rounding; as they are if the model does not run in it."""
    try:
        wide, images = copy.deepcopy(network).float(), probe.float()
        with torch.inference_mode():
            return wide, images, checked_logits(wide(images.clone()), images)
    except RuntimeError:
        return network, probe, wanted


def _refuse_dependent(network: nn.Module, tile: Tensor, wanted: Tensor) -> None:
    """Raise ValueError if the logits `wanted` of a tile with pixels in [0.25, 0.75] change when it is asked again, or
    when the second half of its rows has another mean, spread, least and greatest pixel."""
    other, half = tile.clone(), len(tile) // 2
    flat = other.flatten(1)
    flat[half:] = 1.0
    flat[half:, ::8] = 0.0
    for rows, kept, when in ((tile, len(tile), "when asked again"), (other, half, "with the other rows")):
        found = network(rows.clone())
        moved = inference.moved_by(found[:kept], wanted[:kept])
        if moved > 0 or (math.isnan(moved) and not wanted.isnan().any()):
            raise ValueError(
                f"model must be a function of each row of a batch, got logits that change by {moved:.2g} {when}; a "
                "network does that in train mode, which its eval() ends, or with layers that stay so, such as "
                "F.dropout without training=self.training"
            )


def _device(model: nn.Module, default: torch.device) -> torch.device:
    """Where the model runs: with its tensors, or as its functions say."""
    tensors = (t.device for t in itertools.chain(model.parameters(), model.buffers()))
    return next(itertools.chain(tensors, (part.device for part in opaque(model))), default)


def refuse_meta(model: nn.Module) -> None:
    """Raise ValueError for a model with tensors that have no values."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"model must hold values, got {name} on the meta device; load the weights first")


def versions(model: nn.Module) -> list[Version]:
    """Every parameter and buffer with its version, which torch advances at each in-place change, and where it lies."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return [(t, UNKNOWN if t.is_inference() else t._version, t.data_ptr()) for t in tensors]


def unchanged(before: Sequence[Version], now: Sequence[Version]) -> bool:
    """Whether they are of the same tensors, as far as versions show unchanged."""
    pairs = itertools.zip_longest(before, now, fillvalue=(None, UNKNOWN, 0))
    return all(a is b and same == again for (a, *same), (b, *again) in pairs)


__all__ = [
    "ABSTAIN",
    "Prepared",
    "Smooth",
    "TiledClassifier",
    "certified_radius",
    "checked",
    "image",
    "lower_confidence_bound",
    "nchw",
    "read",
    "refuse_meta",
    "run_tiles",
    "sent",
    "unchanged",
    "versions",
    "votes",
]
