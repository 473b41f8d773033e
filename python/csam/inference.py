"""A network made ready to run: what can be computed once is folded into the weights, the rest fused.

Rewrites, each kept only if the logits on a probe stay what they were: masks and batch norms disappear in the weights,
and on a CPU a convolution takes the residual sum and the ReLU that follow it into its own loop, as oneDNN's
post-operations, with its weight packed once, and filters that came out empty leave with everything that only they fed.
Every rewrite says in words what it did, or why it could not.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import fusion

from csam.nn import fold, masked_layers

_RELU = {F.relu, torch.relu, "relu", "relu_"}
_SUM = {operator.add, torch.add, "add"}
_WIDTH = 16  # channels that oneDNN's kernels work on at once
_INERT = (nn.Identity, nn.modules.dropout._DropoutNd)  # in eval mode


def ready(
    network: nn.Module, probe: Tensor, wanted: Tensor, dtype: torch.dtype, tile: int
) -> tuple[nn.Module, torch.memory_format, list[str]]:
    """The network folded, cast, laid out and fused for batches of `tile` images.

    Args:
        network: in eval mode; the result may share modules with it.
        probe: images [B, C, H, W] in the network's own dtype.
        wanted: logits [B, K] of the network on the probe.
        dtype: to run in.

    Returns:
        (network, layout, steps): `layout` is that of its inputs; `steps` say what was done, what not, and why.

    Raises:
        ValueError: the network does not run in `dtype`.
    """
    passes: list[_Pass] = [
        _Pass("masked layers", "folded", lambda m: len(masked_layers(m)), fold),
        _Pass("batch-norm layers", "folded", _batch_norms, _fold_batch_norms),
    ]
    network, steps = _rewritten(network, probe, wanted, passes)
    layout = torch.channels_last
    if _failure(network, laid_out(probe, layout)):
        layout = torch.contiguous_format
        steps.append("kept contiguous: the model does not take channels_last")
    elif probe.device.type == "cpu" and _onednn(dtype):
        passes = [
            _Pass("convolutions", "fused", _plain_convolutions, lambda m: _fuse_convolutions(m, probe)),
            _Pass("dead channels", "removed", _dead_channels, _remove_dead_channels),
        ]
        network, fused = _rewritten(network, laid_out(probe, layout), wanted, passes)
        steps += fused
    network = network.to(dtype).to(memory_format=layout)  # type: ignore[call-overload]
    probe = laid_out(probe.to(dtype), layout)
    if failure := _failure(network, probe):
        raise ValueError(f"dtype must be None: the model does not run in {dtype}: {failure}") from failure
    pack(network, probe, tile)
    return network, layout, steps


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
                moved = float((new(probe) - wanted).abs().max())
        except Exception as error:  # tracing runs the model's own code on proxies: it may raise anything
            steps.append(f"{what} not {done}: {type(error).__name__}: {error}".splitlines()[0])
            continue
        if moved <= 1e-3 * float(wanted.abs().max()):
            network = new
            steps.append(f"{there - number(new)} of {there} {what} {done}")
        else:
            steps.append(f"{what} not {done}: it would move the logits by {moved:.2g}")
    return network, steps


def laid_out(batch: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A copy whose strides are those of `memory_format`.

    torch takes a batch of one-channel images to be in every format already, so that `.to` leaves strides
    which the layers then read as the other format.
    """
    return torch.empty_like(batch, memory_format=memory_format).copy_(batch)


def lanes(x: Tensor) -> Tensor:
    """Images [B, C, H, W] as contiguous [C, H, W, B]; by way of plain transposes, which torch copies fast."""
    b, c, h, w = x.shape
    moved = x.permute(1, 2, 3, 0)
    if moved.is_contiguous():
        return moved
    if x.is_contiguous():
        return x.flatten(1).t().contiguous().view(c, h, w, b)
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).flatten(1).t().contiguous().view(h, w, c, b).permute(2, 0, 1, 3).contiguous()
    return moved.contiguous()


def channels_last(x: Tensor) -> Tensor:
    """Images [B, C, H, W] in channels_last; from `lanes` by way of plain transposes."""
    b, c, h, w = x.shape
    moved = x.permute(1, 2, 3, 0)
    if b > 1 and moved.is_contiguous():
        flat = moved.permute(1, 2, 0, 3).contiguous().view(-1, b).t().contiguous()
        return flat.view(b, h, w, c).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


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
    def of(cls, layer: nn.Conv2d, activation: str) -> FusedConv2d:
        """The layer's twin, with a copy of its parameters."""
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
        input = channels_last(input)
        weight = self.weight if self.packed is None else self.packed
        args = (weight, self.bias, self.padding, self.stride, self.dilation, self.groups)
        run, relu = torch.ops.mkldnn._convolution_pointwise, self.activation == "relu"
        out: Tensor
        if other is None:
            out = run(input, *args, self.activation, [], "")
        else:
            out = run.binary(input, channels_last(other), *args, "add", 1.0, "relu" if relu else None, [], "")
        return out


def pack(network: nn.Module, probe: Tensor, tile: int) -> None:
    """Pack the weights of the fused convolutions for batches of `tile` images like the probe's."""

    def remember(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        sizes[layer] = (tile, *args[0].shape[1:])

    sizes: dict[nn.Module, tuple[int, ...]] = {}
    fused = [m for m in network.modules() if isinstance(m, FusedConv2d)]
    hooks = [layer.register_forward_pre_hook(remember) for layer in fused]
    with torch.inference_mode():
        network(probe)
    for layer, hook in zip(fused, hooks, strict=True):
        hook.remove()
        layer.pack(sizes[layer])


def _onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN serves fused convolutions of the dtype (float32, bfloat16, float16) on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _batch_norms(network: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) for m in network.modules())


def _plain_convolutions(network: nn.Module) -> int:
    return sum(type(m) is nn.Conv2d for m in network.modules())


def _fold_batch_norms(network: nn.Module) -> nn.Module:
    """The traced network, every batch-norm folded that alone reads a convolution or linear layer."""
    traced = fx.symbolic_trace(network)
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
        name = f"{calls[1].name}_{node.name}"
        modules[name] = merge(layer, norm)
        traced.add_submodule(name, modules[name])
        calls[1].target = name
        node.replace_all_uses_with(calls[1])
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _fuse_convolutions(network: nn.Module, probe: Tensor) -> nn.Module:
    """The traced network, every zero-padded convolution a `FusedConv2d` with what alone reads it."""
    traced = fx.symbolic_trace(network)
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
        other = _summand(node, shapes)
        if other is not None:
            chain += node.users
        relu = [user for user in chain[-1].users if len(chain[-1].users) == 1 and _is_relu(user, modules)]
        chain += relu
        name = f"{node.name}_fused"
        traced.add_submodule(name, FusedConv2d.of(layer, "relu" if relu else "none"))
        with traced.graph.inserting_before(chain[-1]):
            fused = traced.graph.call_module(name, (node.args[0], *([] if other is None else [other])))
        shapes[fused] = shapes[chain[-1]]
        chain[-1].replace_all_uses_with(fused)
        for dead in reversed(chain):
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


def _drop_identities(traced: fx.GraphModule) -> None:
    """Without the layers that do nothing in eval mode and would stand between a convolution and its sum."""
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and isinstance(modules[node.target], _INERT) and node.args:
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
            self.run(probe)
        return self.shapes

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            self.shapes[n] = out.shape
        return out
