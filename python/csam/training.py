"""The epoch loop shared by every training stage: shuffling, augmentation, noise, optimiser, checkpoints.

Everything random is drawn from generators seeded by (seed, purpose, epoch), so an epoch repeats bit for bit wherever
the run starts again, and training noise never meets the noise of certification, whose seed is another.

Where torch.distributed is initialised, its processes share every batch: gradients, logged values and the statistics of
batch norm are those of the whole batch, so the network is that of one process up to rounding. After every epoch all
processes must hold the same weights and masks, to the last bit.
"""

from __future__ import annotations

import hashlib
import math
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from csam.data import to_unit
from csam.nn import masked_layers
from csam.processes import Team, average
from csam.runs import RunError, Stage, agree, raw_bytes
from csam.search import seeded
from csam.transforms import Transform
from csam_kernels import checks, smoothing_noise
from csam_kernels.laws import checked_law

PRECISIONS = ("float32", "bfloat16")
CHECKPOINT_SECONDS = 5.0


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Compute on so many torch threads, then on as many as before; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite."""


class Stepper(Protocol):
    """One optimisation step and the state that makes it resumable; `Sgd` and `csam.MaskSearch` are steppers."""

    model: nn.Module

    def step(self, x: Tensor, y: Tensor) -> dict[str, float]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


@dataclass(frozen=True)
class Feed:
    """How images reach a training stage.

    epochs, batch_size : passes over the images, images a step (the last incomplete batch of an epoch is left out)
    start   : the epoch to begin with, where phases of one seed share one sequence of batches
    sigma   : standard deviation of the noise on each image, pixels in [0,1] (Cohen et al. 2019, sec. 3.3)
    noise   : its law, of `csam_kernels.laws`
    padding : random crop of the zero-padded image, in pixels; 0 = none
    flip    : random horizontal flip
    transform : a `csam.transforms` transform that each image meets with parameters of its own, before the noise
    threads : torch threads of the stage; None = as many as are set
    seed    : of shuffling, augmentation and noise
    """

    epochs: int
    batch_size: int = 128
    start: int = 0
    sigma: float = 0.0
    noise: str = "gaussian"
    padding: int = 0
    flip: bool = False
    transform: Callable[..., Tensor] | None = None
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("epochs", 0), ("batch_size", 1), ("start", 0), ("padding", 0)):
            checks.integer(name, getattr(self, name), low=low)
        checks.real("sigma", self.sigma, least=0)
        checked_law("noise", self.noise)
        if self.transform is not None and not callable(self.transform):
            raise TypeError(f"transform must be callable, of csam.transforms for example, got {self.transform!r}")
        if self.threads is not None:
            checks.integer("threads", self.threads, low=1)

    def steps_per_epoch(self, images: int) -> int:
        return max(1, images // self.batch_size)


def derive_seed(seed: int, *words: object) -> int:
    """A 63-bit seed for one purpose, from the run's seed and words that name the purpose."""
    text = repr((int(seed), *map(str, words))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator(seed: int, *words: object) -> torch.Generator:
    """A CPU generator for one purpose."""
    return torch.Generator().manual_seed(derive_seed(seed, *words))


def augment(x: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Random crop of the zero-padded images and random horizontal flip, one gather for the batch.

    x: any dtype [B, C, H, W]; the result has the same shape and dtype.
    """
    b, c, h, w = x.shape
    rows = torch.arange(h).repeat(b, 1)
    columns = torch.arange(w).repeat(b, 1)
    if flip:
        flipped = torch.rand(b, generator=generator) < 0.5
        columns = torch.where(flipped[:, None], columns.flip(1), columns)
    if padding:
        x = F.pad(x, (padding,) * 4)
        offsets = torch.randint(2 * padding + 1, (2, b, 1), generator=generator)
        rows, columns = rows + offsets[0], columns + offsets[1]
    if not (flip or padding):
        return x
    return x[
        torch.arange(b)[:, None, None, None],
        torch.arange(c)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def batches(
    images: Tensor, labels: Tensor, feed: Feed, epoch: int, *, rank: int = 0, size: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch: float32 [B, C, H, W] pixels in [0,1] plus noise, int64 [B]; the same for every method.

    images: uint8 [N, C, H, W]; labels: int64 [N]; rank, size: whose share of each batch, the rank-th part of `size`.
    """
    order = torch.randperm(len(images), generator=generator(feed.seed, "order", epoch))
    draws = generator(feed.seed, "augment", epoch)
    noise = generator(feed.seed, "noise", epoch)
    for step, chosen in enumerate(order[: feed.steps_per_epoch(len(images)) * feed.batch_size].split(feed.batch_size)):
        share = len(chosen) // size
        mine = slice(rank * share, (rank + 1) * share)
        x = to_unit(augment(images[chosen], feed.padding, feed.flip, draws)[mine])
        first = step * feed.batch_size + mine.start
        if feed.transform is not None:
            x = feed.transform(x, seed=derive_seed(feed.seed, "transform", epoch), first_sample=first)
        if feed.sigma > 0 and feed.noise == "gaussian":
            whole = torch.randn(len(chosen), *x.shape[1:], generator=noise)
            x.add_(whole[mine], alpha=feed.sigma)
        elif feed.sigma > 0:
            seed, blank = derive_seed(feed.seed, "noise", epoch), torch.zeros(x.shape[1:])
            x.add_(smoothing_noise(blank, len(x), feed.sigma, seed=seed, first_sample=first, law=feed.noise))
        yield x, labels[chosen[mine]]


def shared(transform: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The transform where every process of torch.distributed has its share of a batch, and its rows of the draws.

    Batches have noise (`batches`), so one of `csam.transforms` takes values outside [0, 1] too, and clips what it makes
    of them.
    """
    apply = transform.clipped if isinstance(transform, Transform) else transform

    def transformed(x: Tensor, *, seed: int) -> Tensor:
        together = dist.is_available() and dist.is_initialized()
        return apply(x, seed=seed, first_sample=dist.get_rank() * len(x) if together else 0)

    return transformed


@dataclass(frozen=True)
class Optimizer:
    """SGD with momentum, its rate falling from `lr` to 0 along a cosine (Loshchilov & Hutter 2017, eq. 5)."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = True
    label_smoothing: float = 0.0
    precision: str = "float32"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr must be > 0, got {self.lr}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")


def autocast(precision: str) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 on the CPU, or nothing for float32."""
    checks.choice("precision", precision, PRECISIONS)
    return torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext()


class Sgd:
    """The ordinary step on a model's trainable parameters, cross-entropy loss; a `Stepper`."""

    def __init__(self, model: nn.Module, recipe: Optimizer, total_steps: int) -> None:
        self.model = model
        self.recipe = recipe
        self.total_steps = max(1, total_steps)
        self.done = 0
        self._optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad],
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov and recipe.momentum != 0,  # the same without momentum, which torch refuses
        )

    def step(self, x: Tensor, y: Tensor) -> dict[str, float]:
        rate = 0.5 * self.recipe.lr * (1 + math.cos(math.pi * self.done / self.total_steps))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        self._optimizer.zero_grad(set_to_none=True)
        with autocast(self.recipe.precision):
            logits = self.model(x)
        _check_logits(logits, y)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=self.recipe.label_smoothing)
        loss.backward()
        values = torch.stack([loss.detach(), (logits.detach().argmax(1) == y).float().mean()])
        average([*(p.grad for p in self._parameters() if p.grad is not None), values])
        self._optimizer.step()
        self.done += 1
        return {"loss": float(values[0]), "accuracy": float(values[1])}

    def state_dict(self) -> dict[str, Any]:
        momentum = [self._optimizer.state[p].get("momentum_buffer") for p in self._parameters()]
        return {"model": dict(self.model.state_dict()), "momentum": momentum, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.done = state["done"]
        for parameter, buffer in zip(self._parameters(), state["momentum"], strict=True):
            if buffer is not None:
                # Keep the parameter's memory layout: another layout may round differently.
                self._optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]


