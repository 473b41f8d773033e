"""A network as steps on samples that lie innermost: what the sampling engine runs on a CPU.

In the layout [C, H, W, samples] every linear operation is a convolution of surviving weights, so convolutions, linear
layers, average pooling, shortcuts, sums and concatenations all become one kind of step (a concatenation none at all:
its parts are written side by side); maximum pooling is the other. `lower` makes them of a network traced by torch.fx,
or of the operators that `exported` finds where its forward is Python that torch.fx cannot trace.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from csam import tracing
from csam_kernels import compress
from csam_kernels.layout import expand_mask
from csam_kernels.ops.sample_network import Program, Rows, Step, Value


class NotLowered(ValueError):
    """A node of the network that has no such step; says which and why."""


def lower(traced: fx.GraphModule, image: torch.Size) -> Program:
    """The steps of a traced network in eval mode for images [C, H, W]; `csam.aliases.settled`, if it changes in place.

    Raises:
        NotLowered: an operation without a step.
    """
    return _Lowering(traced, image).run()


def exported(network: nn.Module, probe: Tensor) -> fx.GraphModule:
    """The operators that a network in eval mode runs on images like the probe [B, C, H, W], for every B: torch.export.

    What Python decides by shapes and settings is decided; what it would decide by pixels is refused.

    Raises:
        Exception: whatever torch.export or the network's own code does.
    """
    batch = ({0: torch.export.Dim.DYNAMIC},)
    whole = nn.Sequential(network)  # which takes one argument, whatever the network's forward says
    with tracing.exports(), tracing.quiet():  # a failed export prints its graph
        program = torch.export.export(whole, (probe,), dynamic_shapes=batch, strict=False)
        traced: fx.GraphModule = program.module(check_guards=False)
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    if len(output.args[0]) == 1:  # one tensor comes as a tuple of one
        output.args = output.args[0]
    return traced


def identity(channels: int, area: int = 1, scale: float | Tensor = 1.0) -> Rows:
    """Rows of the weight that gives every channel its own taps, all of one value."""
    taps = torch.arange(channels * area, dtype=torch.int32, device="cpu")
    values = _float(scale).expand(channels, 1).repeat_interleave(area, 1).flatten()
    return values.contiguous(), taps, torch.arange(channels + 1, dtype=torch.int32, device="cpu") * area


def filters(rows: Tensor) -> Tensor:
    """The filter of each entry of a compressed weight, int64 [nnz]."""
    return torch.arange(len(rows) - 1, device="cpu").repeat_interleave(rows.diff())


class _Lowering:
    def __init__(self, traced: fx.GraphModule, image: torch.Size) -> None:
        self.traced = traced
        self.modules = dict(traced.named_modules())
        self.values: dict[fx.Node, Any] = {}
        self.steps: list[Step] = []
        self.image = Value(*image)
        self.mean: Tensor | None = None
        self.std: Tensor | None = None

    def run(self) -> Program:
        logits: Any = None
        for node in self.traced.graph.nodes:
            if node.op == "output":
                logits = self._of(node.args[0])
                break
            self.values[node] = self._lowered(node)
        if not isinstance(logits, Value) or logits.height * logits.width != 1:
            raise NotLowered("the network's output is no row of logits")
        return Program(self.image, logits, self.steps, self.mean, self.std)

    def _of(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self.values[argument]
        if isinstance(argument, (tuple, list)):
            return type(argument)(self._of(a) for a in argument)
        return argument

    def _lowered(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            if any(value is self.image for value in self.values.values()):
                raise NotLowered(f"{node.name}: a second input")
            return self.image
        if node.op == "get_attr":
            attribute: Any = self.traced
            for part in str(node.target).split("."):
                attribute = getattr(attribute, part)
            return attribute.detach().float() if isinstance(attribute, Tensor) else attribute
        args, kwargs = self._of(node.args), {k: self._of(v) for k, v in node.kwargs.items()}
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if module is not None:
            what, table = type(module).__name__, _MODULES
        else:
            what, table = _called(node), _FUNCTIONS
        before = len(self.steps)
        try:
            if module is not None and module.training:
                raise NotLowered(f"{what} in train mode")
            if what in _RANDOM:
                raise NotLowered(f"{what} draws random numbers")
            if module is None and not _has_value((args, kwargs)):  # computed at once
                method = node.op == "call_method"
                call: Any = getattr(args[0], what) if method else node.target
                return call(*args[method:], **kwargs)
            make = table.get(what) or table.get(what.removesuffix("_"))
            if make is None:
                raise NotLowered(f"no step for {what}")
            made = make(self, *([] if module is None else [module]), *args, **kwargs)
        except NotLowered as error:
            raise NotLowered(f"{node.name}: {error}") from error
        except Exception as error:  # a form of the call that its step does not take
            raise NotLowered(f"{node.name}: {what} in a form that has no step ({error})") from error
        for i, step in enumerate(self.steps[before:]):
            step.name = f"{node.name}.{i}" if i else node.name
        return made

    def alone(self, x: Value) -> bool:
        """Whether a single node reads x, under whichever of its names."""
        return all(len(_readers(node)) == 1 for node, value in self.values.items() if value is x)

    def untouched(self, x: Any) -> bool:
        """Whether x is the image, which nothing has read but what scales it."""
        return x is self.image and self.alone(x)

    def last(self, x: Value) -> Step | None:
        """The convolution that gives x for a single reader, which may then become a part of it."""
        step = next((s for s in self.steps if s.out is x), None)
        return step if step is not None and step.weight is not None and self.alone(x) else None

    def open(self, x: Value) -> Step | None:
        """`last`, where nothing is added and nothing clamped yet."""
        step = self.last(x)
        free = step is not None and step.other is None and (step.low, step.high) == (-math.inf, math.inf)
        return step if free else None

    # Steps

    def add(self, step: Step) -> Value:
        self.steps.append(step)
        return step.out

    def convolve(self, x: Value, weight: Rows, **options: Any) -> Value:
        filters = len(weight[2]) - 1
        step = Step(x, x, weight=weight, **options)
        step.out = Value(filters, _outputs(step, 0, x.height), _outputs(step, 1, x.width))
        return self.add(step)

    def each(self, x: Value, scale: float | Tensor = 1.0, **options: Any) -> Value:
        """Every channel by itself, times its factor."""
        return self.convolve(x, identity(x.channels, scale=scale), **options)

    def affine(self, x: Value, scale: float | Tensor = 1.0, shift: float | Tensor = 0.0) -> Value:
        """Every channel times its factor, plus its summand: part of the convolution that alone gives x."""
        scale, shift = (_float(t).expand(x.channels) for t in (scale, shift))
        step = self.open(x)
        if step is None:
            return self.each(x, scale[:, None], bias=shift.contiguous())
        assert step.weight is not None
        values, taps, rows = step.weight
        step.weight = (values * scale.repeat_interleave(rows.diff()), taps, rows)
        step.bias = shift.clone() if step.bias is None else step.bias * scale + shift
        return x

    def conv2d(
        self,
        x: Value,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        **options: Any,
    ) -> Value:
        if isinstance(padding, str):
            padding = _padding(padding, _pair(weight.shape[2:]), _pair(dilation))
        made = compress(weight.detach().float(), groups=groups)
        options |= {"stride": _pair(stride), "padding": _pair(padding), "dilation": _pair(dilation)}
        return self.convolve(x, made, bias=_bias(bias), kernel=_pair(weight.shape[2:]), **options)

    def convolution(self, layer: Any, x: Value, other: Value | None = None) -> Value:
        if layer.padding_mode != "zeros":
            raise NotLowered(f"a convolution with padding {layer.padding_mode} {layer.padding}")
        low = 0.0 if getattr(layer, "activation", "none") == "relu" else -math.inf
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return self.conv2d(x, layer.weight, layer.bias, *geometry, other=other, low=low)

    def linear(self, x: Value, weight: Tensor, bias: Tensor | None = None) -> Value:
        if x.height * x.width != 1:
            raise NotLowered("a linear layer over images")
        return self.convolve(x, compress(weight.detach().float()[:, :, None, None]), bias=_bias(bias))

    def batch_norm(
        self,
        x: Value,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
        *cudnn: bool,
    ) -> Value:
        """F.batch_norm; or torch.batch_norm, which has the weight and the bias first and an argument more."""
        if cudnn:
            mean, var, weight, bias = weight, bias, mean, var  # type: ignore[assignment]
        if training:
            raise NotLowered("batch_norm with training=True")
        scale = (var.double() + eps).rsqrt() * (1.0 if weight is None else weight.double())
        shift = (0.0 if bias is None else bias.double()) - mean.double() * scale
        return self.affine(x, scale.float(), shift.float())

    def clamp(self, x: Value, low: float | None = None, high: float | None = None) -> Value:
        """A clamp of what one step alone gives joins it."""
        low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
        step = self.last(x)
        if step is None:
            return self.each(x, low=low, high=high)
        step.low, step.high = (min(max(bound, low), high) for bound in (step.low, step.high))
        return x

    def sum(self, a: Any, b: Any) -> Value:
        """A sum with what one step alone gives joins it, where the other summand is there before."""
        if not isinstance(a, Value):
            a, b = b, a
        if not isinstance(b, Value):
            return self.affine(a, shift=_per_channel(b, a.channels))
        if (a.channels, a.height, a.width) != (b.channels, b.height, b.width):
            raise NotLowered("a sum of two shapes")
        for one, other in ((a, b), (b, a)):
            step = self.open(one)
            if step is not None and step in self.steps[self.given(other) :]:
                step.other = other
                return one
        return self.each(a, other=b)

    def given(self, x: Value) -> int:
        """How many steps are run when x is there."""
        return max((i + 1 for i, step in enumerate(self.steps) if step.out.root is x.root), default=0)

    def difference(self, a: Any, b: Any) -> Value:
        if isinstance(a, Value) and isinstance(b, Value):
            return self.sum(a, self.each(b, -1.0) if a is b else self.affine(b, -1.0))
        if not isinstance(a, Value):
            return self.affine(b, -1.0, _per_channel(a, b.channels))
        shift = _per_channel(b, a.channels)
        if self.untouched(a) and self.mean is None and self.std is None:
            self.mean = shift
            return a
        return self.affine(a, shift=-shift)

    def product(self, a: Any, b: Any) -> Value:
        if isinstance(a, Value) and isinstance(b, Value):
            raise NotLowered("a product of two values")
        if not isinstance(a, Value):
            a, b = b, a
        scale = _per_channel(b, a.channels)
        if self.untouched(a) and self.std is None and bool((scale != 0).all()):
            self.std = 1 / scale
            return a
        return self.affine(a, scale)

    def quotient(self, a: Any, b: Any) -> Value:
        if not isinstance(a, Value) or isinstance(b, Value):
            raise NotLowered("a quotient of this form")
        scale = _per_channel(b, a.channels)
        if self.untouched(a) and self.std is None:
            self.std = scale
            return a
        return self.affine(a, 1 / scale)

    def average(
        self,
        x: Value,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Value:
        kernel, padding = _pair(kernel_size), _pair(padding)
        if ceil_mode or (any(padding) and not count_include_pad):
            raise NotLowered("average pooling with ceil_mode or count_include_pad=False")
        area = kernel[0] * kernel[1]
        weight = identity(x.channels, area, 1 / (divisor_override or area))
        return self.convolve(x, weight, kernel=kernel, stride=_pair(stride or kernel), padding=padding)

    def adaptive(self, x: Value, output_size: Any) -> Value:
        sizes = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
        high, wide = (s or n for s, n in zip(sizes, (x.height, x.width), strict=True))
        if x.height % high or x.width % wide:
            raise NotLowered(f"adaptive pooling of {x.height}x{x.width} to {high}x{wide}")
        return self.average(x, (x.height // high, x.width // wide))

    def maximum(
        self,
        x: Value,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Value:
        if return_indices:
            raise NotLowered("maximum pooling with return_indices")
        kernel = _pair(kernel_size)
        step = Step(
            x, x, kernel=kernel, stride=_pair(stride or kernel), padding=_pair(padding), dilation=_pair(dilation)
        )
        high, wide = _outputs(step, 0, x.height, ceil_mode), _outputs(step, 1, x.width, ceil_mode)
        step.out = Value(x.channels, high, wide)
        return self.add(step)

    def cat(self, parts: Any, dim: int = 0) -> Value:
        if dim not in (1, -3) or not all(isinstance(p, Value) for p in parts):
            raise NotLowered(f"a concatenation along dimension {dim}")
        whole = Value(sum(p.channels for p in parts), parts[0].height, parts[0].width)
        start = 0
        for part in parts:
            made = next((s for s in self.steps if s.out is part), None)
            if part.part is not None or made is None:
                part = self.each(part)
            part.part = (whole, start)
            start += part.channels
        return whole

    def flatten(self, x: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
        if start_dim not in (1, -3) or end_dim not in (-1, 3):
            raise NotLowered(f"flattening dimensions {start_dim} to {end_dim}")
        return x if x.height * x.width == 1 else Value(x.size, 1, 1, (x, 0))

    def view(self, x: Value, *shape: Any) -> Any:
        sizes = tuple(shape[0] if shape and isinstance(shape[0], (tuple, list)) else shape)
        if len(sizes) != 2 or sizes[0] != _BATCH or sizes[1] not in (-1, x.size):
            raise NotLowered(f"a view of {x.size} values an image as {sizes}")
        return self.flatten(x, 1)

    def mean_over(self, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
        if sorted(d % 4 for d in dim) != [2, 3]:
            raise NotLowered(f"a mean over {dim}")
        return self.adaptive(x, 1)

    def getitem(self, x: Any, index: Any) -> Any:
        """Every n-th row and column: all that a convolution gives for it alone, or else a convolution of one tap."""
        whole = slice(None, None, None)
        index = (*index, *[whole] * (4 - len(index)))
        steps = [i.step or 1 for i in index[2:]]
        if any(i != whole for i in index[:2]) or any(i.start or i.stop for i in index[2:]):
            raise NotLowered(f"indexing with {index}")
        made = self.last(x)
        if made is None or made.other is not None:
            return self.each(x, stride=tuple(steps))
        made.stride = (made.stride[0] * steps[0], made.stride[1] * steps[1])
        x.height, x.width = _outputs(made, 0, made.input.height), _outputs(made, 1, made.input.width)
        return x

    def slice(self, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Value:
        """One axis of `getitem`, as torch.export writes it."""
        index = [slice(None)] * 4
        index[dim] = slice(start or None, None if end == sys.maxsize else end, None if step == 1 else step)
        return x if index == [slice(None)] * 4 else self.getitem(x, tuple(index))

    def pad(self, x: Value, amounts: Any, mode: str = "constant", value: float | None = None) -> Value:
        left, right, top, bottom, *channels = [*amounts, 0, 0, 0, 0, 0, 0][:6]
        if mode != "constant" or value or (left, top) != (right, bottom) or min(amounts) < 0 or len(amounts) > 6:
            raise NotLowered(f"padding by {amounts} in mode {mode}")
        values, taps, rows = identity(x.channels)
        before, after = channels
        rows = torch.cat([rows.new_zeros(before), rows, rows.new_full((after,), x.channels)])
        made = self.last(x)
        if made is not None and made.other is None and made.low <= 0 <= made.high and not (left or top):
            assert made.weight is not None
            v, t, r = made.weight  # the step itself gives the empty channels too
            made.weight = (v, t, torch.cat([r.new_zeros(before), r, r.new_full((after,), int(r[-1]))]))
            if made.bias is not None:
                made.bias = F.pad(made.bias, (before, after))
            x.channels += before + after
            return x
        return self.convolve(x, (values, taps, rows), padding=(top, left))


@dataclass(frozen=True)
class _Last:
    """A value whose channels are said to be last."""

    value: Value


def _permute(lowering: _Lowering, x: Value | _Last, *dims: Any) -> Value | _Last:
    """Channels last, or back: that is no step, and nothing in between has one."""
    order = tuple(d % 4 for d in (dims[0] if isinstance(dims[0], (tuple, list)) else dims))
    if isinstance(x, Value) and order == (0, 2, 3, 1):
        return _Last(x)
    if isinstance(x, _Last) and order == (0, 3, 1, 2):
        return x.value
    raise NotLowered(f"a permutation to {order}")


def _called(node: fx.Node) -> str:
    """Name of the function, method or operator, without the operator's overload."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.overloadpacket.__name__
    return str(getattr(node.target, "__name__", node.target))


