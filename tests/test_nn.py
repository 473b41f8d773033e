"""Masked layers: drop-in for nn.Conv2d and nn.Linear, whatever one does to a module."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import csam
from conftest import assert_close
from csam.nn import (
    GRANULARITIES,
    MaskedConv2d,
    MaskedLinear,
    convert,
    expand_mask,
    fold,
    mask_shape,
    masked_layers,
)

CONVS: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
    "same": {"kernel_size": 3, "padding": "same"},
    "same-even": {"kernel_size": (2, 4), "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular-same": {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
}


class Small(nn.Module):
    """A bit of everything that convert has to keep apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.blocks = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2), nn.ReLU(), nn.ModuleDict({"up": self.twice}))
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.blocks[0](self.twice(x))
        x = self.up(self.blocks[2]["up"](x))
        return self.head(x.mean((2, 3)))


def images(n: int = 2, channels: int = 3, size: int = 9) -> Tensor:
    return torch.randn(n, channels, size, size)


def random_mask(layer: nn.Module) -> Tensor:
    mask = torch.rand(layer.mask.shape) < 0.6
    mask.view(-1)[0], mask.view(-1)[-1] = True, False
    return mask


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("amp", [False, True], ids=["f32", "autocast"])
def test_conv_with_a_full_mask_is_conv2d_to_the_last_bit(
    options: dict[str, Any], layout: torch.memory_format, amp: bool
) -> None:
    plain = nn.Conv2d(4, 8, **options).to(memory_format=layout)
    masked = convert(plain)
    x = images(channels=4).to(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        expected, actual = plain(x), masked(x)
    assert type(masked) is MaskedConv2d
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)], ids=str)
@pytest.mark.parametrize("amp", [False, True], ids=["f32", "autocast"])
def test_linear_with_a_full_mask_is_linear_to_the_last_bit(shape: tuple[int, ...], amp: bool) -> None:
    plain = nn.Linear(8, 5)
    x = torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        expected, actual = plain(x), convert(plain)(x)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("options", [CONVS["strided"], CONVS["grouped"], CONVS["reflect"]], ids=str)
def test_masked_conv_is_conv_of_the_product(granularity: str, options: dict[str, Any]) -> None:
    layer = MaskedConv2d(4, 8, **options, granularity=granularity, block_size=5)
    layer.set_mask(random_mask(layer))
    plain = nn.Conv2d(4, 8, **options)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k in plain.state_dict()})
    plain.weight.data *= expand_mask(layer.mask, layer.weight.shape, layer.block_size or 0)
    x = images(channels=4)
    assert_close(layer(x), plain(x))
    assert_close(layer.masked_weight(), plain.weight.data)
    assert_close(layer(x[0]), plain(x[0]))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_soft_mask_is_differentiable_inside_its_range(granularity: str) -> None:
    layer = MaskedLinear(6, 4, granularity=granularity).double()
    layer.soft = True
    with torch.no_grad():
        layer.mask_score.copy_(torch.rand_like(layer.mask_score) * 2 - 0.5)
    layer.mask_score.requires_grad_()
    x = torch.randn(3, 6, dtype=torch.float64)
    layer(x).square().sum().backward()
    score = layer.mask_score.detach().clone().requires_grad_()
    weight = layer.weight.detach().clone().requires_grad_()
    soft = expand_mask(score.clamp(0, 1), weight.shape, layer.block_size or 0)
    F.linear(x, weight * soft, layer.bias.detach()).square().sum().backward()
    assert_close(layer.mask_score.grad, score.grad)
    assert_close(layer.weight.grad, weight.grad)


def test_the_override_replaces_weight_and_mask() -> None:
    layer = MaskedConv2d(3, 4, 3)
    layer.set_mask(torch.zeros(4, 3, 3, 3))
    layer.effective_weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    x = images()
    out = layer(x)
    assert torch.equal(out, F.conv2d(x, layer.effective_weight, layer.bias))
    out.sum().backward()
    assert layer.effective_weight.grad is not None
    assert layer.weight.grad is None


