"""Networks lowered to steps and simplified: the logits stay the module's, and what has no step is refused by name."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import csam
import csam_kernels as ck
from conftest import TOLERANCE, assert_close
from csam import aliases, inference, lanes, sampling
from csam.quantization import quantize
from csam_kernels import reference
from csam_kernels.ops.sample_network import Program, Step, Value

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import networks


def with_statistics(model: nn.Module) -> nn.Module:
    """In eval mode, with batch norms that do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval().requires_grad_(False)


def lowered(model: nn.Module, x: Tensor) -> Program:
    return lanes.lower(fx.symbolic_trace(model), x.shape[1:])


def same(model: nn.Module, x: Tensor, export: bool = False) -> Program:
    """The lowered network gives the module's logits, simplified too, and with what reads one value joined."""
    wanted = model(x.clone())
    traced = lanes.exported(model, x) if export else fx.symbolic_trace(model)
    program = lanes.lower(aliases.settled(traced, x), x.shape[1:])
    assert_close(ck.sample_network(program, torch.float32).logits(x), wanted)
    lanes.simplify(program)
    assert_close(ck.sample_network(program, torch.float32).logits(x), wanted)
    lanes.join(program)
    assert_close(ck.sample_network(program, torch.float32).logits(x), wanted)
    return program


class Net(nn.Module):
    """A convolution, `body` of its output, the mean over the image and a linear layer."""

    def __init__(self, body: Callable[[Net, Tensor], Tensor], head: bool = True, **conv: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 1, bias=False)
        self.narrow = nn.Conv2d(8, 4, 1)
        self.special = nn.Conv2d(8, 8, **{"kernel_size": 3, "padding": 1} | conv)
        self.norm, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)
        self.relu, self.relu6 = nn.ReLU(), nn.ReLU6()
        self.in_place = nn.ReLU(inplace=True)
        self.head = nn.LazyLinear(5) if head else nn.Identity()
        self.register_buffer("scale", 0.5 + torch.rand(1, 8, 1, 1))
        self.register_buffer("flat", torch.rand(3))
        self.masked, self.masked_linear = csam.nn.MaskedConv2d(8, 8, 3, padding=1), csam.nn.MaskedLinear(8, 6)
        self.body, self.images = body, True

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self, self.first(x))
        return self.head(x.mean((2, 3)) if self.images else x)


def net(body: Callable[[Net, Tensor], Tensor], **options: Any) -> tuple[nn.Module, Tensor]:
    model, x = Net(body, **options), torch.rand(5, 3, 8, 8)
    model.images = body(model, model.first(x)).dim() == 4
    model(x)  # the linear layer takes its width
    return with_statistics(model), x


# Every module and function with a step

MODULES: dict[str, nn.Module] = {
    "Conv2d": nn.Conv2d(8, 8, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), groups=2, bias=False),
    "Linear": nn.Sequential(nn.Flatten(), nn.Linear(512, 6, bias=False)),
    "BatchNorm2d": nn.BatchNorm2d(8),
    "ReLU": nn.ReLU(),
    "ReLU6": nn.ReLU6(),
    "Hardtanh": nn.Hardtanh(-0.2, 0.3),
    "MaxPool2d": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "AvgPool2d": nn.AvgPool2d((3, 2), (2, 1), (1, 0), divisor_override=5),
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d((4, None)),
    "Flatten": nn.Flatten(),
    "Identity": nn.Identity(),
    "Dropout": nn.Dropout(),
    "Dropout2d": nn.Dropout2d(),
}
FUNCTIONS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "conv2d": lambda net, x: F.conv2d(x, net.special.weight, net.special.bias, padding=1, dilation=(1, 2)),
    "linear": lambda net, x: F.linear(x.mean((2, 3)), net.flat.new_ones(4, 8), bias=None),
    "batch_norm": lambda net, x: F.batch_norm(x, net.norm.running_mean, net.norm.running_var, bias=net.norm.bias),
    "relu": lambda net, x: F.relu(x),
    "relu_": lambda net, x: x.relu_(),
    "relu6": lambda net, x: F.relu6(8 * x),
    "hardtanh": lambda net, x: F.hardtanh(x, -0.1, 0.2),
    "clamp": lambda net, x: torch.clamp(x.clamp(max=0.2), -0.1),
    "add": lambda net, x: torch.add(net.second(x), x),
    "add_": lambda net, x: net.second(x).add_(x),
    "sub": lambda net, x: x - net.scale,
    "mul": lambda net, x: x * net.scale,
    "truediv": lambda net, x: x / net.scale,
    "div": lambda net, x: torch.div(x, 3.0),
    "cat": lambda net, x: torch.cat((net.second(x), net.third(x)), 1),
    "concat": lambda net, x: torch.concat([x, net.narrow(x)], dim=-3),
    "avg_pool2d": lambda net, x: F.avg_pool2d(x, 3, padding=1, stride=2),
    "adaptive_avg_pool2d": lambda net, x: F.adaptive_avg_pool2d(x, output_size=2),
    "max_pool2d": lambda net, x: F.max_pool2d(x, kernel_size=2, dilation=2),
    "flatten": lambda net, x: torch.flatten(x, start_dim=1),
    "view": lambda net, x: x.view(-1, 512),
    "reshape": lambda net, x: torch.reshape(x, (x.shape[0], 512)),
    "size": lambda net, x: x.view(x.size(0), x.size(1) * x.size(2) * x.size()[3]),
    "getattr": lambda net, x: x.view(x.shape[0], -1),
    "mean": lambda net, x: x.mean([-1, -2], keepdim=True),
    "getitem": lambda net, x: x[:, :, ::2, ::3],
    "pad": lambda net, x: F.pad(x, (1, 1, 2, 2, 3, 1)),
    "dropout": lambda net, x: F.dropout(x, 0.3, training=net.training),
    "contiguous": lambda net, x: x.contiguous(),
    "clone": lambda net, x: x.clone(),
    "permute": lambda net, x: torch.permute(x.permute(0, 2, 3, 1).contiguous(), (0, -1, 1, 2)),
}