def _readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read more than the shape."""
    return [user for user in node.users if user.op == "call_module" or _called(user) not in _SHAPES]


def _bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float()


def _outputs(step: Step, axis: int, size: int, ceil_mode: bool = False) -> int:
    reach = step.dilation[axis] * (step.kernel[axis] - 1) + 1
    room = size + 2 * step.padding[axis] - reach
    number = (-(-room // step.stride[axis]) if ceil_mode else room // step.stride[axis]) + 1
    if ceil_mode and (number - 1) * step.stride[axis] >= size + step.padding[axis]:
        number -= 1  # no window starts in the padding behind the image
    return number


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[-1])) if isinstance(value, (tuple, list)) else (int(value), int(value))


def _padding(padding: str, kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int]:
    """What "same" or "valid" add on either side."""
    reach = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    if any(r % 2 for r in reach):
        raise NotLowered(f"a convolution with padding {padding}, more of it on one side")
    return reach[0] // 2, reach[1] // 2


def _float(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device="cpu")


def _zeros(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Whatever torch's default dtype and device are."""
    return torch.zeros(n, dtype=dtype, device="cpu")


def _per_channel(value: Any, channels: int) -> Tensor:
    value = _float(value)
    if value.numel() not in (1, channels) or (value.numel() > 1 and value.shape[-3:] != (channels, 1, 1)):
        raise NotLowered(f"a constant of shape {tuple(value.shape)}")
    return value.flatten().expand(channels).contiguous()