def run_epochs(
    stepper: Stepper,
    images: Tensor,
    labels: Tensor,
    feed: Feed,
    *,
    stage: Stage | None = None,
    on_step: Callable[[int], None] | None = None,
) -> float:
    """Drive `stepper` through `feed.epochs` epochs; returns the seconds spent, those before a restart included.

    With a `stage` the run resumes at the last checkpoint, bit for bit on the same thread count, and each epoch's mean
    values go to metrics.jsonl. Checkpoints are written at the ends of epochs, at least CHECKPOINT_SECONDS apart.
    `on_step(k)` tells a progress bar that k more steps are done. Raises TrainingDiverged; ValueError for a batch that
    several processes cannot share evenly, or weights or masks that came out differently in them.
    """
    _check_images(images, labels)
    steps = feed.steps_per_epoch(len(images))
    state = stage.load() if stage else None
    first, seconds = 0, 0.0
    if stage is not None and state is not None:
        first, seconds = _restore(stepper, stage, state)
        if on_step:
            on_step(first * steps)
    saved = started = time.monotonic()
    with Team() as team, threads(feed.threads), _shared_statistics(stepper, team):
        batch = min(feed.batch_size, len(images))
        if batch % team.size:
            raise ValueError(f"batch_size must be a multiple of the number of processes, {team.size}, got {batch}")
        _check_alike(stepper, team, "before training")
        for epoch in range(first, feed.epochs):
            means = _run_epoch(stepper, images, labels, feed, feed.start + epoch, on_step, team)
            _check_alike(stepper, team, f"after epoch {feed.start + epoch + 1}")
            elapsed = seconds + time.monotonic() - started
            if stage is None:
                continue
            stage.record(feed.start + epoch + 1, **means)
            if time.monotonic() - saved >= CHECKPOINT_SECONDS or epoch + 1 == feed.epochs:
                stage.save({"epoch": epoch + 1, "seconds": elapsed, "stepper": stepper.state_dict()})
                saved = time.monotonic()
    return seconds + time.monotonic() - started


