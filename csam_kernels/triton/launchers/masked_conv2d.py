"""Launchers of the masked convolution: plans from shapes and strides (cached), then one to four launches.

Whatever follows from shapes, strides and dtypes is in a plan, so that a call only adds addresses. Nothing here reads a
value of a tensor.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csam_kernels.layout import MaskLayout, mask_layout, memory_format
from csam_kernels.triton import tuning
from csam_kernels.triton.kernels import masked_conv2d as kernels
from csam_kernels.triton.kernels import masked_depthwise as depthwise
from csam_kernels.triton.launch import LIMIT, launch

_Meta = tuple[torch.Size, tuple[int, ...], torch.dtype]
_Pair = tuple[int, int]
_WORD = 2**64 - 1
_CHUNK = 1024  # tiles that the list kernel looks at in one step


class Geometry(NamedTuple):
    """Sizes of one group, the mask's strides over the weight, and the constants of the kernels."""

    batch: int
    groups: int
    channels: int
    height: int
    width: int
    filters: int
    out_height: int
    out_width: int
    mask: dict[str, int]
    constants: dict[str, int]

    @property
    def taps(self) -> int:
        return self.constants["KERNEL_H"] * self.constants["KERNEL_W"]

    @property
    def cols(self) -> int:
        return self.channels * self.taps

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.groups * self.filters, self.out_height, self.out_width

    @property
    def flops(self) -> int:
        return 2 * math.prod(self.out_shape) * self.cols

    @property
    def depthwise(self) -> bool:
        return self.channels == 1 and self.groups > 1


class Plan(NamedTuple):
    """One launch over K-tiles: its grid and arguments, and the table of live tiles where one is used."""

    geometry: Geometry
    memory_format: torch.memory_format
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    rows: int
    tiles: int
    table: dict[str, Any] | None


def _meta(t: Tensor) -> _Meta:
    return t.shape, t.stride(), t.dtype


