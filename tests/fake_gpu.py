"""A GPU that is not there: tensors without memory, launches that are collected, and every wait of the host counted."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._library.custom_ops import _maybe_get_opdef
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from csam_kernels import backend
from csam_kernels import triton as provider
from csam_kernels.triton import tables, tuning
from csam_kernels.triton.launch import Launch, record

CUDA = torch.device("cuda:0")
aten = torch.ops.aten


def there(values: Any) -> bool:
    """Whether any of the values is on the device."""
    return any(isinstance(t, FakeTensor) for t in tree_leaves(values))


def item(t: Tensor, index: Any) -> Tensor:
    """t[index] for integers, slices and None."""
    axis = 0
    for i in index if isinstance(index, tuple) else (index,):
        if i is None:
            t = t.unsqueeze(axis)
        elif isinstance(i, int):
            t, axis = t.select(axis, i), axis - 1
        else:
            start, stop, step = i.indices(t.shape[axis])
            t = aten.slice.Tensor(t, axis, start, stop, step)
        axis += 1
    return t


UNGUARDED = {
    Tensor.copy_: aten.copy_.default,
    Tensor.contiguous: aten.contiguous.default,
    Tensor.__invert__: aten.bitwise_not.default,
    Tensor.cpu: lambda t: aten._to_copy.default(t, device="cpu"),
}


class Unguarded(TorchFunctionMode):
    """Runs the library's operators instead of their fakes, and by way of their operators the methods whose Python
    binding would set the current device, which torch without CUDA cannot."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        library, *name = str(func).split(".")
        if library == "csam" and there(args):
            with self:
                return _maybe_get_opdef(f"csam::{name[0]}")._init_fn(*args, **kwargs)
        if args and isinstance(args[0], FakeTensor):
            if func is Tensor.__getitem__:
                return item(*args)
            if func is Tensor.__setitem__:
                return aten.copy_.default(item(*args[:2]), args[2])
            func = UNGUARDED.get(func, func)
        return func(*args, **kwargs)


class Watch(TorchDispatchMode):
    """Runs what is on the CPU, passes what is on the GPU to the fake mode beneath it, and keeps account of the traffic
    between the two.

    Attributes:
        waits: operators by which the host waited for the device, or a copy to it that was waited for.
        sent: copies to the device, True where out of pinned memory.
    """

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.answer = answer  # from zeros to what the device would have computed of a tensor that is read back
        self.waits: list[str] = []
        self.sent: list[bool] = []
        self.pinned: list[Tensor] = []

    def read(self, func: Any, t: Tensor) -> Tensor:
        self.waits.append(str(func))
        with _disable_current_modes():
            return self.answer(torch.zeros(t.shape, dtype=t.dtype))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = kwargs.get("device")
        if there((args, kwargs)):
            if func is aten._local_scalar_dense.default:
                scalar = self.read(func, args[0])
                with _disable_current_modes():
                    return scalar.item()
            if func is aten._to_copy.default and target is not None and torch.device(target).type == "cpu":
                return self.read(func, args[0])
            return func(*args, **kwargs)
        with _disable_current_modes():
            if func is aten.is_pinned.default:
                return any(args[0] is t for t in self.pinned)
            if func in (aten._pin_memory.default, aten.pin_memory.default):
                self.pinned.append(args[0].clone())
                return self.pinned[-1]
            if target is None or torch.device(target).type == "cpu":
                return func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.to.dtype_layout):  # the latter in inference mode
            self.sent.append(any(args[0] is t for t in self.pinned))
            if not kwargs.get("non_blocking"):
                self.waits.append("a copy to the device")
            return on_gpu(args[0])
        return func(*args, **kwargs)


@contextmanager
def gpu(
    answer: Callable[[Tensor], Tensor] = lambda zeros: zeros, capturing: bool = False
) -> Iterator[tuple[Watch, list[Launch]]]:
    """Everything inside sees a device "cuda:0", or one that captures a CUDA graph; nothing is computed there."""
    tables._tables.clear()
    watch, serve = Watch(answer), backend.serve
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of addresses that fake tensors do not have
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        patch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
        patch.setattr(backend, "serve", lambda op, where: getattr(provider, op) if where == CUDA else serve(op, where))
        patch.setattr(FakeTensor, "data_ptr", lambda self: 16 * id(self))
        with (
            tuning.forced("sm90"),
            record() as launches,
            FakeTensorMode(allow_non_fake_inputs=True),
            watch,
            Unguarded(),
        ):
            yield watch, launches
    tables._tables.clear()


def on_gpu(t: Tensor) -> Tensor:
    """Inside of `gpu`: a tensor like t on the device, without its values."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=CUDA)


def moved(modules: Any) -> Any:
    """Inside of `gpu`: copies of modules with all of their tensors there."""

    def like(value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            return nn.Parameter(on_gpu(value), requires_grad=False)
        if isinstance(value, tuple):
            return tuple(like(v) for v in value)
        return on_gpu(value) if isinstance(value, Tensor) else value

    with _disable_current_modes():
        modules = copy.deepcopy(modules)
    for module in [m for root in modules for m in root.modules()]:
        for own in (module._parameters, module._buffers, vars(module)):
            own.update({name: like(value) for name, value in own.items() if isinstance(value, Tensor | tuple)})
    return modules