# Those that torch.export alone writes
EXPORTED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "sym_size": lambda net, x: x.view(x.shape[0], -1),
    "slice": lambda net, x: x[:, :, ::2, ::3],
    "rsub": lambda net, x: 2 - x,
    "feature_dropout": lambda net, x: F.dropout2d(x, 0.3, training=net.training),
    "masked_conv2d": lambda net, x: net.masked(x),
    "masked_linear": lambda net, x: net.masked_linear(x.mean((2, 3))),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), MODULES[name], nn.Flatten(), nn.LazyLinear(5))
    x = torch.rand(5, 3, 8, 8)
    model(x)
    same(with_statistics(model), x)


@pytest.mark.parametrize("export", [False, True], ids=["fx", "export"])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding: str, export: bool) -> None:
    layer = nn.Conv2d(3, 8, (3, 2), padding=padding, dilation=(1, 2))
    model, x = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(5)), torch.rand(5, 3, 8, 8)
    model(x)
    same(with_statistics(model), x, export)


def test_a_maximum_over_more_than_the_image() -> None:
    model, x = nn.Sequential(nn.MaxPool2d(3, 2, ceil_mode=True), nn.Flatten(), nn.LazyLinear(5)), torch.rand(5, 3, 7, 2)
    model(x)
    program = same(with_statistics(model), x)
    assert_close(reference.sample_logits(program, x, torch.float32), model(x))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    model, x = net(FUNCTIONS[name])
    graph = fx.symbolic_trace(model).graph
    assert name in {getattr(n.target, "__name__", n.target) for n in graph.nodes if n.op.startswith("call_")}
    same(model, x)


@pytest.mark.parametrize("name", FUNCTIONS | EXPORTED)
def test_exported_functions(name: str) -> None:
    model, x = net((FUNCTIONS | EXPORTED)[name])
    called = {lanes._called(n) for n in lanes.exported(model, x).graph.nodes if n.op == "call_function"}
    assert name in called or name in FUNCTIONS
    same(model, x, export=True)