def _has_value(argument: Any) -> bool:
    if isinstance(argument, (tuple, list)):
        return any(map(_has_value, argument))
    return isinstance(argument, Value | _Last) or (isinstance(argument, dict) and _has_value(list(argument.values())))


_MIDDLE = 0.75  # of the way to the other bfloat16; a weight that is further from that stays with the nearest
_BATCH = -1  # size of the batch, which no step knows


def _size(lowering: _Lowering, x: Value, dim: int | None = None) -> Any:
    shape = (_BATCH, x.channels, x.height, x.width)
    return shape if dim is None else shape[dim]


def _attribute(lowering: _Lowering, x: Value, name: str) -> Any:
    if name != "shape":
        raise NotLowered(f"no step for .{name}")
    return _size(lowering, x)


def _dropout(lowering: _Lowering, x: Value, p: float = 0.5, training: bool = True, inplace: bool = False) -> Value:
    if training:
        raise NotLowered("dropout with training=True")
    return x


_SHAPES = ("size", "sym_size", "getattr")
_RANDOM = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like"}
_RANDOM |= {"normal", "bernoulli", "multinomial", "poisson"}
_MODULES: dict[str, Callable[..., Any]] = {
    "Conv2d": _Lowering.convolution,
    "FusedConv2d": _Lowering.convolution,
    "Linear": lambda self, m, x: self.linear(x, m.weight, m.bias),
    "BatchNorm2d": lambda self, m, x: self.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, eps=m.eps),
    "ReLU": lambda self, m, x: self.clamp(x, 0.0, math.inf),
    "ReLU6": lambda self, m, x: self.clamp(x, 0.0, 6.0),
    "Hardtanh": lambda self, m, x: self.clamp(x, m.min_val, m.max_val),
    "MaxPool2d": lambda self, m, x: self.maximum(
        x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
    ),
    "AvgPool2d": lambda self, m, x: self.average(
        x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
    "AdaptiveAvgPool2d": lambda self, m, x: self.adaptive(x, m.output_size),
    "Flatten": lambda self, m, x: self.flatten(x, m.start_dim, m.end_dim),
    "Identity": lambda self, m, x: x,
    "Dropout": lambda self, m, x: x,
    "Dropout2d": lambda self, m, x: x,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "_checked_images": lambda self, x, channels: x,
    "conv2d": _Lowering.conv2d,
    "linear": _Lowering.linear,
    "masked_conv2d": lambda self, x, weight, mask, bias, *geometry: self.conv2d(
        x, weight * expand_mask(mask, weight.shape, geometry[-1]), bias, *geometry[:-1]
    ),
    "masked_linear": lambda self, x, weight, mask, bias, block_size: self.linear(
        x, weight * expand_mask(mask, weight.shape, block_size), bias
    ),
    "batch_norm": _Lowering.batch_norm,
    "relu": lambda self, x, inplace=False: self.clamp(x, 0.0, math.inf),
    "relu6": lambda self, x, inplace=False: self.clamp(x, 0.0, 6.0),
    "hardtanh": lambda self, x, min_val=-1.0, max_val=1.0, inplace=False: self.clamp(x, min_val, max_val),
    "clamp": lambda self, x, min=None, max=None: self.clamp(x, min, max),
    "add": _Lowering.sum,
    "sub": _Lowering.difference,
    "rsub": lambda self, x, other: self.difference(other, x),
    "mul": _Lowering.product,
    "truediv": _Lowering.quotient,
    "div": _Lowering.quotient,
    "cat": _Lowering.cat,
    "concat": _Lowering.cat,
    "avg_pool2d": _Lowering.average,
    "adaptive_avg_pool2d": _Lowering.adaptive,
    "max_pool2d": _Lowering.maximum,
    "flatten": _Lowering.flatten,
    "view": _Lowering.view,
    "reshape": _Lowering.view,
    "size": _size,
    "sym_size": _size,
    "getattr": _attribute,
    "mean": _Lowering.mean_over,
    "getitem": _Lowering.getitem,
    "slice": _Lowering.slice,
    "pad": _Lowering.pad,
    "dropout": _dropout,
    "feature_dropout": _dropout,
    "contiguous": lambda self, x, **_: x,
    "clone": lambda self, x, **_: x,
    "permute": _permute,
}