@pytest.mark.parametrize(
    ("granularity", "conv", "linear"),
    [
        ("weight", (8, 2, 3, 3), (5, 7)),
        ("filter", (8, 1, 1, 1), (5, 1)),
        ("channel", (1, 2, 1, 1), (1, 7)),
        ("block", (8, 5), (5, 2)),
    ],
)
def test_mask_shapes(granularity: str, conv: tuple[int, ...], linear: tuple[int, ...]) -> None:
    assert MaskedConv2d(4, 8, 3, groups=2, granularity=granularity).mask.shape == conv
    assert MaskedLinear(7, 5, granularity=granularity).mask_score.shape == linear
    assert mask_shape((8, 2, 3, 3), granularity) == conv


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_sparsity_counts_weights_exactly(granularity: str) -> None:
    layer = MaskedConv2d(3, 5, 3, granularity=granularity)
    assert layer.sparsity == 0
    layer.set_mask(random_mask(layer))
    full = expand_mask(layer.mask, layer.weight.shape, layer.block_size or 0)
    assert layer.kept() == int(full.sum())
    assert layer.sparsity == 1 - int(full.sum()) / full.numel()
    assert f"granularity={granularity}" in repr(layer)
    assert f"sparsity={layer.sparsity:.4f}" in repr(layer)


def test_set_mask_broadcasts_and_accepts_numbers() -> None:
    layer = MaskedConv2d(3, 4, 3)
    layer.set_mask(torch.tensor([1.0, 0.0, 1.0, 1.0]).view(4, 1, 1, 1))
    assert layer.mask.dtype == torch.bool
    assert layer.sparsity == 0.25
    layer.set_mask(torch.ones((), dtype=torch.int64))
    assert layer.sparsity == 0


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([1, 0], TypeError, "mask must be a torch.Tensor, got list"),
        (torch.ones(4, 1, 1, 1).to_sparse(), TypeError, "mask must be a dense tensor, got layout torch.sparse_coo"),
        (torch.ones(4), ValueError, r"mask must broadcast to \(4, 1, 1, 1\) \(granularity 'filter'\), got shape"),
        (torch.ones(1, 4, 1, 1, 1), ValueError, "must broadcast"),
        (torch.full((4, 1, 1, 1), 0.5), ValueError, "hold only 0 and 1"),
        (torch.full((4, 1, 1, 1), torch.nan), ValueError, "hold only 0 and 1"),
        (torch.ones(4, 1, 1, 1, device="meta"), ValueError, "on the layer's device cpu, got meta"),
    ],
    ids=["list", "sparse", "shape", "rank", "half", "nan", "device"],
)
def test_set_mask_refuses(mask: Any, error: type[Exception], message: str) -> None:
    layer = MaskedConv2d(3, 4, 3, granularity="filter")
    with pytest.raises(error, match=message):
        layer.set_mask(mask)
    assert layer.sparsity == 0


def test_a_block_wider_than_a_filter_is_the_filter() -> None:
    layer = convert(nn.Linear(8, 6), "block", 2**40)
    csam.masks.global_magnitude(layer, 0.5)
    assert (layer.kept(), layer.mask.shape) == (24, (6, 1))  # type: ignore[operator, union-attr]
    assert (csam.fold(layer).weight != 0).any(1).tolist() == layer.mask.flatten().tolist()  # type: ignore[union-attr, operator]


def test_bad_granularity_and_block_size() -> None:
    with pytest.raises(ValueError, match="granularity must be one of weight, filter, channel, block, got 'row'"):
        MaskedLinear(3, 3, granularity="row")
    with pytest.raises(ValueError, match="block_size must be >= 1, got 0"):
        convert(nn.Linear(3, 3), "block", 0)
    for size in (True, 2.0, None):
        with pytest.raises(TypeError, match="block_size must be an integer, got"):
            convert(nn.Linear(3, 3), "block", size)  # type: ignore[arg-type]
    of_numpy = convert(nn.Linear(8, 3), "block", np.int64(4))  # type: ignore[arg-type]
    assert type(of_numpy.block_size) is int
    assert of_numpy.mask.shape == (3, 2)  # type: ignore[union-attr]


def test_signature_is_that_of_the_plain_layer() -> None:
    conv = MaskedConv2d(4, 8, (3, 1), (2, 1), (1, 0), 1, 2, False, "zeros", "meta", torch.bfloat16)
    assert conv.weight.is_meta
    assert conv.weight.dtype == torch.bfloat16
    assert conv.bias is None
    assert "granularity=weight" in repr(conv)
    assert MaskedLinear(3, 4, False, "cpu", torch.float64).mask_score.dtype == torch.float64


