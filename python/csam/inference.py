"""A network made ready to run: what can be computed once is folded into the weights, the rest fused.

Rewrites, each kept only if the logits on a probe stay what they were: masks and batch norms disappear in the weights,
and a convolution takes the residual sum and the ReLU that follow it into its own loop. On a CPU these are oneDNN's
post-operations, with the weight packed once, and filters that came out empty leave with everything that only they fed.
On a GPU it is the library's kernel, which takes the batch norm in as well and skips tiles of the weight that are all
zero; and where it is the first to read the images, it can draw their noise itself. Every rewrite says in words what it
did, or why it could not. A network with hooks, which tracing and rewriting would lose, is run as it is.
"""

from __future__ import annotations

import copy
import itertools
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import fusion

import csam_kernels
from csam import aliases, tracing
from csam.models import _checked_images
from csam.nn import fold, masked_layers

_RELU = {F.relu, torch.relu, "relu", "relu_"}
_SUM = {operator.add, torch.add, "add"}
_DIFFERENCE, _PRODUCT = {operator.sub, torch.sub, "sub"}, {operator.mul, torch.mul, "mul"}
_QUOTIENT = {operator.truediv, torch.div, "div"}
_WIDTH = 16  # channels that oneDNN's kernels work on at once
_INERT = (nn.Identity, nn.modules.dropout._DropoutNd)  # in eval mode
_FAR = 10.0  # steps between logits that are so many times all smaller ones together
_LAST_BITS = 4e-6  # share of a float32 that rounding explains, some 30 of its last bits
_HOOKS = {"_forward_pre_hooks": "a forward pre-hook", "_forward_hooks": "a forward hook"}


class Ready(NamedTuple):
    """What `ready` made.

    Attributes:
        network: what runs.
        layout: of its inputs.
        steps: what was done, what not, and why.
        head: its beginning and its rest, where noise can be drawn on the way into it.
        exact: the same before it was cast, on a CPU; None for one that is run by its own modules.
    """

    network: nn.Module
    layout: torch.memory_format
    steps: list[str]
    head: NoiseHead | None = None
    exact: nn.Module | None = None


def ready(network: nn.Module, probe: Tensor, wanted: Tensor, dtype: torch.dtype, tile: int) -> Ready:
    """The network folded, cast, laid out and fused for batches of `tile` images.

    Args:
        network: in eval mode; the result may share modules with it.
        probe: images [B, C, H, W] in the network's own dtype.
        wanted: logits [B, K] of the network on the probe.
        dtype: to run in.

    Raises:
        ValueError: the network does not run in `dtype`.
    """
    if reason := hooked(network):
        network = network.to(dtype)
        if failure := _failure(network, probe.to(dtype)):
            raise _unrunnable(dtype, failure) from failure
        return Ready(network, torch.contiguous_format, [f"the model's own modules, since {reason}"])
    kernels = _kernels(probe.device)
    if kernels and probe.dtype is torch.float64:  # which they do not offer
        network, probe = network.float(), probe.float()
    masks = _Pass("masked layers", "folded", lambda m: len(masked_layers(m)), fold)
    network, steps = _rewritten(network, probe, wanted, [masks])
    network, aliased = _settled(network, probe)
    passes = [_Pass("batch-norm layers", "folded", _batch_norms, _fold_batch_norms)]
    if kernels and not aliased:
        fuse = _Pass("convolutions", "fused", _plain_convolutions, lambda m: _fuse_convolutions(m, probe, KernelConv2d))
        passes.insert(0, fuse)
    network, more = _rewritten(network, probe, wanted, passes)
    steps += more
    head = None
    if kernels and any(isinstance(m, KernelConv2d) for m in network.modules()):
        steps += [f"{name} left to torch: {_unserved(layer)}" for name, layer in _plain(network)]
        head, step = _noise_head(network, probe)
        steps.append(step)
    layout = torch.channels_last
    if reason := aliased or _unfit(network, laid_out(probe, layout), wanted):
        layout = torch.contiguous_format
        steps.append(f"kept contiguous: {reason}")
    elif probe.device.type == "cpu" and not kernels and onednn(dtype):
        passes = [
            _Pass("convolutions", "fused", _plain_convolutions, lambda m: _fuse_convolutions(m, probe, FusedConv2d)),
            _Pass("dead channels", "removed", _dead_channels, _remove_dead_channels),
        ]
        network, fused = _rewritten(network, laid_out(probe, layout), wanted, passes)
        steps += fused
    exact = copy.deepcopy(network) if probe.device.type == "cpu" and not kernels else None
    network = network.to(dtype).to(memory_format=layout)  # type: ignore[call-overload]
    probe = laid_out(probe.to(dtype), layout)
    if failure := _failure(network, probe.clone()):
        raise _unrunnable(dtype, failure) from failure
    pack(network, probe, tile)
    if head is not None:
        head = head.to(dtype).to(memory_format=layout)  # type: ignore[call-overload]
    return Ready(network, layout, steps, head, exact)


