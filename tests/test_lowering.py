"""Convolution as a matrix product equals torch's, forward and backward, in every form that the search meets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import TOLERANCE, assert_close
from csam import lowering
from csam.nn import MaskedConv2d

# batch, in, out, size, kernel, stride, padding
SHAPES: dict[str, tuple[int, int, int, int, tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "all-three-products": (2, 64, 64, 4, (3, 3), (1, 1), (1, 1)),
    "strided": (2, 8, 32, 8, (3, 3), (2, 2), (1, 1)),
    "1x1-strided": (2, 8, 32, 8, (1, 1), (2, 2), (0, 0)),
    "uneven-kernel": (1, 24, 24, 5, (1, 3), (1, 1), (0, 2)),
    "padding-beyond-kernel": (1, 16, 64, 3, (2, 2), (1, 1), (2, 2)),
    "weight-gradient-only-in-bf16": (2, 6, 8, 6, (3, 3), (1, 1), (1, 1)),
}


@pytest.fixture(autouse=True)
def with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table that takes all three products, whatever the processor."""
    monkeypatch.setattr(lowering, "_LIMITS", lowering._WITH_AMX)


def operands(name: str, dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, Tensor, Tensor, Any, Any]:
    batch, cin, cout, size, kernel, stride, padding = SHAPES[name]
    x = torch.randn(batch, cin, size, size).to(dtype).contiguous(memory_format=layout)
    weight = (torch.randn(cout, cin, *kernel) / (cin * kernel[0] * kernel[1]) ** 0.5).to(dtype)
    return x, weight.contiguous(memory_format=layout), torch.randn(cout).to(dtype), stride, padding


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_conv2d(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    *tensors, stride, padding = operands(name, dtype, layout)
    exact = [t.double().requires_grad_() for t in tensors]
    expected = F.conv2d(*exact, stride, padding)
    seed = torch.randn_like(expected)
    expected.backward(seed)

    own = [t.requires_grad_() for t in tensors]
    out = lowering.conv2d(*own, stride, padding)
    out.backward(seed.to(dtype))
    assert out.dtype == dtype
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)
    for mine, theirs in zip(own, exact, strict=True):
        assert mine.grad.dtype == dtype
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(mine.grad.double() / scale, theirs.grad / scale, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", SHAPES)
def test_gradcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lowering._LIMITS, torch.float64, lowering._WITH_AMX[torch.float32])
    x, weight, bias, stride, padding = operands(name, torch.float64, torch.channels_last)
    x, weight = x[:1, :4].contiguous().requires_grad_(), weight[:16, :4].contiguous().requires_grad_()
    args = (x, weight, bias[:16].requires_grad_(), stride, padding)
    assert torch.autograd.gradcheck(lowering.conv2d, args, fast_mode=True)


def test_expanded_and_strided_gradients_and_inputs() -> None:
    x, weight, _, stride, padding = operands("all-three-products", torch.float32, torch.channels_last)
    x = torch.cat([x, x], 3)[..., ::2].requires_grad_()
    weight.requires_grad_()
    for reduce in (torch.sum, lambda t: t[:, ::3].square().sum()):
        mine = torch.autograd.grad(reduce(lowering.conv2d(x, weight, None, stride, padding)), (x, weight))
        theirs = torch.autograd.grad(reduce(F.conv2d(x, weight, None, stride, padding)), (x, weight))
        for a, b in zip(mine, theirs, strict=True):
            assert_close(a / b.abs().max(), b / b.abs().max())


def test_columns_of_one_product_do_not_leak_into_the_next() -> None:
    """They share a buffer: interleaved forwards and backwards must not see each other's."""
    first = operands("all-three-products", torch.float32, torch.channels_last)
    second = operands("strided", torch.float32, torch.channels_last)
    for x, weight, *_ in (first, second):
        x.requires_grad_(), weight.requires_grad_()
    both = [lowering.conv2d(*args).square().sum() for args in (first, second)]
    twin = [F.conv2d(*args).square().sum() for args in (first, second)]
    leaves = [t for args in (first, second) for t in args[:2]]
    for a, b in zip(torch.autograd.grad(sum(both), leaves), torch.autograd.grad(sum(twin), leaves), strict=True):
        assert_close(a / b.abs().max(), b / b.abs().max())


def test_pays_only_where_it_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _, stride, padding = operands("all-three-products", torch.float32, torch.channels_last)
    assert lowering.pays(x, weight, stride, padding)
    assert not lowering.pays(x.contiguous(), weight, stride, padding)
    assert lowering.pays(x.bfloat16().contiguous(), weight.bfloat16(), stride, padding)
    assert not lowering.pays(x.bfloat16(), weight, stride, padding)
    assert not lowering.pays(x[:0], weight, stride, padding)
    assert not lowering.pays(x.double(), weight.double(), stride, padding)
    assert not lowering.pays(x[0], weight, stride, padding)
    assert not lowering.pays(torch.randn(2, 64, 32, 32), weight, stride, padding)
    monkeypatch.setattr(lowering, "_LIMITS", lowering._WITHOUT_AMX)
    assert not lowering.pays(x, weight, stride, padding)
    assert lowering.pays(x.bfloat16(), weight.bfloat16(), stride, padding)


@pytest.mark.parametrize(
    "options",
    [{"groups": 2}, {"dilation": 2}, {"padding": "same"}, {"padding_mode": "reflect"}, {"stride": (2, 1)}, {}],
    ids=str,
)
def test_a_masked_layer_computes_the_same_whichever_way(options: dict[str, Any]) -> None:
    layer = MaskedConv2d(64, 64, 3, **({"padding": 1} | options)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 64, 4, 4).to(memory_format=torch.channels_last)
    expected = layer(x)
    layer.effective_weight = layer.weight.detach()
    assert_close(layer(x), expected)
