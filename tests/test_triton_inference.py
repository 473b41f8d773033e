"""The convolutions of inference in Triton's interpreter, and certificates of networks that run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("triton")

import csam
import csam_kernels as ck
from conftest import TOLERANCE, assert_close
from csam import inference
from csam_kernels import backend, cpu, reference

if not backend.INTERPRETED:
    pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from csam_kernels.triton.launchers import masked_conv2d as launchers
from test_triton_noise import fma  # noqa: F401

F32, BF16 = torch.float32, torch.bfloat16
NCHW, NHWC = torch.contiguous_format, torch.channels_last
WINDOW = ((1, 1), (1, 1), (1, 1), 1, 0)
T = torch.randn


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("memory_format", [NCHW, NHWC], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_sum_in_the_epilogue(dtype: torch.dtype, memory_format: torch.memory_format, groups: int) -> None:
    """A residual in the result's memory format and in the other; groups=4 is depthwise."""
    x, w = T(2, 4, 3, 5).to(dtype, memory_format=memory_format), T(8, 4 // groups, 3, 3) / 4
    mask, scale, shift = torch.rand(8, 1, 1, 1), torch.rand(8) + 0.5, T(8)
    options = (*WINDOW[:3], groups, 0)
    for other_format, relu in ((NCHW, False), (NHWC, True)):
        other = T(2, 8, 3, 5).to(dtype, memory_format=other_format)
        arguments = (x, w, mask, None, scale, shift, relu, *options, other)
        out = launchers.masked_conv2d_inference(*arguments)
        want = reference.masked_conv2d_inference(*arguments, None)  # type: ignore[arg-type]
        assert_close(out / 4, want / 4)
        assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("channels", [3, 32])
@pytest.mark.parametrize("memory_format", [NCHW, NHWC], ids=["NCHW", "NHWC"])
def test_a_table_serves_any_batch_in_any_layout(
    dtype: torch.dtype, channels: int, memory_format: torch.memory_format
) -> None:
    w = (T(40, channels, 3, 3) / 8).to(memory_format=memory_format)
    w[8:] = 0
    everything = torch.ones(1, 1, 1, 1)
    tiles = launchers.live_tiles(w, everything, dtype)
    assert tiles is not None
    for batch in (1, 3):
        for layout in (NCHW, NHWC):
            x = T(batch, channels, 4, 4).to(dtype, memory_format=layout)
            out = launchers.masked_conv2d_inference(x, w, everything, None, None, None, False, *WINDOW, tiles=tiles)
            assert_close(out, F.conv2d(x.float(), w.to(dtype).float(), padding=1).to(dtype))


def test_a_table_of_dead_tiles_is_believed() -> None:
    """The weights are those of the table: NaN in the others leaves no trace; a table of another dtype is refused."""
    w = T(40, 32, 3, 3).to(memory_format=NHWC)
    w[:, 16:] = 0
    poisoned, everything, x = w.clone(), torch.ones(1, 1, 1, 1), T(1, 32, 4, 4).to(memory_format=NHWC)
    poisoned[:, 16:] = torch.nan
    arguments = (x, poisoned, everything, None, None, None, False, *WINDOW)
    assert launchers.masked_conv2d_inference(*arguments).isnan().any()
    out = launchers.masked_conv2d_inference(*arguments, tiles=launchers.live_tiles(w, everything, F32))
    assert_close(out, F.conv2d(x, w, padding=1))
    noise, tiles = (x[0], 2, 0.1, 0, 0, 0), launchers.live_tiles(w, everything, F32)
    out = launchers.smoothing_conv2d(*noise, poisoned, everything, None, *WINDOW, tiles=tiles)
    assert_close(out, F.conv2d(cpu.smoothing_noise(*noise, F32, NCHW), w, padding=1))
    with pytest.raises(ValueError, match=r"tiles must be the table that live_tiles gives for this weight and dtype"):
        launchers.masked_conv2d_inference(*arguments, tiles=launchers.live_tiles(w, everything, BF16))


@pytest.mark.usefixtures("fma")
@pytest.mark.parametrize("channels", [3, 17])
def test_normalised_noise_has_the_bits_of_the_cpu(channels: int) -> None:
    """A 1x1 convolution with the identity hands on what it loads, in float32: exact."""
    x, scale, shift = torch.rand(channels, 3, 5), torch.rand(channels) + 1, T(channels)
    eye, ones = torch.eye(channels).view(channels, channels, 1, 1), torch.ones(1, 1, 1, 1)
    noise = (x, 3, 0.5, -7, 2**32 - 2, 3)
    noisy = cpu.smoothing_noise(*noise, F32, NCHW)
    window = ((1, 1), (0, 0), (1, 1), 1, 0)
    assert torch.equal(launchers.smoothing_conv2d(*noise, eye, ones, None, *window), noisy)
    out = launchers.smoothing_conv2d(*noise, eye, ones, None, *window, scale, shift)
    want = noisy.double() * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)  # one rounding, as fma's
    assert torch.equal(out, want.float())


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_smoothing_conv2d(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the public function, with everything: strides, groups, normalisation, epilogue, a table."""
    x, w, mask = torch.rand(4, 5, 6), T(6, 2, 3, 3) / 2, torch.rand(6, 1, 1, 1) * (torch.rand(6, 2, 3, 3) < 0.5)
    names = ("input_scale", "input_shift", "scale", "shift")
    given = {name: torch.rand(n) + 0.5 for name, n in zip(names, (4, 4, 6, 6), strict=True)}
    call: dict[str, Any] = {"stride": (2, 1), "padding": 1, "groups": 2, "seed": 2**63, "relu": True, "dtype": dtype}
    results = []
    for provider in ("triton", "reference"):
        monkeypatch.setenv("CSAM_BACKEND", provider)
        tiles = ck.live_tiles(w, mask, dtype=dtype, groups=2)
        assert (tiles is None) == (provider == "reference")
        results.append(ck.smoothing_conv2d(x, 4, 0.5, w, mask, T(6) * 0 + 1, **call, **given, tiles=tiles))
    assert_close(*results)


class Net(nn.Module):
    """The shape of this project's models at the least size: normalisation, batch norms, a residual, a classifier."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.25]).view(1, 3, 1, 1))
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False, **options), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.linear = nn.Linear(16, 5)

    def normalised(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(self.normalised(x))))
        x = F.relu(x + self.bn2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))