def test_mask_score_is_a_frozen_float32_parameter() -> None:
    layer = MaskedLinear(3, 4)
    assert dict(layer.named_parameters()).keys() == {"weight", "bias", "mask_score"}
    assert layer.mask_score.dtype == torch.float32
    assert not layer.mask_score.requires_grad
    assert torch.equal(layer.mask_score, torch.ones(4, 3))
    assert dict(layer.named_buffers()).keys() == {"mask"}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_converted_model_gives_the_original_outputs(granularity: str) -> None:
    model = Small().eval()
    twin = convert(model, granularity)
    x = images()
    assert torch.equal(twin(x), model(x))
    assert list(masked_layers(twin)) == ["stem", "twice", "blocks.0", "head"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_converted_linear_layer_gives_the_original_bits_whatever_the_strides(dtype: torch.dtype) -> None:
    plain = nn.Linear(24, 39).to(dtype)
    twin = convert(nn.Sequential(plain))
    wide = torch.randn(9, 5, 12, 48).to(dtype)
    for x in (
        wide[..., ::2],
        wide[..., :24],
        wide[0, ..., ::2].transpose(0, 1),
        wide[0, 0, ..., ::2],
        wide[0, 0, 0, ::2],
        wide.reshape(48, -1)[:24].t(),
        wide.permute(3, 0, 1, 2)[:24].permute(1, 2, 3, 0),
    ):
        assert torch.equal(twin(x), plain(x))
        assert twin(x).stride() == plain(x).stride()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_converted_model_runs_on_the_meta_device(granularity: str) -> None:
    twin, x = convert(Small(), granularity), images()
    out = twin.to("meta")(x.to("meta"))
    assert out.is_meta
    assert out.shape == Small()(x).shape
    out.sum().backward()
    assert twin.stem.weight.grad.shape == twin.stem.weight.shape


def test_convert_copies_and_keeps_everything_else() -> None:
    model = Small()
    model.norm.eval()
    model.head.weight.requires_grad_(False)
    calls: list[int] = []
    model.stem.register_forward_hook(lambda *_: calls.append(1))
    twin = convert(model)
    assert twin.training
    assert not twin.norm.training
    assert not twin.head.weight.requires_grad
    assert twin.twice is twin.blocks[2]["up"]
    assert type(twin.up) is nn.ConvTranspose2d
    assert type(model.stem) is nn.Conv2d
    with torch.no_grad():
        twin.stem.weight.zero_()
    assert model.stem.weight.abs().sum() > 0
    twin(images())
    assert calls == [1]
    again = convert(twin)
    assert list(masked_layers(again)) == list(masked_layers(twin))


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (("stem", "head"), ["twice", "blocks.0"]),
        ("blocks", ["stem", "head"]),
        (["blocks.2.up"], ["stem", "blocks.0", "head"]),
        (lambda name, module: isinstance(module, nn.Linear), ["stem", "twice", "blocks.0"]),
    ],
    ids=["names", "subtree", "second-name-of-a-shared-module", "predicate"],
)
def test_convert_excludes(exclude: Any, left: list[str]) -> None:
    assert list(masked_layers(convert(Small(), exclude=exclude))) == left