def _blocks(n: int, block: int) -> int:
    return -(-n // block)


def _refuse(**tensors: Tensor) -> None:
    for name, t in tensors.items():
        if t.dtype is torch.float64:
            raise TypeError(
                f"{name} must have dtype float32, bfloat16 or float16 on the GPU, got float64; "
                "cast it, or move all tensors to the CPU (CSAM_BACKEND=cpu or reference)"
            )


def _bounded(name: str, shape: torch.Size, stride: tuple[int, ...]) -> None:
    """Offsets inside an image or a weight, and a result like it, are 32-bit; only the batch is addressed with 64."""
    reach = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if max(reach, math.prod(shape)) >= 2**31:
        raise ValueError(
            f"{name} must hold and span fewer than 2^31 elements, got shape {tuple(shape)}, strides {stride}"
        )


def _strides(prefix: str, stride: tuple[int, ...], axes: str = "bchw") -> dict[str, int]:
    return {f"{prefix}_{axis}": step for axis, step in zip(axes, stride, strict=True)}


def _channels_last(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """torch's suggest_memory_format: strides that ascend in the order C, W, H, B."""
    least = 0
    if 0 in shape or stride[1] == 0:
        return False
    for axis in (1, 3, 2, 0):
        if stride[axis] < least or (axis == 0 and least == stride[1]):
            return False
        least = stride[axis] * max(shape[axis], 1)
    return True


def _suggested(x: _Meta, weight: _Meta, empty: bool) -> torch.memory_format:
    """The memory format that torch's convolution gives its results."""
    asks = not empty and (_channels_last(*x[:2]) or _channels_last(*weight[:2]))
    return torch.channels_last if asks else torch.contiguous_format


def _mask_strides(weight_shape: torch.Size, mask: _Meta, block: int) -> dict[str, int]:
    shape, stride, _ = mask
    if block:
        return {**_strides("m", (*stride, 0, 0), "ochw"), "block": block}
    steps = [0 if size == 1 else step for size, step in zip(shape, stride, strict=True)]
    return {**_strides("m", tuple(steps), "ochw"), "block": 1}


@lru_cache(4096)
def _geometry(
    x: _Meta, weight: _Meta, mask: _Meta, stride: _Pair, padding: _Pair, dilation: _Pair, groups: int, block: int
) -> Geometry:
    batch, _, height, width = x[0]
    filters, channels, kernel_h, kernel_w = weight[0]
    kernel = (kernel_h, kernel_w)
    out_height, out_width = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip((height, width), padding, dilation, kernel, stride, strict=True)
    )
    if batch * max(height * width, out_height * out_width) > LIMIT:
        raise ValueError(
            f"x must have at most 2^31 - 2^22 pixels in a batch, and its result too, got shape {tuple(x[0])}; "
            "split the batch"
        )
    _bounded("an image of x", x[0][1:], x[1][1:])
    _bounded("weight", *weight[:2])
    _bounded("mask", *mask[:2])
    constants = {"KERNEL": kernel, "STRIDE": stride, "PAD": padding, "DILATION": dilation}
    return Geometry(
        batch,
        groups,
        channels,
        height,
        width,
        filters // groups,
        out_height,
        out_width,
        _mask_strides(weight[0], mask, block),
        {f"{name}_{axis}": pair[i] for name, pair in constants.items() for i, axis in enumerate("HW")}
        | {"BLOCKED": bool(block)},
    )


def _tile(where: str, kernel: str, dtype: torch.dtype, rows: int) -> tuple[dict[str, int], dict[str, int]]:
    narrow, wide = tuning.MASKED_CONV2D[where][kernel, "float32" if dtype is torch.float32 else "half"]
    t = narrow if rows <= narrow.rows else wide
    columns, inner = ("BLOCK_C", "BLOCK_K") if kernel == "weight_gradient" else ("BLOCK_P", "BLOCK_K")
    return {"BLOCK_R": t.rows, columns: t.columns, inner: t.inner}, _options_of(t)


def _options_of(t: tuning.ConvTile) -> dict[str, int]:
    return {"num_warps": t.num_warps, "num_stages": t.num_stages, "maxnreg": t.maxnreg}


def _flat(x: _Meta, weight: _Meta) -> bool:
    """Take the weights of a filter in their own order: few channels, or neither operand has channels side by side."""
    _, channels, *kernel = weight[0]
    return math.prod(kernel) > 1 and (channels < 16 or (weight[1][1] != 1 and x[1][1] != 1))


def _precision(dtype: torch.dtype, convolution: bool) -> str:
    """TF32 where torch.set_float32_matmul_precision asks for it, for convolutions unless cuDNN's setting forbids it."""
    asked = dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    allowed = not convolution or torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if asked and allowed else "ieee"


def _table(
    g: Geometry, tile: dict[str, int], row_blocks: int, tiles: int, flat: bool, transposed: bool
) -> dict[str, Any]:
    return {
        "channels": g.channels,
        "filters": g.filters,
        **g.mask,
        "row_blocks": row_blocks,
        "tiles": tiles,
        **g.constants,
        "FLAT": flat,
        "TRANSPOSED": transposed,
        "BLOCK_R": tile["BLOCK_R"],
        "BLOCK_K": tile["BLOCK_K"],
    }


@lru_cache(4096)
def _forward_plan(
    where: str, x: _Meta, weight: _Meta, mask: _Meta, dtype: torch.dtype, options: Any, direct: bool = True
) -> Plan:
    g = _geometry(x, weight, mask, *options)
    suggested = _suggested(x, weight, 0 in g.out_shape)
    out = torch.empty(g.out_shape, device="meta", memory_format=suggested)
    _bounded("an image of the result", out.shape[1:], out.stride()[1:])
    pixels = g.batch * g.out_height * g.out_width
    common = {
        "pixels": pixels,
        "height": g.height,
        "width": g.width,
        "out_height": g.out_height,
        "out_width": g.out_width,
        **_strides("x", x[1]),
        **_strides("w", weight[1], "ochw"),
        **g.mask,
        **_strides("out", out.stride()),
        **g.constants,
    }
    if g.depthwise and direct:
        t = tuning.DEPTHWISE[suggested is torch.channels_last]
        filters = g.groups * g.filters
        rows = _blocks(filters, t.rows)
        common |= {"filters": filters, "multiplier": g.filters, "rows": rows, "BLOCK_R": t.rows, "BLOCK_P": t.columns}
        common |= _options_of(t)
        return Plan(g, suggested, (rows * _blocks(pixels, t.columns),), common, rows, 0, None)
    tile, launching = _tile(where, "forward" if direct else "noise", dtype, g.filters)
    flat = _flat(x, weight)
    row_blocks = _blocks(g.filters, tile["BLOCK_R"])
    rows = g.groups * row_blocks
    inner = tile["BLOCK_K"]
    tiles = _blocks(g.cols, inner) if flat else g.taps * _blocks(g.channels, inner)
    columns = _blocks(pixels, tile["BLOCK_P"])
    listed = columns >= tuning.LISTED_FROM
    common |= {"channels": g.channels, "filters": g.filters, "row_blocks": row_blocks, "rows": rows, "tiles": tiles}
    common |= {"FLAT": flat, "LISTED": listed, **tile, **launching}
    table = _table(g, tile, row_blocks, tiles, flat, False)
    return Plan(g, suggested, (rows * columns,), common, rows, tiles, table)


def _live_tiles(mask: Tensor, plan: Plan) -> Tensor:
    """The table of `plan`: int32, live tiles [rows, tiles], then counts [rows], then the flags they come from."""
    rows, tiles, table = plan.rows, plan.tiles, plan.table
    size = rows * tiles
    out = torch.empty(2 * size + rows, dtype=torch.int32, device=mask.device)
    flags = out[size + rows :]
    launch(
        kernels.tile_flags_kernel,
        (size,),
        reads=[mask],
        writes=[flags],
        mask_ptr=mask,
        flags_ptr=flags,
        **(table or {}),
    )
    launch(
        kernels.tile_list_kernel,
        (rows,),
        reads=[flags],
        writes=[4 * (size + rows)],
        flags_ptr=flags,
        tiles_ptr=out,
        counts_ptr=out[size:],
        tiles=tiles,
        CHUNK=_CHUNK,
    )
    return out


def _table_pointers(plan: Plan, tiles: Tensor | None, unused: Tensor) -> tuple[list[int], dict[str, Any]]:
    """Bytes that reading a table costs, and the pointers to its parts; without one any pointer will do."""
    if tiles is None:
        return [], {"tiles_ptr": unused, "counts_ptr": unused}
    size = plan.rows * plan.tiles
    return [4 * (size + plan.rows)], {"tiles_ptr": tiles, "counts_ptr": tiles[size:]}


def _options(stride: Any, padding: Any, dilation: Any, groups: int, block_size: int) -> tuple[Any, ...]:
    return tuple(stride), tuple(padding), tuple(dilation), groups, block_size


def _raw(mask: Tensor) -> Tensor:
    return mask.view(torch.uint8) if mask.dtype is torch.bool else mask


def _forward(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    options: tuple[Any, ...],
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
    tiles: Tensor | None = None,
    convolution: bool = True,
    noise: dict[str, Any] | None = None,
    samples: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    _refuse(x=x, weight=weight, mask=mask)
    dtype, mask = dtype or x.dtype, _raw(mask)
    x_meta = _meta(x) if noise is None else (torch.Size((samples, *x.shape)), (0, *x.stride()), dtype)
    where = tuning.device_class(x.device)
    plan = _forward_plan(where, x_meta, _meta(weight), _meta(mask), dtype, options, noise is None)
    g = plan.geometry
    out = torch.empty(g.out_shape, dtype=dtype, device=x.device, memory_format=plan.memory_format)
    epilogue = {
        "bias_ptr": x if bias is None else bias,
        "scale_ptr": x if scale is None else scale,
        "shift_ptr": x if shift is None else shift,
        "HAS_BIAS": bias is not None,
        "HAS_SCALE": scale is not None,
        "RELU": relu,
    }
    arguments = {"x_ptr": x, "weight_ptr": weight, "mask_ptr": mask, "out_ptr": out, **epilogue, **plan.arguments}
    reads = [x, weight, mask, *(t for t in (bias, scale, shift) if t is not None)]
    if plan.table is None:
        launch(depthwise.depthwise_kernel, plan.grid, reads=reads, writes=[out], flops=g.flops, **arguments)
        return out
    if tiles is not None:
        arguments["LISTED"] = True
    elif arguments["LISTED"] and all(plan.grid):
        tiles = _live_tiles(mask, plan)
    listed, pointers = _table_pointers(plan, tiles, mask)
    launch(
        kernels.masked_conv2d_kernel,
        plan.grid,
        reads=[*reads, *listed],
        writes=[out],
        flops=g.flops,
        **pointers,
        PRECISION=_precision(dtype, convolution),
        **(noise or {"sigma": 0.0, "seed": 0, "first_sample": 0, "stream_word": 0, "NOISE": False}),
        **arguments,
    )
    return out


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    block_size: int,
) -> Tensor:
    return _forward(x, weight, mask, bias, _options(stride, padding, dilation, groups, block_size))


def masked_conv2d_inference(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    dilation: Any = (1, 1),
    groups: int = 1,
    block_size: int = 0,
    tiles: Tensor | None = None,
) -> Tensor:
    """relu((conv2d(x, weight * mask) + bias) * scale + shift) in one kernel, without gradients.

    Args:
        x: [B, C, H, W]; weight, mask, bias, stride, ..., block_size: as the provider's masked_conv2d.
        scale, shift: [O], a batch norm folded to y * scale + shift; both or none.
        relu: clip at zero.
        tiles: what `live_tiles` gave for this mask, to look for dead tiles once and not every call.

    Returns:
        [B, O, H', W'] in x's dtype.
    """
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must be given together")
    options = _options(stride, padding, dilation, groups, block_size)
    return _forward(x, weight, mask, bias, options, scale=scale, shift=shift, relu=relu, tiles=tiles)


def live_tiles(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    dilation: Any = (1, 1),
    groups: int = 1,
    block_size: int = 0,
) -> Tensor | None:
    """Table of the live tiles of a mask that will not change, for any batch of images like x; None if depthwise.

    Who holds the table answers for the mask: a write to it that this library cannot see makes the table wrong.
    """
    options = _options(stride, padding, dilation, groups, block_size)
    mask = _raw(mask)
    plan = _forward_plan(tuning.device_class(x.device), _meta(x), _meta(weight), _meta(mask), x.dtype, options)
    return None if plan.table is None else _live_tiles(mask, plan)


def smoothing_conv2d(
    x: Tensor,
    n: int,
    sigma: float,
    seed: int,
    first_sample: int,
    stream: int,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    dilation: Any = (1, 1),
    groups: int = 1,
    block_size: int = 0,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
    dtype: torch.dtype | None = None,
    tiles: Tensor | None = None,
) -> Tensor:
    """masked_conv2d_inference of smoothing_noise(x, n, sigma, ..., dtype) without the noisy batch in memory.

    Each program draws the noise of the pixels that it loads, so a sample's deviates are drawn once for every tap and
    block of filters: memory is saved, not arithmetic.

    Args:
        x: image [C, H, W]; n, sigma, seed, first_sample, stream, dtype: as smoothing_noise.

    Returns:
        [n, O, H', W'] in `dtype`.
    """
    noise = {"sigma": sigma, "seed": seed & _WORD, "first_sample": first_sample, "stream_word": stream, "NOISE": True}
    options = _options(stride, padding, dilation, groups, block_size)
    return _forward(
        x,
        weight,
        mask,
        bias,
        options,
        scale=scale,
        shift=shift,
        relu=relu,
        tiles=tiles,
        noise=noise,
        samples=n,
        dtype=dtype or x.dtype,
    )


@lru_cache(4096)
def _input_plan(where: str, grad: _Meta, x: _Meta, weight: _Meta, mask: _Meta, options: Any) -> Plan:
    g = _geometry(x, weight, mask, *options)
    suggested = _suggested(x, weight, 0 in g.out_shape)
    out = torch.empty(x[0], device="meta", memory_format=suggested)
    _bounded("an image of the gradient", grad[0][1:], grad[1][1:])
    stride_h, stride_w = g.constants["STRIDE_H"], g.constants["STRIDE_W"]
    common = {
        "height": g.height,
        "width": g.width,
        "out_height": g.out_height,
        "out_width": g.out_width,
        **_strides("g", grad[1]),
        **_strides("w", weight[1], "ochw"),
        **g.mask,
        **_strides("out", out.stride()),
        **g.constants,
    }
    if g.depthwise:
        t = tuning.DEPTHWISE[suggested is torch.channels_last]
        pixels = g.batch * g.height * g.width
        rows = _blocks(g.groups, t.rows)
        common |= {"pixels": pixels, "channels": g.groups, "multiplier": g.filters, "rows": rows}
        common |= {"BLOCK_R": t.rows, "BLOCK_P": t.columns, **_options_of(t)}
        return Plan(g, suggested, (rows * _blocks(pixels, t.columns),), common, rows, 0, None)
    tile, launching = _tile(where, "input_gradient", grad[2], g.channels)
    row_blocks = _blocks(g.channels, tile["BLOCK_R"])
    rows = g.groups * stride_h * stride_w * row_blocks
    tiles = g.taps * _blocks(g.filters, tile["BLOCK_K"])
    pixels = g.batch * _blocks(g.height, stride_h) * _blocks(g.width, stride_w)
    columns = _blocks(pixels, tile["BLOCK_P"])
    common |= {"batch": g.batch, "channels": g.channels, "filters": g.filters, "row_blocks": row_blocks, "rows": rows}
    common |= {"tiles": tiles, "LISTED": columns >= tuning.LISTED_FROM, **tile, **launching}
    return Plan(g, suggested, (rows * columns,), common, rows, tiles, _table(g, tile, row_blocks, tiles, False, True))


def _input_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, options: tuple[Any, ...], convolution: bool
) -> Tensor:
    where = tuning.device_class(x.device)
    plan = _input_plan(where, _meta(grad), _meta(x), _meta(weight), _meta(mask), options)
    if not x.numel():
        return torch.empty_like(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=plan.memory_format)
    arguments = {"grad_ptr": grad, "weight_ptr": weight, "mask_ptr": mask, "out_ptr": out, **plan.arguments}
    reads, flops = [grad, weight, mask], plan.geometry.flops
    if plan.geometry.depthwise:
        kernel = depthwise.depthwise_input_gradient_kernel
        launch(kernel, plan.grid, reads=reads, writes=[out], flops=flops, **arguments)
        return out
    tiles = _live_tiles(mask, plan) if arguments["LISTED"] and all(plan.grid) else None
    listed, pointers = _table_pointers(plan, tiles, mask)
    launch(
        kernels.masked_conv2d_input_gradient_kernel,
        plan.grid,
        reads=[*reads, *listed],
        writes=[out],
        flops=flops,
        **pointers,
        PRECISION=_precision(x.dtype, convolution),
        **arguments,
    )
    return out


