"""Naive plain-torch twin of every operation: slow, obviously right, the ground truth of the tests and benchmarks.

Each function has the name and the signature that the dispatcher in `csam_kernels.backend` calls; arguments have
already been checked by the public function in `csam_kernels.ops`. Nothing here is chosen automatically, but under
torch.func's transforms (`csam_kernels.backend.plain`): `CSAM_BACKEND=reference` asks for it by name.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from csam_kernels.cells import cells
from csam_kernels.layout import conv2d_size, expand_mask, reduce_to_mask
from csam_kernels.ops.sample_network import Program, Step, Value, winograd_tile

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
PERTURB_DOMAIN = 0x6D61736B  # "mask": keeps mask noise apart from smoothing noise of the same seed
UNIFORM_DOMAIN = 0x756E6966  # "unif"
CELL_DOMAIN = 0x63656C6C  # "cell"
_WORD = 0xFFFFFFFF


def philox4x32(counter: Tensor, key: tuple[int, int], rounds: int = 10) -> Tensor:
    """Philox-4x32 (Salmon et al., SC'11): int64 counters [..., 4] of 32-bit words -> int64 words [..., 4]."""
    c0, c1, c2, c3 = (counter[..., i] for i in range(4))
    k0, k1 = key
    for _ in range(rounds):
        hi0, lo0 = _mulhilo(c0, PHILOX_MULTIPLIERS[0])
        hi1, lo1 = _mulhilo(c2, PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + PHILOX_WEYL[0]) & _WORD, (k1 + PHILOX_WEYL[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _mulhilo(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a*b without overflowing int64: multiply by the two 16-bit halves of b."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return (high >> 16) & _WORD, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_words(elements: int, samples: Tensor, *, seed: int, stream: int, domain: int = 0) -> Tensor:
    """int64 words [len(samples), elements]: word e of sample i comes from counter (e//4, i low, i high, stream)."""
    quads = torch.arange((elements + 3) // 4, device=samples.device)
    counter = torch.empty(len(samples), len(quads), 4, dtype=torch.int64, device=samples.device)
    counter[..., 0] = quads
    counter[..., 1] = (samples & _WORD)[:, None]
    counter[..., 2] = ((samples >> 32) & _WORD)[:, None]
    counter[..., 3] = stream
    words = philox4x32(counter, (seed & _WORD, ((seed >> 32) & _WORD) ^ domain))
    return words.flatten(1)[:, :elements]


def normal_deviates(words: Tensor) -> Tensor:
    """Box-Muller on pairs of words: u1 = (w+1)/2^32 in (0,1], angle 2*pi*w'/2^32; float64 [..., even]."""
    u1 = (words[..., 0::2] + 1).double() * 2.0**-32
    angle = words[..., 1::2].double() * (2 * math.pi * 2.0**-32)
    r = torch.sqrt(-2 * torch.log(u1))
    return torch.stack((r * torch.cos(angle), r * torch.sin(angle)), dim=-1).flatten(-2)


def uniform_deviates(words: Tensor) -> Tensor:
    """The top bit of each word is the sign, the others are the size: float64 on [-sqrt(3), sqrt(3)]."""
    return math.sqrt(3) * _signed(words, (words % 2**31 + 0.5) * 2.0**-31)


def laplace_deviates(words: Tensor) -> Tensor:
    """The same by the inverse of the distribution function; float64, of scale 1 / sqrt(2)."""
    return _signed(words, -torch.log((words % 2**31 + 0.5) * 2.0**-31)) / math.sqrt(2)


def _signed(words: Tensor, size: Tensor) -> Tensor:
    return torch.where(words >= 2**31, -size, size)


DEVIATES = {"gaussian": normal_deviates, "uniform": uniform_deviates, "laplace": laplace_deviates}


def philox_uniform(n: int, k: int, seed: int, first_sample: int, stream: int) -> Tensor:
    samples = torch.arange(n) + first_sample
    words = philox_words(k, samples, seed=seed, stream=stream, domain=UNIFORM_DOMAIN)
    return (words >> 8).float() * 2.0**-24


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
    samples = torch.arange(n, device=x.device) + first_sample
    elements = x.numel()
    words = philox_words(4 * ((elements + 3) // 4), samples, seed=seed, stream=stream)
    noise = DEVIATES[law](words)[:, :elements].float().reshape(n, *x.shape)
    return (x.float() + sigma * noise).to(dtype).contiguous(memory_format=memory_format)


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
    table, device = cells(sigma, grid, law), numbers.device
    samples = torch.arange(n, device=device) + first_sample
    words = philox_words(numbers.numel(), samples, seed=seed, stream=stream)
    column, fraction = words >> (32 - table.bits), (words << table.bits) & _WORD
    entry, low = table.columns.long().to(device)[column] & _WORD, 2**table.bits - 1
    own, tied = fraction < (entry & ~low), fraction == (entry & ~low)
    for i, e in tied.nonzero().tolist():
        counter = torch.tensor([e, int(samples[i]) & _WORD, int(samples[i]) >> 32, stream])
        first, second, *_ = philox4x32(counter, (seed & _WORD, ((seed >> 32) & _WORD) ^ CELL_DOMAIN)).tolist()
        own[i, e] = (first << 32 | second) < int(table.rest[column[i, e]]) % 2**64
    number = torch.where(own, column, entry & low) - 2 ** (table.bits - 1)
    out = (number.reshape(n, *numbers.shape) + numbers) / numbers.new_tensor(grid)
    return out.to(dtype).contiguous(memory_format=memory_format)


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
    if kind == "uniform":
        return [(m + _uniform_noise(m, radius, seed, step, layer)).clamp(0, 1) for layer, m in enumerate(masks)]
    squares = [g.double().square().sum() for g in grads]
    if norm == "global":
        squares = [sum(squares, torch.zeros((), dtype=torch.float64))] * len(masks)
    scales = [float(rho / s.sqrt()) if s > 0 else 0.0 for s in squares]
    return [(m + scale * g.to(m.dtype)).clamp(0, 1) for m, g, scale in zip(masks, grads, scales, strict=True)]


def _uniform_noise(m: Tensor, radius: float, seed: int, step: int, layer: int) -> Tensor:
    words = philox_words(
        m.numel(), torch.tensor([step], device=m.device), seed=seed, stream=layer, domain=PERTURB_DOMAIN
    )[0]
    signed = torch.where(words >= 2**31, words - 2**32, words)
    scale = torch.tensor(radius, dtype=m.dtype) * 2.0**-31
    return (signed.to(m.dtype) * scale).reshape(m.shape)


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
    if kind != "plain":
        masks = perturb_masks(masks, kind, radius, rho, grads, norm, seed, step)
    return [
        _product(w, expand_mask(m, w.shape, block_size), dtype or w.dtype) for w, m in zip(weights, masks, strict=True)
    ]


def _product(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """weight * mask in float32 (float64 for float64 weights), rounded once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) * mask.to(wide)).to(dtype)


def mask_gradients(
    grad_weights: list[Tensor],
    weights: list[Tensor],
    masks: list[Tensor],
    block_size: int,
    need_weight: bool,
    need_mask: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    dtheta, dmask = [], []
    norm = torch.zeros((), dtype=torch.float64, device=weights[0].device if weights else None)
    for grad, w, m in zip(grad_weights, weights, masks, strict=True):
        grad = grad.to(w.dtype)
        if need_weight:
            dtheta.append(grad * expand_mask(m, w.shape, block_size).to(w.dtype))
        dm = reduce_to_mask(grad * w, m.shape, block_size)
        norm = norm + dm.double().square().sum()
        if need_mask:
            dmask.append(dm)
    return dtheta, dmask, norm


def binarize(scores: list[Tensor], keep: list[int], scope: str) -> list[Tensor]:
    if scope == "layer":
        return [_keep_largest(s.flatten(), k).reshape(s.shape) for s, k in zip(scores, keep, strict=True)]
    flat = _keep_largest(torch.cat([s.flatten() for s in scores]), keep[0])
    return [
        part.reshape(s.shape).clone() for part, s in zip(flat.split([s.numel() for s in scores]), scores, strict=True)
    ]


def _keep_largest(flat: Tensor, keep: int) -> Tensor:
    order = torch.sort(flat, descending=True, stable=True).indices
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    mask[order[:keep]] = True
    return mask


def percentile_init(weights: list[Tensor], tau: float) -> list[Tensor]:
    out = []
    for w in weights:
        magnitude = w.abs()
        if not w.numel():
            out.append(magnitude)
            continue
        ordered = magnitude.flatten().sort().values
        position = tau * (w.numel() - 1)
        low = math.floor(position)
        high = min(low + 1, w.numel() - 1)
        quantile = ordered[low] + (position - low) * (ordered[high] - ordered[low])
        out.append((magnitude / quantile).clamp(0, 1) if quantile > 0 else (magnitude > 0).to(w.dtype))
    return out


def count_votes(logits: Tensor, out: Tensor) -> None:
    logits = logits[~logits.isnan().any(1)]
    if len(logits):
        winners = (logits == logits.amax(1, keepdim=True)).int().argmax(1)
        out += torch.bincount(winners, minlength=out.numel())


def discrepancy(clean: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    clean, logits = clean.double(), logits.double()
    moved = (logits.softmax(1) - clean.softmax(0)).abs().amax(1)
    winners = (logits == logits.amax(1, keepdim=True)).int().argmax(1)
    return moved, (winners != (clean == clean.amax()).int().argmax()) & ~moved.isnan()


def semantic_batch(x: Tensor, params: Tensor) -> Tensor:
    return torch.stack([_semantic_one(x.double(), row) for row in params.double()]).float()


def _semantic_one(x: Tensor, row: Tensor) -> Tensor:
    rotation, tx, ty, scale, blur, contrast, brightness, gamma = row.tolist()
    y = _affine(x, math.radians(rotation), tx, ty, scale)
    if blur > 0:
        y = _gaussian_blur(y, blur)
    return (contrast * y + brightness).clamp(0, 1) ** gamma


def _affine(x: Tensor, angle: float, tx: float, ty: float, scale: float) -> Tensor:
    """One bilinear resampling about the image centre: output pixel p reads input R(angle) (p - t) / scale."""
    _, h, w = x.shape
    v, u = torch.meshgrid(*(torch.arange(n, device=x.device).double() for n in (h, w)), indexing="ij")
    dx, dy = u - (w - 1) / 2 - tx * w, v - (h - 1) / 2 - ty * h
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    sx = cos * dx - sin * dy + (w - 1) / 2
    sy = sin * dx + cos * dy + (h - 1) / 2
    x0, y0 = sx.floor(), sy.floor()
    out = torch.zeros_like(x)
    for oy in (0, 1):
        for ox in (0, 1):
            px, py = x0 + ox, y0 + oy
            weight = (1 - (sx - px).abs()) * (1 - (sy - py).abs())
            inside = (px >= 0) & (px < w) & (py >= 0) & (py < h)
            value = x[:, py.clamp(0, h - 1).long(), px.clamp(0, w - 1).long()]
            out += value * (weight * inside)
    return out


def _gaussian_blur(y: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian of radius ceil(3*sigma), edges replicated."""
    radius = math.ceil(3 * sigma)
    t = torch.arange(-radius, radius + 1, device=y.device).double()
    kernel = torch.exp(-0.5 * (t / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(y.dtype)
    y = y[:, None]
    y = F.conv2d(F.pad(y, (radius, radius, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    y = F.conv2d(F.pad(y, (0, 0, radius, radius), mode="replicate"), kernel.view(1, 1, -1, 1))
    return y[:, 0]


def _dense_weight(values: Tensor, taps: Tensor, rows: Tensor, channels: int, kernel_size: list[int]) -> Tensor:
    filters = torch.arange(len(rows) - 1, device=values.device).repeat_interleave(rows.diff())
    weight = values.new_zeros((len(rows) - 1, channels, *kernel_size))
    weight.flatten(1)[filters, taps.long()] = values
    return weight


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
    dense: bool = False,
) -> Tensor:
    weight = _dense_weight(values.to(x.dtype).to(torch.float32), taps, rows, x.shape[0], kernel_size)
    out = F.conv2d(x.permute(3, 0, 1, 2).float(), weight, bias, stride, padding, dilation).permute(1, 2, 3, 0)
    if other is not None:
        out = out + other
    return (out.relu() if relu else out).to(x.dtype).contiguous()


# B^T, G and A^T along one axis: of F(2x2, 3x3).
_F2: tuple[tuple[tuple[float, ...], ...], ...] = (
    ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    ((1, 1, 1, 0), (0, 1, -1, -1)),
)
# The same of F(4x4, 3x3), at the points 0, +-2/3, +-3/2 and infinity.
_F4: tuple[tuple[tuple[float, ...], ...], ...] = (
    (
        (1, 0, -97 / 36, 0, 1, 0),
        (0, -3 / 2, -9 / 4, 2 / 3, 1, 0),
        (0, 3 / 2, -9 / 4, -2 / 3, 1, 0),
        (0, -2 / 3, -4 / 9, 3 / 2, 1, 0),
        (0, 2 / 3, -4 / 9, -3 / 2, 1, 0),
        (0, 1, 0, -97 / 36, 0, 1),
    ),
    (
        (1, 0, 0),
        (-81 / 130, -54 / 130, -36 / 130),
        (-81 / 130, 54 / 130, -36 / 130),
        (8 / 65, 12 / 65, 18 / 65),
        (8 / 65, -12 / 65, 18 / 65),
        (0, 0, 1),
    ),
    (
        (1, 1, 1, 1, 1, 0),
        (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2, 0),
        (0, 4 / 9, 4 / 9, 9 / 4, 9 / 4, 0),
        (0, 8 / 27, -8 / 27, 27 / 8, -27 / 8, 1),
    ),
)
_TRANSFORMS = {2: _F2, 4: _F4}


def _winograd(step: Step, images: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A step's convolution by F(2x2, 3x3) or F(4x4, 3x3) of Lavin and Gray, CVPR 2016.

    What is multiplied is rounded to dtype, at place (1, 1) of F(2x2, 3x3), where windows are summed along both axes, to
    two numbers of it; in bfloat16 F(4x4, 3x3) rounds less than weights would be, and nothing here. With a stride these
    are direct sums.
    """
    if step.stride == (2, 2):
        return F.conv2d(images, weight, step.bias, step.stride, step.padding)
    tile, (down, across), size = winograd_tile(step, dtype), step.padding, (step.out.height, step.out.width)
    dtype = torch.float32 if tile == 4 else dtype
    below, right = (-n % tile for n in size)
    images = F.pad(images, (across, across + right, down, down + below))
    windows = images.unfold(2, tile + 2, tile).unfold(3, tile + 2, tile)  # [n, C, tiles, tiles, tile + 2, tile + 2]
    of_input, of_weight, of_output = _TRANSFORMS[tile]
    for_input, for_output = images.new_tensor(of_input), images.new_tensor(of_output)
    for_weight = weight.new_tensor(of_weight, dtype=torch.float64)
    exact = (for_weight @ weight.double() @ for_weight.t()).float()
    weights = exact.to(dtype).float()
    if tile == 2:
        weights[..., 1, 1] += (exact - weights)[..., 1, 1].to(dtype).float()
    placed = (for_input @ windows @ for_input.t()).to(dtype).float()
    products = torch.einsum("nchwyx,ocyx->nohwyx", placed, weights)
    sums = for_output @ products @ for_output.t()
    out = sums.transpose(3, 4).flatten(4).flatten(2, 3)[:, :, : size[0], : size[1]]
    return out if step.bias is None else out + step.bias.view(-1, 1, 1)


def sample_logits(program: Program, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits float32 [n, K] of images [n, C, H, W], every value rounded to dtype."""
    return sample_values(program, x, dtype)[program.logits].flatten(0, 2).t().float()


def sample_values(program: Program, x: Tensor, dtype: torch.dtype) -> dict[Value, Tensor]:
    """What every step of a program gives, [C, H, W, n], in dtype; of int8 as float32."""
    values: dict[Value, Tensor] = {}
    stored = torch.float32 if dtype is torch.int8 else dtype

    def new(value: Value) -> Tensor:
        if value not in values:
            shape = (value.channels, value.height, value.width, len(x))
            if value.part is None:
                values[value] = x.new_zeros(shape, dtype=stored)
            else:
                start = value.part[1] * value.part[0].height * value.part[0].width
                whole = new(value.part[0]).flatten(0, 2)
                values[value] = whole[start : start + value.size].view(shape)
        return values[value]

    mean = 0.0 if program.mean is None else program.mean.view(-1, 1, 1, 1)
    std = 1.0 if program.std is None else program.std.view(-1, 1, 1, 1)
    pixels = (x.to(stored).float().permute(1, 2, 3, 0) - mean) / std
    if dtype is torch.int8:
        pixels = (pixels * program.scale + program.shift).clamp(0, 255).round()
    new(program.image).copy_(pixels)
    for s in program.steps:
        image, out = new(s.input).float(), new(s.out)
        images = image.permute(3, 0, 1, 2)
        kernel, stride, padding, dilation = (list(pair) for pair in (s.kernel, s.stride, s.padding, s.dilation))
        if s.weight is None:
            ceil = list(out.shape[1:3]) != conv2d_size(images.shape[2:], kernel, stride, padding, dilation)
            most = F.max_pool2d(images, kernel, stride, padding, dilation, ceil_mode=ceil)
            out.copy_(most.permute(1, 2, 3, 0))
            continue
        entries, taps, rows = s.weight
        added: Tensor | float = 0.0 if s.other is None else new(s.other).float()
        if s.engine == "winograd" and s.integers is None and winograd_tile(s, dtype):
            weight = _dense_weight(entries, taps, rows, len(image), kernel)
            result = _winograd(s, images, weight, dtype).permute(1, 2, 3, 0) + added
        elif s.integers is None:
            weight = _dense_weight(entries.to(dtype).float(), taps, rows, len(image), kernel)
            result = F.conv2d(images, weight, s.bias, stride, padding, dilation).permute(1, 2, 3, 0) + added
        else:
            whole, (top, left) = s.integers, padding
            around = F.pad(images.double(), (left, left, top, top), value=whole.zero)
            weight = _dense_weight(entries.double(), taps, rows, len(image), kernel)
            sums = F.conv2d(around, weight, None if s.bias is None else s.bias.double(), stride, 0, dilation)
            factor, shift = image.new_tensor([whole.other_scale, whole.shift]).double()  # of float32
            added = torch.as_tensor(added, device=x.device).double()
            added = (added * factor + shift).float()  # rounded once, as in the kernels
            scales = whole.scales.double().view(-1, 1, 1, 1)
            result = (sums.float().permute(1, 2, 3, 0).double() * scales + added).float()
        result = result.clamp(s.low, s.high)
        out.copy_(result if s.integers is None or s.integers.real else result.round())
    return values


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
    w = _product(weight, expand_mask(mask, weight.shape, block_size), x.dtype)
    return torch.conv2d(x, w, None if bias is None else bias.to(x.dtype), stride, padding, dilation, groups)


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
    wide = torch.promote_types(x.dtype, torch.float32)
    w = _product(weight, expand_mask(mask, weight.shape, block_size), x.dtype)
    rounded = None if bias is None else bias.to(x.dtype).to(wide)
    out = torch.conv2d(x.to(wide), w.to(wide), rounded, stride, padding, dilation, groups)
    if scale is not None and shift is not None:
        out = out * scale.to(wide).view(-1, 1, 1) + shift.to(wide).view(-1, 1, 1)
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
    effective = _product(weight, expand_mask(mask, weight.shape, block_size), x.dtype)
    args = (stride, padding, dilation, False, [0, 0], groups, [True, True, False])
    dx, dw, _ = torch.ops.aten.convolution_backward(grad, x, effective, None, *args)
    return _needed(dx, *_chain(dw, weight, mask, block_size), need=need)


def masked_linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, block_size: int) -> Tensor:
    w = _product(weight, expand_mask(mask, weight.shape, block_size), x.dtype)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))


def masked_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, block_size: int, need: list[bool]
) -> list[Tensor]:
    effective = _product(weight, expand_mask(mask, weight.shape, block_size), x.dtype)
    return _needed(grad @ effective, *_chain(grad.T @ x, weight, mask, block_size), need=need)


def _chain(dw: Tensor, weight: Tensor, mask: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """dL/dtheta = G * M and dL/dM = sum of G * theta, in the dtypes of theta and M."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    dtheta = _product(dw.to(wide), expand_mask(mask, weight.shape, block_size), weight.dtype)
    dmask = reduce_to_mask(dw.to(wide) * weight.to(wide), mask.shape, block_size).to(mask.dtype)
    return dtheta, dmask


def _needed(*grads: Tensor, need: list[bool]) -> list[Tensor]:
    return [g for g, n in zip(grads, need, strict=True) if n]