def test_convert_refuses() -> None:
    with pytest.raises(ValueError, match="exclude must hold names of the model's modules, got 'steam'"):
        convert(Small(), exclude=("steam",))
    with pytest.raises(TypeError, match=r"exclude must be names of modules or a callable .*, got None"):
        convert(Small(), exclude=None)  # type: ignore[arg-type]
    lazy = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyConv2d(4, 3))
    with pytest.raises(ValueError, match="model must have run once before it is converted, got the lazy layer '1'"):
        convert(lazy)
    assert list(masked_layers(convert(lazy, exclude="1"))) == ["0"]
    lazy(images())
    assert list(masked_layers(convert(lazy))) == ["0", "1"]
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got Tensor"):
        convert(torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        fold("model")  # type: ignore[arg-type]


def test_convert_leaves_subclasses_and_transformers_alone() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = nn.ModuleList([Scaled(3, 4, 3), parametrized, encoder, nn.Conv1d(3, 4, 3)])
    assert not masked_layers(convert(model))


def test_convert_leaves_layers_alone_whose_weight_or_forward_is_not_their_own() -> None:
    hooked, patched = nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4)
    patched.forward = lambda x: 2 * F.linear(x, patched.weight)  # type: ignore[method-assign]
    model = nn.Sequential(hooked, patched, nn.Linear(4, 4)).eval()
    twin = convert(model)
    assert list(masked_layers(twin)) == ["2"]
    x = torch.randn(3, 4)
    assert torch.equal(twin(x), model(x))


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize(
    "hooked", [pruned, nn.utils.weight_norm, nn.utils.spectral_norm], ids=["prune", "weight_norm", "spectral_norm"]
)
def test_weights_that_torchs_hooks_compute_are_copied(hooked: Callable[[nn.Module], nn.Module]) -> None:
    """torch.nn.utils leave a weight that has a gradient's history, which copy.deepcopy refuses."""
    model, x = (
        nn.Sequential(hooked(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(4 * 36, 5)).eval(),
        torch.randn(2, 3, 8, 8),
    )
    wanted = model(x)
    for twin in (convert(model), fold(model), convert(convert(model)), fold(convert(model))):
        assert torch.equal(twin(x), wanted)
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
        next(p for n, p in twin.named_parameters() if "weight_" in n).data.zero_()
        assert not torch.equal(twin(x), wanted)
        assert torch.equal(model(x), wanted)
    assert list(masked_layers(convert(model))) == ["2"]
    votes = csam.Smooth(model, 5, 0.5).counts(x[0], 200)
    assert torch.equal(votes, csam.Smooth(plain(model), 5, 0.5).counts(x[0], 200))
    assert csam.CCCert(model, csam.transforms.Brightness(0.2), n=10, k=2).certify(x[0].clamp(0, 1)).n == 10
    plan = csam.sampling.plan(model, x[0], dtype=torch.float32, choices="sparse")
    assert len(plan.layers) == 2
    assert torch.equal(plan.votes(x[0], 0.5, 200), votes)
    assert torch.equal(model(x), wanted)  # whose hooks are still there


def plain(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model(torch.randn(2, 3, 8, 8))
    twin = copy.deepcopy(model)
    if prune.is_pruned(twin):
        prune.remove(twin[0], "weight")
    elif hasattr(twin[0], "weight_g"):
        nn.utils.remove_weight_norm(twin[0])
    else:
        nn.utils.remove_spectral_norm(twin[0])
    return twin


@pytest.mark.parametrize(
    ("compute", "remove"),
    [(pruned, prune.remove), (parametrizations.weight_norm, parametrize.remove_parametrizations)],
    ids=["hook", "parametrization"],
)
def test_a_masked_layer_whose_weight_is_computed_is_not_folded(compute: Any, remove: Any) -> None:
    model = convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    compute(model[1])
    with pytest.raises(ValueError, match=rf"masked layer .* got '1'; first call .*\.{remove.__name__}\(module"):
        fold(model)
    remove(model[1], "weight")
    x = torch.randn(3, 4)
    assert_close(fold(model)(x), model(x))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_layer_without_weights_has_sparsity_zero(granularity: str) -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        layer = convert(nn.Linear(0, 3), granularity)
    assert layer.kept() == 0
    assert "sparsity=0.0000" in repr(layer)


def test_fold_is_plain_and_equal() -> None:
    twin = convert(Small().eval(), "block", 4)
    for layer in masked_layers(twin).values():
        layer.set_mask(random_mask(layer))
    plain = fold(twin)
    x = images()
    assert_close(plain(x), twin(x))
    assert plain.state_dict().keys() == Small().state_dict().keys()
    assert not masked_layers(plain)
    assert plain.twice is plain.blocks[2]["up"]
    Small().load_state_dict(plain.state_dict())
    assert masked_layers(twin)["stem"].sparsity > 0


def test_plain_state_dict_loads_and_keeps_masks() -> None:
    source, twin = Small(), convert(Small())
    twin.stem.set_mask(torch.zeros(8, 1, 1, 1))
    twin.load_state_dict(source.state_dict())
    assert torch.equal(twin.stem.weight, source.stem.weight)
    assert twin.stem.sparsity == 1
    other = convert(source)
    other.load_state_dict(twin.state_dict())
    assert other.stem.sparsity == 1
    for state, key in [(source.state_dict(), "stem.weight"), (other.state_dict(), "stem.mask")]:
        with pytest.raises(RuntimeError, match=rf"Missing key.*{key}"):
            twin.load_state_dict({k: v for k, v in state.items() if k != key})


@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_masks_that_were_on_the_meta_device_are_ones(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(392, 5))
    twin = convert(source).to("meta")
    if how == "to_empty":
        with monkeypatch.context() as patch:  # zeros are what memory that is new may hold
            patch.setattr(torch, "empty_like", lambda t, device: torch.zeros_like(t, device=device))
            twin = twin.to_empty(device="cpu")
    twin.load_state_dict(source.state_dict(), assign=how == "assign")
    x = images()
    assert torch.equal(twin(x), source(x))
    assert all(bool((layer.mask_score == 1).all()) for layer in masked_layers(twin).values())
    assert not any(layer.mask_score.requires_grad for layer in masked_layers(twin).values())


def masked_small() -> Small:
    twin = convert(Small().eval())
    for layer in masked_layers(twin).values():
        layer.set_mask(random_mask(layer))
    return twin  # type: ignore[return-value]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_compute_the_same(how: str, tmp_path: Path) -> None:
    model = masked_small()
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        torch.save(model, tmp_path / "m.pt")
        twin = torch.load(tmp_path / "m.pt", weights_only=False)
    else:
        torch.save(model.state_dict(), tmp_path / "m.pt")
        twin = convert(Small()).eval()
        twin.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    x = images()
    assert torch.equal(twin(x), model(x))


def test_dtype_and_memory_format_conversion() -> None:
    model = masked_small()
    x = images()
    nhwc = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert nhwc.stem.mask.is_contiguous(memory_format=torch.channels_last)
    out = nhwc(x.to(memory_format=torch.channels_last))
    assert_close(out, model(x))
    double = copy.deepcopy(model).double()
    assert double.stem.mask.dtype == torch.bool
    assert_close(double(x.double()).float(), model(x))
    assert_close(copy.deepcopy(model).bfloat16()(x.bfloat16()).float(), model(x), torch.bfloat16)


def test_autocast_trains_float32_weights() -> None:
    model = masked_small().train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images())
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    grad = model.stem.weight.grad
    assert grad is not None
    assert grad.dtype == torch.float32
    assert not grad[~model.stem.mask].any()
    assert model.stem.mask_score.grad is None


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend: str) -> None:
    layers: list[nn.Module] = [MaskedConv2d(3, 4, 3, padding=1, granularity="filter")]
    if backend == "aot_eager":
        layers += [nn.Flatten(1), MaskedLinear(4 * 25, 3, granularity="block")]
    model = nn.Sequential(*layers)
    for layer in masked_layers(model).values():
        layer.set_mask(random_mask(layer))
    x = images(size=5)
    expected = model(x)
    expected.square().sum().backward()
    grad = model[0].weight.grad.clone()
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    out = compiled(x)
    out.square().sum().backward()
    assert_close(out, expected)
    assert_close(model[0].weight.grad, grad)
    torch._dynamo.reset()


