"""The C++ provider: lays tensors out as the kernels want them and hands over their addresses.

`torch` is imported before `_C`, so both use the one OpenMP runtime that torch brings, and every kernel is told how many
of its threads to use (`torch.set_num_threads`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format  # as the dispatcher decides; torch exports it nowhere else

from csam_kernels import _C
from csam_kernels.cells import cells
from csam_kernels.checks import WORD
from csam_kernels.laws import scaled
from csam_kernels.layout import MaskLayout, conv2d_size, expand_mask, mask_layout, reduce_to_mask
from csam_kernels.native import DTYPE, KIND, Products, dense, flat, fusible, like, restride, wide
from csam_kernels.ops.sample_network import ENGINES, Program, Value

_LARGE = 1 << 20  # bytes from which a result's page faults cost more than taking its memory from the pool
_GRAIN = 1 << 15  # values a thread should have at least
_COMPACT = 0.75  # share of live channels below which leaving the dead ones out pays for the copies

_Layer = tuple[int, int, int, int, int, tuple[int, ...], float]


def _threads(values: int) -> int:
    return max(1, min(torch.get_num_threads(), values // _GRAIN))


def _new(pattern: Tensor, dtype: torch.dtype) -> Tensor:
    """`torch.empty_like`, a large one in pooled memory; `pattern` may be on the meta device."""
    nbytes = pattern.numel() * dtype.itemsize
    if nbytes < _LARGE or not dense(pattern):
        return torch.empty_like(pattern, dtype=dtype, device="cpu")
    memory = torch.frombuffer(_C.Block(nbytes), dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=dtype, device="cpu").set_(memory, 0, pattern.shape, pattern.stride())


def philox_uniform(n: int, k: int, seed: int, first_sample: int, stream: int) -> Tensor:
    out = torch.empty(n, k, dtype=torch.float32, device="cpu")
    _C.philox_uniform(out.data_ptr(), n, k, seed & WORD, first_sample, stream)
    return out


def smoothing_noise(
    x: Tensor,
    n: int,
    sigma: float,
    seed: int,
    first_sample: int,
    stream: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    law: str = "gaussian",
) -> Tensor:
    channels, height, width = x.shape
    image = x.to(torch.float32).contiguous()
    shape = torch.empty((n, channels, height, width), device="meta", memory_format=memory_format)
    out = _new(shape, dtype)
    channels_last = memory_format is torch.channels_last
    where = (seed & WORD, first_sample, stream, out.data_ptr(), DTYPE[dtype], channels_last)
    _C.smoothing_noise(
        image.data_ptr(), n, channels, height * width, *scaled(law, sigma), *where, _threads(16 * out.numel())
    )
    return out


def grid_noise(
    numbers: Tensor,
    n: int,
    sigma: float,
    grid: int,
    seed: int,
    first_sample: int,
    stream: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    law: str = "gaussian",
) -> Tensor:
    channels, height, width = numbers.shape
    table, numbers = cells(sigma, grid, law), numbers.contiguous()
    shape = torch.empty((n, channels, height, width), device="meta", memory_format=memory_format)
    out = _new(shape, dtype)
    where = (seed & WORD, first_sample, stream, out.data_ptr(), DTYPE[dtype], memory_format is torch.channels_last)
    _C.grid_noise(numbers.data_ptr(), n, channels, height * width, *table.native, *where, _threads(16 * out.numel()))
    return out


def perturb_masks(
    masks: list[Tensor],
    kind: str,
    radius: float,
    rho: float,
    grads: list[Tensor],
    norm: str,
    seed: int,
    step: int,
) -> list[Tensor]:
    masks = [m.contiguous() for m in masks]
    grads = [g.to(m.dtype).contiguous() for m, g in zip(masks, grads, strict=kind == "adversarial")]
    scales = _scales(kind, len(masks), radius, rho, grads, norm)
    outs = [_new(m, m.dtype) for m in masks]
    for dtype in {m.dtype for m in masks}:
        layers: list[_Layer] = [
            (
                0,
                m.data_ptr(),
                _address(grads, i),
                out.data_ptr(),
                0,
                flat(m.numel() * (m.dtype is dtype)),
                scale,
            )
            for i, (m, out, scale) in enumerate(zip(masks, outs, scales, strict=True))
        ]
        code = DTYPE[dtype]
        _C.perturb_masks(layers, [0, code, code, code], KIND[kind], seed & WORD, step, _threads(_total(masks)))
    return outs


def _scales(kind: str, count: int, radius: float, rho: float, grads: list[Tensor], norm: str) -> list[float]:
    """What multiplies the noise word or the gradient of each layer."""
    if kind == "uniform":
        return [radius * 2.0**-31] * count
    if kind == "plain":
        return [0.0] * count
    squares = [_C.squared_norm(g.data_ptr(), g.numel(), DTYPE[g.dtype], _threads(g.numel())) for g in grads]
    if norm == "global":
        squares = [sum(squares)] * count
    return [rho / math.sqrt(s) if s > 0 else 0.0 for s in squares]


def _address(tensors: list[Tensor], i: int) -> int:
    return tensors[i].data_ptr() if tensors else 0


def _total(tensors: list[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def _lay(weight: Tensor, mask: Tensor, block_size: int) -> tuple[Tensor, Tensor, MaskLayout]:
    """Weight and mask as dense memory and the layout of one over the other.

    Two full tensors of equal dense strides (channels_last) are taken as they lie: the arithmetic is elementwise.
    """
    if weight.shape == mask.shape and not block_size and weight.stride() == mask.stride() and dense(weight):
        return weight, mask, MaskLayout(*flat(weight.numel()))
    layout = mask_layout(weight.shape, mask.shape, block_size)
    if layout is None:
        mask = expand_mask(mask, weight.shape)
        layout = mask_layout(weight.shape, weight.shape)
        assert layout is not None
    if not layout.elementwise:
        mask = mask.to(wide(weight.dtype))  # broadcast masks are small: kernels read them in the compute type
    return weight.contiguous(), mask.contiguous(), layout


def effective_weights(
    weights: list[Tensor],
    masks: list[Tensor],
    kind: str,
    radius: float,
    rho: float,
    grads: list[Tensor],
    norm: str,
    seed: int,
    step: int,
    dtype: torch.dtype | None,
    block_size: int,
) -> list[Tensor]:
    if kind != "plain" and not fusible(kind, weights, masks):
        masks = perturb_masks(masks, kind, radius, rho, grads, norm, seed, step)
        kind, grads = "plain", []
    grads = [like(g.to(torch.float32), m) for g, m in zip(grads, masks, strict=bool(grads))]
    scales = _scales(kind, len(weights), radius, rho, grads, norm)
    laid = [_lay(w, m, block_size) for w, m in zip(weights, masks, strict=True)]
    outs = [_new(w, dtype or w.dtype) for w, _, _ in laid]
    groups = {(w.dtype, m.dtype, out.dtype) for (w, m, _), out in zip(laid, outs, strict=True)}
    for group in groups:
        layers: list[_Layer] = []
        for i, ((w, m, layout), out, scale) in enumerate(zip(laid, outs, scales, strict=True)):
            chosen = layout if (w.dtype, m.dtype, out.dtype) == group else MaskLayout(*flat(0))
            layers.append((w.data_ptr(), m.data_ptr(), _address(grads, i), out.data_ptr(), 0, tuple(chosen), scale))
        codes = [DTYPE[group[0]], DTYPE[group[1]], 0, DTYPE[group[2]]]
        _C.effective_weights(layers, codes, KIND[kind], seed & WORD, step, _threads(_total(weights)))
    return [restride(out, w) for out, w in zip(outs, weights, strict=True)]


def mask_gradients(
    grad_weights: list[Tensor],
    weights: list[Tensor],
    masks: list[Tensor],
    block_size: int,
    need_weight: bool,
    need_mask: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    laid = [_lay(w, m, block_size) for w, m in zip(weights, masks, strict=True)]
    grads = [like(g, w) for g, (w, _, _) in zip(grad_weights, laid, strict=True)]
    dtheta = [_new(w, w.dtype) for w, _, _ in laid] if need_weight else []
    odd = [m.shape != mask.shape for (_, m, _), mask in zip(laid, masks, strict=True)]  # expanded by _lay
    # A broadcast mask's own gradient is needed for the norm even when nobody reads it.
    dmask = [
        _new(m, w.dtype) if need_mask or broadcast or not layout.elementwise else w.new_empty(0)
        for (w, m, layout), broadcast in zip(laid, odd, strict=True)
    ]
    keys = [(w.dtype, m.dtype, g.dtype, o) for (w, m, _), g, o in zip(laid, grads, odd, strict=True)]
    norm = 0.0
    for key in sorted(set(keys), key=str):
        layers: list[_Layer] = []
        for i, ((w, m, layout), g) in enumerate(zip(laid, grads, strict=True)):
            if keys[i] == key:
                results = (_address(dtheta, i), dmask[i].data_ptr() if dmask[i].numel() else 0)
                layers.append((w.data_ptr(), m.data_ptr(), g.data_ptr(), *results, tuple(layout), 0.0))
        codes = [DTYPE[dtype] for dtype in key[:3]]
        squares = _C.mask_gradients(layers, [*codes, 0], _threads(_total(weights)))
        norm += 0.0 if key[3] else squares
    for i, (w, _, _) in enumerate(laid):
        if odd[i]:
            dmask[i] = reduce_to_mask(dmask[i].view(w.shape), masks[i].shape)
            norm += float(dmask[i].double().square().sum())
    dtheta = [restride(d, w) for d, w in zip(dtheta, weights, strict=need_weight)]
    return dtheta, dmask if need_mask else [], torch.tensor(norm, dtype=torch.float64, device="cpu")


def binarize(scores: list[Tensor], keep: list[int], scope: str) -> list[Tensor]:
    scores = [s.contiguous() for s in scores]
    if len({s.dtype for s in scores}) > 1:
        scores = [s.to(torch.float32) for s in scores]
    masks = [_new(s, torch.bool) for s in scores]
    groups = [(scores, masks)] if scope == "global" else [([s], [m]) for s, m in zip(scores, masks, strict=True)]
    for (part, out), k in zip(groups, keep, strict=True):
        _C.binarize(
            [s.data_ptr() for s in part],
            [s.numel() for s in part],
            DTYPE[part[0].dtype],
            k,
            [m.data_ptr() for m in out],
            _threads(_total(part)),
        )
    return masks


def percentile_init(weights: list[Tensor], tau: float) -> list[Tensor]:
    outs = []
    for w in weights:
        w = w.contiguous()
        out = _new(w, w.dtype)
        _C.percentile_init(w.data_ptr(), w.numel(), DTYPE[w.dtype], tau, out.data_ptr())
        outs.append(out)
    return outs


def count_votes(logits: Tensor, out: Tensor) -> None:
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    n, classes = logits.shape
    threads = _threads(logits.numel())
    _C.count_votes(logits.data_ptr(), n, classes, logits.stride(0), DTYPE[logits.dtype], out.data_ptr(), threads)


def discrepancy(clean: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    clean = clean.double().contiguous()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    n, classes = logits.shape
    out, changed = (torch.empty(n, dtype=dtype, device="cpu") for dtype in (torch.float64, torch.bool))
    rows = (logits.data_ptr(), n, classes, logits.stride(0), DTYPE[logits.dtype])
    _C.discrepancy(clean.data_ptr(), *rows, out.data_ptr(), changed.data_ptr(), _threads(4 * logits.numel()))
    return out, changed


def semantic_batch(x: Tensor, params: Tensor) -> Tensor:
    x, params = x.contiguous(), params.to(torch.float32).contiguous()
    out = _new(torch.empty((len(params), *x.shape), device="meta"), torch.float32)
    _C.semantic_batch(x.data_ptr(), len(params), *x.shape, params.data_ptr(), out.data_ptr(), _threads(8 * out.numel()))
    return out


def sample_conv2d(
    x: Tensor,
    values: Tensor,
    taps: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    relu: bool,
    dense: bool,
) -> Tensor:
    window = (kernel_size, stride, padding, dilation)
    filters, size = len(rows) - 1, conv2d_size(x.shape[1:3], *window)
    out = _new(torch.empty((filters, *size, x.shape[3]), device="meta"), x.dtype)
    if out.numel():
        x, values, taps, rows = (t.contiguous() for t in (x, values, taps, rows))
        extra = [None if t is None else t.contiguous() for t in (bias, other)]
        threads = _threads(len(values) * out[0].numel() // 8)
        weight = (values.data_ptr(), taps.data_ptr(), rows.data_ptr(), filters)
        added = (0 if t is None else t.data_ptr() for t in extra)
        _C.sample_conv2d(
            x.data_ptr(),
            DTYPE[x.dtype],
            list(x.shape),
            *weight,
            *added,
            window,
            relu,
            dense,
            out.data_ptr(),
            size,
            threads,
        )
    return out


def sample_network(
    program: Program, dtype: torch.dtype, places: dict[Value, int], arena: int, draft: bool = False
) -> _C.SampleNetwork:
    """The program in C++, which copies what the addresses show; a draft can tell its costs and nothing else."""

    def at(value: Value | None) -> int:
        return -1 if value is None else places[value.root] + value.offset

    def address(t: Tensor | None) -> int:
        if t is None:
            return 0
        kept.append(t.detach().contiguous())
        return kept[-1].data_ptr()

    kept: list[Tensor] = []
    steps, streams = [], program.streams()
    for index, s in enumerate(program.steps):
        weight = [address(t) for t in s.weight or (None, None, None)]
        window = (s.kernel, s.stride, s.padding, s.dilation)
        shape, size = (s.input.channels, s.input.height, s.input.width), (s.out.height, s.out.width)
        filters, bias, bounds = s.out.channels, address(s.bias), (s.low, s.high)
        at_all = (at(s.input), at(s.other), at(s.out))
        i = s.integers
        integers = (0, 0.0, 0.0, 0, False) if i is None else (address(i.scales), i.shift, i.other_scale, i.zero, i.real)
        steps.append(
            (
                s.weight is None,
                *at_all,
                shape,
                *weight,
                filters,
                bias,
                window,
                bounds,
                ENGINES.index(s.engine),
                size,
                (streams.get(index - 1, 0), streams.get(index, 0)),
                integers,
            )
        )
    image, logits = program.image, program.logits
    shape = (image.channels, image.height, image.width)
    scaling = (address(program.mean), address(program.std), (program.scale, program.shift))
    at_ends = (arena, at(image), at(logits), logits.channels)
    return _C.SampleNetwork(DTYPE[dtype], shape, *scaling, steps, at_ends, draft)


_products = Products(effective_weights, mask_gradients)
masked_linear, masked_linear_backward = _products.masked_linear, _products.masked_linear_backward


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
    w = _products.effective(weight, mask, x.dtype, block_size)
    bias = None if bias is None else bias.to(x.dtype)
    filters, channels = _live(mask, weight, groups, block_size)
    if filters is None and channels is None:
        return torch.conv2d(x, w, bias, stride, padding, dilation, groups)
    memory_format = _suggested(x, w)
    if channels is not None:
        x, w = x[:, channels].contiguous(memory_format=memory_format), w[:, channels]
    if filters is None:
        return torch.conv2d(x, w, bias, stride, padding, dilation).contiguous(memory_format=memory_format)
    live = torch.conv2d(x, w[filters], None if bias is None else bias[filters], stride, padding, dilation)
    batch, _, height, width = live.shape
    out = torch.empty((batch, len(weight), height, width), dtype=x.dtype, device="cpu", memory_format=memory_format)
    out[:] = 0 if bias is None else bias.view(1, -1, 1, 1)
    out[:, filters] = live
    return out


def _suggested(x: Tensor, w: Tensor) -> torch.memory_format:
    """The memory format that convolution gives its result: channels_last when an operand asks for it."""
    asks = torch.channels_last in (suggest_memory_format(x), suggest_memory_format(w))
    return torch.channels_last if asks else torch.contiguous_format


def _live(mask: Tensor, weight: Tensor, groups: int, block_size: int) -> tuple[Tensor | None, Tensor | None]:
    """Indices of the live filters and input channels; None where leaving out the dead ones would not pay.

    Looking must cost less than it can save: filter and channel masks are small, a full hard mask is looked at filter
    by filter, a full soft mask not at all.
    """
    full = mask.numel() == weight.numel()
    if groups != 1 or mask.dim() != 4 or block_size or (full and mask.dtype is not torch.bool):
        return None, None
    live = mask if mask.dtype is torch.bool else mask != 0
    filters = _few(live.flatten(1).any(1))
    return filters, None if full else _few(live.any(0).flatten(1).any(1))


def _few(live: Tensor) -> Tensor | None:
    """Indices of a minority of live channels; the single flag of a broadcast axis is never one."""
    if len(live) == 1:
        return None
    indices = live.nonzero()[:, 0]
    return indices if 0 < len(indices) <= _COMPACT * len(live) else None


def masked_conv2d_inference(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    block_size: int,
    other: Tensor | None,
    tiles: Tensor | None,
) -> Tensor:
    out = masked_conv2d(x, weight, mask, bias, stride, padding, dilation, groups, block_size)
    if scale is not None and shift is not None:
        full = wide(x.dtype)
        out = out * scale.to(full).view(-1, 1, 1) + shift.to(full).view(-1, 1, 1)
    if other is not None:
        out = out + other
    return (out.relu() if relu else out).to(x.dtype)


def live_tiles(weight: Tensor, mask: Tensor, dtype: torch.dtype, groups: int, block_size: int) -> Tensor | None:
    return None


def smoothing_conv2d(
    x: Tensor,
    n: int,
    sigma: float,
    seed: int,
    first_sample: int,
    stream: int,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    block_size: int,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    dtype: torch.dtype,
    tiles: Tensor | None,
) -> Tensor:
    drawn = dtype if input_scale is None else torch.float32
    batch = smoothing_noise(x, n, sigma, seed, first_sample, stream, drawn, torch.contiguous_format)
    if input_scale is not None and input_shift is not None:
        batch = (batch * input_scale.view(-1, 1, 1) + input_shift.view(-1, 1, 1)).to(dtype)
    options = (stride, padding, dilation, groups, block_size)
    return masked_conv2d_inference(batch, weight, mask, bias, scale, shift, relu, *options, None, tiles)


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
    need_x, need_weight, need_mask = need
    effective = _products.effective(weight, mask, x.dtype, block_size)
    # With the mask's gradient wanted, dead filters have one too; otherwise they and what feeds them get zeros.
    filters, channels = (None, None) if need_mask else _live(mask, weight, groups, block_size)
    args = (stride, padding, dilation, False, [0, 0], groups, [need_x, need_weight or need_mask, False])
    if filters is None and channels is None:
        dx, dw, _ = torch.ops.aten.convolution_backward(grad, x, effective, None, *args)
    else:
        rows = slice(None) if filters is None else filters
        columns = slice(None) if channels is None else channels
        part_x, part_w, _ = torch.ops.aten.convolution_backward(
            grad[:, rows], x[:, columns], effective[rows][:, columns], None, *args
        )
        dx = dw = None
        if need_x:
            dx = torch.zeros_like(x)
            dx[:, columns] = part_x
        if need_weight:
            dw = torch.zeros_like(effective)
            crossed = rows[:, None] if isinstance(rows, Tensor) and isinstance(columns, Tensor) else rows
            dw[crossed, columns] = part_w
    grads = [dx] if need_x else []
    return grads + _products.gradients(dw, weight, mask, block_size, need_weight, need_mask)