@pytest.mark.parametrize("granularity", ["weight", "filter", "channel", "block"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_masks_of_exported_layers(granularity: str, soft: bool) -> None:
    """The mask is multiplied into the weight at once: what it removes takes no time."""
    model, x = net(lambda net, x: net.masked_linear(net.masked(x).mean((2, 3))))
    model.masked = csam.nn.MaskedConv2d(8, 8, 3, padding=1, granularity=granularity)
    model.masked_linear = csam.nn.MaskedLinear(8, 6, granularity=granularity)
    for layer in (model.masked, model.masked_linear):
        layer.requires_grad_(False).set_mask(torch.rand(layer.mask.shape) < 0.5)
        layer.mask_score.copy_(2 * torch.rand(layer.mask_score.shape) - 0.5)
        layer.soft = soft
    step = next(s for s in same(model, x, export=True).steps if s.name == "masked_conv2d")
    assert len(step.weight[0]) < model.masked.weight.numel()


def test_every_module_and_function_is_tried() -> None:
    assert set(MODULES) | {"FusedConv2d"} == set(lanes._MODULES)  # fused ones: in test_sampling
    tried = {name.removesuffix("_") for name in FUNCTIONS | EXPORTED}
    assert tried | {"_checked_images"} == set(lanes._FUNCTIONS)  # csam's own models


# What they are put together to


def nested(net: Net, x: Tensor) -> Tensor:
    inner = torch.cat([net.narrow(x), net.second(x)], 1)
    return torch.cat([F.relu(inner), x, inner], 1)


def read_by_two(net: Net, x: Tensor) -> Tensor:
    y = net.second(x)
    return torch.cat([torch.cat([y, x], 1), torch.cat([y, net.third(y), y], 1)], 1)


def preactivated(net: Net, x: Tensor) -> Tensor:
    y = net.second(F.relu(net.norm(x)))
    x = x + net.third(F.relu(net.norm2(y)))
    return F.relu(net.norm(x))


def in_place_on_a_shortcut(net: Net, x: Tensor) -> Tensor:
    """What is read later under its old name has changed too."""
    y = net.second(x)
    net.in_place(x)
    return net.third(x) + y + x


def in_place_on_the_other(net: Net, x: Tensor) -> Tensor:
    y = x.add_(net.second(x))
    return net.third(x) + y


def inception(net: Net, x: Tensor) -> Tensor:
    branches = [F.relu(net.narrow(x)), F.relu(net.second(F.relu(net.third(x)))), net.third(F.max_pool2d(x, 3, 1, 1))]
    return F.max_pool2d(torch.cat(branches, 1), 2)


FORMS: dict[str, tuple[Callable[[Net, Tensor], Tensor], dict[str, Any]]] = {
    "inception": (inception, {}),
    "nested-concatenation": (nested, {}),
    "read-by-two-concatenations": (read_by_two, {}),
    "concatenation-of-flat": (lambda net, x: torch.cat([x.flatten(1), net.second(x).mean((2, 3))], 1), {}),
    "concatenation-of-one": (lambda net, x: torch.cat([x], 1), {}),
    "sum-with-itself": (lambda net, x: x + x, {}),
    "sum-of-two-convolutions": (lambda net, x: F.relu(net.second(x) + net.third(x)), {}),
    "sum-of-three": (lambda net, x: net.second(x) + x + net.third(x), {}),
    "difference-of-two": (lambda net, x: F.relu(net.second(x) - net.third(x)), {}),
    "difference-from-itself": (lambda net, x: (x - x) + net.second(x), {}),
    "difference-in-place": (lambda net, x: net.second(x).sub_(x) + x, {}),
    "residual-denoiser": (lambda net, x: net.third((torch.clamp(x - net.second(x), 0, 1) - net.scale) / net.scale), {}),
    "sum-with-numbers": (lambda net, x: 1 + (net.second(x) + 0.5) - 2 + net.scale, {}),
    "number-minus-values": (lambda net, x: 1 - net.second(x), {}),
    "number-times-values": (lambda net, x: 3 * x * net.scale * net.flat[0], {}),
    "constant-arithmetic": (lambda net, x: x * (net.scale + 1).view(8, 1, 1), {}),
    "pre-activation": (preactivated, {}),
    "in-place-on-a-shortcut": (in_place_on_a_shortcut, {}),
    "in-place-on-the-other": (in_place_on_the_other, {}),
    "read-twice": (lambda net, x: F.relu(x) + x, {}),
    "called-twice": (lambda net, x: net.second(F.relu(net.second(x))), {}),
    "bounds-upon-bounds": (lambda net, x: F.relu(F.hardtanh(F.relu6(net.second(x)), -0.5, 0.1)), {}),
    "bounds-apart": (lambda net, x: F.relu(F.hardtanh(net.second(x), -0.5, -0.2)) + 1, {}),
    "depthwise": (lambda net, x: net.relu6(4 * net.special(x)), {"groups": 8, "bias": False}),
    "dilated": (lambda net, x: net.special(x), {"dilation": (1, 3), "stride": (2, 1), "groups": 2}),
    "every-second-row": (lambda net, x: F.relu(net.special(x))[:, :, ::2, ::3] + 1, {"stride": (1, 2), "padding": 2}),
    "every-second-row-of-a-sum": (lambda net, x: (net.second(x) + x)[:, :, ::2], {}),
    "option-a-shortcut": (lambda net, x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)), {}),
    "pad-after-convolution": (lambda net, x: F.relu(F.pad(net.second(x), (0, 0, 0, 0, 2, 3)) + 0.1), {}),
    "pad-of-bounded": (lambda net, x: F.pad(F.hardtanh(net.second(x), 0.5, 1.0), (0, 0, 0, 0, 2, 3)), {}),
    "flatten-with-dropout": (lambda net, x: F.dropout(x.view(x.size(0), -1), training=net.training), {}),
    "maximum-of-a-part": (lambda net, x: torch.cat([x, F.max_pool2d(x, 3, 1, 1)], 1), {}),
    "average-that-counts-padding": (lambda net, x: F.avg_pool2d(x, (4, 2), (3, 2), (2, 1)), {}),
}