def test_compiles_soft_masks() -> None:
    layer = MaskedConv2d(3, 4, 3, padding=1)
    layer.soft = True
    layer.mask_score.requires_grad_()
    x = images(size=5)
    layer(x).square().sum().backward()
    expected = layer.mask_score.grad.clone()
    layer.zero_grad()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    assert_close(layer.mask_score.grad, expected)
    torch._dynamo.reset()


def _ddp_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    state = torch.load(f"{folder}/model.pt", weights_only=False)
    model = nn.parallel.DistributedDataParallel(state["model"])
    half = slice(rank * 4, rank * 4 + 4)
    for _ in range(2):  # the second backward would raise if a parameter had gone unused in the first
        model.zero_grad()
        F.cross_entropy(model(state["x"][half]), state["y"][half]).backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in model.module.named_parameters()}, f"{folder}/grads.pt")
    # DDP's reducer keeps gloo's threads alive past destroy_process_group, and one that frees a gradient while Python
    # shuts down aborts the process (github.com/pytorch/pytorch/pull/179291): leave without the shutdown.
    os._exit(0)


def test_ddp_gradients_equal_those_of_one_process(tmp_path: Path) -> None:
    model = masked_small()
    x, y = images(8), torch.arange(8) % 5
    torch.save({"model": model, "x": x, "y": y}, tmp_path / "model.pt")
    F.cross_entropy(model(x), y).backward()
    mp.spawn(_ddp_worker, args=(str(tmp_path),), nprocs=2)
    grads = torch.load(tmp_path / "grads.pt")
    for name, parameter in model.named_parameters():
        if name.endswith("mask_score"):
            assert grads[name] is None
        else:
            assert_close(grads[name], parameter.grad)
