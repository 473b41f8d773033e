"""masked_conv2d and masked_linear: values, gradients, dtypes, every geometry and granularity; opcheck of every op."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import csam_kernels as ck
import test_inference_ops
from conftest import assert_close
from csam_kernels import backend
from csam_kernels.layout import expand_mask
from test_masks_ops import mask_shape

# (x, weight, options): odd sizes, strides, dilation, groups, depthwise, empty batch
GEOMETRIES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "B2-C4-8x8-3x3": ((2, 4, 8, 8), (6, 4, 3, 3), {"padding": 1}),
    "B3-C3-7x5-5x3-s2": ((3, 3, 7, 5), (4, 3, 5, 3), {"padding": (2, 1), "stride": (2, 1)}),
    "B2-C8-9x9-3x3-g4": ((2, 8, 9, 9), (8, 2, 3, 3), {"groups": 4}),
    "B2-C6-8x8-3x3-depthwise": ((2, 6, 8, 8), (6, 1, 3, 3), {"groups": 6, "padding": 1}),
    "B1-C4-11x11-3x3-d2": ((1, 4, 11, 11), (5, 4, 3, 3), {"dilation": 2, "padding": "same"}),
    "B2-C4-8x8-2x2-same": ((2, 4, 8, 8), (4, 4, 2, 2), {"padding": "same"}),
    "B2-C16-6x6-1x1": ((2, 16, 6, 6), (12, 16, 1, 1), {"padding": "valid"}),
    "B0-C4-8x8-3x3": ((0, 4, 8, 8), (6, 4, 3, 3), {"padding": 1}),
}
GRANULARITIES = ["weight", "filter", "channel", "block"]


def problem(name: str, granularity: str, dtype: torch.dtype, density: float = 0.5) -> tuple[list, dict[str, Any]]:
    x_shape, w_shape, options = GEOMETRIES[name]
    shape = mask_shape(granularity, w_shape)
    mask = torch.rand(shape, dtype=dtype) * (torch.rand(shape) < density)
    tensors = [
        torch.randn(x_shape, dtype=dtype),
        torch.randn(w_shape, dtype=dtype),
        mask,
        torch.randn(w_shape[0], dtype=dtype),
    ]
    return tensors, options | ({"block_size": 4} if granularity == "block" else {})


def plain(x: Any, w: Any, m: Any, b: Any, block_size: int = 0, **options: Any) -> torch.Tensor:
    return F.conv2d(x, w * expand_mask(m, w.shape, block_size), b, **options)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0], ids=["all-masked", "half", "none-masked"])
def test_forward_and_gradients(name: str, granularity: str, density: float) -> None:
    tensors, options = problem(name, granularity, torch.float64, density)
    ours = [t.clone().requires_grad_() for t in tensors]
    want = [t.clone().requires_grad_() for t in tensors]
    out, expected = ck.masked_conv2d(*ours, **options), plain(*want, **options)
    assert_close(out, expected)
    grad = torch.randn_like(expected)
    out.backward(grad)
    expected.backward(grad)
    for a, b in zip(ours, want, strict=True):
        assert a.grad is not None
        assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("granularity", ["filter", "channel", "kernel", "weight"])
def test_dead_channels_are_left_out_without_a_trace(name: str, granularity: str) -> None:
    """A fixed mask lets whole filters and channels be skipped; values, gradients and memory format stay the same."""
    (x, w, m, b), options = problem(name, granularity, torch.float64, 0.3)
    if granularity in ("weight", "kernel"):
        m[::2] = 0
    if granularity == "kernel":
        m[:, ::2] = 0
    mask = m > 0
    for memory_format in (torch.contiguous_format, torch.channels_last):
        leaves = [t.clone().requires_grad_() for t in (x.to(memory_format=memory_format), w, b)]
        twins = [t.detach().clone().requires_grad_() for t in leaves]
        out = ck.masked_conv2d(leaves[0], leaves[1], mask, leaves[2], **options)
        expected = plain(twins[0], twins[1], mask, twins[2], **options)
        assert_close(out, expected)
        assert out.stride() == expected.stride()
        grad = torch.randn_like(expected)
        out.backward(grad)
        expected.backward(grad)
        for a, t in zip(leaves, twins, strict=True):
            assert_close(a.grad, t.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["B2-C4-8x8-3x3", "B2-C8-9x9-3x3-g4", "B2-C6-8x8-3x3-depthwise", "B3-C3-7x5-5x3-s2"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradcheck(name: str, granularity: str) -> None:
    tensors, options = problem(name, granularity, torch.float64)
    tensors = [t[:1, :, :5, :5] if i == 0 else t for i, t in enumerate(tensors)]
    assert torch.autograd.gradcheck(
        lambda *t: ck.masked_conv2d(*t, **options),
        [t.clone().requires_grad_() for t in tensors],
        fast_mode=True,
    )


def test_gradcheck_linear() -> None:
    x, w, b = torch.randn(3, 2, 5).double(), torch.randn(4, 5).double(), torch.randn(4).double()
    for m, block in (
        (torch.rand(4, 5), None),
        (torch.rand(4, 1), None),
        (torch.rand(1, 5), None),
        (torch.rand(4, 2), 4),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, w, m.double(), b)]
        assert torch.autograd.gradcheck(lambda *t, block=block: ck.masked_linear(*t, block_size=block), leaves)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("linear", [False, True], ids=["conv2d", "linear"])
def test_transforms_of_torch_func_are_right(granularity: str, linear: bool) -> None:
    if linear:
        x, w, b = torch.randn(3, 2, 5).double(), torch.randn(4, 5).double(), torch.randn(4).double()
        m, block = torch.rand(mask_shape(granularity, (4, 5))).double(), 4 if granularity == "block" else 0
        tensors, ours = [x, w, m, b], partial(ck.masked_linear, block_size=block or None)
        want: Any = lambda x, w, m, b: F.linear(x, w * expand_mask(m, w.shape, block), b)  # noqa: E731
    else:
        tensors, options = problem("B2-C8-9x9-3x3-g4", granularity, torch.float64)
        ours, want = partial(ck.masked_conv2d, **options), partial(plain, **options)
    primals, tangents = tuple(tensors), tuple(torch.randn_like(t) for t in tensors)
    expected = torch.func.jvp(want, primals, tangents)
    for one, other in zip(torch.func.jvp(ours, primals, tangents), expected, strict=True):
        assert_close(one, other)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]
        assert_close(forward_ad.unpack_dual(ours(*duals)).tangent, expected[1])
    gradients = [torch.func.grad(lambda *t, f=f: f(*t).square().sum(), (0, 1, 2, 3))(*primals) for f in (ours, want)]
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other)
    batched = torch.stack([tensors[1], -tensors[1]])
    assert_close(*(torch.vmap(f, (None, 0, None, None))(tensors[0], batched, *tensors[2:]) for f in (ours, want)))


def test_the_kernel_serves_outside_of_transforms() -> None:
    assert backend.plain("masked_conv2d") is None


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_linear_matches_torch(granularity: str) -> None:
    x, w, b = torch.randn(7, 30), torch.randn(20, 30), torch.randn(20)
    m = torch.rand(mask_shape(granularity, (20, 30)))
    block = 4 if granularity == "block" else 0
    out = ck.masked_linear(x, w, m, b, block_size=block or None)
    assert_close(out, F.linear(x, w * expand_mask(m, w.shape, block), b))


def test_linear_without_features_gives_the_bias() -> None:
    b = torch.randn(4)
    assert torch.equal(
        ck.masked_linear(torch.zeros(5, 2, 0), torch.zeros(4, 0), torch.zeros(4, 0), b), b.expand(5, 2, 4)
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_all_ones_mask_gives_the_dense_bits(memory_format: torch.memory_format) -> None:
    x = torch.randn(4, 16, 10, 10).to(memory_format=memory_format)
    w = torch.randn(32, 16, 3, 3).to(memory_format=memory_format)
    dense = F.conv2d(x, w, padding=1)
    for mask in (
        torch.ones(32, 16, 3, 3),
        torch.ones(32, 1, 1, 1),
        torch.ones(1, 16, 1, 1, dtype=torch.bool),
    ):
        assert torch.equal(ck.masked_conv2d(x, w, mask, padding=1), dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rounds_the_product_once(dtype: torch.dtype) -> None:
    x, w, m = torch.randn(2, 8, 6, 6).to(dtype), torch.randn(8, 8, 3, 3), torch.rand(8, 8, 3, 3)
    assert torch.equal(ck.masked_conv2d(x, w, m), F.conv2d(x, (w * m).to(dtype)))
    out = ck.masked_conv2d(x, w.requires_grad_(), m)
    out.float().sum().backward()
    assert w.grad is not None
    assert w.grad.dtype == torch.float32


def test_autocast() -> None:
    x, w, m = torch.randn(2, 8, 6, 6), torch.randn(8, 8, 3, 3), torch.rand(8, 8, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = ck.masked_conv2d(x, w, m)
        linear = ck.masked_linear(x.flatten(1), torch.randn(3, 288), torch.ones(3, 1))
        wide = (
            ck.masked_conv2d(x.double(), w.double(), m),
            ck.masked_linear(x.double()[..., 0], T(3, 6), torch.ones(3, 1)),
        )
    assert linear.dtype == torch.bfloat16
    assert all(t.dtype == torch.float64 for t in wide)  # as torch's own layers
    assert torch.equal(out, F.conv2d(x.bfloat16(), (w * m).bfloat16()))


@pytest.mark.parametrize("shape", [(6, 1, 1, 1), (1, 4, 1, 1)], ids=["filter", "channel"])
def test_frozen_weight_passes_the_gradient_to_its_input(shape: tuple[int, ...]) -> None:
    x, w = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(6, 4, 3, 3)
    mask = (torch.arange(max(shape)) < 2).view(shape)  # few enough live channels to leave the dead ones out
    twin = x.detach().clone().requires_grad_()
    grad = torch.randn(2, 6, 6, 6)
    ck.masked_conv2d(x, w, mask).backward(grad)
    F.conv2d(twin, w * mask).backward(grad)
    assert x.grad is not None
    assert twin.grad is not None
    assert_close(x.grad, twin.grad)


def test_unusual_gradients_and_inputs() -> None:
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    w, m = torch.randn(6, 4, 3, 3, requires_grad=True), torch.rand(6, 4, 3, 3, requires_grad=True)
    ck.masked_conv2d(x, w, m, padding=1).sum().backward()  # a stride-0 gradient
    twin = [t.detach().clone().requires_grad_() for t in (x, w, m)]
    F.conv2d(twin[0], twin[1] * twin[2], padding=1).sum().backward()
    for a, b in zip((x, w, m), twin, strict=True):
        assert_close(a.grad, b.grad)  # type: ignore[arg-type]
    turned = torch.randn(8, 8, 4, 2).permute(3, 2, 0, 1)
    assert_close(ck.masked_conv2d(turned, w, m), F.conv2d(turned, w * m))
    assert ck.masked_conv2d(turned[0], w, m).shape == (6, 6, 6)


T = torch.randn
LAST = torch.channels_last
ONE_CHANNEL = torch.empty(
    2, 1, 6, 6, memory_format=LAST
).normal_()  # contiguous by its sizes, channels_last by its strides
PLAIN = ("plain", 0.1, 0.1, [], "global", 1, 0, None, 0)
OPCHECKS: dict[str, tuple[Any, tuple]] = {
    "masked_conv2d": (
        torch.ops.csam.masked_conv2d,
        (
            T(2, 4, 6, 6, requires_grad=True),
            T(6, 4, 3, 3, requires_grad=True),
            torch.rand(6, 4, 3, 3).requires_grad_(),
            T(6, requires_grad=True),
            [1, 1],
            [1, 1],
            [1, 1],
            1,
            0,
        ),
    ),
    "masked_conv2d-filter": (
        torch.ops.csam.masked_conv2d,
        (
            T(2, 4, 6, 6, requires_grad=True),
            T(6, 4, 3, 3, requires_grad=True),
            (torch.arange(6) > 3).view(6, 1, 1, 1),
            None,
            [2, 1],
            [1, 0],
            [1, 1],
            1,
            0,
        ),
    ),
    "masked_conv2d-one_channel": (
        torch.ops.csam.masked_conv2d,
        (ONE_CHANNEL, T(6, 1, 3, 3), (torch.arange(6) > 3).view(6, 1, 1, 1), None, [1, 1], [1, 1], [1, 1], 1, 0),
    ),
    "masked_conv2d-strided": (
        torch.ops.csam.masked_conv2d,
        (
            T(2, 4, 6, 12).to(memory_format=LAST)[..., ::2],
            T(6, 4, 3, 3),
            (torch.arange(4) > 2).view(1, 4, 1, 1),
            None,
            [1, 1],
            [1, 1],
            [1, 1],
            1,
            0,
        ),
    ),
    "masked_conv2d-backward": (
        torch.ops.csam.masked_conv2d_backward,
        (
            T(2, 6, 4, 4),
            T(2, 4, 6, 6),
            T(6, 4, 3, 3).to(memory_format=LAST),
            torch.rand(6, 4, 3, 3).to(memory_format=LAST),
            [1, 1],
            [0, 0],
            [1, 1],
            1,
            0,
            [True, True, True],
        ),
    ),
    "masked_linear": (
        torch.ops.csam.masked_linear,
        (
            T(3, 5, requires_grad=True),
            T(4, 5, requires_grad=True),
            torch.rand(1, 5).requires_grad_(),
            T(4, requires_grad=True),
            0,
        ),
    ),
    "effective_weights": (
        torch.ops.csam.effective_weights,
        (
            [T(4, 3), T(2, 3, 3, 3)],
            [torch.rand(4, 3), torch.rand(2, 1, 1, 1)],
            "plain",
            0.1,
            0.1,
            [],
            "global",
            1,
            0,
            torch.bfloat16,
            0,
        ),
    ),
    "effective_weights-transposed": (
        torch.ops.csam.effective_weights,
        ([T(3, 4).T, T(4, 3, 2, 2).mT], [torch.rand(4, 3), torch.rand(4, 3, 2, 2)], *PLAIN),
    ),
    "perturb_masks": (
        torch.ops.csam.perturb_masks,
        ([torch.rand(4, 3)], "adversarial", 0.1, 0.1, [T(4, 3)], "layer", 1, 0),
    ),
    "mask_gradients": (
        torch.ops.csam.mask_gradients,
        ([T(4, 3)], [T(4, 3)], [torch.rand(1, 3)], 0, True, True),
    ),
    "mask_gradients-channels_last": (
        torch.ops.csam.mask_gradients,
        (
            [T(4, 3, 2, 2)],
            [T(4, 3, 2, 2).to(memory_format=LAST)],
            [T(4, 3, 2, 2).to(memory_format=LAST)],
            0,
            True,
            True,
        ),
    ),
    "mask_gradients-transposed": (
        torch.ops.csam.mask_gradients,
        ([T(4, 3)], [T(3, 4).T], [torch.rand(3, 4).T], 0, True, True),
    ),
    "binarize": (torch.ops.csam.binarize, ([T(4, 3), T(7)], [9], "global")),
    "percentile_init": (torch.ops.csam.percentile_init, ([T(4, 3)], 0.9)),
    "smoothing_noise": (torch.ops.csam.smoothing_noise, (T(3, 4, 4), 5, 0.5, 1, 0, 0, torch.bfloat16, True, "laplace")),
    "grid_noise": (torch.ops.csam.grid_noise, (T(3, 4, 4).round(), 5, 0.5, 255, 1, 0, 0, torch.bfloat16, True)),
    "count_votes": (torch.ops.csam.count_votes, (T(9, 4), torch.zeros(4, dtype=torch.int64))),
    "discrepancy": (torch.ops.csam.discrepancy, (T(4), T(9, 4))),
    "semantic_batch": (
        torch.ops.csam.semantic_batch,
        (torch.rand(3, 4, 4), torch.tensor([ck.SEMANTIC_NEUTRAL] * 2)),
    ),
    "philox_uniform": (torch.ops.csam.philox_uniform, (4, 3, 1, 0, 0)),
    "sample_conv2d": (
        torch.ops.csam.sample_conv2d,
        (T(3, 5, 5, 8), *ck.compress(T(4, 3, 3, 3)), T(4), T(4, 3, 3, 8), [3, 3], [2, 2], [1, 1], [1, 1], True, True),
    ),
}


@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name: str) -> None:
    op, args = OPCHECKS[name]
    torch.library.opcheck(op, args)


def test_every_operation_is_opchecked() -> None:
    names = [*OPCHECKS, *test_inference_ops.OPCHECKS]
    assert {name.split("-")[0] for name in names} == set(ck.OPERATIONS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w, m: ck.masked_conv2d(x[:, :2], w, m), "x must have 4 channels"),
        (lambda x, w, m: ck.masked_conv2d(x, w, m[:, :2]), "mask must broadcast"),
        (lambda x, w, m: ck.masked_conv2d(x, w, m[0]), "mask must broadcast"),
        (lambda x, w, m: ck.masked_conv2d(x, w, m, torch.zeros(5)), "bias must have shape"),
        (lambda x, w, m: ck.masked_conv2d(x.long(), w, m), "x must have dtype"),
        (lambda x, w, m: ck.masked_conv2d(x, w, m, stride=0), "stride must be >= 1"),
        (lambda x, w, m: ck.masked_conv2d(x, w, m, padding="full"), "padding must be"),
        (lambda x, w, m: ck.masked_conv2d(x, w, m, padding="same", stride=2), "needs stride 1"),
        (lambda x, w, m: ck.masked_conv2d(x, w, m.to("meta")), "one device"),
        (lambda x, w, m: ck.masked_conv2d(x[..., :2], w, m), "too small along W"),
        (lambda x, w, m: ck.masked_conv2d(x.to_sparse(), w, m), "dense tensor"),
        (lambda x, w, m: ck.masked_linear(x, w[:, :, 0, 0], m[:, :, 0, 0]), "x must be"),
    ],
)
def test_bad_arguments(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((ValueError, TypeError), match=message):
        call(torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3), torch.rand(6, 4, 3, 3))
