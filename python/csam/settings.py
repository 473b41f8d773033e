"""What a run is asked for: settings as frozen dataclasses, the presets, and changes to them by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from csam import models, sequential, transforms
from csam.laws import LAWS
from csam_kernels.laws import checked_law, checked_sigma

T = TypeVar("T")
DTYPES = (None, "float32", "bfloat16", "float16", "int8")
OF_STOPPING = ("target_radius", "rtol", "method")  # settings of adaptive certificates alone


@dataclass(frozen=True)
class SearchSettings:
    """Keyword arguments of `csam.MaskSearch` (see there); the transform is the one of the certificate."""

    perturbation: str | None = "adversarial"
    radius: float = 0.1
    rho: float = 1.0
    norm: str = "global"
    scope: str = "global"
    tau: float = 0.9
    task: float = 1.0
    structural: float = 1.0
    consistency: float = 1.0
    margin: float = 1.0
    budget: float = 1.0
    budget_form: str = "target"
    optimizer: str = "adam"
    lr: float = 0.03
    joint: bool = False
    weight_lr: float = 0.1


@dataclass(frozen=True)
class TrainSettings:
    """Training: epochs of the dense network, then search_epochs + finetune_epochs more for every method.

    noise and sigma are law and standard deviation of the noise of training and of smoothing (pixel units); with
    `augment` training images also meet the transform of the certificate. `threads`: torch threads while training,
    None = all.
    """

    epochs: int = 20
    search_epochs: int = 10
    finetune_epochs: int = 15
    batch_size: int = 128
    lr: float = 0.1
    finetune_lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    sigma: float = 0.25
    noise: str = "gaussian"
    padding: int = 0
    flip: bool = False
    precision: str = "float32"
    granularity: str = "weight"
    magnitude_scope: str = "global"
    augment: bool = True
    threads: int | None = None


@dataclass(frozen=True)
class CertifySettings:
    """Certification: randomized smoothing (n0, n, alpha) and CC-Cert (cc_n, cc_k, delta, t) on evenly spaced images.

    With `adaptive` smoothing stops before n (target_radius, rtol, method: see `csam.Smooth.certify`). With dtype int8
    what is certified is the quantised network, calibrated on training images (`csam.pipeline.calibration`). With
    sound_float smoothing is proved for floating point too (`csam.sound`).
    """

    images: int | None = 120
    n0: int = 100
    n: int = 1000
    alpha: float = 0.001
    adaptive: bool = False
    target_radius: float | None = None
    rtol: float | None = None
    method: str | None = None
    dtype: str | None = "float32"
    sound_float: bool = False
    radii: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5)
    cc_n: int = 100
    cc_k: int = 10
    delta: float = 0.9
    eps: tuple[float, ...] = (0.01, 0.05, 0.1)

    def __post_init__(self) -> None:
        for name in ("n0", "n", "cc_n", "cc_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("n0", "n"):
            if getattr(self, name) > sequential.Fixed.most:
                raise ValueError(f"{name} must be <= {sequential.Fixed.most}, got {getattr(self, name)}")
        sequential.checked_alpha(self.alpha)
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must be in (0, 1), got {self.delta}")
        for name in OF_STOPPING:
            if getattr(self, name) is not None and not self.adaptive:
                raise ValueError(f"{name} must be none unless adaptive is true, got {getattr(self, name)}")
        if self.adaptive and self.n > sequential.MOST:
            raise ValueError(f"n must be <= {sequential.MOST} if adaptive is true, got {self.n}")
        if self.target_radius is not None and not (math.isfinite(self.target_radius) and self.target_radius > 0):
            raise ValueError(f"target_radius must be > 0, got {self.target_radius}")
        if self.rtol is not None and not 0 < self.rtol < 1:
            raise ValueError(f"rtol must be in (0, 1), got {self.rtol}")
        if self.method not in (None, *sequential.METHODS):
            raise ValueError(f"method must be one of {', '.join(sequential.METHODS)}, got {self.method!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {self.dtype!r}")
        if self.images is not None and self.images < 1:
            raise ValueError(f"images must be >= 1, got {self.images}")
        if not self.eps or any(not 0 < e <= 1 for e in self.eps):
            raise ValueError(f"eps must hold at least one value, each in (0, 1], got {self.eps}")
        if not self.radii or any(not (math.isfinite(r) and r >= 0) for r in self.radii):
            raise ValueError(f"radii must hold at least one value, each >= 0, got {self.radii}")


@dataclass(frozen=True)
class Settings:
    """Everything that is asked of a run. `transform` is written as `csam.transforms.parse` reads it."""

    data: str = "digits"
    data_dir: str | None = None
    corruption: str | None = None
    severity: int | None = None
    resize: int | None = None
    crop: int | None = None
    train_subset: int | None = None
    test_subset: int | None = None
    model: str = "digits"
    weights: str | None = None
    normalization: str | None = None
    methods: tuple[str, ...] = ("dense", "magnitude", "csam")
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.9)
    transform: str = "rotation:15,translation:0.05,brightness:0.2"
    seed: int = 0
    train: TrainSettings = field(default_factory=TrainSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    certify: CertifySettings = field(default_factory=CertifySettings)

    def __post_init__(self) -> None:
        for name in ("methods", "sparsities"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must hold at least one value and none twice, got {values}")
        for sparsity in self.sparsities:
            if not 0 <= sparsity < 1:
                raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
        if not (math.isfinite(self.train.sigma) and self.train.sigma > 0):
            raise ValueError(f"sigma must be > 0, got {self.train.sigma}")
        checked_sigma(self.train.sigma, checked_law("noise", self.train.noise))
        most = self.train.sigma * LAWS[self.train.noise].largest
        if (self.certify.target_radius or 0.0) >= most:
            asked = f"{self.certify.target_radius:g} under {self.train.noise} noise of sigma {self.train.sigma:g}"
            raise ValueError(f"target_radius must be below {most:g}, got {asked}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")
        if self.normalization is not None and self.normalization not in models.NORMALIZATION:
            known = ", ".join(models.NORMALIZATION)
            raise ValueError(f"normalization must be one of {known}, got {self.normalization!r}")
        transforms.parse(self.transform)


PRESETS = {
    # One thread: the tensors are tiny, and the numbers are then the same on any number of cores.
    "digits": Settings(train=TrainSettings(threads=1)),
    "cifar10": Settings(
        data="cifar10",
        model="resnet20",
        normalization="imagenet",
        transform="rotation:10,brightness:0.1",
        train=TrainSettings(padding=4, flip=True, search_epochs=2, finetune_epochs=4, finetune_lr=0.02),
        certify=CertifySettings(images=100),
    ),
    "cifar10c": Settings(
        data="cifar10c",
        severity=3,
        model="resnet20",
        normalization="imagenet",
        transform="rotation:10,brightness:0.1",
        certify=CertifySettings(images=100),
    ),
    "images": Settings(
        data="images",
        model="resnet18",
        normalization="imagenet",
        transform="rotation:10,brightness:0.1",
        train=TrainSettings(flip=True),
        certify=CertifySettings(images=None),
    ),
}

# What changes in a preset when the dense network comes with weights: it only has to get used to noise and transforms.
PRETRAINED = {"train": {"epochs": 3, "lr": 0.02}}


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """The nested values of all layers; those of a later layer win. What is no group where one should be stays, to be
    refused.
    """
    found: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if key in found and isinstance(value, Mapping):
                found[key] = merged(found[key], value) if isinstance(found[key], Mapping) else found[key]
            else:
                found[key] = value
    return found


def override(settings: T, values: Mapping[str, Any], prefix: str = "") -> T:
    """A copy of a settings dataclass with nested values replaced, as read from JSON.

    Raises ValueError naming an unknown key, and a value of the wrong kind.
    """
    kinds = get_type_hints(type(settings))
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in kinds:
            raise ValueError(f"{type(settings).__name__} has no setting {key!r}; it has {', '.join(kinds)}")
        old = getattr(settings, key)
        if is_dataclass(old) and not isinstance(old, type) and isinstance(value, Mapping):
            changes[key] = override(old, value, f"{prefix}{key}.")
        else:
            changes[key] = _of_kind(f"{prefix}{key}", value, kinds[key])
    return replace(settings, **changes)  # type: ignore[type-var]


def _of_kind(name: str, value: Any, kind: Any) -> Any:
    """The value as `kind` (a type, tuple[item, ...] or a union): a list becomes a tuple, an int a float."""
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(_of_kind(name, item, get_args(kind)[0]) for item in value)
    allowed = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    if float in allowed and type(value) is int:
        return float(value)
    if type(value) not in allowed:
        wanted = " or ".join("none" if k is NoneType else getattr(k, "__name__", str(k)) for k in allowed)
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value