@dataclass(eq=False)
class _Tied:
    """Values whose channels belong together: those of a sum, and of a maximum over windows."""

    values: set[Value]
    steps: list[Step]  # that give one of them

    def readers(self, program: Program) -> list[Step]:
        return [s for s in program.steps if s.input in self.values and s.weight is not None]


def simplify(program: Program) -> int:
    """Take channels out that nobody reads or that are constant; gives how many values of a sample are gone.

    A constant channel is that of an empty filter: its bias, plus a constant. What it adds to a convolution is no bias
    of that convolution, because of zero padding, so all constant channels of a value become a single one of value 1.
    """
    before = sum(s.out.size for s in program.steps)
    while sum(_simplified(program, tied) for tied in _ties(program)):
        pass
    return before - sum(s.out.size for s in program.steps)


def _ties(program: Program) -> list[_Tied]:
    """The values that may be changed, by component; not those that are parts of others or have parts."""
    group: dict[Value, Value] = {}

    def find(v: Value) -> Value:
        while group.setdefault(v, v) is not v:
            v = group[v]
        return v

    fixed = [program.image, program.logits, program.logits.root]
    for step in program.steps:
        for value in (step.input, step.out, step.other):
            if value is not None and value.part is not None:
                fixed += [value, value.root]
        tied = step.input if step.weight is None else step.other
        if tied is not None:
            group[find(step.out)] = find(tied)
    components: dict[Value, _Tied] = {}
    for step in program.steps:
        for value in (step.input, step.out):
            components.setdefault(find(value), _Tied(set(), [])).values.add(value)
        components[find(step.out)].steps.append(step)
    kept = {find(value) for value in fixed}
    return [tied for key, tied in components.items() if key not in kept]