class WeightPlan(NamedTuple):
    """The weight's gradient: its launch, how the pixels are split, and how G becomes the mask's gradient."""

    geometry: Geometry
    grid: tuple[int, int]
    arguments: dict[str, Any]
    segments: int  # mask values of a filter
    span: int  # consecutive weights that share one
    per_filter: bool  # else the mask's gradient is a sum over filters
    whole: bool  # a broadcast with no such form: dmask is summed from the gradient of a full mask
    alike: bool  # weight and mask are both channels_last, and so are their gradients


def _segments(weight: _Meta, mask: _Meta, block: int, need_mask: bool) -> tuple[int, int, bool, bool]:
    layout = mask_layout(weight[0], mask[0], block)
    if layout is None or not need_mask:
        layout, whole = MaskLayout(weight[0][0], math.prod(weight[0][1:]), 1, 1, 1), need_mask
    else:
        whole = False
    segments = _blocks(layout.cols, layout.span) if layout.col_stride else 1
    return segments, layout.span, layout.row_stride > 0, whole


@lru_cache(4096)
def _weight_plan(
    where: str, grad: _Meta, x: _Meta, weight: _Meta, dweight: _Meta, mask: _Meta, options: Any, need_mask: bool
) -> WeightPlan:
    g = _geometry(x, weight, mask, *options)
    _bounded("an image of the gradient", grad[0][1:], grad[1][1:])
    pixels = g.batch * g.out_height * g.out_width
    common: dict[str, Any] = {
        "pixels": pixels,
        "height": g.height,
        "width": g.width,
        "filters": g.filters,
        "out_height": g.out_height,
        "out_width": g.out_width,
        **_strides("g", grad[1]),
        **_strides("x", x[1]),
        **g.constants,
    }
    mapping = _segments(weight, mask, options[-1], need_mask)
    dense = torch.empty_strided(*weight[:2], device="meta")
    alike = weight[:2] == mask[:2] and memory_format(dense) is torch.channels_last
    if g.depthwise:
        t = tuning.DEPTHWISE[_channels_last(*x[:2])]
        filters = g.groups * g.filters
        programs, step = g.taps * _blocks(filters, t.rows), t.columns
        del common["BLOCKED"]
        common |= {"filters": filters, "multiplier": g.filters, "BLOCK_R": t.rows, "BLOCK_P": t.columns}
        common |= _options_of(t)
    else:
        tile, launching = _tile(where, "weight_gradient", x[2], g.filters)
        row_blocks, step = _blocks(g.filters, tile["BLOCK_R"]), tile["BLOCK_K"]
        flat = g.taps > 1 and (g.channels < 16 or x[1][1] != 1)
        block_c = tile["BLOCK_C"]
        columns = _blocks(g.cols, block_c) if flat else g.taps * _blocks(g.channels, block_c)
        programs = g.groups * row_blocks * columns
        common |= {
            "channels": g.channels,
            **_strides("w", weight[1], "ochw"),
            **g.mask,
            **_strides("dw", dweight[1], "ochw"),
            "row_blocks": row_blocks,
            "column_blocks": columns,
            "groups": g.groups,
            "FLAT": flat,
            **tile,
            **launching,
        }
    parts = min(_blocks(tuning.PROGRAMS[where], max(programs, 1)), _blocks(pixels, max(tuning.SPLIT_PIXELS, step)))
    common["split_pixels"] = _blocks(_blocks(pixels, max(parts, 1)), step) * step
    parts = max(_blocks(pixels, max(common["split_pixels"], 1)), 1)
    return WeightPlan(g, (programs, parts), common, *mapping, alike)


