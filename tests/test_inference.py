"""What a network is rewritten to before it labels samples: same logits, fewer passes over memory."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import csam
import csam_kernels
from conftest import TOLERANCE, assert_close
from csam import inference


class Net(nn.Module):
    """A stem of three filters a group, `body` of its output and the input's copy, then a classifier."""

    def __init__(self, body: Callable[[Net, Tensor], Tensor], **conv: object) -> None:
        super().__init__()
        options = {"padding": 1} | conv
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, **options)  # type: ignore[arg-type]
        self.third = nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.relu, self.relu6, self.dropout, self.same = nn.ReLU(inplace=True), nn.ReLU6(), nn.Dropout(), nn.Identity()
        self.head = nn.Linear(8, 5)
        self.body = body
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, F.relu(self.first(x))).mean((2, 3)))


def in_place_on_the_other(net: Net, x: Tensor) -> Tensor:
    y = net.second(x)
    x += y
    return net.relu6(x) + x


def add_method(net: Net, x: Tensor) -> Tensor:
    return net.second(x).add_(x).relu_()


BODIES: dict[str, tuple[Callable[[Net, Tensor], Tensor], list[str], dict[str, object]]] = {
    # body, (activation, takes a sum) of the three layers in the order they run, options of the second
    "relu-module": (lambda net, x: net.relu(net.second(x)), ["relu", "relu"], {}),
    "residual": (lambda net, x: F.relu(net.norm(net.second(x)) + net.same(x)), ["relu", "+relu"], {}),
    "residual-left": (lambda net, x: torch.relu(x + net.dropout(net.second(x))), ["relu", "+relu"], {}),
    "sum-without-relu": (lambda net, x: net.second(x) + x, ["relu", "+none"], {}),
    "two-convolutions": (lambda net, x: F.relu(net.second(x) + net.third(x)), ["relu", "none", "+relu"], {}),
    "methods": (add_method, ["relu", "+relu"], {}),
    "relu6-is-left-alone": (lambda net, x: net.relu6(net.second(x)), ["relu", "none"], {}),
    "read-twice": (lambda net, x: (lambda y: F.relu(y) + y)(net.second(x)), ["relu", "none"], {}),
    "called-twice": (lambda net, x: net.second(F.relu(net.second(x))), ["relu", "relu", "none"], {}),
    "sum-with-itself": (lambda net, x: (lambda y: y + y)(net.second(x)), ["relu", "none"], {}),
    "sum-with-number": (lambda net, x: net.second(x) + 1, ["relu", "none"], {}),
    "sum-that-broadcasts": (lambda net, x: net.second(x) + x.mean((2, 3), keepdim=True), ["relu", "none"], {}),
    "sum-in-place-on-the-other": (in_place_on_the_other, ["relu", "+none"], {}),
    "depthwise": (lambda net, x: F.relu(net.second(x)), ["relu", "relu"], {"groups": 8}),
    "grouped-strided-dilated": (
        lambda net, x: F.relu(net.second(x)),
        ["relu", "relu"],
        {"groups": 2, "stride": 2, "dilation": 2, "bias": False},
    ),
    "reflect-padding-is-left-alone": (lambda net, x: F.relu(net.second(x)), ["relu"], {"padding_mode": "reflect"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", BODIES)
def test_fuses_what_follows_a_convolution_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    if not inference.onednn(dtype):
        pytest.skip(f"oneDNN serves no fused {dtype} convolutions on this processor")
    body, expected, options = BODIES[name]
    network, x = Net(body, **options).eval().requires_grad_(False), torch.rand(6, 4, 9, 9)
    wanted = network(x)
    new, layout, steps, *_ = inference.ready(network, x[:2], wanted[:2], dtype, tile=6)
    nodes = [node for node in new.graph.nodes if node.op == "call_module"]
    fused = [node for node in nodes if isinstance(new.get_submodule(node.target), inference.FusedConv2d)]
    found = ["+" * (len(n.args) == 2) + new.get_submodule(n.target).activation for n in fused]
    assert found == expected, (steps, new.graph)

    packed = new(inference.laid_out(x.to(dtype), layout))
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(packed.float(), wanted, rtol=rtol, atol=4 * atol)
    unpacked = copy.deepcopy(new)
    assert torch.equal(unpacked(inference.laid_out(x.to(dtype), layout)), packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_network_that_needs_contiguous_images_is_not_fused(dtype: torch.dtype) -> None:
    """oneDNN's fused convolution returns channels_last whatever comes in."""
    network = Net(lambda net, x: F.relu(net.second(x) + x).view(x.shape[0], 648).view(x.shape)).eval()
    x = torch.rand(6, 4, 9, 9)
    wanted = network.requires_grad_(False)(x)
    new, layout, steps, *_ = inference.ready(network, x[:2], wanted[:2], dtype, tile=6)
    assert layout is torch.contiguous_format
    assert steps == ["1 of 1 batch-norm layers folded", "kept contiguous: the model does not take channels_last"]
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(new(x.to(dtype)).float(), wanted, rtol=rtol, atol=4 * atol)


def test_a_chain_of_batch_norms_is_folded_into_one_convolution() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
    )
    for norm in network[1:3]:
        nn.init.normal_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)
    x = torch.rand(2, 3, 8, 8)
    wanted = network.eval().requires_grad_(False)(x)
    new, _, steps, *_ = inference.ready(network, x, wanted, torch.float32, tile=2)
    assert steps[0] == "2 of 2 batch-norm layers folded"
    assert_close(new(inference.laid_out(x, torch.channels_last)), wanted)


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_every_convolution_of_a_resnet_is_fused(name: str) -> None:
    model = csam.models.build(name).eval()
    smooth = csam.Smooth(csam.convert(model), num_classes=10, sigma=0.25, dtype=torch.float32, tile=2)
    smooth.counts(torch.rand(3, 8, 8), 2)
    assert smooth.prepared is not None
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert f"{convolutions} of {convolutions} convolutions fused" in smooth.prepared.steps
    relus = [m.activation for m in smooth.prepared.module.modules() if isinstance(m, inference.FusedConv2d)]
    assert relus.count("relu") == 1 + 2 * sum(isinstance(m, csam.models.BasicBlock) for m in model.modules())


def test_a_prepared_network_can_be_copied() -> None:
    smooth = csam.Smooth(csam.models.build("digits").eval(), num_classes=10, sigma=0.25, dtype=torch.float32, tile=4)
    x = torch.rand(1, 8, 8)
    counts = smooth.counts(x, 16)
    assert torch.equal(copy.deepcopy(smooth).counts(x, 16), counts)


def test_a_network_that_cannot_be_traced_runs_as_it_is() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.head((x if x.sum() > 0 else -x).mean((2, 3)))

    network, x = Branching().eval(), torch.rand(2, 3, 8, 8)
    new, _, steps, *_ = inference.ready(network, x, network(x).detach(), torch.float32, tile=2)
    assert new is network
    assert len(steps) == 1
    assert steps[0].startswith("convolutions not fused: TraceError")


@pytest.mark.parametrize("bias", ["none", "zero", "negative", "positive", "mixed"])
@pytest.mark.parametrize("kept", [0, 5, 16, 20, 40])
def test_dead_channels_leave_with_what_only_they_fed(kept: int, bias: str) -> None:
    """Between two convolutions; a positive bias of an empty filter still counts, less so at the padded border."""
    inner, outer = nn.Conv2d(4, 40, 3, padding=1, bias=bias != "none"), nn.Conv2d(40, 6, 3, padding=1)
    network = nn.Sequential(inner, nn.ReLU(), outer, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 49, 3))
    with torch.no_grad():
        inner.weight[kept:] = 0
        outer.weight[:, 1:4] = 0  # read by nobody
        if inner.bias is not None:
            sign = {"zero": 0, "negative": -1, "positive": 1, "mixed": (-1) ** torch.arange(40)}[bias]
            inner.bias.copy_(sign * (0.5 + torch.rand(40)))
    network = network.eval().requires_grad_(False)
    x = torch.rand(6, 4, 7, 7)
    wanted = network(x)
    new, layout, steps, *_ = inference.ready(network, x[:2], wanted[:2], torch.float32, tile=6)
    first, second = (m for m in new.modules() if isinstance(m, inference.FusedConv2d))
    live = kept - min(max(kept - 1, 0), 3) + (kept < 40 and bias in ("positive", "mixed"))
    assert first.weight.shape[0] == second.weight.shape[1] == min(40, max(1, -(-live // 16)) * 16)
    assert any("dead channels removed" in step for step in steps)
    assert_close(new(inference.laid_out(x, layout)), wanted)


# Hooks, and what a comparison of logits sees


def pixels_in_a_pre_hook(model: nn.Module) -> Any:
    return model.register_forward_pre_hook(lambda module, args: ((args[0] - 0.5) * 4,))


def activations_in_a_hook(model: nn.Module) -> Any:
    return model[1].register_forward_hook(lambda module, args, out: out.clamp(max=0.1))


def another_forward(model: nn.Module) -> None:
    forward = type(model).forward
    model.forward = types.MethodType(lambda self, x: forward(self, 1 - x), model)


HOOKS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "root": (pixels_in_a_pre_hook, "it has a forward pre-hook"),
    "leaf": (activations_in_a_hook, "layer '1' has a forward hook"),
    "forward": (another_forward, "it has a forward of its own"),
    "global": (
        lambda model: nn.modules.module.register_module_forward_hook(
            lambda module, args, out: out.clamp(max=0.1) if isinstance(module, nn.ReLU) else None
        ),
        "torch has a hook for all modules",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", HOOKS)
def test_a_network_with_hooks_runs_as_torch_runs_it(name: str, dtype: torch.dtype) -> None:
    """One class is kept from winning by a constant, which must not hide that the others moved."""
    hook, words = HOOKS[name]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5)).eval()
    with torch.no_grad():
        model[-1].bias[4] = -1e4
    x, handle = torch.rand(3, 8, 8), hook(model)
    try:
        smooth = csam.Smooth(model, 5, 0.5, dtype=dtype)
        found = smooth.counts(x, 400)
        noisy = csam_kernels.smoothing_noise(x, 400, 0.5, seed=0).to(dtype)
        with torch.no_grad():
            wanted = copy_of(model).to(dtype)(noisy).argmax(1).bincount(minlength=5)
    finally:
        if handle is not None:
            handle.remove()
    assert smooth.prepared is not None
    assert smooth.prepared.sampler is None
    (step,) = smooth.prepared.steps
    assert step.startswith(f"the model's own modules, since {words}, which a rewrite would lose")
    assert int((found - wanted).abs().sum()) <= (0 if dtype == torch.float32 else 8)  # batches round otherwise


def copy_of(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model(torch.rand(1, 3, 8, 8))  # after which what hooks compute can be copied
    return copy.deepcopy(model)


def test_a_plan_says_whose_hook_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    pixels_in_a_pre_hook(model)
    x = torch.rand(3, 8, 8)
    plan = csam.sampling.plan(model, x)
    assert (plan.choices, plan.layers) == ("module", ())
    assert "since it has a forward pre-hook" in plan.explain()
    with pytest.raises(ValueError, match=r"int8 needs .* since it has a forward pre-hook, which a rewrite would lose"):
        csam.sampling.plan(model, x, dtype="int8", sigma=0.5)


LOGITS = torch.tensor([[0.3, -2.0, 1.1, 0.4, -0.7], [-0.2, 1.7, 0.9, -1.4, 0.1]])


@pytest.mark.parametrize("large", [[], [-1e4], [-1e9], [1e4], [-float("inf")], [-1e4] * 40, [-1e9] * 40, [1e4, -1e4]])
def test_no_logit_hides_how_the_others_move(large: list[float]) -> None:
    wanted = torch.cat([LOGITS, torch.tensor(large).expand(2, -1) + torch.rand(2, len(large))], 1)
    assert inference.moved_by(wanted.clone(), wanted) == 0
    rounded = wanted * (1 + 1e-6 * torch.rand_like(wanted))
    assert inference.moved_by(rounded, wanted) == 0
    for k in range(5):
        moved = wanted.clone()
        moved[1, k] += 0.05
        assert inference.moved_by(moved, wanted) == pytest.approx(0.05, rel=1e-4)


def test_infinite_logits_are_equal_or_not() -> None:
    wanted, inf = torch.cat([LOGITS, torch.full((2, 1), -torch.inf)], 1), float("inf")
    for value, moved in ((-inf, 0), (inf, inf), (-1e30, inf)):
        found = wanted.clone()
        found[0, 5] = value
        assert inference.moved_by(found, wanted) == moved
    found[0, 5] = torch.nan
    assert torch.tensor([inference.moved_by(*pair) for pair in ((found, wanted), (wanted, found))]).isnan().all()
    assert inference.moved_by(found[:, :0], found[:, :0]) == inference.moved_by(LOGITS * 0, LOGITS * 0) == 0