def _settled(network: nn.Module, probe: Tensor) -> tuple[nn.Module, str]:
    """The network without changes in place that an order or a layout could tell apart; and why it is left as it is."""
    try:
        traced = trace(network)
        settled = aliases.settled(traced, probe)
    except aliases.Aliased as error:
        return network, str(error)
    except Exception:  # tracing runs the model's own code on proxies: it may raise anything
        return network, ""  # and no pass that needs a trace will do anything
    return (network if settled is traced else settled), ""


def _unfit(network: nn.Module, batch: Tensor, wanted: Tensor) -> str:
    """Why the network does not take a batch of this layout."""
    if _failure(network, batch.clone()):
        return "the model does not take channels_last"
    with torch.inference_mode():
        moved = moved_by(network(batch), wanted)
    return f"channels_last would move the logits by {moved:.2g}" if moved else ""


def _kernels(where: torch.device) -> bool:
    """Whether convolutions are the library's own: on a GPU, and wherever Triton's provider is asked for."""
    return where.type == "cuda" or os.environ.get("CSAM_BACKEND") == "triton"


class _Pass(NamedTuple):
    """One rewrite: of `what`, in one word, how many there are, and the rewriting itself."""

    what: str
    done: str
    number: Callable[[nn.Module], int]
    rewrite: Callable[[nn.Module], nn.Module]


def _rewritten(network: nn.Module, probe: Tensor, wanted: Tensor, passes: list[_Pass]) -> tuple[nn.Module, list[str]]:
    """The network after every pass that leaves its logits on the probe what they were, and a step for each."""
    steps = []
    for what, done, number, rewrite in passes:
        there = number(network)
        if not there:
            continue
        try:
            new = rewrite(network)
            with torch.inference_mode():
                moved = moved_by(new(probe.clone()), wanted)
        except Exception as error:  # tracing runs the model's own code on proxies: it may raise anything
            steps.append(f"{what} not {done}: {type(error).__name__}: {error}".splitlines()[0])
            continue
        if moved:
            steps.append(f"{what} not {done}: it would move the logits by {moved:.2g}")
        else:
            network = new
            steps.append(f"{there - number(new)} of {there} {what} {done}")
    return network, steps


def moved_by(found: Tensor, wanted: Tensor) -> float:
    """How far a rewrite moved the logits [B, K]; 0 where that is no more than rounding explains, NaN if some are NaN.

    Rounding explains a thousandth of the logits' spread, and the last bits of a large one. Equal infinities are equal.
    """
    away = torch.where(found == wanted, 0.0, (found - wanted).abs().double())
    if bool((wanted.isnan() | found.isnan()).any()):
        return float("nan")
    large = torch.where(wanted.isfinite(), wanted.abs().double(), 0.0)
    wrong = away > 1e-3 * _spread(wanted) + _LAST_BITS * large
    return float(away[wrong].max()) if bool(wrong.any()) else 0.0