@pytest.mark.parametrize("export", [False, True], ids=["fx", "export"])
@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str, export: bool) -> None:
    body, options = FORMS[name]
    same(*net(body, **options), export)


@pytest.mark.parametrize("export", [False, True], ids=["fx", "export"])
def test_what_follows_a_convolution_is_a_part_of_it(export: bool) -> None:
    """Batch norm, factor, summand, shortcut and bounds; a shortcut's convolution that comes later takes the sum."""
    forms = {
        "second": lambda net, x: F.relu6(F.relu(net.norm(net.second(x)) / 3 - net.scale + x)),
        "third": lambda net, x: F.relu(net.norm(net.special(x)) + net.norm2(net.third(x))),
    }
    for last, body in forms.items():
        program = same(*net(body), export)
        first, *_, step = [s for s in program.steps if s.kernel[0] < 8 and s.out.height > 1]
        assert (len(program.steps), step.other is not None) == ({"second": 4, "third": 5}[last], True)
        assert (first.name, step.name) == (
            ("conv2d", f"conv2d_{len(program.steps) - 3}") if export else ("first", last)
        )


@pytest.mark.parametrize("level", [logging.NOTSET, logging.CRITICAL], ids=["logs", "no-logs"])
def test_a_network_that_decides_by_pixels_is_refused_in_silence(
    level: int, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    model, x = net(lambda net, x: x if x.mean() > 0 else -x)
    logging.disable(level)
    try:
        with pytest.raises(RuntimeError, match="data-dependent"):
            lanes.exported(model, x)
        assert logging.root.manager.disable == level
    finally:
        logging.disable(logging.NOTSET)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


NORMALISED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "mean-std": lambda net, x: (x - net.mean) / net.std,
    "flat-buffers": lambda net, x: (x - net.flat[None, :, None, None]) / net.flat.view(1, -1, 1, 1),
    "numbers": lambda net, x: (x - 0.5) / 0.25,
    "factor-summand": lambda net, x: x * net.std + net.mean,
    "number-first": lambda net, x: 2 * x - 1,
    "division-first": lambda net, x: x / net.std - net.mean,
    "twice": lambda net, x: ((x - net.mean) / net.std - net.mean) / net.std,
    "factor-of-0": lambda net, x: x * torch.tensor([1.0, 0.0, 2.0]).view(3, 1, 1),
    "minuend": lambda net, x: 1 - x,
    "batch-norm": lambda net, x: net.norm(x),
    "beside-the-image": lambda net, x: torch.cat([x - net.mean, x / net.std], 1)[:, :, ::2],
    "and-the-image": lambda net, x: (x - net.mean) / net.std + x,
}


@pytest.mark.parametrize("name", NORMALISED)
def test_normalisations(name: str) -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.rand(1, 3, 1, 1))
            self.register_buffer("std", 0.5 + torch.rand(1, 3, 1, 1))
            self.register_buffer("flat", 0.5 + torch.rand(3))
            self.norm, self.conv = nn.BatchNorm2d(3), nn.LazyConv2d(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(NORMALISED[name](self, x)).mean((2, 3))

    model, x = Normalised(), torch.rand(5, 3, 8, 8)
    model(x)
    program = same(with_statistics(model), x)
    if name in ("mean-std", "flat-buffers", "numbers"):  # at no cost
        assert len(program.steps) == 2


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_fused_convolutions(activation: str) -> None:
    """With the residual and the ReLU that they took in, and with bounds behind them."""
    if not inference.onednn(torch.float32):
        pytest.skip("oneDNN serves no fused convolutions on this processor")

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            plain = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)]
            self.first, self.second = (inference.FusedConv2d.of(layer, (), activation) for layer in plain)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return F.hardtanh(self.second(x, x), -0.5, -0.2).mean((2, 3)) + x.mean((2, 3))

    model, x = Fused().eval().requires_grad_(False), torch.rand(5, 3, 8, 8)
    program = lanes.lower(inference.trace(model), x.shape[1:])
    assert_close(ck.sample_network(program, torch.float32).logits(x), model(x))


