"""What stands between a tile of images and a classifier that is no ordinary module: any callable, and other layouts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from csam.tracing import exporting
from csam_kernels import checks

LAYOUTS = ("NCHW", "NHWC")
Classifier = nn.Module | Callable[[Tensor], Tensor]


class ModelError(RuntimeError):
    """A callable failed."""


class Opaque(nn.Module):
    """A classifier that is run as it is: a function, a bound method, a wrapper of another runtime.

    It gets images float32 on `device` in whole tiles, always the same number of them, so one that was exported for a
    fixed batch is served; and gives logits [B, K] there. It is not copied, traced, cast or put in eval mode. So what a
    certificate takes for granted is for its owner to keep:

    - it is a function of each row alone: the other rows, the thread, and what was asked before change nothing. Three
      tiles of random pixels are tried at the first image, and one that shows otherwise is refused; that is no proof.
    - it stays the same: changes of its state cannot be seen during a run. When a run goes on, `name` stands for the
      function, and one that gives other logits for a tile of random pixels is refused; that is no proof either, so one
      that computes something else must get another name, or votes of two are mixed.
    - threads of its own must not change its answers.

    Args:
        function: images [B, C, H, W] to logits [B, K], floating point. A torch.nn.Module needs no such thing.
        name: name and version, for records; None for none.
        device: where it takes images and gives logits.
        threads: that may be inside at once, >= 1; noise and votes of other tiles go on meanwhile.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or range. When it runs: what is no tensor [B, K], K >= 2.
        ModelError: when it runs, in place of the function's own exceptions.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        *,
        name: str | None = None,
        device: torch.device | str = "cpu",
        threads: int = 1,
    ) -> None:
        super().__init__()
        if isinstance(function, nn.Module) or not callable(function):
            raise TypeError(
                f"function must be a callable other than a torch.nn.Module, which goes without Opaque, got "
                f"{type(function).__name__}"
            )
        if not isinstance(name, str | None):
            raise TypeError(f"name must be a string or None, got {type(name).__name__}")
        self.function, self.name = function, name
        try:
            self.device = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device must be one of torch's, such as 'cpu' or 'cuda:0', got {device!r}") from error
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device must be one that torch can use here, got {device!r}: CUDA is not available")
        self._free = threading.BoundedSemaphore(checks.integer("threads", threads, low=1))

    def __deepcopy__(self, memo: dict[int, Any]) -> Opaque:
        return self

    def extra_repr(self) -> str:
        return self.name or str(getattr(self.function, "__qualname__", type(self.function).__name__))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy) or exporting(x):
            raise TypeError(f"{self} is run as it is and cannot be traced")
        with self._free:
            try:
                logits = self.function(x.float())
            except Exception as error:  # of other code
                raise ModelError(f"{self.extra_repr()} gave no logits for {tuple(x.shape)}: {told(error)}") from error
            return checked_logits(logits, x)


class FromNCHW(nn.Module):
    """A model that takes images [B, H, W, C], for tiles [B, C, H, W]; from channels_last ones nothing is copied."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x.permute(0, 2, 3, 1).contiguous())
        return logits


def told(error: Exception) -> str:
    """What an error of other code says, with its kind where the words alone may say little."""
    return str(error) if isinstance(error, RuntimeError | OSError | ValueError) else f"{type(error).__name__}: {error}"


def opaque(model: nn.Module) -> list[Opaque]:
    """The parts of the model that are run as they are."""
    return [module for module in model.modules() if isinstance(module, Opaque)]


def checked_logits(logits: Any, x: Tensor) -> Tensor:
    """The logits, which must be floating point [B, K] with K >= 2 on the device of the images x [B, ...]."""
    fits = isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == len(x) and logits.shape[1] >= 2
    if not fits:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model must map {tuple(x.shape)} to logits ({len(x)}, K) with K >= 2, got {got}")
    if not logits.is_floating_point() or logits.device != x.device:
        raise ValueError(
            f"model must give floating-point logits where it gets the images, on {x.device}, got {logits.dtype} on "
            f"{logits.device}"
        )
    found: Tensor = logits
    return found


__all__ = ["LAYOUTS", "Classifier", "FromNCHW", "ModelError", "Opaque", "checked_logits", "opaque", "told"]