def _spread(logits: Tensor) -> float:
    """From the lowest to the highest logit of a row, the most of all rows, without what lies far from all others.

    Votes are won by differences between logits that are near each other. So classes that a constant of -10^4 keeps from
    winning say nothing of how much the others may move: of the steps from one logit to the next those are left out that
    are more than ten times all smaller ones together.
    """
    spread = 0.0
    for row in logits.double().cpu():
        steps = row[row.isfinite()].sort().values.diff()
        steps = steps[steps > 0].sort().values
        if not len(steps):
            continue
        below = steps.cumsum(0) - steps
        far = steps > _FAR * below
        far[: (len(steps) + 1) // 2] = False  # the smaller half is never far, however it is spread
        first = int(far.nonzero()[0]) if bool(far.any()) else len(steps)
        spread = max(spread, float(steps[:first].sum()))
    return spread


def hooked(network: nn.Module) -> str:
    """Why the network is left as it is: a module is called by more than its class's forward. Empty if none is."""
    for name, module in network.named_modules():
        own = vars(module)
        kind = next((words for key, words in _HOOKS.items() if own.get(key)), "")
        if not kind and not isinstance(module, fx.GraphModule) and not _compiled(module):
            kind = "a forward of its own" if "forward" in own else "a __call__ of its own" if _called(module) else ""
        if kind:
            which = f"layer {name!r}" if name else "it"
            return f"{which} has {kind}, which a rewrite would lose"
    if any(getattr(nn.modules.module, name) for name in ("_global_forward_hooks", "_global_forward_pre_hooks")):
        return "torch has a hook for all modules, which a rewrite would lose"
    return ""


def _compiled(module: nn.Module) -> bool:
    """Whether it is what torch.compile gives, which calls the module inside as that is."""
    return type(module).__module__.startswith("torch._dynamo")


def _called(module: nn.Module) -> bool:
    return any(
        "__call__" in vars(kind) for kind in itertools.takewhile(lambda k: k is not nn.Module, type(module).__mro__)
    )


def _unrunnable(dtype: torch.dtype, failure: RuntimeError) -> ValueError:
    return ValueError(f"dtype must be None: the model does not run in {dtype}: {failure}")


def laid_out(batch: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A copy whose strides are those of `memory_format`.

    torch takes a batch of one-channel images to be in every format already, so that `.to` leaves strides
    which the layers then read as the other format.
    """
    return torch.empty_like(batch, memory_format=memory_format).copy_(batch)


def _failure(network: nn.Module, batch: Tensor) -> RuntimeError | None:
    # a traced network would print its error before it raises it
    run = network.forward if isinstance(network, fx.GraphModule) else network
    try:
        with torch.inference_mode():
            run(batch)
    except RuntimeError as error:
        return error
    return None


class FusedConv2d(nn.Conv2d):
    """nn.Conv2d, then `+ other`, then ReLU, each rounded with the convolution and not on its own.

    Stands for inference on a CPU only; `pack` lays the weight out as oneDNN wants it, which torch's own layer does in
    every call.
    """

    activation: str
    packed: Tensor | None

    @classmethod
    def of(cls, layer: nn.Conv2d, norms: Sequence[Any], activation: str) -> FusedConv2d:
        """The layer's twin, with a copy of its parameters; batch norms it cannot take in."""
        assert not norms
        twin: Any = copy.deepcopy(layer)
        twin.__class__ = cls
        twin.activation, twin.packed = activation, None
        return cast(FusedConv2d, twin)

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts unpacked: oneDNN's layout can be neither copied nor pickled."""
        return self.__dict__ | {"packed": None}

    def pack(self, size: tuple[int, ...]) -> None:
        """Pack the weight for inputs [B, C, H, W] of this size."""
        args: Any = (self.padding, self.stride, self.dilation, self.groups, size)
        self.packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight.detach(), *args)

    def forward(self, input: Tensor, other: Tensor | None = None) -> Tensor:
        relu = self.activation == "relu"
        out: Tensor
        if tracing.exporting(input):  # as the operators that `csam.lanes` knows
            out = super().forward(input)
            out = out if other is None else out + other
            return F.relu(out) if relu else out
        input = input.contiguous(memory_format=torch.channels_last)
        weight = self.weight if self.packed is None else self.packed
        args = (weight, self.bias, self.padding, self.stride, self.dilation, self.groups)
        run = torch.ops.mkldnn._convolution_pointwise
        if other is None:
            out = run(input, *args, self.activation, [], "")
        else:
            other = other.contiguous(memory_format=torch.channels_last)
            out = run.binary(input, other, *args, "add", 1.0, "relu" if relu else None, [], "")
        return out


class KernelConv2d(nn.Conv2d):
    """nn.Conv2d, then batch norms, `+ other` and ReLU: one call of `csam_kernels.masked_conv2d_inference`.

    Stands for inference on a GPU. The zeros of the weight are the mask: `pack` looks once where they fill whole tiles,
    which the kernel then skips.
    """

    activation: str
    scale: Tensor | None  # of the batch norms, float32 whatever the weight is cast to
    shift: Tensor | None
    everything: Tensor
    tiles: Tensor | None

    @classmethod
    def of(cls, layer: nn.Conv2d, norms: Sequence[Any], activation: str) -> KernelConv2d:
        """The layer's twin, with a copy of its parameters."""
        twin: Any = copy.deepcopy(layer)
        twin.__class__ = cls
        twin.activation, twin.tiles, twin.scale, twin.shift = activation, None, None, None
        twin.everything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=layer.weight.device)
        if norms:
            scale, shift = torch.ones_like(layer.weight[:, 0, 0, 0]), torch.zeros_like(layer.weight[:, 0, 0, 0])
            if layer.bias is not None:
                shift, twin.bias = layer.bias, None
            for norm in norms:
                own = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
                scale, shift = scale * own, (shift - norm.running_mean) * own + (0 if norm.bias is None else norm.bias)
            twin.scale, twin.shift = scale.detach().float(), shift.detach().float()
        return cast(KernelConv2d, twin)

    @property
    def geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups

    def pack(self) -> None:
        """Lay out the weight, as it is now, for the kernels."""
        self.tiles = csam_kernels.live_tiles(self.weight, self.everything, dtype=self.weight.dtype, groups=self.groups)

    def forward(self, input: Tensor, other: Tensor | None = None) -> Tensor:
        epilogue = (self.bias, self.scale, self.shift, self.activation == "relu")
        run = torch.ops.csam.masked_conv2d_inference
        out: Tensor = run(input, self.weight, self.everything, *epilogue, *self.geometry, 0, other, self.tiles)
        return out


