"""A network as steps on samples that lie innermost: noise goes in, votes come out, no batch lies in memory."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from csam_kernels import backend, checks
from csam_kernels.cells import cells, steps
from csam_kernels.laws import checked_law, checked_sigma, scaled
from csam_kernels.layout import conv2d_size
from csam_kernels.ops.grid_noise import checked_grid
from csam_kernels.ops.sample_conv2d import DTYPES, MOST_TAPS, compressed_rows
from csam_kernels.ops.smoothing_noise import checked_range

ENGINES = ("sparse", "dense", "winograd")  # in the order of csrc/cpu/kernels.h
Rows = tuple[Tensor, Tensor, Tensor]  # values, taps, rows of `compress`
Range = tuple[Tensor, int, int, int]  # image, samples, the first of them, stream
STREAMED = 2**14  # numbers a sample of a value from which that pays: a megabyte in bfloat16
_ARITHMETIC = 10  # goes up when the same plan gives other bits
_MOST = 2**31 - 1  # numbers of a value


@dataclass(eq=False)
class Value:
    """What a step reads or gives: [channels, height, width] a sample.

    Attributes:
        part: (whole, first channel) of the value that this one is a part of: the parts of a concatenation.
    """

    channels: int
    height: int
    width: int
    part: tuple[Value, int] | None = None

    @property
    def size(self) -> int:
        return self.channels * self.height * self.width

    @property
    def root(self) -> Value:
        return self if self.part is None else self.part[0].root

    @property
    def offset(self) -> int:
        """Of its first number in its root."""
        return 0 if self.part is None else self.part[0].offset + self.part[1] * self.part[0].height * self.part[0].width


@dataclass(frozen=True)
class Integers:
    """What a step of a program in int8 does: values are 0 .. 255, weights whole numbers -127 .. 127, sums 32 bits.

    out = clamp(sum * scales[filter] + other * other_scale + shift, low, high), rounded to even; the step's bias is in
    units of the sum, low and high in those of out.

    Attributes:
        scales: float32 [filters].
        zero: what stands for 0 in the input, and lies outside its borders.
        real: whether out is stored as float32, unrounded: the logits.
    """

    scales: Tensor
    shift: float
    other_scale: float
    zero: int
    real: bool = False


@dataclass(eq=False)
class Step:
    """out = clamp(conv2d(input, weight) + bias + other, low, high), or the maximum over windows of the input.

    Attributes:
        weight: (values, taps, rows) as `compress` gives them; None for the maximum.
        bias: float32 [channels of out], or None.
        kernel, stride, padding, dilation: along height and width.
        engine: how a convolution multiplies. "sparse": each filter its own taps. "dense": filters share what they load,
            with the zeros between channels and filters that are alive at all; faster from a density of about 0.4 on.
            "winograd": dense, with fewer multiplications (Lavin and Gray, CVPR 2016; `winograd_tile`): 36 in place of
            144, 81 with a stride of 2, or 16 in place of 36; for a kernel of 3x3, stride 1 or 2, no dilation. 36 are
            in float32 up to twice the rounding; in bfloat16 they multiply integers of 16 bits, with less; in int8 they
            have the bits of the others. It runs dense where tiles of AMX are faster, and in int8 where the sum of a
            filter could pass 2^25.
        name: for messages.
        integers: in a program of int8 and no other.
    """

    input: Value
    out: Value
    other: Value | None = None
    weight: Rows | None = None
    bias: Tensor | None = None
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    low: float = -math.inf
    high: float = math.inf
    engine: str = "sparse"
    name: str = ""
    integers: Integers | None = None


@dataclass(eq=False)
class Program:
    """Steps from an image to logits.

    Attributes:
        image: [C, H, W]; the network sees (image - mean) / std.
        logits: [K, 1, 1].
        mean, std: float32 [C], or None for 0 and 1.
        scale, shift: in int8 what stands for a normalised pixel v is v * scale + shift, rounded.
    """

    image: Value
    logits: Value
    steps: list[Step] = field(default_factory=list)
    mean: Tensor | None = None
    std: Tensor | None = None
    scale: float = 1.0
    shift: float = 0.0

    def streams(self) -> dict[int, int]:
        """Steps whose results the next one alone reads, a row at a time, and the rows kept: those of its window.

        They are the steps around a depthwise convolution, whose values would not stay in a second-level cache.
        """
        alone = [depthwise(step) for step in self.steps]
        readers: dict[Value, int] = {self.logits.root: 2}
        for step in self.steps:
            for value in (v.root for v in (step.input, step.other) if v is not None):
                readers[value] = readers.get(value, 0) + 1
        found = {}
        for i, (step, after) in enumerate(itertools.pairwise(self.steps)):
            out, (height, dilation) = step.out, (after.kernel[0], after.dilation[0])
            pair = (alone[i + 1] and height <= 3 and dilation == 1) or (alone[i] and height == 1)
            plain = all(s.weight is not None and s.engine != "winograd" for s in (step, after)) and step.other is None
            own = after.input is out and out.root is out and readers[out] == 1
            if pair and plain and own and after.stride[0] <= 2 and out.height > height and out.size >= STREAMED:
                found[i] = height
        return found

    def places(self) -> tuple[dict[Value, int], int]:
        """Where each root value lies in an arena that all share, and the arena's size; in numbers of one sample.

        Values that are needed at the same time do not overlap, and steps that run together need theirs together; the
        largest find their place first.
        """
        first: dict[Value, int] = {self.image.root: -1}
        last: dict[Value, int] = {self.logits.root: len(self.steps)}
        streams, begin, ends = self.streams(), 0, list(range(len(self.steps)))
        for i in reversed(range(len(self.steps) - 1)):
            ends[i] = ends[i + 1] if i in streams else i
        for i, step in enumerate(self.steps):
            begin = begin if i - 1 in streams else i
            first.setdefault(step.out.root, begin)
            for value in (step.input, step.out, step.other):
                if value is not None:
                    last[value.root] = max(last.get(value.root, i), ends[i])
        real = {step.out.root for step in self.steps if step.integers is not None and step.integers.real}
        sizes = {root: root.size * (4 if root in real else 1) for root in first}
        for i, rows in streams.items():
            out = self.steps[i].out
            sizes[out] = out.channels * rows * out.width
        found: dict[Value, int] = {}
        for root in sorted(first, key=lambda v: -sizes[v]):
            alive = [
                r for r in found if first[r] <= last.get(root, first[root]) and first[root] <= last.get(r, first[r])
            ]
            place = 0
            for other in sorted(alive, key=found.__getitem__):
                if found[other] < place + sizes[root] and place < found[other] + sizes[other]:
                    place = found[other] + sizes[other]
            found[root] = place
        return found, max(place + sizes[root] for root, place in found.items())


def depthwise(step: Step) -> bool:
    """Whether every filter of a convolution reads one channel, and on the whole more of it than a tap."""
    if step.weight is None or step.engine != "sparse":
        return False
    _, taps, rows = step.weight
    if len(taps) > (len(rows) - 1) * math.prod(step.kernel):
        return False
    channels, begins = taps // math.prod(step.kernel), rows.new_zeros(len(taps) + 1, dtype=torch.bool)
    begins[rows.long()] = True
    same = (channels[1:] == channels[:-1]) | begins[1:-1]
    return len(taps) > len(rows) - 1 and bool(same.all())


class SampleNetwork:
    """A program readied to run; `sample_network` makes it. Its methods may run on several threads at once.

    Attributes:
        shape: (C, H, W) of an image.
        classes: K.
        dtype: of all values; sums are float32, in int8 32-bit integers. On processors with AMX those of sparse steps in
            bfloat16, but for depthwise ones, are float16 for 64 products at a time, which then enter float32 ones.
        lanes: samples of a tile, which one thread takes through all steps.
        memory: bytes that a thread takes while it runs.
    """

    def __init__(self, program: Program, dtype: torch.dtype) -> None:
        self.program = replace(program, steps=[replace(step) for step in program.steps])  # what becomes of the caller's
        self.dtype = dtype
        self.shape = (program.image.channels, program.image.height, program.image.width)
        self.classes = program.logits.channels
        places, arena = program.places()
        self._native = backend.serve("sample_network", torch.device("cpu"))(program, dtype, places, arena)
        self.lanes: int = self._native.lanes
        self.memory: int = self._native.memory

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made of the program."""
        return SampleNetwork, (self.program, self.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """Logits float32 [n, K] of images [n, C, H, W], which are rounded to the network's dtype first.

        Raises:
            TypeError, ValueError: x of another shape, or not floating point.
        """
        checks.tensor("x", x, ndim=4)
        if tuple(x.shape[1:]) != self.shape or x.device.type != "cpu":
            want = f"[n, {', '.join(map(str, self.shape))}]"
            raise ValueError(f"x must be {want} on the CPU, got {list(x.shape)} on {x.device}")
        self._finite(x)
        x = x.detach().to(torch.float32 if self.dtype is torch.int8 else self.dtype).contiguous()
        out = torch.empty(len(x), self.classes, dtype=torch.float32, device="cpu")
        self._native.logits(x.data_ptr(), len(x), out.data_ptr())
        return out

    def votes(
        self,
        x: Tensor,
        sigma: float,
        n: int,
        *,
        seed: int,
        first_sample: int = 0,
        stream: int = 0,
        grid: int | None = None,
        law: str = "gaussian",
    ) -> Tensor:
        """Votes int64 [K] of the noisy samples first_sample .. first_sample + n - 1 of an image, on one thread.

        They are `count_votes` of the logits of `smoothing_noise(x, n, sigma, seed=seed, ...)`, with a grid of those of
        `grid_noise`: the votes of adjacent ranges add up, and a sample whose logits hold NaN casts none. Arguments and
        errors as there.
        """
        return self.votes_of([(x, n, first_sample, stream)], sigma, seed=seed, grid=grid, law=law)[0]

    def votes_of(
        self, ranges: Sequence[Range], sigma: float, *, seed: int, grid: int | None = None, law: str = "gaussian"
    ) -> Tensor:
        """`votes` of so many ranges of samples, int64 [ranges, K]; nothing but forward passes lies between them."""
        checked_law("law", law)
        sigma, seed = checked_sigma(sigma, law), checks.seed(seed)
        table = None if grid is None else cells(sigma, checked_grid(grid), law)
        noise = scaled(law, sigma) if table is None else table.native
        which = [(self._pixels(x, grid), *checked_range(n, first, stream)) for x, n, first, stream in ranges]
        draw = self._native.votes if table is None else self._native.grid_votes
        out = torch.zeros(len(which), self.classes, dtype=torch.int64, device="cpu")
        place, row = out.data_ptr(), self.classes * out.itemsize
        for x, n, first, stream in which:
            draw(x.data_ptr(), *noise, seed, stream, first, n, place)
            place += row
        return out

    def _pixels(self, x: Tensor, grid: int | None) -> Tensor:
        """The image, checked, as it is handed over: with a grid its steps."""
        checks.tensor("x", x, dtypes=(torch.float32,), ndim=3)
        if x.shape != self.shape or x.device.type != "cpu":
            raise ValueError(f"x must be {list(self.shape)} on the CPU, got {list(x.shape)} on {x.device}")
        self._finite(x)
        return (x.detach() if grid is None else steps(x.detach(), grid)).contiguous()

    def _finite(self, x: Tensor) -> None:
        if self.dtype is torch.int8 and not bool(x.isfinite().all()):  # integers have no NaN to show for it
            raise ValueError("x must be finite in torch.int8, got NaN or infinite values")

    def times(self, rounds: int = 5) -> list[float]:
        """The least milliseconds of processor time a sample that each step took in so many rounds, on one thread."""
        rounds = checks.integer("rounds", rounds, low=1)
        out = torch.empty(len(self.program.steps), dtype=torch.float64, device="cpu")
        self._native.times(rounds, out.data_ptr())
        return [1e3 * seconds / self.lanes for seconds in out.tolist()]

    @property
    def fingerprint(self) -> str:
        """16 hex digits of what decides a vote besides image and noise: weights, steps, dtype, arithmetic."""
        digest = hashlib.sha256(f"{self.dtype} {self._native.format} {_ARITHMETIC}".encode())
        program = self.program
        places, _ = program.places()

        def at(value: Value | None) -> tuple[int, ...] | None:
            return None if value is None else (places[value.root] + value.offset, *_shape(value))

        def add(tensors: tuple[Tensor | None, ...]) -> None:
            for tensor in tensors:
                digest.update(f"{None if tensor is None else tuple(tensor.shape)}".encode())
                digest.update(b"" if tensor is None else tensor.detach().contiguous().numpy().tobytes())

        digest.update(f"{at(program.image)} {at(program.logits)} {program.scale} {program.shift}".encode())
        add((program.mean, program.std))
        for step in program.steps:
            pairs = map(tuple, (step.kernel, step.stride, step.padding, step.dilation))
            window = (*pairs, float(step.low), float(step.high), step.engine)
            digest.update(f"{[at(v) for v in (step.input, step.other, step.out)]} {window}".encode())
            add((*(step.weight or (None,)), step.bias))
            if step.integers is not None:
                numbers = (step.integers.shift, step.integers.other_scale, step.integers.zero, step.integers.real)
                digest.update(f"{numbers}".encode())
                add((step.integers.scales,))
        return digest.hexdigest()[:16]


def step_costs(program: Program, dtype: torch.dtype) -> list[float]:
    """What each step of a program should cost a sample, in multiply-adds of one vector: what `SampleNetwork.times` is
    proportional to, with one factor for sparse steps and one for the others. Errors as in `sample_network`."""
    _checked(program, dtype)
    places, arena = program.places()
    draft = backend.serve("sample_network", torch.device("cpu"))(program, dtype, places, arena, draft=True)
    out = torch.empty(len(program.steps), dtype=torch.float64, device="cpu")
    draft.costs(out.data_ptr())
    return [float(cost) for cost in out]


def sample_network(program: Program, dtype: torch.dtype) -> SampleNetwork:
    """Ready a program for the processor: weights are copied and laid out, memory is planned.

    Args:
        program: steps in the order they run.
        dtype: torch.float32 or bfloat16, of all values; torch.int8 for a program of integers.

    Returns:
        What gives logits float32 [n, K] of images [n, C, H, W], and votes int64 [K] of noisy copies of one [C, H, W].

    Raises:
        TypeError, ValueError: a step whose shapes do not go together, or that reads what no step before it gave; by
            its name.
    """
    _checked(program, dtype)
    return SampleNetwork(program, dtype)


def _checked(program: Program, dtype: torch.dtype) -> None:
    checks.choice("dtype", dtype, (*DTYPES, torch.int8))
    image, logits = program.image, program.logits
    _placed("program.image", image)
    _placed("program.logits", logits)
    if logits.height * logits.width != 1:
        raise ValueError(f"program.logits must be [K, 1, 1], got {_shape(logits)}")
    for name in ("mean", "std"):
        scaling = getattr(program, name)
        if scaling is not None and _on_cpu(f"program.{name}", scaling, torch.float32).shape != (image.channels,):
            raise ValueError(f"program.{name} must hold {image.channels} values, got {tuple(scaling.shape)}")
    integers = dtype is torch.int8
    given: dict[Value, Tensor] = {}  # root -> which of its numbers are
    _given(given, image).fill_(True)
    for step in program.steps:
        name = f"step {step.name or '(unnamed)'}"
        _check(name, step)
        for what, value in (("input", step.input), ("other", step.other)):
            if value is not None and not _is_given(given, value):
                raise ValueError(f"{name}: {what} must be given by the image or steps before it")
        if step.out.root is image.root:
            raise ValueError(f"{name}: out must not lie in program.image")
        if bool(_given(given, step.out).any()):
            raise ValueError(f"{name}: out must not be given by steps before it")
        if (step.integers is not None) != (integers and step.weight is not None):
            raise ValueError(f"{name}: integers must be given for a convolution in torch.int8 and for no other step")
        checks.choice(f"{name}: engine", step.engine, ENGINES)
        if step.engine == "winograd" and not transformable(step):
            raise ValueError(f"{name}: engine winograd needs a 3x3 kernel of stride 1 or 2 without dilation")
        real = step.integers is not None and step.integers.real
        if integers and (real != (step.out is logits) or (step.out.root is logits.root) != real):
            raise ValueError(f"{name}: out must be real where it is program.logits, which is no part, and there alone")
        if integers and any(v is not None and v.root is logits.root for v in (step.input, step.other)):
            raise ValueError(f"{name}: program.logits must not be read in torch.int8, where they alone are float32")
        _given(given, step.out).fill_(True)
    if logits.root is image.root or not _is_given(given, logits):
        raise ValueError("program.logits must be given by the steps")


def transformable(step: Step) -> bool:
    """Whether the step may have engine "winograd"."""
    plain = step.weight is not None and (step.kernel, step.dilation) == ((3, 3), (1, 1))
    return plain and step.stride in ((1, 1), (2, 2))


def winograd_tile(step: Step, dtype: torch.dtype) -> int:
    """Side of the square of outputs that engine "winograd" makes at a time; 0 where a step may not have it, or it runs
    dense on any processor.

    4 takes 36 products, 81 with a stride of 2; 2 takes 16, of bfloat16 17. int8 has 4, and so have the others where
    that leaves at most three quarters of the products of 2; float32 of four such squares or more, or the weights would
    be read once for each. With a stride there is no other, nor that of int8: AVX-512 multiplies bytes twice as fast.
    """
    if not transformable(step):
        return 0
    small, large = (math.prod(-(-n // side) for n in (step.out.height, step.out.width)) for side in (2, 4))
    fours = 3 * large <= small and (large >= 4 or dtype is torch.bfloat16)
    if step.stride == (2, 2):
        return 4 if fours and dtype is not torch.int8 else 0
    return 4 if fours or dtype is torch.int8 else 2


def _check(name: str, step: Step) -> None:
    """Refuse a step by which anything would be read or written outside its values."""

    def refuse(what: str) -> None:
        raise ValueError(f"{name}: {what}")

    for what, value in (("input", step.input), ("out", step.out), ("other", step.other)):
        if value is not None or what != "other":
            _placed(f"{name}: {what}", value)
    if any(v is not None and _overlap(v, step.out) for v in (step.input, step.other)):
        refuse("out must not lie in what is read")
    if step.other is not None and _shape(step.other) != _shape(step.out):
        refuse(f"other must have out's shape {_shape(step.out)}, got {_shape(step.other)}")
    kernel, stride, padding, dilation = windows = (step.kernel, step.stride, step.padding, step.dilation)
    for what, pair in zip(("kernel", "stride", "padding", "dilation"), windows, strict=True):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            refuse(f"{what} must be a pair, got {pair!r}")
        for n in pair:
            checks.integer(f"{name}: {what}", n, low=0 if pair is padding else 1, high=_MOST)
    if kernel[0] * kernel[1] > MOST_TAPS:
        refuse(f"kernel must hold at most {MOST_TAPS} taps, got {kernel}")
    if not step.low <= step.high:
        refuse(f"low must be <= high, got {step.low} and {step.high}")
    size = conv2d_size((step.input.height, step.input.width), *windows)
    if step.weight is None:
        if (step.other, step.bias, step.low, step.high) != (None, None, -math.inf, math.inf):
            refuse("a maximum takes no other, bias or bounds")
        if any(2 * p > d * (k - 1) + 1 for p, d, k in zip(padding, dilation, kernel, strict=True)):
            refuse(f"padding of a maximum must be at most half its window, got {padding}")
        # as with torch's ceil_mode, a window more may begin inside the image or the padding before it
        axes = zip(_shape(step.out)[1:], size, (step.input.height, step.input.width), stride, padding, strict=True)
        fits = all(o in (s, s + 1) and (o == s or s * d < n + p) for o, s, n, d, p in axes)
        if step.out.channels != step.input.channels or not fits:
            refuse(f"out must be {[step.input.channels, *size]}, got {_shape(step.out)}")
        return
    values, taps, rows = step.weight
    for what, tensor, dtype in (
        ("values", values, torch.float32),
        ("taps", taps, torch.int32),
        ("rows", rows, torch.int32),
    ):
        if _on_cpu(f"{name}: {what}", tensor, dtype).dim() != 1:
            refuse(f"{what} must have 1 dimension, got shape {tuple(tensor.shape)}")
    try:
        compressed_rows(values, taps, rows, step.input.channels * kernel[0] * kernel[1])
    except ValueError as error:
        refuse(str(error))
    want = (len(rows) - 1, *size)
    if min(size) < 1 or _shape(step.out) != want:
        refuse(f"out must be {list(want)}, got {_shape(step.out)}")
    if step.bias is not None and _on_cpu(f"{name}: bias", step.bias, torch.float32).shape != want[:1]:
        refuse(f"bias must have shape {want[:1]}, got {tuple(step.bias.shape)}")
    if step.integers is not None:
        scales = _on_cpu(f"{name}: scales", step.integers.scales, torch.float32)
        if scales.shape != want[:1]:
            refuse(f"scales must have shape {want[:1]}, got {tuple(scales.shape)}")
        checks.integer(f"{name}: zero", step.integers.zero, low=0, high=255)
        if not (step.integers.real or 0 <= step.low <= step.high <= 255):
            refuse(f"low and high must be in [0, 255] in torch.int8, got {step.low} and {step.high}")
        for what, numbers, bound in (("values", values, 2**7), ("bias", step.bias, 2**31)):
            if numbers is not None and not bool(((numbers == numbers.round()) & (numbers.abs() < bound)).all()):
                refuse(f"{what} must be whole numbers below {bound} in torch.int8")
        run = torch.nn.functional.pad(values.abs().cumsum(0, dtype=torch.float64), (1, 0))  # exact: of whole numbers
        most = 255 * run[rows.long()].diff() + (0 if step.bias is None else step.bias.abs())
        if bool((most >= 2**31).any()):
            refuse("values must keep every sum of a filter below 2**31 in torch.int8")


def _placed(name: str, value: Value | None) -> None:
    """Refuse a value without numbers, or one that does not lie inside what it is a part of."""
    seen: list[Value] = []
    while True:
        if not isinstance(value, Value):
            raise TypeError(f"{name} must be a Value, got {type(value).__name__}")
        if any(value is v for v in seen):
            raise ValueError(f"{name} must not be a part of itself")
        for what in ("channels", "height", "width"):
            checks.integer(f"{name}: {what}", getattr(value, what), low=1, high=_MOST)
        if value.size > _MOST:
            raise ValueError(f"{name} must hold at most {_MOST} numbers, got {_shape(value)}")
        if value.part is None:
            return
        seen.append(value)
        whole, first = value.part
        first = checks.integer(f"{name}: first channel", first, low=-_MOST, high=_MOST)
        if isinstance(whole, Value) and not 0 <= first * whole.height * whole.width <= whole.size - value.size:
            raise ValueError(f"{name}: {_shape(value)} must lie inside {_shape(whole)} from channel {first} on")
        value = whole


def _overlap(a: Value, b: Value) -> bool:
    return a.root is b.root and a.offset < b.offset + b.size and b.offset < a.offset + a.size


def _on_cpu(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if checks.tensor(name, value, dtypes=(dtype,)).device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, got {value.device}")
    return value


def _given(given: dict[Value, Tensor], value: Value) -> Tensor:
    """Which of a value's numbers are, to be changed."""
    whole = given.setdefault(value.root, torch.zeros(value.root.size, dtype=torch.bool, device="cpu"))
    return whole[value.offset : value.offset + value.size]


def _is_given(given: dict[Value, Tensor], value: Value) -> bool:
    return bool(_given(given, value).all())


def _shape(value: Value) -> tuple[int, int, int]:
    return value.channels, value.height, value.width


__all__: list[Any] = ["Integers", "Program", "Rows", "SampleNetwork", "Step", "Value", "sample_network"]
