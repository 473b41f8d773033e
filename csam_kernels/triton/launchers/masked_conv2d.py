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
from torch._prims_common import are_strides_like_channels_last_or_false as channels_last  # as in csam_kernels.cpu

from csam_kernels.checks import no_float64
from csam_kernels.layout import MaskLayout, conv2d_size, mask_layout, memory_format
from csam_kernels.triton import tuning
from csam_kernels.triton.kernels import masked_conv2d as kernels
from csam_kernels.triton.kernels import masked_depthwise as depthwise
from csam_kernels.triton.launch import LIMIT, launch
from csam_kernels.triton.launchers.smoothing_noise import smoothing_noise

_Meta = tuple[torch.Size, tuple[int, ...], torch.dtype]
_Pair = tuple[int, int]
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
    dtype: torch.dtype
    table: dict[str, Any] | None

    @property
    def packs(self) -> int:
        """Blocks of rows that have weights of their own: those of the pixels' residues share them."""
        strides = self.geometry.constants["STRIDE_H"] * self.geometry.constants["STRIDE_W"]
        return self.rows // strides if self.table and self.table["TRANSPOSED"] else self.rows

    @property
    def parts(self) -> tuple[int, int, int]:
        """Words in a table: the packed weights, the lists with their lengths, the flags."""
        a_tile = self.arguments["BLOCK_R"] * self.arguments["BLOCK_K"] * self.dtype.itemsize // 4
        return self.packs * self.tiles * a_tile, self.rows * (self.tiles + 1), self.rows * self.tiles


def _meta(t: Tensor) -> _Meta:
    return t.shape, t.stride(), t.dtype