class Replayed:
    """A network on a GPU for batches of one shape, its kernels launched as one CUDA graph from the second batch on.

    Python takes some 100 us a layer to launch them, on a fast GPU several times what a small network's kernels run
    for. A network that cannot be captured, such as one that waits for a value, goes on as it is. The graph keeps the
    memory of one batch's activations; calls must be made on one stream, in order.
    """

    def __init__(self, network: Callable[[Tensor], Tensor]) -> None:
        self.network, self.calls = network, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch, self.logits = torch.empty(0), torch.empty(0)

    def __call__(self, batch: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            self._capture(batch)
        if self.graph is None:
            return self.network(batch)
        self.batch.copy_(batch)
        self.graph.replay()
        return self.logits.clone()

    def _capture(self, batch: Tensor) -> None:
        graph, own = torch.cuda.CUDAGraph(), torch.empty_like(batch)
        try:
            with torch.cuda.graph(graph):
                logits = self.network(own)
        except RuntimeError:  # what was not to be captured, and memory that is not there
            torch.cuda.synchronize()
            return
        self.graph, self.batch, self.logits = graph, own, logits


class NoiseHead(nn.Module):
    """The noise, a network's first convolution, and the rest of the network.

    Called, it maps (x, n, sigma, seed, first_sample, stream) to what `rest` takes of the n noisy copies: see
    `csam_kernels.smoothing_conv2d`. `normalization`, a factor and a summand [C], is what was between the images and the
    convolution; None for nothing.
    """

    normalization: tuple[Tensor, Tensor] | tuple[None, None]

    def __init__(self, first: KernelConv2d, normalization: tuple[Tensor, Tensor] | None, rest: nn.Module) -> None:
        super().__init__()
        self.first, self.rest = first, rest
        self.normalization = normalization or (None, None)  # not buffers: they stay float32

    def forward(self, x: Tensor, n: int, sigma: float, seed: int, first_sample: int, stream: int) -> Tensor:
        layer, (input_scale, input_shift) = self.first, self.normalization
        return csam_kernels.smoothing_conv2d(
            x,
            n,
            sigma,
            layer.weight,
            layer.everything,
            layer.bias,
            *layer.geometry,
            seed=seed,
            first_sample=first_sample,
            stream=stream,
            dtype=layer.weight.dtype,
            input_scale=input_scale,
            input_shift=input_shift,
            scale=layer.scale,
            shift=layer.shift,
            relu=layer.activation == "relu",
            tiles=layer.tiles,
        )


def pack(network: nn.Module, probe: Tensor, tile: int) -> None:
    """Pack the weights of the fused convolutions for batches of `tile` images like the probe's."""
    for module in network.modules():
        if isinstance(module, KernelConv2d):
            module.pack()

    def remember(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        sizes[layer] = (tile, *args[0].shape[1:])

    sizes: dict[nn.Module, tuple[int, ...]] = {}
    fused = [m for m in network.modules() if isinstance(m, FusedConv2d)]
    hooks = [layer.register_forward_pre_hook(remember) for layer in fused]
    with torch.inference_mode():
        network(probe.clone())
    for layer, hook in zip(fused, hooks, strict=True):
        hook.remove()
        layer.pack(sizes[layer])


def onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN serves fused convolutions of the dtype (float32, bfloat16, float16) on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


class _Tracer(fx.Tracer):
    """Takes fused convolutions as they are, like torch's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, FusedConv2d | KernelConv2d) or super().is_leaf_module(m, module_qualified_name)

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        with tracing.alone():
            return super().trace(*args, **kwargs)


def trace(network: nn.Module) -> fx.GraphModule:
    """The network as torch.fx traces it. Raises whatever that or the network's own code does."""
    graph = _Tracer().trace(network)
    for node in graph.nodes:
        node.type = None  # annotations that are strings cannot be pickled
    return fx.GraphModule(network, graph)


def _batch_norms(network: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) for m in network.modules())


def _plain(network: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    """The convolutions that are torch's own, by name."""
    return [(name, m) for name, m in network.named_modules() if type(m) is nn.Conv2d]


def _plain_convolutions(network: nn.Module) -> int:
    return len(_plain(network))


def _unserved(layer: nn.Conv2d) -> str:
    """Why a convolution is not fused."""
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return f"its padding is {layer.padding if layer.padding_mode == 'zeros' else layer.padding_mode!r}"
    return "nothing calls it with an input alone"


def _fold_batch_norms(network: nn.Module) -> nn.Module:
    """The traced network, every batch-norm folded that alone reads a convolution or linear layer."""
    traced = trace(network)
    modules = dict(traced.named_modules())
    kinds: dict[tuple[type, type], Callable[[Any, Any], nn.Module]] = {
        (nn.Conv2d, nn.BatchNorm2d): fusion.fuse_conv_bn_eval,
        (nn.Linear, nn.BatchNorm1d): fusion.fuse_linear_bn_eval,
    }
    for node in list(traced.graph.nodes):
        calls = [node, *node.args[:1]]
        if len(calls) < 2 or any(not isinstance(c, fx.Node) or c.op != "call_module" for c in calls):
            continue
        layer, norm = modules[calls[1].target], modules[node.target]
        merge = kinds.get((type(layer), type(norm)))
        if merge is None or len(calls[1].users) > 1:
            continue
        calls[1].target = name = _name(calls[1])
        modules[name] = merge(layer, norm)
        traced.add_submodule(name, modules[name])
        node.replace_all_uses_with(calls[1])
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _name(call: fx.Node) -> str:
    """Of a layer to call instead: that of the layer itself, unless others call it too. What a plan calls its layers is
    then the same on processors that fuse convolutions and on those that do not."""
    others = (n for n in call.graph.nodes if n is not call and n.op == "call_module" and n.target == call.target)
    return f"{call.name}_own" if any(others) else str(call.target)


def _fuse_convolutions(network: nn.Module, probe: Tensor, kind: type[FusedConv2d] | type[KernelConv2d]) -> nn.Module:
    """The traced network, every zero-padded convolution of the kind that takes in what alone reads it."""
    traced = trace(network)
    _drop_identities(traced)
    modules = dict(traced.named_modules())
    shapes = _Shapes(traced).of(probe)
    for node in list(traced.graph.nodes):
        layer = modules.get(node.target) if node.op == "call_module" else None
        if type(layer) is not nn.Conv2d or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            continue
        if len(node.args) != 1 or node.kwargs:
            continue
        chain: list[fx.Node] = [node]
        norms = _norms(node, modules) if kind is KernelConv2d else []
        chain += norms
        other = _summand(chain[-1], shapes)
        if other is not None:
            chain += chain[-1].users
        relu = [user for user in chain[-1].users if len(chain[-1].users) == 1 and _is_relu(user, modules)]
        chain += relu
        name = _name(node)
        traced.add_submodule(name, kind.of(layer, [modules[str(n.target)] for n in norms], "relu" if relu else "none"))
        node.target, node.args = name, (node.args[0], *([] if other is None else [other]))
        shapes[node] = shapes[chain[-1]]
        if len(chain) > 1:
            chain[-1].prepend(node)  # where all that it reads is there
            chain[-1].replace_all_uses_with(node)
        for dead in reversed(chain[1:]):
            traced.graph.erase_node(dead)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _pairs(network: nn.Module) -> list[tuple[FusedConv2d, FusedConv2d]]:
    """(producer, consumer) where the consumer's convolution alone reads what the producer gives; neither is grouped."""
    if not isinstance(network, fx.GraphModule):
        return []
    modules = dict(network.named_modules())
    calls = [n for n in network.graph.nodes if n.op == "call_module" and type(modules[n.target]) is FusedConv2d]
    pairs = []
    for node in calls:
        if len(node.users) != 1 or len(node.args) != 1:
            continue
        (after,) = node.users
        if after in calls and after.args[0] is node and node not in after.args[1:]:
            pairs.append((modules[node.target], modules[after.target]))
    return [(a, b) for a, b in pairs if a.groups == b.groups == 1]


def _liveness(producer: FusedConv2d, consumer: FusedConv2d) -> tuple[Tensor, Tensor]:
    """Of the channels between the two: bool [C], which depend on the input and are read; and float [C], the value of
    those that are read but constant, 0 elsewhere."""
    read = (consumer.weight != 0).flatten(2).any(2).any(0)
    fed = (producer.weight != 0).flatten(1).any(1)
    value = torch.zeros_like(producer.weight[:, 0, 0, 0]) if producer.bias is None else producer.bias
    value = value.clamp(min=0) if producer.activation == "relu" else value
    return fed & read, torch.where(read & ~fed, value, 0.0)


def _dead_channels(network: nn.Module) -> int:
    return sum(int((~_liveness(*pair)[0]).sum()) for pair in _pairs(network))


def _remove_dead_channels(network: nn.Module) -> nn.Module:
    """Channels between two convolutions that are constant or that nobody reads, taken out of both.

    The constant ones, empty filters with a bias, become a single one of value 1: next to a zero-padded border they
    are no bias of the consumer. The width is rounded up to a multiple of `_WIDTH` where that is not the whole.
    """
    network = copy.deepcopy(network)
    for producer, consumer in reversed(_pairs(network)):
        live, value = _liveness(producer, consumer)
        kept = live.nonzero().flatten()
        constant = bool(value.any())
        width = max(1, -(-(len(kept) + constant) // _WIDTH)) * _WIDTH
        if width >= len(live):
            continue
        into, out = (layer.weight.detach() for layer in (producer, consumer))
        bias = into.new_zeros(len(into)) if producer.bias is None else producer.bias.detach()
        new_into, new_bias = into.new_zeros(width, *into.shape[1:]), into.new_zeros(width)
        new_out = out.new_zeros(len(out), width, *out.shape[2:])
        new_into[: len(kept)], new_bias[: len(kept)], new_out[:, : len(kept)] = into[kept], bias[kept], out[:, kept]
        if constant:
            new_bias[len(kept)] = 1.0
            new_out[:, len(kept)] = (out * value.view(1, -1, 1, 1)).sum(1)
        for layer, name, tensor in (
            (producer, "weight", new_into),
            (producer, "bias", new_bias),
            (consumer, "weight", new_out),
        ):
            setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
        producer.out_channels = consumer.in_channels = width
    return network


def _norms(node: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """The batch norms behind a convolution, each of which alone reads what is before it."""
    found: list[fx.Node] = []
    while len(node.users) == 1:
        (after,) = node.users
        if after.op != "call_module" or type(modules[str(after.target)]) is not nn.BatchNorm2d:
            break
        found.append(after)
        node = after
    return found


def _noise_head(network: nn.Module, probe: Tensor) -> tuple[NoiseHead | None, str]:
    """The network's `NoiseHead` if a convolution is the first to read the images, but for a factor and a summand a
    channel; and a step that says so."""
    apart = "noise not drawn by the first convolution: "
    assert isinstance(network, fx.GraphModule)  # since its convolutions are fused
    path = _first_path(network)
    if not path:
        return None, apart + "something else reads the images"
    first: Any = network.get_submodule(str(path[-1].target))
    numbers = {n: operator.attrgetter(str(n.target))(network) for n in network.graph.nodes if n.op == "get_attr"}
    steps = [_affine(before, node, numbers, first.in_channels) for before, node in itertools.pairwise(path[:-1])]
    if any(step is None for step in steps):
        return None, apart + "more than a factor and a summand a channel is between it and the images"
    scale = torch.ones(first.in_channels, dtype=torch.float64, device=probe.device)
    shift = torch.zeros_like(scale)
    for factor, summand in (step for step in steps if step):
        scale, shift = scale * factor, shift * factor + summand
    graph = fx.Graph()
    made = {path[-1]: graph.placeholder("x")}
    for node in network.graph.nodes:
        if node not in path and not (node in numbers and set(path) >= set(node.users)):
            made[node] = graph.node_copy(node, made.__getitem__)
    plain = bool((scale == 1).all() and (shift == 0).all())
    normalization = None if plain else (scale.float(), shift.float())
    head = NoiseHead(first, normalization, fx.GraphModule(network, graph))
    noise = {"n": 2, "sigma": 0.5, "seed": 0, "first_sample": 0, "stream": 0}
    try:
        with torch.inference_mode():
            wanted = network(csam_kernels.smoothing_noise(probe[0], **noise))  # type: ignore[arg-type]
            moved = moved_by(head.rest(head(probe[0], **noise)), wanted)
    except Exception as error:  # tracing leaves a model's own code, which may raise anything
        return None, f"{apart}{type(error).__name__}: {error}".splitlines()[0]
    if moved:
        return None, f"{apart}it would move the logits by {moved:.2g}"
    return head, "noise drawn by the first convolution"


def _first_path(network: fx.GraphModule) -> list[fx.Node]:
    """From the images to the `KernelConv2d` that reads them, each node read by the next alone; [] if there is none."""
    path = [n for n in network.graph.nodes if n.op == "placeholder"][:1]
    while path[-1].op in ("placeholder", "call_function", "call_method"):
        if len(path[-1].users) != 1:
            return []
        path += path[-1].users
    last = path[-1]
    served = last.op == "call_module" and isinstance(network.get_submodule(str(last.target)), KernelConv2d)
    return path if served and len(last.args) == 1 else []


def _affine(
    before: fx.Node, node: fx.Node, numbers: dict[fx.Node, Tensor], channels: int
) -> tuple[Tensor | float, Tensor | float] | None:
    """(factor, summand) a channel [C] by which a node's value follows from the one before; None if it is no such."""
    if node.kwargs or len(node.args) != 2:
        return None
    if node.target is _checked_images:
        return 1.0, 0.0
    other = node.args[1] if node.args[0] is before else node.args[0]
    value = numbers.get(other) if isinstance(other, fx.Node) else other
    if isinstance(value, Tensor) and (
        value.numel() == 1 or (1,) * (4 - value.dim()) + value.shape == (1, channels, 1, 1)
    ):
        value = value.detach().double().flatten().expand(channels)
    elif not isinstance(value, int | float):
        return None
    left = node.args[0] is before
    if node.target in _SUM:
        return 1.0, value
    if node.target in _PRODUCT:
        return value, 0.0
    if node.target in _DIFFERENCE:
        return (1.0, -value) if left else (-1.0, value)
    return (1 / value, 0.0) if node.target in _QUOTIENT and left else None


def _drop_identities(traced: fx.GraphModule) -> None:
    """Without the layers that do nothing in eval mode and would stand between a convolution and its sum."""
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        layer = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(layer, _INERT) and not layer.training and node.args:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _summand(node: fx.Node, shapes: dict[fx.Node, torch.Size]) -> fx.Node | None:
    """What is added to a convolution's output where that sum alone reads it, in the output's own shape."""
    if len(node.users) != 1:
        return None
    (after,) = node.users
    if after.op == "call_module" or after.kwargs or len(after.args) != 2:
        return None
    if after.target not in _SUM and not (after.target == "add_" and after.args[0] is node):
        return None
    (other,) = [a for a in after.args if a is not node] or [None]
    return other if isinstance(other, fx.Node) and shapes.get(other) == shapes[node] else None


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules.get(str(node.target))) is nn.ReLU
    return node.target in _RELU


class _Shapes(fx.Interpreter):
    """Shape of every node's tensor."""

    def of(self, probe: Tensor) -> dict[fx.Node, torch.Size]:
        self.shapes: dict[fx.Node, torch.Size] = {}
        with torch.inference_mode():
            self.run(probe.clone())
        return self.shapes

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            self.shapes[n] = out.shape
        return out