def _simplified(program: Program, tied: _Tied) -> bool:
    channels = tied.steps[0].out.channels
    constant: dict[Value, Tensor] = {}  # value of every channel, NaN where it depends on the image
    for step in tied.steps:  # in their order
        if step.weight is None:
            constant[step.out] = constant[step.input]
            continue
        base = _zeros(channels) if step.bias is None else step.bias.clone()
        base = base if step.other is None else base + constant[step.other]
        base[step.weight[2].diff() > 0] = math.nan
        constant[step.out] = base.clamp(step.low, step.high)
    fixed = torch.stack([c.isfinite() for c in constant.values()]).all(0)
    readers = tied.readers(program)
    read = _zeros(channels, torch.bool)
    for step in readers:
        assert step.weight is not None
        read[step.weight[1].long() // (step.kernel[0] * step.kernel[1])] = True
    live = read & ~fixed
    needed = any(bool((constant[s.input][read & fixed] != 0).any()) for s in readers)
    kept = live.nonzero().flatten()
    bounded = any(not step.low <= 1 <= step.high for step in tied.steps)  # so that no channel of value 1 can be there
    if len(kept) + needed >= channels or not len(kept) or (needed and bounded):
        return False
    for step in readers:
        step.weight = _reading(step, kept, constant[step.input] if needed else None, fixed)
    for step in tied.steps:
        if step.weight is None:
            continue
        bias = _zeros(channels) if step.bias is None else step.bias
        one = bias.new_full((int(needed),), 0.0 if step.other is not None else 1.0)
        step.bias = torch.cat([bias[kept], one])
        step.weight = _giving(step.weight, kept, needed)
    for value in tied.values:
        value.channels = len(kept) + needed
    return True


def join(program: Program) -> None:
    """Make convolutions of one value, alike but for their weights, a single one: what they read is packed once.

    Its result is theirs side by side. One of them may be the first part of a concatenation; it comes last, so that the
    concatenation goes on behind it.
    """
    alike: dict[Any, list[Step]] = {}
    for step in program.steps:
        if step.weight is not None and step.other is None and step.out.root is not program.logits.root:
            i = step.integers
            numbers = None if i is None else (i.shift, i.other_scale, i.zero, i.real)
            window = (step.kernel, step.stride, step.padding, step.dilation)
            alike.setdefault((step.input, *window, step.low, step.high, numbers), []).append(step)
    for group in alike.values():
        alone = [step for step in group if step.out.part is None]
        parts = [step for step in group if _begins(step.out)]
        if len(together := alone + parts[:1]) > 1:
            _join(program, together)


def _begins(value: Value) -> bool:
    """Whether a value is the first part of one that is no part itself."""
    return value.part is not None and value.part[1] == 0 and value.part[0].part is None


def _join(program: Program, steps: list[Step]) -> None:
    first, last = steps[0], steps[-1].out
    behind = last if last.part is None else last.part[0]  # what goes on behind the others' results
    height, width = last.height, last.width
    before = sum(step.out.channels for step in steps[:-1])
    root = Value(before + behind.size // (height * width), height, width)
    made = Value(before + last.channels, height, width, (root, 0))
    start = 0
    for value in [*(step.out for step in steps[:-1]), behind]:
        value.part = (root, start)
        start += value.channels
    values, taps, rows = zip(*(step.weight for step in steps if step.weight is not None), strict=True)
    counts = torch.cat([r.diff() for r in rows])
    weight = torch.cat(values), torch.cat(taps), F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    biases = [_zeros(step.out.channels) if step.bias is None else step.bias for step in steps]
    scales = [step.integers.scales for step in steps if step.integers is not None]
    integers = first.integers and replace(first.integers, scales=torch.cat(scales))
    name = "+".join(step.name for step in steps)
    joined = replace(first, out=made, weight=weight, bias=torch.cat(biases), integers=integers, name=name)
    place = min(map(program.steps.index, steps))
    program.steps = [step for step in program.steps if step not in steps]
    program.steps.insert(place, joined)


def balance(program: Program) -> None:
    """Round the weights that are multiplied in bfloat16 so that in every filter the roundings add up to almost nothing.

    To the nearest they add up to what shifts the filter's results alike in all samples, since what it reads is mostly
    positive. Of the weights near the middle of two bfloat16s some take the other one, the nearest first, which makes
    the single errors hardly larger. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
    Correction" (ICCV 2019), section 4.2, correct the bias for that shift, if they know what is read. Winograd's layers
    are left alone: what they multiply is rounded after the transform.
    """
    for step in program.steps:
        if step.weight is not None and step.engine != "winograd":
            values, taps, rows = step.weight
            step.weight = _balanced(values, rows), taps, rows


def _balanced(values: Tensor, rows: Tensor) -> Tensor:
    near = values.bfloat16().float()
    error = near - values  # exact
    row = filters(rows)
    total = _zeros(len(rows) - 1, torch.float64).index_add_(0, row, error.double())
    asked = (((error > 0) == (total > 0)[row]) & (error != 0) & (near != 0)).nonzero().flatten()
    here, row, error = near[asked], row[asked], error[asked]
    other = (here.view(torch.int32) + torch.where((here > 0) == (error < 0), 1 << 16, -1 << 16).int()).view(
        torch.float32
    )
    gain = other - here
    distance = 1 + error / gain  # to the other, of the way there from the nearest
    close = (distance < _MIDDLE).nonzero().flatten()
    close = close[(row[close] + distance[close].double()).argsort(stable=True)]  # weights of a mean are all alike
    row, gain = row[close], gain[close].double()
    run = gain.cumsum(0)
    counts = torch.bincount(row, minlength=len(total))
    before = F.pad(run, (1, 0))[counts.cumsum(0) - counts][row]  # of the rows above
    flipped = close[(run - before - gain / 2).abs() <= total[row].abs()]  # while that brings the sum nearer to 0
    near[asked[flipped]] = other[flipped]
    return near


def _giving(weight: Rows, kept: Tensor, one: bool) -> Rows:
    """The kept filters, and an empty one behind them."""
    values, taps, rows = weight
    counts = rows.diff()
    chosen = _zeros(len(counts), torch.bool)
    chosen[kept] = True
    entries = chosen.repeat_interleave(counts)
    ends = F.pad(counts[kept].cumsum(0), (1, 0))
    ends = torch.cat([ends, ends[-1:]]) if one else ends
    return values[entries], taps[entries], ends.to(torch.int32)


def _reading(step: Step, kept: Tensor, constant: Tensor | None, fixed: Tensor) -> Rows:
    """The step's weight on the kept channels and, given constants, the channel of value 1 behind them."""
    assert step.weight is not None
    values, taps, rows = step.weight
    area = step.kernel[0] * step.kernel[1]
    of = filters(rows)
    channel, tap = taps.long() // area, taps.long() % area
    width = (len(kept) + (constant is not None)) * area
    place = kept.new_full((len(fixed),), -1)
    place[kept] = torch.arange(len(kept), device="cpu")
    there = place[channel] >= 0
    flat = of[there] * width + place[channel[there]] * area + tap[there]
    if constant is not None:
        gone = ~there & fixed[channel] & (constant[channel] != 0)
        target = of[gone] * width + len(kept) * area + tap[gone]
        merged, index = target.unique(return_inverse=True)
        sums = _zeros(len(merged), torch.float64)
        sums.index_add_(0, index, values[gone].double() * constant[channel[gone]].double())
        flat, values = torch.cat([flat, merged]), torch.cat([values[there], sums.float()])
    else:
        values = values[there]
    flat, order = flat.sort()
    counts = torch.bincount(flat // width, minlength=len(rows) - 1)
    return values[order], (flat % width).to(torch.int32), F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