# What is refused

REFUSED: dict[str, tuple[Callable[[Net, Tensor], Any], str]] = {
    "softmax": (lambda net, x: F.softmax(x, 1), "softmax: no step for softmax"),
    "attention": (lambda net, x: torch.matmul(x, x.transpose(2, 3)), "transpose: no step for transpose"),
    "unknown-function": (lambda net, x: torch.sin(x), "sin: no step for sin"),
    "unknown-method": (lambda net, x: x.sigmoid(), "sigmoid: no step for sigmoid"),
    "product-of-two": (lambda net, x: x * net.second(x), "mul: a product of two values"),
    "quotient-of-two": (lambda net, x: x / net.second(x), "truediv: a quotient of this form"),
    "sum-of-two-shapes": (lambda net, x: x + x.mean((2, 3), keepdim=True), "add: a sum of two shapes"),
    "sum-with-factor": (lambda net, x: torch.add(x, x, alpha=2), "add: add in a form that has no step"),
    "sum-with-an-image": (lambda net, x: x + torch.ones(8, 8), "add: a constant of shape"),
    "concatenation-of-rows": (lambda net, x: torch.cat([x, x], 2), "cat: a concatenation along dimension 2"),
    "concatenation-of-samples": (lambda net, x: torch.cat([x, x]), "cat: a concatenation along dimension 0"),
    "concatenation-with-a-constant": (lambda net, x: torch.cat([x, torch.ones(5, 1, 8, 8)], 1), "cat: a concat"),
    "permutation-of-rows": (lambda net, x: x.permute(0, 1, 3, 2), r"permute: a permutation to \(0, 1, 3, 2\)"),
    "channels-last": (lambda net, x: x.permute(0, 2, 3, 1) * 2, "mul: mul in a form that has no step"),
    "interpolation": (lambda net, x: F.interpolate(x, scale_factor=2), "interpolate: no step for interpolate"),
    "mean-over-channels": (lambda net, x: x.mean((1, 2)), r"mean: a mean over \(1, 2\)"),
    "mean-of-all": (lambda net, x: x.mean(), "mean: mean in a form that has no step"),
    "view-as-rows": (lambda net, x: x.view(-1, 8, 64).mean(2), "view: a view of 512 values an image as"),
    "view-across-samples": (lambda net, x: x.view(-1, 256), r"view: a view of 512 values an image as \(-1, 256\)"),
    "flatten-the-image": (lambda net, x: x.flatten(2).mean(2), "flatten: flattening dimensions 2 to -1"),
    "flatten-the-samples": (lambda net, x: torch.flatten(x)[None], "flatten: flattening dimensions 0 to -1"),
    "pad-by-reflection": (lambda net, x: F.pad(x, (1, 1, 1, 1), "reflect"), "pad: padding by .* in mode reflect"),
    "pad-with-ones": (lambda net, x: F.pad(x, (1, 1), value=1.0), "pad: padding by"),
    "pad-on-one-side": (lambda net, x: F.pad(x, (1, 0)), "pad: padding by"),
    "crop": (lambda net, x: F.pad(x, (-1, -1)), "pad: padding by"),
    "slice": (lambda net, x: x[:, :4], "getitem: indexing with"),
    "slice-of-the-image": (lambda net, x: x[:, :, 1:], "getitem: indexing with"),
    "index": (lambda net, x: x[:, 0], "getitem: "),
    "average-ceil": (lambda net, x: F.avg_pool2d(x, 3, ceil_mode=True), "avg_pool2d: average pooling with ceil_mode"),
    "average-of-what-is-there": (
        lambda net, x: F.avg_pool2d(x, 3, padding=1, count_include_pad=False),
        "avg_pool2d: average pooling with ceil_mode or count_include_pad=False",
    ),
    "adaptive-that-overlaps": (lambda net, x: F.adaptive_avg_pool2d(x, 3), "adaptive_avg_pool2d: .* of 8x8 to 3x3"),
    "adaptive-maximum": (lambda net, x: F.adaptive_max_pool2d(x, 1), "no step for adaptive_max_pool2d"),
    "indices": (lambda net, x: F.max_pool2d(x, 2, return_indices=True)[0], "no step for max_pool2d_with_indices"),
    "dropout-at-all-times": (lambda net, x: F.dropout(x), "dropout: dropout with training=True"),
    "linear-over-images": (lambda net, x: nn.functional.linear(x, torch.eye(8)), "linear: a linear layer over images"),
    "dtype": (lambda net, x: x.double().float(), "double: no step for double"),
    "images-as-logits": (lambda net, x: x, "the network's output is no row of logits"),
    "two-outputs": (lambda net, x: (x, x), "the network's output is no row of logits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_step_is_refused_by_the_name_of_its_node(name: str) -> None:
    class Refused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(REFUSED[name][0], head=False)

        def forward(self, x: Tensor) -> Any:
            return self.net.body(self.net, self.net.first(x))

    with pytest.raises(lanes.NotLowered, match=REFUSED[name][1]):
        lowered(Refused().eval(), torch.rand(5, 3, 8, 8))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "_0: a convolution with padding reflect"),
        (nn.Conv2d(3, 4, 2, padding="same"), "_0: a convolution with padding same, more of it on one side"),
        (nn.ConvTranspose2d(3, 4, 3), "_0: no step for ConvTranspose2d"),
        (nn.BatchNorm2d(3, track_running_stats=False), "_0: BatchNorm2d in a form that has no step"),
        (nn.InstanceNorm2d(3), "_0: no step for InstanceNorm2d"),
        (nn.Linear(8, 4), "_0: a linear layer over images"),
        (nn.GELU(), "_0: no step for GELU"),
        (nn.MaxPool2d(2, return_indices=True), "_0: maximum pooling with return_indices"),
        (nn.Flatten(2), "_0: flattening dimensions 2 to -1"),
        (nn.MultiheadAttention(8, 2), "_0: no step for MultiheadAttention"),
    ],
    ids=lambda p: type(p).__name__ if isinstance(p, nn.Module) else "",
)
def test_layers_without_a_step_are_refused_by_name(layer: nn.Module, message: str) -> None:
    with pytest.raises(lanes.NotLowered, match=message):
        lowered(nn.Sequential(layer).eval(), torch.rand(5, 3, 8, 8))