def masked_conv2d_weight_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    options: tuple[Any, ...],
    need_weight: bool,
    need_mask: bool,
    convolution: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dweight (in weight's dtype and memory format), dL/dmask and parts [*] whose sum is its squared norm.

    G = dL/dW is formed once. With one part of pixels and a mask that has one value a weight it stays in registers;
    otherwise a second launch adds the parts up in their order. What is not needed is undefined.
    """
    where = tuning.device_class(x.device)
    dweight = torch.empty_like(weight, memory_format=memory_format(weight))
    full, mask = mask, _raw(mask)
    metas = (_meta(grad), _meta(x), _meta(weight), _meta(dweight), _meta(mask))
    plan = _weight_plan(where, *metas, options, need_mask)
    g, arguments, device = plan.geometry, plan.arguments, x.device
    filters = g.groups * g.filters
    if need_mask and plan.per_filter and not plan.whole:
        lies = torch.channels_last if plan.alike else torch.contiguous_format
        dmask = torch.empty(mask.shape, dtype=mask.dtype, device=device, memory_format=lies)
    else:  # its sums come later
        dmask = torch.empty(filters * plan.segments if need_mask else 0, dtype=torch.float32, device=device)
    parts = plan.grid[1]
    partial = g.depthwise or parts > 1 or plan.span > 1 or not plan.per_filter
    workspace = torch.empty(parts * filters * g.cols if partial else 0, dtype=torch.float32, device=device)
    blocks = (1, 1, 1)
    if partial:
        inner = min(1 << (plan.span - 1).bit_length(), 1024)
        outer = min(1024 // inner, 1 << (plan.segments - 1).bit_length())
        blocks = (_blocks(plan.segments, outer), outer, inner)
    squares = torch.empty(filters * blocks[0] if partial else plan.grid[0], dtype=torch.float32, device=device)
    if g.depthwise:
        kernel = depthwise.depthwise_weight_gradient_kernel
        pointers: dict[str, Any] = {"grad_ptr": grad, "x_ptr": x, "partial_ptr": workspace}
        launch(kernel, plan.grid, reads=[grad, x], writes=[workspace], flops=g.flops, **pointers, **arguments)
    else:
        results = [workspace] if partial else [dweight] * need_weight + [dmask, squares] * need_mask
        launch(
            kernels.masked_conv2d_weight_gradient_kernel,
            plan.grid,
            reads=[grad, x, *([] if need_mask and partial else [mask]), *([weight] * (need_mask and not partial))],
            writes=results,
            flops=g.flops,
            grad_ptr=grad,
            x_ptr=x,
            weight_ptr=weight,
            mask_ptr=mask,
            dweight_ptr=dweight,
            dmask_ptr=dmask,
            squares_ptr=squares,
            partial_ptr=workspace,
            PARTIAL=partial,
            NEED_WEIGHT=need_weight,
            NEED_MASK=need_mask,
            ALIKE=plan.alike,
            PRECISION=_precision(x.dtype, convolution),
            **arguments,
        )
    if partial:
        launch(
            kernels.finish_gradients_kernel,
            (filters * blocks[0],),
            reads=[workspace] + [mask] * need_weight + [weight] * need_mask,
            writes=[dweight] * need_weight + [dmask, squares] * need_mask,
            partial_ptr=workspace,
            weight_ptr=weight,
            mask_ptr=mask,
            dweight_ptr=dweight,
            dmask_ptr=dmask,
            squares_ptr=squares,
            filters=filters,
            cols=g.cols,
            parts=parts,
            **_strides("w", weight.stride(), "ochw"),
            **g.mask,
            **_strides("dw", dweight.stride(), "ochw"),
            segments=plan.segments,
            segment_blocks=blocks[0],
            span=plan.span,
            **{name: g.constants[name] for name in ("KERNEL_H", "KERNEL_W", "BLOCKED")},
            NEED_WEIGHT=need_weight,
            NEED_MASK=need_mask,
            ALIKE=plan.alike,
            BLOCK_S=blocks[1],
            BLOCK_J=blocks[2],
            **tuning.FINISH[plan.alike],
        )
    if not need_mask:
        return dweight, dmask, squares[:0]
    if plan.whole:
        dmask = dmask.view(weight.shape).sum_to_size(full.shape)
        return dweight, dmask.to(full.dtype), dmask.square().sum()[None]
    if not plan.per_filter:
        return dweight, *_sum_rows(dmask.view(filters, -1), full)
    return dweight, dmask, squares


def _sum_rows(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(mask.shape, dtype=mask.dtype, device=rows.device)
    block = 32
    squares = torch.empty(_blocks(rows.shape[1], block), dtype=torch.float32, device=rows.device)
    launch(
        kernels.sum_rows_kernel,
        (len(squares),),
        reads=[rows],
        writes=[out, squares],
        rows_ptr=rows,
        out_ptr=out,
        squares_ptr=squares,
        rows=rows.shape[0],
        cols=rows.shape[1],
        BLOCK_R=32,
        BLOCK_C=block,
    )
    return out, squares


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    options: tuple[Any, ...],
    need: list[bool],
    convolution: bool = True,
) -> list[Tensor]:
    _refuse(grad=grad, x=x, weight=weight, mask=mask)
    need_x, need_weight, need_mask = need
    grads = [_input_gradient(grad, x, weight, _raw(mask), options, convolution)] if need_x else []
    if need_weight or need_mask:
        both = masked_conv2d_weight_gradients(grad, x, weight, mask, options, need_weight, need_mask, convolution)
        grads += [t for t, wanted in zip(both, (need_weight, need_mask), strict=False) if wanted]
    return grads


def masked_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    block_size: int,
    need: list[bool],
) -> list[Tensor]:
    return _backward(grad, x, weight, mask, _options(stride, padding, dilation, groups, block_size), need)
