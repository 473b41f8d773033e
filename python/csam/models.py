"""The networks of this project: CIFAR ResNets, ResNet-18 with a CIFAR stem, and a small one for digits.

Every model takes pixels in [0, 1], float [B, C, H, W], and normalises them itself, so that a noise level or a radius
is always in pixel units. It returns logits [B, num_classes]. Height and width are free.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csam.adapters import Classifier
from csam.search import seeded
from csam_kernels import checks


class Normalization(NamedTuple):
    """Channel means and standard deviations of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


NORMALIZATION = {
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


@torch.fx.wrap
def _checked_images(x: Tensor, channels: int) -> Tensor:
    """x itself; refuses what normalisation would otherwise broadcast to `channels` without a word."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"x must be images [B, {channels}, H, W], got shape {list(x.shape)}")
    return x


class PadShortcut(nn.Module):
    """Option A shortcut (He et al. 2016, section 4.2): no weights; subsample, then zero channels on both sides."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        before = (out_channels - in_channels) // 2
        self.channels = (before, out_channels - in_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.channels))


class ConvShortcut(nn.Sequential):
    """Option B shortcut: 1x1 convolution and batch norm, keys `downsample.0` and `downsample.1`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
        )


Shortcut = Callable[[int, int, int], nn.Module]


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))), 3x3 convolutions, the first with the stride."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.downsample = nn.Identity() if same else shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


@dataclass(frozen=True)
class Architecture:
    """What tells one ResNet from another: blocks and width of each stage, kind of shortcut, key of the classifier."""

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    shortcut: Shortcut = PadShortcut
    head: str = "linear"
    in_channels: int = 3


ARCHITECTURES = {
    **{f"resnet{6 * n + 2}": Architecture((n, n, n), (16, 32, 64)) for n in (3, 5, 7, 9)},
    "resnet18": Architecture((2, 2, 2, 2), (64, 128, 256, 512), ConvShortcut, "fc"),
    "digits": Architecture((1, 1, 1), (16, 32, 64), in_channels=1),
}


class CifarResNet(nn.Module):
    """A ResNet with a 3x3 stride-1 stem: He et al. 2016, for small images.

    Keys are the usual ones: conv1, bn1, layer1.0.conv1, ..., and `linear` (CIFAR family) or `fc` (ResNet-18).
    `mean` and `std` [1, C, 1, 1] are buffers outside the state_dict: they belong to the data, not to the weights.

    Args:
        architecture: see `ARCHITECTURES`.
        num_classes, in_channels: >= 1.
        mean, std: one value a channel; 0 and 1 by default, std > 0.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or range, or (from `forward`) x that is not [B,
            in_channels, H, W].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        architecture: Architecture,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes = checks.integer("num_classes", num_classes, low=1)
        self.in_channels = in_channels = checks.integer("in_channels", in_channels, low=1)
        self.register_buffer("mean", _per_channel("mean", mean, 0.0, in_channels), persistent=False)
        self.register_buffer("std", _per_channel("std", std, 1.0, in_channels), persistent=False)
        if not bool((self.std > 0).all()):
            raise ValueError(f"std must be > 0 in every channel, got {std}")

        width = architecture.widths[0]
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self._stages = [f"layer{i + 1}" for i in range(len(architecture.blocks))]
        for i, name in enumerate(self._stages):
            stage = nn.Sequential()
            for j in range(architecture.blocks[i]):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(BasicBlock(width, architecture.widths[i], stride, architecture.shortcut))
                width = architecture.widths[i]
            self.add_module(name, stage)
        self._head = architecture.head
        self.add_module(self._head, nn.Linear(width, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = (_checked_images(x, self.in_channels) - self.mean) / self.std
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self._stages:
            x = getattr(self, name)(x)
        logits: Tensor = getattr(self, self._head)(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def _per_channel(argument: str, values: Sequence[float] | None, default: float, channels: int) -> Tensor:
    if values is not None and not isinstance(values, Sequence):
        raise TypeError(f"{argument} must hold one value for each of {channels} channels, got {values!r}")
    values = [default] * channels if values is None else list(values)
    if len(values) != channels:
        raise ValueError(f"{argument} must hold one value for each of {channels} channels, got {len(values)}")
    tensor = torch.tensor(values, dtype=torch.float32)
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{argument} must be finite, got {values}")
    return tensor.view(1, channels, 1, 1)


def build(
    name: str,
    *,
    num_classes: int = 10,
    in_channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int | None = None,
) -> CifarResNet:
    """A freshly initialised model.

    Args:
        name: "resnet20", "resnet32", "resnet44", "resnet56" (option A shortcuts), "resnet18" (CIFAR stem) or
            "digits" (ResNet-8 of 75 thousand weights for 1x8x8 images).
        num_classes: length of the logits.
        in_channels: image channels; 1 for "digits", else 3, when not given.
        mean, std: normalisation of pixels in [0, 1], one value a channel (see `NORMALIZATION`); 0 and 1 by default.
        seed: initialise from this seed and leave torch's global generator as it was; without it the global
            generator is drawn from, as any torch module does.

    Raises:
        TypeError, ValueError: an unknown name, or an argument of the wrong kind or range.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"name must be one of {', '.join(ARCHITECTURES)}, got {name!r}")
    architecture = ARCHITECTURES[name]
    channels = architecture.in_channels if in_channels is None else in_channels
    with nullcontext() if seed is None else seeded(seed, torch.get_default_device()):
        return CifarResNet(architecture, num_classes=num_classes, in_channels=channels, mean=mean, std=std)


def names_factory(model: str | Path) -> bool:
    """Whether it is "package.module:factory", and not a file."""
    return ":" in str(model) and not Path(model).exists()


def imported(reference: str) -> Classifier:
    """What a factory of other code gives, named "package.module:factory" and called without arguments.

    That code is run: it is imported as Python imports modules, from the folders of PYTHONPATH among others.

    Raises:
        ValueError: no such module or factory, one that fails, or what it gives is no model.
    """
    place, _, name = reference.partition(":")
    try:
        factory = getattr(importlib.import_module(place), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"model must be a file or package.module:factory, got {reference!r} ({error}); PYTHONPATH=. finds "
            "modules in this folder"
        ) from error
    except Exception as error:  # of other code
        raise ValueError(f"{place} must import, got {type(error).__name__}: {error}") from error
    try:
        model = factory() if callable(factory) else None
    except Exception as error:  # of other code
        raise ValueError(f"{reference} must give a model, got {type(error).__name__}: {error}") from error
    if not callable(model):
        raise ValueError(f"{reference} must give a torch.nn.Module or another callable, got {type(model).__name__}")
    found: Classifier = model
    return found


_OPTIONAL_KEYS = {"num_batches_tracked", "mask", "mask_score"}


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a safetensors file into `model`, all of it or nothing.

    Keys and shapes must be the model's. Only batch-norm counters and masks may be absent from the file; they then
    stay as they are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole safetensors file, or one of another model; names the file and the first wrong key.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path must be a safetensors file, {path} does not exist")
    if not path.is_file():
        raise ValueError(f"path must be a safetensors file, {path} is none")
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from error
    _check_keys(model.state_dict(), tensors, path)
    model.load_state_dict(tensors, strict=False)


def _check_keys(expected: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    foreign = [key for key in found if key not in expected]
    missing = [key for key in expected if key not in found and key.rsplit(".", 1)[-1] not in _OPTIONAL_KEYS]
    if foreign:
        raise ValueError(f"{path} is of another model: it has {foreign[0]!r} ({len(foreign)} keys too many)")
    if missing:
        raise ValueError(f"{path} is of another model: it has no {missing[0]!r} ({len(missing)} keys too few)")
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape:
            want, got = list(expected[key].shape), list(tensor.shape)
            raise ValueError(f"{path} is of another model: {key!r} must have shape {want}, got {got}")