def test_two_inputs_are_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with pytest.raises(lanes.NotLowered, match="y: a second input"):
        lowered(Two(), torch.rand(5, 3, 8, 8))


def test_steps_have_names_of_their_own() -> None:
    model, x = net(lambda net, x: torch.cat([x, x, net.second(x), x], 1))
    names = [step.name for step in lowered(model, x).steps]
    assert len(set(names)) == len(names)
    assert {"first", "second", "cat", "cat.1", "head"} <= set(names)


# Simplification


def size(program: Program) -> int:
    return sum(step.out.size for step in program.steps)


def unbatched(model: nn.Module, x: Tensor) -> tuple[Program, int]:
    """The simplified program, whose logits are those of the module, and how many values went."""
    program = lowered(model, x)
    before = size(program)
    gone = lanes.simplify(program)
    assert gone == before - size(program)
    wanted = model(x)
    found = ck.sample_network(program, torch.float32).logits(x)
    rtol, atol = TOLERANCE[torch.float32]
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol * max(1.0, float(wanted.abs().max())))
    assert lanes.simplify(program) == 0
    return program, gone


@pytest.mark.parametrize(("name", "seed"), [*(("digits", seed) for seed in range(6)), ("resnet20", 0), ("resnet20", 1)])
def test_random_masks(name: str, seed: int) -> None:
    """Filters, channels and weights that are gone; batch norms leave every sign behind empty filters."""
    torch.manual_seed(seed)
    model = with_statistics(csam.models.build(name, mean=None))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            weight = layer.weight
            weight.mul_(torch.rand(weight.shape) < 0.8 * torch.rand(()))
            weight.mul_((torch.rand(len(weight)) < 0.7).view(-1, 1, 1, 1))
            if layer.in_channels > 3:
                weight.mul_((torch.rand(layer.in_channels) < 0.7).view(-1, 1, 1))
    _, gone = unbatched(model, torch.rand(7, 1 if name == "digits" else 3, 8, 8))
    assert gone > 0