def _blocks(n: int, block: int) -> int:
    return -(-n // block)


def _bounded(name: str, shape: torch.Size, stride: tuple[int, ...]) -> None:
    """Offsets inside an image or a weight, and a result like it, are 32-bit; only the batch is addressed with 64."""
    reach = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if max(reach, math.prod(shape)) >= 2**31:
        raise ValueError(
            f"{name} must hold and span fewer than 2^31 elements, got shape {tuple(shape)}, strides {stride}"
        )


def _strides(prefix: str, stride: tuple[int, ...], axes: str = "bchw") -> dict[str, int]:
    return {f"{prefix}_{axis}": step for axis, step in zip(axes, stride, strict=True)}


def _suggested(x: _Meta, weight: _Meta, empty: bool) -> torch.memory_format:
    """The memory format that torch's convolution gives its results."""
    asks = not empty and (channels_last(*x[:2]) or channels_last(*weight[:2]))
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
    filters, channels, *kernel = weight[0]
    out_height, out_width = conv2d_size((height, width), kernel, stride, padding, dilation)
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


def _tile(
    where: str, kernel: str, dtype: torch.dtype, rows: int, columns: int
) -> tuple[dict[str, int], dict[str, int]]:
    t = tuning.tile(where, kernel, "float32" if dtype is torch.float32 else "half", rows, columns)
    across = "BLOCK_C" if kernel.endswith("weight_gradient") else "BLOCK_P"
    return {"BLOCK_R": t.rows, across: t.columns, "BLOCK_K": t.inner}, _options_of(t)


def _options_of(t: tuning.ConvTile) -> dict[str, int]:
    return {"num_warps": t.num_warps, "num_stages": t.num_stages, "maxnreg": t.maxnreg}


def _flat(x: _Meta | None, weight: _Meta) -> bool:
    """Take the weights of a filter in their own order: few channels, or neither operand has channels side by side."""
    _, channels, *kernel = weight[0]
    apart = weight[1][1] != 1 and (x is None or x[1][1] != 1)
    return math.prod(kernel) > 1 and (channels < 16 or apart)


def _precision(dtype: torch.dtype, convolution: bool) -> str:
    """TF32 where torch.set_float32_matmul_precision asks for it, for convolutions unless cuDNN's setting forbids it."""
    asked = dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    allowed = not convolution or torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if asked and allowed else "ieee"


def _table(
    g: Geometry,
    weight: _Meta,
    tile: dict[str, int],
    row_blocks: int,
    tiles: int,
    flat: bool,
    transposed: bool,
) -> dict[str, Any]:
    return {
        "channels": g.channels,
        "filters": g.filters,
        **_strides("w", weight[1], "ochw"),
        **g.mask,
        "row_blocks": row_blocks,
        "tiles": tiles,
        **g.constants,
        "FLAT": flat,
        "TRANSPOSED": transposed,
        "BLOCK_R": tile["BLOCK_R"],
        "BLOCK_K": tile["BLOCK_K"],
        "num_warps": 8,
    }


@lru_cache(4096)
def _forward_plan(
    where: str,
    x: _Meta,
    weight: _Meta,
    mask: _Meta,
    dtype: torch.dtype,
    options: Any,
    given: bool = False,
) -> Plan:
    """A convolution of images like x; `given`: by a table of `live_tiles`."""
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
    if g.depthwise:
        t = tuning.DEPTHWISE[suggested is torch.channels_last]
        filters = g.groups * g.filters
        rows = _blocks(filters, t.rows)
        common |= {"filters": filters, "multiplier": g.filters, "rows": rows, "BLOCK_R": t.rows, "BLOCK_P": t.columns}
        common |= _options_of(t)
        return Plan(g, suggested, (rows * _blocks(pixels, t.columns),), common, rows, 0, dtype, None)
    tile, launching = _tile(where, "forward", dtype, g.filters, pixels)
    flat = _flat(None if given else x, weight)
    row_blocks = _blocks(g.filters, tile["BLOCK_R"])
    rows = g.groups * row_blocks
    inner = tile["BLOCK_K"]
    tiles = _blocks(g.cols, inner) if flat else g.taps * _blocks(g.channels, inner)
    columns = _blocks(pixels, tile["BLOCK_P"])
    listed = given or columns >= tuning.LISTED_FROM
    common |= {"channels": g.channels, "filters": g.filters, "row_blocks": row_blocks, "rows": rows, "tiles": tiles}
    common |= {"FLAT": flat, "LISTED": listed, **tile, **launching}
    table = _table(g, weight, tile, row_blocks, tiles, flat, False)
    return Plan(g, suggested, (rows * columns,), common, rows, tiles, dtype, table)


def _live_tiles(weight: Tensor, mask: Tensor, plan: Plan) -> Tensor:
    """The table of `plan`, int32 [sum(plan.parts)]: weight * mask tile by tile in the plan's dtype, the live tiles of
    each row and how many each has, and the flags that they come from."""
    rows, tiles, (packed, listed, flagged) = plan.rows, plan.tiles, plan.parts
    out = torch.empty(packed + listed + flagged, dtype=torch.int32, device=mask.device)
    flags = out[packed + listed :]
    steps = 1 if plan.arguments.get("FLAT") else plan.geometry.constants["KERNEL_W"]
    launch(
        kernels.pack_tiles_kernel,
        (plan.packs * (tiles // steps),),
        reads=[weight, mask],
        writes=[4 * packed, flags],
        weight_ptr=weight,
        mask_ptr=mask,
        packed_ptr=out[:packed].view(plan.dtype),
        flags_ptr=flags,
        **(plan.table or {}),
    )
    launch(
        kernels.tile_list_kernel,
        (rows,),
        reads=[flags],
        writes=[4 * listed],
        flags_ptr=flags,
        tiles_ptr=out[packed:],
        counts_ptr=out[packed + rows * tiles :],
        tiles=tiles,
        CHUNK=_CHUNK,
    )
    return out


def _table_pointers(
    plan: Plan, tiles: Tensor | None, weight: Tensor, mask: Tensor
) -> tuple[list[Tensor | int], dict[str, Any]]:
    """What is read for the weights, and the pointers to a table's parts; without one any pointer will do."""
    if tiles is None:
        return [weight, mask], {"packed_ptr": mask, "tiles_ptr": mask, "counts_ptr": mask}
    packed, listed, _ = plan.parts
    words = tiles[:packed].view(plan.dtype)
    counts = tiles[packed + plan.rows * plan.tiles :]
    return [4 * (packed + listed)], {"packed_ptr": words, "tiles_ptr": tiles[packed:], "counts_ptr": counts}


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
    other: Tensor | None = None,
    relu: bool = False,
    tiles: Tensor | None = None,
    convolution: bool = True,
) -> Tensor:
    no_float64(x=x, weight=weight, mask=mask)
    dtype, mask = x.dtype, _raw(mask)
    where = tuning.device_class(x.device)
    plan = _forward_plan(where, _meta(x), _meta(weight), _meta(mask), dtype, options, tiles is not None)
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
    reads = [x, *(t for t in (bias, scale, shift) if t is not None)]
    if plan.table is None:
        reads += [weight, mask]
        launch(depthwise.depthwise_kernel, plan.grid, reads=reads, writes=[out], flops=g.flops, **arguments)
        return out
    if tiles is None:
        tiles = _live_tiles(weight, mask, plan) if arguments["LISTED"] and all(plan.grid) else None
    elif tiles.shape != (sum(plan.parts),):
        raise ValueError(
            f"tiles must be the table that live_tiles gives for this weight and dtype, "
            f"int32 {[sum(plan.parts)]}, got shape {list(tiles.shape)}"
        )
    if other is not None:
        other = other.contiguous(memory_format=plan.memory_format)
        reads.append(other)
    weights, pointers = _table_pointers(plan, tiles, weight, mask)
    launch(
        kernels.masked_conv2d_kernel,
        plan.grid,
        reads=[*reads, *weights],
        writes=[out],
        flops=g.flops,
        **pointers,
        PRECISION=_precision(dtype, convolution),
        other_ptr=out if other is None else other,
        HAS_OTHER=other is not None,
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
    other: Tensor | None = None,
    tiles: Tensor | None = None,
) -> Tensor:
    """One kernel; depthwise layers add `other` in another."""
    if other is not None and groups > 1 and weight.shape[1] == 1:
        window = (stride, padding, dilation, groups, block_size)
        out = masked_conv2d_inference(x, weight, mask, bias, scale, shift, False, *window).add_(other)
        return out.relu_() if relu else out
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must be given together")
    options = _options(stride, padding, dilation, groups, block_size)
    return _forward(x, weight, mask, bias, options, scale=scale, shift=shift, other=other, relu=relu, tiles=tiles)


def live_tiles(weight: Tensor, mask: Tensor, dtype: torch.dtype, groups: int = 1, block_size: int = 0) -> Tensor | None:
    options = _options((1, 1), (0, 0), (1, 1), groups, block_size)
    mask, (channels, *kernel) = _raw(mask), weight.shape[1:]
    x = torch.empty((1, channels * groups, *kernel), dtype=dtype, device="meta")
    no_float64(x=x, weight=weight, mask=mask)
    where = tuning.device_class(weight.device)
    plan = _forward_plan(where, _meta(x), _meta(weight), _meta(mask), dtype, options, True)
    return None if plan.table is None else _live_tiles(weight, mask, plan)


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
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
    dtype: torch.dtype | None = None,
    tiles: Tensor | None = None,
) -> Tensor:
    """Two kernels: the batch between them, a few bytes a pixel, stays in the L2 cache. Drawn in the convolution's load
    path, a deviate was drawn again for every tap that reads it, which took twice as long in all (H200)."""
    options, normalization = (stride, padding, dilation, groups, block_size), (input_scale, input_shift)
    noise = (n, sigma, seed, first_sample, stream, dtype or x.dtype, memory_format(weight), "gaussian", *normalization)
    batch = smoothing_noise(x, *noise)
    return masked_conv2d_inference(batch, weight, mask, bias, scale, shift, relu, *options, None, tiles)


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
        return Plan(g, suggested, (rows * _blocks(pixels, t.columns),), common, rows, 0, grad[2], None)
    pixels = g.batch * _blocks(g.height, stride_h) * _blocks(g.width, stride_w)
    tile, launching = _tile(where, "input_gradient", grad[2], g.channels, pixels * stride_h * stride_w)
    row_blocks = _blocks(g.channels, tile["BLOCK_R"])
    rows = g.groups * stride_h * stride_w * row_blocks
    tiles = g.taps * _blocks(g.filters, tile["BLOCK_K"])
    columns = _blocks(pixels, tile["BLOCK_P"])
    common |= {"batch": g.batch, "channels": g.channels, "filters": g.filters, "row_blocks": row_blocks, "rows": rows}
    common |= {"tiles": tiles, "LISTED": columns >= tuning.LISTED_FROM, **tile, **launching}
    table = _table(g, weight, tile, row_blocks, tiles, False, True)
    return Plan(g, suggested, (rows * columns,), common, rows, tiles, grad[2], table)


def _input_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, options: tuple[Any, ...], convolution: bool
) -> Tensor:
    where = tuning.device_class(x.device)
    plan = _input_plan(where, _meta(grad), _meta(x), _meta(weight), _meta(mask), options)
    if not x.numel():
        return torch.empty_like(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=plan.memory_format)
    arguments = {"grad_ptr": grad, "weight_ptr": weight, "mask_ptr": mask, "out_ptr": out, **plan.arguments}
    flops = plan.geometry.flops
    if plan.geometry.depthwise:
        kernel = depthwise.depthwise_input_gradient_kernel
        launch(kernel, plan.grid, reads=[grad, weight, mask], writes=[out], flops=flops, **arguments)
        return out
    tiles = _live_tiles(weight, mask, plan) if arguments["LISTED"] and all(plan.grid) else None
    weights, pointers = _table_pointers(plan, tiles, weight, mask)
    launch(
        kernels.masked_conv2d_input_gradient_kernel,
        plan.grid,
        reads=[grad, *weights],
        writes=[out],
        flops=flops,
        **pointers,
        PRECISION=_precision(x.dtype, convolution),
        **arguments,
    )
    return out


