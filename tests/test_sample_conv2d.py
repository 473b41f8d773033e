"""sample_conv2d against the reference and against what must not depend on how the work is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import csam_kernels as ck
from conftest import ISAS, assert_close
from csam_kernels import _C, reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
WINDOWS: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x3-unpadded": {"kernel_size": 3},
    "3x3-stride2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "3x3-dilation2": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "3x3-padding3": {"kernel_size": 3, "padding": 3},
    "1x1": {"kernel_size": 1},
    "1x1-stride2": {"kernel_size": 1, "stride": 2},
    "1x1-padding2": {"kernel_size": 1, "padding": 2},
    "5x5": {"kernel_size": 5, "padding": 2},
    "7x7-stride2": {"kernel_size": 7, "stride": 2, "padding": 3},
    "2x3-oblong": {"kernel_size": (2, 3), "stride": (3, 1), "padding": (0, 2), "dilation": (1, 3)},
    "5x1-stride3-dilation2": {"kernel_size": (5, 1), "stride": 3, "padding": 4, "dilation": 2},
}


def sparse(filters: int, channels: int, kernel: Any, density: float, groups: int = 1) -> Tensor:
    height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    weight = torch.randn(filters, channels // groups, height, width)
    weight[torch.rand(weight.shape) >= density] = 0
    return weight / (density * weight[0].numel()) ** 0.5  # results of order 1, as the tolerances are for


def both(x: Tensor, packed: tuple[Tensor, ...], bias: Any = None, other: Any = None, **options: Any) -> None:
    """Sparse and dense against the reference; in float32 the two agree to the last bit."""
    ours = ck.sample_conv2d(x, *packed, bias, other, **options)
    dense = ck.sample_conv2d(x, *packed, bias, other, dense=True, **options)
    pairs = (options.get(n, d) for n, d in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)))
    window = [list(p) if isinstance(p, tuple) else [p, p] for p in pairs]
    twin = reference.sample_conv2d(x, *packed, bias, other, *window, options.get("relu", False))
    assert ours.is_contiguous()
    assert dense.is_contiguous()
    assert_close(ours, twin)
    assert_close(dense, twin)
    assert x.dtype is torch.bfloat16 or torch.equal(dense, ours)


@DTYPES
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_windows(isa: str, threads: int, window: dict[str, Any], dtype: torch.dtype) -> None:
    x = torch.randn(5, 11, 9, 19).to(dtype)
    packed = ck.compress(sparse(7, 5, window["kernel_size"], 0.4))
    both(x, packed, **window)
    other = torch.randn(ck.sample_conv2d(x, *packed, **window).shape).to(dtype)
    both(x, packed, torch.randn(7), other, relu=True, **window)


@DTYPES
@pytest.mark.parametrize("samples", [0, 1, 7, 16, 32, 48, 50])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (7, 7), (8, 3), (3, 16), (13, 33)], ids=str)
def test_sizes(isa: str, samples: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(3, *size, samples).to(dtype)
    other = torch.randn(4, *size, samples).to(dtype)
    both(x, ck.compress(sparse(4, 3, 3, 0.5)), torch.randn(4), other, kernel_size=3, padding=1)


@DTYPES
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_densities(isa: str, density: float, dtype: torch.dtype) -> None:
    """Many channels, so that the input is cut into several blocks; few weights leave rows empty."""
    x = torch.randn(96, 6, 6, 16).to(dtype)
    both(x, ck.compress(sparse(33, 96, 3, density or 1) * (density > 0)), torch.randn(33), kernel_size=3, padding=1)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_groups_and_depthwise(isa: str, groups: int, dense: bool) -> None:
    x, weight = torch.randn(6, 5, 5, 16), sparse(12, 6, 3, 0.5, groups)
    out = ck.sample_conv2d(x, *ck.compress(weight, groups), kernel_size=3, padding=1, dense=dense)
    wanted = torch.conv2d(x.permute(3, 0, 1, 2), weight, padding=1, groups=groups)
    assert_close(out, wanted.permute(1, 2, 3, 0))


@DTYPES
@pytest.mark.parametrize("samples", [1, 16, 32, 50])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), ((3, 3), (2, 1), 1), (3, 1, 2), (5, 1, 1), ((1, 4), 3, 1)]
)
def test_depthwise(isa: str, samples: int, kernel: Any, stride: Any, dilation: int, dtype: torch.dtype) -> None:
    """Two filters a channel, one of them dead, one with a tap; rows of any remainder to three."""
    pair, steps = (n if isinstance(n, tuple) else (n, n) for n in (kernel, stride))
    weight = torch.randn(6, 1, *pair)
    weight[2], weight[3, :, 0, 1:] = 0, 0
    for width in (4, 5, 9):
        x = torch.randn(3, 6, width, samples).to(dtype)
        size = [(n + 2 - dilation * (k - 1) - 1) // s + 1 for n, k, s in zip((6, width), pair, steps, strict=True)]
        other = torch.randn(6, *size, samples).to(dtype)
        window = {"kernel_size": kernel, "stride": stride, "padding": 1, "dilation": dilation}
        both(x, ck.compress(weight, 3), torch.randn(6), other, relu=True, **window)


@DTYPES
@pytest.mark.parametrize("stride", [1, 2])
def test_a_dead_depthwise_filter_reads_nothing(isa: str, stride: int, dtype: torch.dtype) -> None:
    weight, x = torch.zeros(2, 1, 3, 3), torch.ones(2, 4, 4, 40, dtype=dtype)
    weight[1], x[0] = 1, torch.inf
    out = ck.sample_conv2d(x, *ck.compress(weight, 2), torch.ones(2), kernel_size=3, padding=1, stride=stride)
    assert bool((out[0] == 1).all())
    assert bool(out[1].isfinite().all())


@DTYPES
def test_dead_filters_and_channels(isa: str, dtype: torch.dtype) -> None:
    """Neither their number nor their place matters; a dead filter is its bias, plus the residual."""
    weight = sparse(13, 11, 3, 0.6)
    weight[[0, 4, 5, 12]], weight[:, [1, 2, 10]] = 0, 0
    x, other = torch.randn(11, 5, 6, 33).to(dtype), torch.randn(13, 5, 6, 33).to(dtype)
    both(x, ck.compress(weight), torch.randn(13), other, kernel_size=3, padding=1, relu=True)
    both(x, ck.compress(weight * 0), torch.randn(13), other, kernel_size=3, padding=1)


def test_many_filters(threads: int) -> None:
    both(torch.randn(4, 4, 4, 16), ck.compress(sparse(600, 4, 3, 0.2)), torch.randn(600), kernel_size=3, padding=1)


@DTYPES
@pytest.mark.parametrize(("filters", "dense"), [(40, False), (600, False), (40, True), (200, True)])
def test_bits_do_not_depend_on_threads_or_samples(isa: str, filters: int, dense: bool, dtype: torch.dtype) -> None:
    channels = 8 if dense else 24
    x, packed = torch.randn(channels, 9, 10, 50).to(dtype), ck.compress(sparse(filters, channels, 3, 0.3))
    call = lambda x: ck.sample_conv2d(x, *packed, torch.ones(filters), kernel_size=3, padding=1, dense=dense)  # noqa: E731
    want, before = call(x), torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(call(x), want), count
        assert torch.equal(call(x[..., 3:20].contiguous()), want[..., 3:20]), count
    torch.set_num_threads(before)


def test_bits_do_not_depend_on_the_instruction_set() -> None:
    x, packed = torch.randn(24, 9, 10, 50), ck.compress(sparse(40, 24, 3, 0.3))
    results = []
    for name in ISAS:
        _C.set_isa(name)
        options: dict[str, Any] = {"kernel_size": 3, "padding": 1}
        results += [ck.sample_conv2d(x, *packed, torch.ones(40), dense=d, **options) for d in (False, True)]
    _C.set_isa("auto")
    assert all(torch.equal(r, results[0]) for r in results)


@DTYPES
def test_what_is_not_finite_spreads_through_surviving_weights_only(isa: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, 4, 20).to(dtype)
    x[0, 1, 1, 3], x[0, 2, 2, 4], x[1] = float("inf"), float("nan"), float("nan")
    weight = torch.zeros(2, 2, 1, 1)
    weight[0, 0] = -2
    out = ck.sample_conv2d(x, *ck.compress(weight), kernel_size=1)
    assert torch.equal(out[0].isnan(), x[0].isnan())
    assert float(out[0, 1, 1, 3]) == -float("inf")
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    rectified = ck.sample_conv2d(x, *ck.compress(weight), kernel_size=1, relu=True)
    torch.testing.assert_close(rectified, out.relu(), equal_nan=True)


@DTYPES
def test_dense_multiplies_the_zeros_between_live_filters_and_channels_alone(isa: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, 3, 20).to(dtype)
    x[0, 1, 1, 3], x[2, 0, 2, 4], x[3] = float("nan"), float("inf"), float("nan")
    weight = torch.zeros(6, 4, 1, 1)
    weight[1, 0], weight[3, 1], weight[4, 2] = 2, 3, -1  # filters 0, 2, 5 and channel 3 are dead
    out = ck.sample_conv2d(x, *ck.compress(weight), kernel_size=1, dense=True)
    spread = x[0].isnan() | x[2].isinf()
    for live in (1, 3):
        assert torch.equal(out[live].isnan(), spread)
    assert torch.equal(out[4].isnan(), x[0].isnan())
    assert float(out[4, 0, 2, 4]) == -float("inf")
    assert torch.equal(out[[0, 2, 5]], torch.zeros_like(out[:3]))


def test_views_are_taken() -> None:
    x, packed = torch.randn(9, 16, 8, 3).permute(3, 0, 2, 1), ck.compress(sparse(4, 3, 3, 0.5))
    both(x, packed, torch.randn(8)[::2], torch.randn(16, 8, 9, 4).permute(3, 2, 1, 0), kernel_size=3, padding=1)


def test_the_unchecked_operator_is_the_same() -> None:
    x, packed = torch.randn(3, 6, 6, 16), ck.compress(sparse(4, 3, 3, 0.5))
    unchecked = torch.ops.csam.sample_conv2d(x, *packed, None, None, [3, 3], [1, 1], [0, 0], [1, 1], False, False)
    assert torch.equal(unchecked, ck.sample_conv2d(x, *packed, kernel_size=3))


def test_compress() -> None:
    weight = torch.zeros(4, 2, 1, 2)
    weight[0, 1, 0, 0], weight[3, 0, 0, 1], weight[3, 1, 0, 1] = 1, 2, float("nan")
    values, taps, rows = ck.compress(weight.double(), groups=2)
    assert torch.equal(values[:2], torch.tensor([1.0, 2.0]))
    assert values[2].isnan()
    assert taps.tolist() == [2, 5, 7]
    assert rows.tolist() == [0, 1, 1, 1, 3]
    assert [t.dtype for t in (values, taps, rows)] == [torch.float32, torch.int32, torch.int32]
    with pytest.raises(ValueError, match="groups must divide the 4 filters"):
        ck.compress(weight, groups=3)
    with pytest.raises(ValueError, match="weight must have 4 dimensions"):
        ck.compress(weight[0])


def test_no_filters_and_no_channels() -> None:
    assert ck.sample_conv2d(torch.randn(3, 4, 4, 8), *ck.compress(torch.zeros(0, 3, 1, 1)), kernel_size=1).numel() == 0
    empty = ck.compress(torch.zeros(2, 0, 1, 1))
    out = ck.sample_conv2d(torch.randn(0, 4, 4, 8), *empty, torch.tensor([1.0, 2.0]), kernel_size=1)
    assert torch.equal(out, torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 4, 4, 8))


GOOD: dict[str, Any] = {
    "x": torch.zeros(2, 5, 5, 8),
    "values": torch.ones(4),
    "taps": torch.tensor([0, 17, 3, 4], dtype=torch.int32),
    "rows": torch.tensor([0, 2, 2, 4], dtype=torch.int32),
    "kernel_size": 3,
}


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 5, 5)}, ValueError, "x must have 4 dimensions"),
        ({"x": torch.zeros(2, 5, 5, 8).half()}, TypeError, "x must have dtype float32, bfloat16"),
        ({"x": torch.zeros(2, 2, 5, 8)}, ValueError, "x is too small along H"),
        ({"values": torch.ones(4).double()}, TypeError, "values must have dtype float32"),
        ({"values": torch.ones(3)}, ValueError, "taps must have one entry a value, 3, got 4"),
        ({"taps": torch.tensor([0, 17, 3, 4])}, TypeError, "taps must have dtype int32"),
        ({"taps": ints(0, 18, 3, 4)}, ValueError, r"taps must be in \[0, 18\) .*, got 18"),
        ({"taps": ints(-1, 17, 3, 4)}, ValueError, "taps must be in .*, got -1"),
        ({"taps": ints(17, 0, 3, 4)}, ValueError, "taps must ascend in each row, got a fall after entry 0"),
        ({"taps": ints(0, 17, 3, 3)}, ValueError, "taps must ascend in each row, got a fall after entry 2"),
        ({"rows": ints(0, 3, 2, 4)}, ValueError, "rows must ascend from 0 to the 4 values"),
        ({"rows": ints(0, 2, 2, 5)}, ValueError, "rows must ascend"),
        ({"rows": ints(1, 2, 2, 4)}, ValueError, "rows must ascend"),
        ({"rows": ints()}, ValueError, "rows must ascend"),
        ({"bias": [0.0, 0.0, 0.0]}, TypeError, "bias must be a torch.Tensor, got list"),
        ({"other": 1.0}, TypeError, "other must be a torch.Tensor, got float"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias must have shape \(3,\)"),
        ({"bias": torch.zeros(3).bfloat16()}, TypeError, "bias must have dtype float32"),
        ({"other": torch.zeros(3, 5, 5, 8)}, ValueError, r"other must have the result's shape \(3, 3, 3, 8\)"),
        ({"other": torch.zeros(3, 3, 3, 8).bfloat16()}, TypeError, "other must have dtype float32"),
        ({"other": torch.zeros(3, 3, 3, 8, device="meta")}, ValueError, "one device"),
        ({"stride": 0}, ValueError, "stride must be >= 1"),
        ({"padding": -1}, ValueError, "padding must be >= 0"),
        ({"kernel_size": 65536, "padding": 32768}, ValueError, "kernel_size must hold at most 1048576 taps"),
        ({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size must be an integer or a pair"),
        ({"relu": "yes"}, TypeError, "^relu must be True or False, got 'yes'$"),
        ({"dense": 1}, TypeError, "^dense must be True or False, got 1$"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    assert ck.sample_conv2d(**GOOD).shape == (3, 3, 3, 8)
    with pytest.raises(error, match=message):
        ck.sample_conv2d(**GOOD | change)


def test_a_cuda_tensor_is_refused_with_the_reasons() -> None:
    with pytest.raises(ck.BackendUnavailable, match=r"sample_conv2d: cpu: serves cpu tensors.*has no sample_conv2d"):
        ck.backend.serve("sample_conv2d", torch.device("cuda"))