def pruned(body: Callable[[Net, Tensor], Tensor], sign: str, **options: Any) -> tuple[nn.Module, Tensor]:
    """Empty filters 0, 2, 5 in the first three convolutions, with biases of a sign; channel 1 is read by nobody."""
    model, x = net(body, **options)
    signs = {"negative": -1.0, "zero": 0.0, "positive": 1.0, "mixed": (-1.0) ** torch.arange(8)}
    for layer in (model.first, model.second, model.special):
        layer.weight[[0, 2, 5]] = 0
        layer.bias.copy_(signs[sign] * (0.2 + torch.rand(8)))
    for layer in (model.second, model.third, model.special, model.narrow):
        layer.weight[:, 1] = 0
    return model, x


SIMPLIFIED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "chain": lambda net, x: net.third(F.relu(net.second(F.relu(x)))),
    "padded-border": lambda net, x: net.third(net.special(F.relu6(x))),
    "residual": lambda net, x: net.third(F.relu(net.second(F.relu(x)) + x)),
    "residual-of-two": lambda net, x: net.third(F.relu(net.second(x) + net.special(x))),
    "residual-with-itself": lambda net, x: net.third(x + x),
    "two-residuals": lambda net, x: net.third((lambda y: net.second(y) + y)(F.relu(net.special(x) + x))),
    "maximum": lambda net, x: net.third(F.max_pool2d(F.relu(net.second(x)), 3, 2, 1)),
    "average": lambda net, x: net.third(F.avg_pool2d(net.second(x), 3, 2, 1)),
    "batch-norm": lambda net, x: net.third(F.relu(net.norm(net.second(F.relu(net.norm2(x)))))),
    "bounded-below-1": lambda net, x: net.second(F.hardtanh(x, -0.1, 0.3)),
    "bounded-above-1": lambda net, x: net.second(F.hardtanh(x, 1.5, 2.0)),
    "read-by-two": lambda net, x: net.second(x) + net.special(x),
    "concatenation": lambda net, x: torch.cat([net.second(x), net.third(x)], 1),
    "flattened": lambda net, x: F.relu(net.second(x)).flatten(1),
}


@pytest.mark.parametrize("sign", ["negative", "zero", "positive", "mixed"])
@pytest.mark.parametrize("name", SIMPLIFIED)
def test_dead_and_constant_channels(name: str, sign: str) -> None:
    program, gone = unbatched(*pruned(SIMPLIFIED[name], sign))
    if name in ("chain", "padded-border", "maximum", "batch-norm"):
        assert gone > 0
    if (
        name == "chain"
    ):  # filters 1, 3, 4, 6, 7, less the unread one, and a channel of value 1 where a constant is not 0
        constant = sign in ("positive", "mixed")
        assert [step.out.channels for step in program.steps[:2]] == [4 + constant, 4 + constant]


def test_what_only_dead_channels_fed_dies_in_turn() -> None:
    model, x = net(lambda net, x: net.narrow(F.relu(net.third(F.relu(net.second(F.relu(x)))))))
    model.narrow.weight[:, 3:] = 0
    model.third.weight[:3, 2:] = 0
    model.second.weight[:2, :-1] = 0
    program, _ = unbatched(model, x)
    assert [step.out.channels for step in program.steps[:4]] == [1, 2, 3, 4]


@pytest.mark.parametrize("bias", [-1.0, 0.0, 1.0])
def test_all_channels_dead(bias: float) -> None:
    model, x = net(lambda net, x: net.third(F.relu(net.second(x))))
    model.second.weight.zero_()
    model.second.bias.fill_(bias)
    unbatched(model, x)
    model.third.weight.zero_()
    unbatched(model, x)


def test_logits_and_images_keep_their_channels() -> None:
    model, x = net(lambda net, x: x)
    model.first.weight[:, 1] = 0
    model.head.weight[2], model.head.bias[2] = 0, 0
    program, _ = unbatched(model, x)
    assert (program.image.channels, program.logits.channels) == (3, 5)