class WeightPlan(NamedTuple):
    """The weight's gradient: its launch over tiles and parts of the pixels, and how the mask lies over the weight."""

    geometry: Geometry
    grid: tuple[int, int]
    arguments: dict[str, Any]
    rows: int  # blocks of filters; tiles of G are rows * columns
    columns: int
    numbers: int  # in a tile
    layout: MaskLayout | None  # None: no mask gradient, or a broadcast with no such form
    alike: bool  # weight and mask are both channels_last, and so are their gradients

    @property
    def direct(self) -> bool:
        """The kernel writes the mask's gradient."""
        sums, layout = self.arguments["SUMS"], self.layout
        return sums == "rows" or (sums == "none" and layout is not None and layout.span == 1)


def _sums(layout: MaskLayout | None) -> str:
    """Over what the kernel adds up G * theta."""
    if layout is None or (layout.row_stride and (layout.span == 1 or layout.col_stride)):
        return "none"
    return "rows" if layout.row_stride else "columns"


@lru_cache(4096)
def _weight_plan(
    where: str, grad: _Meta, x: _Meta, weight: _Meta, dweight: _Meta, mask: _Meta, options: Any, need_mask: bool
) -> WeightPlan:
    g = _geometry(x, weight, mask, *options)
    _bounded("an image of the gradient", grad[0][1:], grad[1][1:])
    pixels = g.batch * g.out_height * g.out_width
    layout = mask_layout(weight[0], mask[0], options[-1]) if need_mask else None
    dense = torch.empty_strided(*weight[:2], device="meta")
    alike = weight[:2] == mask[:2] and memory_format(dense) is torch.channels_last
    common: dict[str, Any] = {
        "pixels": pixels,
        "height": g.height,
        "width": g.width,
        "OUT_HEIGHT": g.out_height,
        "OUT_WIDTH": g.out_width,
        **_strides("g", grad[1]),
        **_strides("x", x[1]),
        **_strides("w", weight[1], "ochw"),
        **g.mask,
        **_strides("dw", dweight[1], "ochw"),
        **_strides("dm", dweight[1] if alike else (g.cols, g.taps, g.constants["KERNEL_W"], 1), "ochw"),
        **g.constants,
        "NEED_MASK": need_mask,
        "SUMS": _sums(layout),
    }
    if g.depthwise:
        t = tuning.DEPTHWISE[channels_last(*x[:2])]
        filters = g.groups * g.filters
        columns, rows, step, numbers = g.taps, _blocks(filters, t.rows), t.columns, t.rows
        common |= {"filters": filters, "multiplier": g.filters, "BLOCK_R": t.rows, "BLOCK_P": t.columns}
        common |= _options_of(t)
    else:
        flat = g.taps > 1 and (g.channels < 16 or x[1][1] != 1)
        kernel = "flat_weight_gradient" if flat else "weight_gradient"
        tile, launching = _tile(where, kernel, x[2], g.filters, g.cols)
        row_blocks, step, block_c = _blocks(g.filters, tile["BLOCK_R"]), tile["BLOCK_K"], tile["BLOCK_C"]
        columns = _blocks(g.cols, block_c) if flat else g.taps * _blocks(g.channels, block_c)
        rows, numbers = g.groups * row_blocks, tile["BLOCK_R"] * block_c
        common |= {
            "channels": g.channels,
            "filters": g.filters,
            "row_blocks": row_blocks,
            "column_blocks": columns,
            "groups": g.groups,
            "FLAT": flat,
            **tile,
            **launching,
        }
    tiles = rows * columns
    parts = min(tuning.PROGRAMS[where] // max(tiles, 1), _blocks(pixels, max(tuning.SPLIT_PIXELS, step)))
    common["split_pixels"] = _blocks(_blocks(pixels, max(parts, 1)), step) * step
    parts = max(_blocks(pixels, max(common["split_pixels"], 1)), 1)
    common["SPLIT"] = parts > 1
    if parts > 1:
        common["maxnreg"] = max(common["maxnreg"], tuning.SPLIT_REGISTERS)
    return WeightPlan(g, (tiles, parts), common, rows, columns, numbers, layout, alike)


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

    One kernel forms G = dL/dW and both gradients; G stays in registers, but for the parts of a split sum. Masks whose
    values span filters or tiles take a second: it adds up the column sums of G * theta, a line for each block of
    filters (channel, layer), or G * theta (block, kernel and other broadcasts). Its counters, about a kilobyte, are
    new in each call and set to zero on its stream, so that calls at once and captured graphs share none. What is not
    needed is undefined.
    """
    where = tuning.device_class(x.device)
    dweight = torch.empty_like(weight, memory_format=memory_format(weight))
    full, mask = mask, _raw(mask)
    metas = (_meta(grad), _meta(x), _meta(weight), _meta(dweight), _meta(mask))
    plan = _weight_plan(where, *metas, options, need_mask)
    g, arguments, layout = plan.geometry, plan.arguments, plan.layout
    (tiles, parts), sums, rows = plan.grid, arguments["SUMS"], plan.rows
    filters = g.groups * g.filters

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    if plan.direct:
        lies = torch.channels_last if plan.alike else torch.contiguous_format
        dmask = torch.empty(mask.shape, dtype=mask.dtype, device=x.device, memory_format=lies)
    else:  # G * theta
        dmask = numbers(*weight.shape) if need_mask and sums == "none" else numbers(0)
    lines = numbers(*{"none": (0,), "rows": (plan.columns, filters), "columns": (rows, g.cols)}[sums])
    squares = numbers({"none": tiles, "rows": rows, "columns": 0}[sums] if need_mask else 0)
    partial = numbers(tiles * parts * plan.numbers if parts > 1 else 0)
    counted = rows + tiles * (parts > 1) if parts > 1 or sums == "rows" else 0
    counters = torch.zeros(counted, dtype=torch.int32, device=x.device)
    split = 4 * parts * filters * g.cols if parts > 1 else 0  # bytes: what lies outside G is not stored
    again: list[Tensor | int] = [split, counters, *([lines] if sums == "rows" else [])]
    precision: dict[str, Any] = {} if g.depthwise else {"PRECISION": _precision(x.dtype, convolution)}
    launch(
        depthwise.depthwise_weight_gradient_kernel if g.depthwise else kernels.masked_conv2d_weight_gradient_kernel,
        plan.grid,
        reads=[grad, x, *[mask] * (need_weight or not need_mask), *[weight] * need_mask, *again],
        writes=[*[dweight] * need_weight, dmask, squares, lines, split, counters],
        flops=g.flops,
        grad_ptr=grad,
        x_ptr=x,
        weight_ptr=weight,
        mask_ptr=mask,
        dweight_ptr=dweight,
        dmask_ptr=dmask,
        squares_ptr=squares,
        lines_ptr=lines,
        partial_ptr=partial,
        counters_ptr=counters,
        NEED_WEIGHT=need_weight,
        **precision,
        **arguments,
    )
    if plan.direct or not need_mask:
        return dweight, dmask, squares
    if layout is None:
        dmask = dmask.sum_to_size(full.shape)
        return dweight, dmask.to(full.dtype), dmask.square().sum()[None]
    values = dmask.view(filters, 1, g.cols) if sums == "none" else lines[None]
    return dweight, *_sum_segments(values, full, layout)


def _sum_segments(values: Tensor, mask: Tensor, layout: MaskLayout) -> tuple[Tensor, Tensor]:
    """The mask's gradient from values [filters or 1, lines, cols], and the parts of its squared norm."""
    out = torch.empty(mask.shape, dtype=mask.dtype, device=values.device)
    segments = _blocks(layout.cols, layout.span) if layout.col_stride else 1
    inner = min(1 << (layout.span - 1).bit_length(), 1024)
    outer = min(1024 // inner, 1 << (segments - 1).bit_length())
    blocks = _blocks(segments, outer)
    squares = torch.empty(values.shape[0] * blocks, dtype=torch.float32, device=values.device)
    launch(
        kernels.sum_segments_kernel,
        (len(squares),),
        reads=[values],
        writes=[out, squares],
        values_ptr=values,
        out_ptr=out,
        squares_ptr=squares,
        lines=values.shape[1],
        cols=layout.cols,
        segments=segments,
        segment_blocks=blocks,
        span=layout.span,
        BLOCK_S=outer,
        BLOCK_J=inner,
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
    no_float64(grad=grad, x=x, weight=weight, mask=mask)
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
