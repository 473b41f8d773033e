"""masked_conv2d_inference and smoothing_conv2d on the CPU: against the reference, their fakes, bad arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import csam_kernels as ck
from conftest import assert_close
from csam_kernels import reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LAST = torch.channels_last
T = torch.randn


def epilogue(filters: int) -> dict[str, Tensor]:
    return {"scale": torch.rand(filters) + 0.5, "shift": T(filters)}


@pytest.mark.parametrize("dtype", [F32, BF16, F16, torch.float64], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_epilogue(dtype: torch.dtype, groups: int) -> None:
    """Each part alone and all of them; in a low dtype the CPU rounds the convolution's result once more."""
    x, w = T(2, 4, 6, 5).to(dtype), (T(6, 4 // groups, 3, 3) / 4).to(dtype)
    mask, bias, other = torch.rand(6, 1, 1, 1), T(6), T(2, 6, 3, 3).to(dtype)
    window: dict[str, Any] = {"stride": 2, "padding": 1, "groups": groups}
    for parts in ({}, epilogue(6), {"other": other}, {"relu": True}, {**epilogue(6), "other": other, "relu": True}):
        out = ck.masked_conv2d_inference(x, w, mask, bias, **window, **parts)
        arguments = [parts.get(name) for name in ("scale", "shift", "relu")]
        options = ([2, 2], [1, 1], [1, 1], groups, 0, parts.get("other"), None)
        want = reference.masked_conv2d_inference(x, w, mask, bias, *arguments, *options)  # type: ignore[arg-type]
        assert out.dtype == dtype
        assert_close(out / 4, want / 4)


def test_reference_is_the_formula() -> None:
    x, w, bias, (scale, shift) = T(2, 3, 5, 5), T(4, 3, 3, 3), T(4), epilogue(4).values()
    other, mask = T(2, 4, 5, 5), (torch.rand(4, 3, 3, 3) < 0.5)
    window = ([1, 1], [1, 1], [1, 1], 1, 0)
    y = F.conv2d(x, w * mask, bias, padding=1)
    want = F.relu(y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1) + other)
    out = reference.masked_conv2d_inference(x, w, mask, bias, scale, shift, True, *window, other, None)
    assert_close(out, want)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("normalized", [False, True])
def test_smoothing_conv2d(isa: str, dtype: torch.dtype, normalized: bool) -> None:
    x, w, mask = torch.rand(3, 6, 5), T(8, 3, 3, 3) / 4, torch.rand(8, 3, 1, 1)
    given = {"input_scale": torch.rand(3) + 1, "input_shift": T(3)} if normalized else {}
    noise: dict[str, Any] = {"seed": 2**64 - 3, "first_sample": 5, "stream": 2}
    parts = epilogue(8)
    out = ck.smoothing_conv2d(x, 4, 0.5, w, mask, padding=1, dtype=dtype, relu=True, **noise, **given, **parts)
    assert out.dtype == dtype
    batch = reference.smoothing_noise(x, 4, 0.5, -3, 5, 2, F32, torch.contiguous_format)
    if normalized:
        batch = batch * given["input_scale"].view(-1, 1, 1) + given["input_shift"].view(-1, 1, 1)
    want = ck.masked_conv2d_inference(batch.to(dtype), w, mask, padding=1, relu=True, **parts)
    assert_close(out / 4, want / 4)


def test_padding_stays_zero_after_the_normalisation() -> None:
    """A convolution that reads nothing but padding gives nothing, whatever the shift."""
    corner = torch.zeros(1, 2, 3, 3)
    corner[:, :, 0, 0] = 1
    scale, shift, ones = torch.ones(2), torch.full((2,), 100.0), torch.ones(1, 1, 1, 1)
    x = torch.rand(2, 3, 3)
    options = {"padding": 1, "seed": 0, "input_scale": scale, "input_shift": shift}
    out = ck.smoothing_conv2d(x, 2, 0.1, corner, ones, **options)
    assert not out[:, :, 0].any()
    assert bool((out[:, :, 1:, 1:] > 100).all())


def test_no_table_of_tiles_on_a_cpu() -> None:
    weight = T(4, 3, 3, 3)
    assert ck.live_tiles(weight, weight, dtype=BF16) is None
    with pytest.raises(ValueError, match="mask must broadcast"):
        ck.live_tiles(weight, T(4, 2, 1, 1), dtype=BF16)


PARTS = (T(4), T(4), T(6), T(6))
W, WINDOW = T(6, 4, 3, 3), ([1, 1], [1, 1], [1, 1], 1, 0)
OPCHECKS: dict[str, tuple[Any, tuple]] = {
    "masked_conv2d_inference": (
        torch.ops.csam.masked_conv2d_inference,
        (T(2, 4, 6, 6), W, torch.rand(6, 1, 1, 1), T(6), T(6), T(6), True, *WINDOW, T(2, 6, 6, 6), None),
    ),
    "masked_conv2d_inference-channels_last": (
        torch.ops.csam.masked_conv2d_inference,
        (T(2, 4, 6, 6).to(BF16, memory_format=LAST), W, W != 0, *[None] * 3, False, *WINDOW, None, None),
    ),
    "smoothing_conv2d": (
        torch.ops.csam.smoothing_conv2d,
        (
            torch.rand(4, 7, 6),
            5,
            0.5,
            1,
            2,
            3,
            W.to(memory_format=LAST),
            W != 0,
            T(6),
            *WINDOW,
            *PARTS,
            True,
            BF16,
            None,
        ),
    ),
}


@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name: str) -> None:
    op, args = OPCHECKS[name]
    torch.library.opcheck(op, args)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w, m: ck.masked_conv2d_inference(x[0], w, m), "x must have 4 dimensions"),
        (lambda x, w, m: ck.masked_conv2d_inference(x[:, :2], w, m), "x must have 4 channels"),
        (lambda x, w, m: ck.masked_conv2d_inference(x, w, m, scale=T(6)), "scale and shift must be given together"),
        (lambda x, w, m: ck.masked_conv2d_inference(x, w, m, scale=T(5), shift=T(6)), r"scale must have shape \(6,\)"),
        (lambda x, w, m: ck.masked_conv2d_inference(x, w, m, other=x), "other must have the result's shape"),
        (lambda x, w, m: ck.masked_conv2d_inference(x, w, m, other=T(2, 6, 6, 6).double()), "other must have dtype"),
        (lambda x, w, m: ck.masked_conv2d_inference(x, w, m, scale=T(6), shift=T(6).to("meta")), "one device"),
        (lambda x, w, m: ck.masked_conv2d_inference(x, w, m, other=1), "other must be a torch.Tensor"),
        (lambda x, w, m: ck.masked_conv2d_inference(x, w, m, tiles=T(3)), "tiles must have dtype int32"),
        (lambda x, w, m: ck.masked_conv2d_inference(x, w, m, relu="yes"), "^relu must be True or False, got 'yes'$"),
        (lambda x, w, m: ck.smoothing_conv2d(x[0], 2, 0.1, w, m, seed=0, relu=1), "relu must be True or False, got 1$"),
        (lambda x, w, m: ck.smoothing_conv2d(x[0], 2, 0.1, w, m, seed=0, tiles=1), "tiles must be a torch.Tensor"),
        (
            lambda x, w, m: ck.masked_conv2d_inference(x, w, m, tiles=torch.zeros(6, dtype=torch.int32)[::2]),
            "tiles must be contiguous",
        ),
        (lambda x, w, m: ck.live_tiles(w, m, dtype=torch.int8), "dtype must be one of"),
        (lambda x, w, m: ck.live_tiles(w, m, dtype=BF16, groups=4), "groups must divide the 6 filters"),
        (lambda x, w, m: ck.smoothing_conv2d(x, 2, 0.1, w, m, seed=0), "x must have 3 dimensions"),
        (lambda x, w, m: ck.smoothing_conv2d(x[0], 2, 0.0, w, m, seed=0), "sigma must be > 0"),
        (lambda x, w, m: ck.smoothing_conv2d(x[0], 2, 0.1, w, m, seed=-1), "seed must be in"),
        (lambda x, w, m: ck.smoothing_conv2d(x[0], 2, 0.1, w[..., 1:], m, padding="same", seed=0), "padding must be"),
        (
            lambda x, w, m: ck.smoothing_conv2d(x[0], 2, 0.1, w, m, seed=0, input_shift=T(4)),
            "input_scale and input_shi",
        ),
        (
            lambda x, w, m: ck.smoothing_conv2d(x[0], 2, 0.1, w, m, seed=0, input_scale=T(3), input_shift=T(4)),
            r"input_scale must have shape \(4,\)",
        ),
    ],
)
def test_bad_arguments(call: Callable[..., Tensor], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(T(2, 4, 8, 8), T(6, 4, 3, 3), torch.rand(6, 1, 1, 1))