def test_a_value_that_is_flattened_into_logits_keeps_its_channels() -> None:
    class Both(nn.Module):
        """Logits that are all values of a convolution, of which another one, which nobody reads, reads some."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 6, 4, stride=4), nn.Conv2d(6, 6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            self.second(y)
            return y.flatten(1)

    model = Both().eval().requires_grad_(False)
    model.second.weight[:, :4] = 0
    unbatched(model, torch.rand(5, 3, 8, 8))


# Networks of the literature


@pytest.mark.parametrize("threads", [1], indirect=True)  # several would wait for each other more than they work
class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def test_roundings_to_bfloat16_add_up_to_almost_nothing() -> None:
    weight = 0.1 * torch.randn(40, 30, 3, 3)
    weight[torch.rand(weight.shape) < torch.linspace(0, 0.99, 40).view(-1, 1, 1, 1)] = 0
    weight[7], weight[8, 1:], weight[9, 0, 0, 0] = 0, 0, 1e-42  # no weight, nine, one that is no normal number
    values, taps, rows = ck.compress(weight)
    step = Step(Value(30, 8, 8), Value(40, 8, 8), weight=(values, taps, rows), kernel=(3, 3), padding=(1, 1), name="a")
    left = replace(step, engine="winograd")
    lanes.balance(Program(step.input, step.out, [step, left]))
    assert left.weight is not None
    assert left.weight[0] is values
    assert step.weight is not None
    found, near = step.weight[0], values.bfloat16().float()
    assert torch.equal(found, found.bfloat16().float())
    assert torch.equal(
        found.view(torch.int32) - near.view(torch.int32) == 0, (found - values).abs() <= (near - values).abs()
    )
    assert bool(((found.view(torch.int32) - near.view(torch.int32)).abs() <= 1 << 16).all())  # the other neighbour

    def sums(rounded: Tensor) -> Tensor:
        row = torch.arange(40).repeat_interleave(rows.diff())
        return torch.zeros(40, dtype=torch.float64).index_add_(0, row, rounded.double() - values.double()).abs()

    assert bool((sums(found) <= sums(near)).all())
    assert float(sums(found).mean()) < 0.2 * float(sums(near).mean())
    assert float((found - values).norm()) < 1.03 * float((near - values).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=["f32", "bf16", "int8"])
@pytest.mark.parametrize("engine", ["sparse", "dense"])
def test_convolutions_of_one_value_are_joined(dtype: torch.dtype, engine: str) -> None:
    """The same bits as each for itself, from fewer steps."""
    x = torch.rand(70, 3, 9, 7)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), networks.Inception(8, 5, 6, 7, 3, 4, 2)).eval()
    model = with_statistics(nn.Sequential(*model, networks.Inception(18, 3, 6, 7, 3, 4, 2), Mean(), nn.Linear(16, 5)))
    alone, joined = (lowered(model, x) for _ in range(2))
    if dtype is torch.int8:
        alone, joined = quantize(alone, x), quantize(joined, x)
    lanes.join(joined)
    for program in (alone, joined):
        for step in program.steps:
            step.engine = engine
    assert len(joined.steps) == len(alone.steps) - 4  # two of the three that read an Inception's input, twice
    assert sum("+" in step.name for step in joined.steps) == 2
    images = x if dtype is torch.int8 else x.to(dtype)
    wanted, found = (ck.sample_network(program, dtype).logits(images) for program in (alone, joined))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("threads", [1], indirect=True)
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_networks_of_the_literature_are_planned_wholly(name: str, threads: int) -> None:
    """A last layer is fitted to tell four images apart, so that votes have margins, as a trained network's."""
    size = {"vgg16_bn": 32, "resnet50": 64}.get(name, 8)
    model = networks.build(name, size)
    images = F.interpolate(torch.rand(4, 3, 4, 4), size=size)
    noisy = torch.cat([ck.smoothing_noise(image, 8, 0.1, seed=i) for i, image in enumerate(images)])
    classes = torch.arange(4).repeat_interleave(8)
    head = model.head if isinstance(model.head, nn.Linear) else model.head[-1]
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with torch.no_grad():
        model(noisy)
        hook.remove()
        middle, target = seen[0].mean(0), F.one_hot(classes, 10).double()
        fitted = torch.linalg.pinv(seen[0] - middle, rtol=0.05) @ (target - target.mean(0))
        head.weight.copy_(fitted.T)
        head.bias.copy_(target.mean(0) - middle @ fitted)
        wanted = model(noisy)
    assert torch.equal(wanted.argmax(1), classes)
    for dtype, kind in ((torch.float32, "sparse"), (torch.bfloat16, "dense")):
        plan = sampling.plan(model, images[0], dtype=dtype, choices=kind)
        assert plan.prepared.sampler is not None, plan.prepared.steps
        with torch.inference_mode():
            by_torch = plan.prepared.module(inference.laid_out(noisy.to(dtype), plan.prepared.memory_format)).float()
        rounding = 1e-4 if dtype is torch.float32 else 1.5 * float((by_torch - wanted).abs().max())
        assert float((plan.prepared.sampler.logits(noisy) - wanted).abs().max()) <= rounding
        votes = torch.stack([plan.votes(image, 0.1, 8, seed=i) for i, image in enumerate(images)])
        assert torch.equal(votes, F.one_hot(torch.arange(4), 10) * 8)