def _run_epoch(
    stepper: Stepper,
    images: Tensor,
    labels: Tensor,
    feed: Feed,
    epoch: int,
    on_step: Callable[[int], None] | None,
    team: Team,
) -> dict[str, float]:
    """One epoch; returns the mean of each value the steps report. What the model draws (dropout) is the epoch's own."""
    sums: dict[str, float] = {}
    with seeded(derive_seed(feed.seed, "model", epoch, team.rank), images.device):
        for x, y in batches(images, labels, feed, epoch, rank=team.rank, size=team.size):
            for key, value in stepper.step(x, y).items():
                sums[key] = sums.get(key, 0.0) + value
            if on_step:
                on_step(1)
    means = {key: value / feed.steps_per_epoch(len(images)) for key, value in sums.items()}
    for key, value in means.items():
        if not math.isfinite(value):
            raise TrainingDiverged(f"{key} is {value} in epoch {epoch + 1}; a lower learning rate may help")
    return means


def _check_alike(stepper: Stepper, team: Team, when: str) -> None:
    """Refuse processes whose parameters, masks' scores included, or hard masks differ in a bit."""
    if team.size > 1:
        masks = {f"{name}.mask": layer.mask for name, layer in masked_layers(stepper.model).items()}
        found = chain(stepper.model.named_parameters(), masks.items())
        sums = {name: zlib.crc32(raw_bytes(t)) for name, t in found}  # knows places: masks hold the same values
        agree(team, f"weights and masks {when}", sums)


class _Normalized(torch.autograd.Function):
    """Batch norm of x [B, C, ...] with mean and variance over the batches of all processes.

    The gradient is the sum over the processes of those of their losses, which the average of all gradients divides by
    their number.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        axes, dtype = [d for d in range(x.dim()) if d != 1], torch.promote_types(x.dtype, torch.float32)
        var, mean = torch.var_mean(x.to(dtype), axes, correction=0)
        moments = torch.stack([mean.double(), var.double() + mean.double() ** 2])
        average([moments])
        mean, var = moments[0].to(dtype), (moments[1] - moments[0] ** 2).clamp_(min=0).to(dtype)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps))
        ctx.axes = axes
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, eps=eps), mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors

        def wide(t: Tensor) -> Tensor:
            return t.view(1, -1, *[1] * (x.dim() - 2))

        centred, upper = (x.to(mean.dtype) - wide(mean)) * wide(scale), grad.to(mean.dtype)
        dbias, dweight = upper.sum(ctx.axes), (upper * centred).sum(ctx.axes)
        sums = torch.stack([dbias, dweight]) * (x.shape[1] / x.numel())
        average([sums])
        dx = (upper - wide(sums[0]) - centred * wide(sums[1])) * wide(scale * weight)
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype), None


def _normalize(norm: Any, x: Tensor) -> Tensor:
    """`norm(x)` with the statistics of all processes, in training."""
    out: Tensor
    if not norm.training:
        out = type(norm).forward(norm, x)
        return out
    ones = x.new_ones(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    weight, bias = (ones, 0 * ones) if norm.weight is None else (norm.weight, norm.bias)
    out, mean, var = _Normalized.apply(x, weight, bias, norm.eps)
    if not norm.track_running_stats:
        return out
    with torch.no_grad():
        n = dist.get_world_size() * x.numel() // x.shape[1]
        norm.num_batches_tracked.add_(1)
        rate = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), rate)
        norm.running_var.lerp_((var * (n / (n - 1))).to(norm.running_var.dtype), rate)
    return out


@contextmanager
def _shared_statistics(stepper: Stepper, team: Team) -> Iterator[None]:
    """Batch norms that are trained take their statistics over the batches of all processes."""
    norms = _batch_norms(stepper.model) if team.size > 1 else []
    for norm in norms:
        norm.forward = partial(_normalize, norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _batch_norms(model: nn.Module) -> list[Any]:
    """The batch-norm layers."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def _restore(stepper: Stepper, stage: Stage, state: Any) -> tuple[int, float]:
    try:
        stepper.load_state_dict(state["stepper"])
        return int(state["epoch"]), float(state["seconds"])
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        # load_state_dict lists every misfit on a line of its own; the first one names a key.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[1] if len(lines) > 1 else str(error)
        raise RunError(f"checkpoint {stage.checkpoint} is of another model: {reason}") from error