class Clamped(Net):
    def normalised(self, x: Tensor) -> Tensor:
        return super().normalised(x.clamp(0, 1))


class Backwards(Net):
    def normalised(self, x: Tensor) -> Tensor:
        return 2 * (self.mean - x) + 1


class Plain(Net):
    def normalised(self, x: Tensor) -> Tensor:
        return x


class ReadTwice(Net):
    def normalised(self, x: Tensor) -> Tensor:
        return x - x.mean((2, 3), keepdim=True)


SIGMA, SHAPE = 0.5, (3, 4, 4)


def picture() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(3))


def masked(model: nn.Module) -> nn.Module:
    """Random running statistics and hard masks; logits centred, so that several classes win."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model = csam.convert(model.eval(), exclude="linear")
    for layer in csam.nn.masked_layers(model).values():
        layer.set_mask(torch.rand(layer.mask.shape) < 0.5)
    with torch.no_grad():
        model.linear.bias -= csam.fold(model)(picture() + SIGMA * T(200, *SHAPE)).mean(0)
    return model


@pytest.fixture
def gpu_path(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run what a GPU would run, in the interpreter, which knows one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("CSAM_BACKEND", "triton")
    yield
    torch.set_num_threads(before)


def votes_of(model: nn.Module, n: int, first: int) -> list[int]:
    """Of the plain module, in its own arithmetic, on the noise of the CPU."""
    noisy = cpu.smoothing_noise(picture(), n, SIGMA, 0, first, 2, F32, NCHW)
    with torch.no_grad():
        return torch.bincount(csam.fold(model)(noisy).argmax(1), minlength=5).tolist()


HEADS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "normalised": (Net, "noise drawn by the first convolution"),
    "other-order": (Backwards, "noise drawn by the first convolution"),
    "plain": (Plain, "noise drawn by the first convolution"),
    "clamped": (Clamped, "noise not drawn by the first convolution: more than a factor and a summand a channel"),
    "read-twice": (ReadTwice, "noise not drawn by the first convolution: something else reads the images"),
    "reflected": (
        lambda: Net(padding_mode="reflect"),
        "noise not drawn by the first convolution: something else reads the images",
    ),
}


@pytest.mark.usefixtures("gpu_path")
@pytest.mark.parametrize("name", HEADS)
def test_votes_are_those_of_the_plain_module(name: str) -> None:
    kind, step = HEADS[name]
    model = masked(kind())
    want = votes_of(model, 12, 3)
    assert sum(count > 0 for count in want) >= 2
    smooth = csam.Smooth(model, 5, SIGMA, dtype=F32, tile=8)
    assert smooth.counts(picture(), 12, 3, stream=2).tolist() == want
    prepared = smooth.prepared
    assert prepared is not None
    assert any(s.startswith(step) for s in prepared.steps), prepared.steps
    assert (prepared.head is not None) == step.endswith("by the first convolution")
    kernels = [m for m in prepared.module.modules() if isinstance(m, inference.KernelConv2d)]
    assert all(layer.tiles is not None and layer.scale is not None for layer in kernels)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in prepared.module.modules())
    if name == "reflected":
        assert len(kernels) == 1
        assert "conv1 left to torch: its padding is 'reflect'" in [s.replace("_bn1", "") for s in prepared.steps]
    else:
        assert "2 of 2 convolutions fused" in prepared.steps
        assert [layer.activation for layer in kernels] == ["relu", "relu"]


@pytest.mark.usefixtures("gpu_path")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_votes_do_not_depend_on_the_batch_size_and_add_up(dtype: torch.dtype) -> None:
    smooth, x = csam.Smooth(masked(Net()), 5, SIGMA, dtype=dtype, tile=8), picture()
    whole = smooth.counts(x, 12, 3)
    assert torch.equal(smooth.counts(x, 12, 3, batch_size=1), whole)
    assert torch.equal(smooth.counts(x, 5, 3) + smooth.counts(x, 7, 8), whole)


@pytest.mark.usefixtures("gpu_path")
def test_a_network_in_float64_is_cast_before_it_is_fused() -> None:
    model = csam.fold(masked(Net()))
    want = votes_of(model, 12, 3)
    smooth = csam.Smooth(model.double(), 5, SIGMA, dtype=F32, tile=8)
    assert smooth.counts(picture(), 12, 3, stream=2).tolist() == want
    assert smooth.prepared is not None
    assert "2 of 2 convolutions fused" in smooth.prepared.steps


@pytest.mark.usefixtures("gpu_path")
def test_cc_cert_runs_the_fused_network() -> None:
    model, x = masked(Net()), picture()
    cert = csam.CCCert(model, csam.transforms.Brightness(0.3), n=6, k=2, dtype=F32, tile=8)
    result = cert.certify(x, stream=1)
    assert cert.prepared is not None
    assert "2 of 2 convolutions fused" in cert.prepared.steps
    rows = csam.transforms.Brightness(0.3).parameters(12, seed=0, stream=1)
    with torch.no_grad():
        plain = csam.fold(model)
        drawn, clean = (plain(t).double().softmax(1) for t in (cpu.semantic_batch(x, rows), x[None]))
    rtol, atol = TOLERANCE[F32]
    want = (drawn - clean).abs().amax(1).reshape(2, 6)
    torch.testing.assert_close(result.discrepancy, want, rtol=rtol, atol=atol)


def test_a_provider_that_is_not_there_leaves_torch_s_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without Triton."""
    model, x = csam.fold(masked(Net())), torch.rand(2, *SHAPE)

    def refuse(op: str, where: torch.device) -> Any:
        raise backend.BackendUnavailable(f"{op}: triton: Triton does not import")

    monkeypatch.setattr(inference, "_kernels", lambda where: True)
    monkeypatch.setattr(backend, "serve", refuse)
    with torch.no_grad():
        wanted = model(x)
        made = inference.ready(model, x, wanted, F32, tile=2)
        assert_close(made.network(inference.laid_out(x, NHWC)), wanted)
    assert made.head is None
    assert made.steps == [
        "convolutions not fused: BackendUnavailable: masked_conv2d_inference: triton: Triton does not import",
        "2 of 2 batch-norm layers folded",
    ]