def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    feed: Feed,
    optimizer: Optimizer | None = None,
    *,
    stage: Stage | None = None,
    on_step: Callable[[int], None] | None = None,
) -> float:
    """Train `model` in place on uint8 images [N, C, H, W] and int64 labels [N]; returns the seconds spent.

    See `Feed`, `Optimizer` and `run_epochs`. The model is left in eval mode. Masks of masked layers stay as they are.
    """
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    stepper = Sgd(model, optimizer or Optimizer(), feed.epochs * feed.steps_per_epoch(len(images)))
    seconds = run_epochs(stepper, images, labels, feed, stage=stage, on_step=on_step)
    model.eval()
    return seconds


@torch.no_grad()
def accuracy(
    model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 500, precision: str = "float32"
) -> float:
    """Fraction of uint8 images [N, C, H, W] that `model`, in eval mode, puts in the class `labels` int64 [N] name."""
    _check_images(images, labels)
    batch_size, correct = checks.integer("batch_size", batch_size, low=1), 0
    with autocast(precision), _modes_kept(model):
        model.eval()
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            logits = model(to_unit(x))
            _check_logits(logits, y)
            correct += int((logits.argmax(1) == y).sum())
    return correct / len(images)


@torch.no_grad()
def reestimate_batchnorm(
    model: nn.Module, images: Tensor, labels: Tensor, feed: Feed, *, max_batches: int = 100
) -> None:
    """Replace the running statistics of every batch norm by the plain average over fixed batches of `feed`.

    The batches are those of an epoch numbered -1, which no training epoch uses, with the stage's noise and
    augmentation. Averages are cumulative (momentum=None), so each batch weighs the same. A model without batch norm
    is left alone, and so is one whose forward pass fails.

    Raises:
        TypeError, ValueError: images or labels not as `fit` takes them, max_batches < 1.
    """
    _check_images(images, labels)
    checks.integer("max_batches", max_batches, low=1)
    norms = [norm for norm in _batch_norms(model) if norm.track_running_stats]
    if not norms:
        return
    before = [(norm, norm.momentum, {name: b.clone() for name, b in norm.named_buffers()}) for norm in norms]
    with threads(feed.threads), _modes_kept(model):
        model.eval()
        try:
            for norm, _, _ in before:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            for x, _ in islice(batches(images, labels, feed, -1), max_batches):
                model(x)
        except BaseException:
            for norm, _, buffers in before:
                for name, buffer in buffers.items():
                    norm.get_buffer(name).copy_(buffer)
            raise
        finally:
            for norm, momentum, _ in before:
                norm.momentum = momentum


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Each module ends in the mode, training or eval, that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check_images(images: Tensor, labels: Tensor) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(f"images must be uint8 [N, C, H, W], got {images.dtype} {list(images.shape)}")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}")
    if len(images) == 0:
        raise ValueError("images must hold at least one image, got 0")
    if int(labels.min()) < 0:
        raise ValueError(f"labels must be >= 0, got {int(labels.min())}")


def _check_logits(logits: Any, labels: Tensor) -> None:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(labels):
        came = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model must return logits [{len(labels)}, classes], got {came}")
    if int(labels.max()) >= logits.shape[1]:
        raise ValueError(f"labels must be below the model's {logits.shape[1]} classes, got {int(labels.max())}")
