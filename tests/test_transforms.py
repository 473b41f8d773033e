"""Semantic transforms: the intervals drawn from, composition, and reproducible draws."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

import csam_kernels
from csam import transforms
from csam.transforms import Blur, Brightness, Contrast, Gamma, GaussianNoise, Rotation, Scale, Transform, Translation

COLUMNS = csam_kernels.SEMANTIC_COLUMNS
NEUTRAL = torch.tensor(csam_kernels.SEMANTIC_NEUTRAL)

CASES = [
    (Rotation(10), {"rotation": (-10, 10)}),
    (Translation(0.1), {"translate_x": (-0.1, 0.1), "translate_y": (-0.1, 0.1)}),
    (Scale(1.2), {"scale": (0.8, 1.2)}),
    (Scale(0.8), {"scale": (0.8, 1.2)}),
    (Contrast(0.5), {"contrast": (0.5, 1.5)}),
    (Brightness(0.2), {"brightness": (-0.2, 0.2)}),
    (Gamma(0.5), {"gamma": (0.5, 2)}),
    (Gamma(2), {"gamma": (0.5, 2)}),
    (Blur(1.5), {"blur": (0, 1.5)}),
    (Rotation(5) | Gamma(0.8) | Blur(1), {"rotation": (-5, 5), "gamma": (0.8, 1.25), "blur": (0, 1)}),
]


@pytest.mark.parametrize(("transform", "intervals"), CASES, ids=lambda v: str(v) if isinstance(v, Transform) else "")
def test_parameters_are_uniform_in_their_interval_and_neutral_elsewhere(
    transform: Transform, intervals: dict[str, tuple[float, float]]
) -> None:
    rows = transform.parameters(4000, seed=1)
    assert rows.shape == (4000, len(COLUMNS))
    assert rows.dtype == torch.float32
    for j, name in enumerate(COLUMNS):
        if name not in intervals:
            assert (rows[:, j] == NEUTRAL[j]).all()
            continue
        low, high = torch.tensor(intervals[name], dtype=torch.float32).tolist()
        column = rows[:, j].double().numpy()
        assert low <= column.min()
        assert column.max() <= high
        assert stats.kstest(column, stats.uniform(low, high - low).cdf).pvalue > 1e-3


def test_every_parameter_is_drawn_on_its_own() -> None:
    rows = (Translation(0.5) | Rotation(10)).parameters(4000, seed=0)[:, :3]
    assert (torch.corrcoef(rows.T) - torch.eye(3)).abs().max() < 0.06


def test_row_depends_on_seed_stream_and_sample_only() -> None:
    t = Rotation(10) | Blur(1)
    rows = t.parameters(50, seed=7, stream=3)
    assert torch.equal(rows[20:30], t.parameters(10, seed=7, first_sample=20, stream=3))
    assert not torch.equal(rows, t.parameters(50, seed=8, stream=3))
    assert not torch.equal(rows, t.parameters(50, seed=7, stream=4))


def test_a_draw_is_the_same_whatever_it_is_composed_with() -> None:
    alone = Brightness(0.2).parameters(20, seed=0)
    mixed = (Rotation(10) | Brightness(0.2)).parameters(20, seed=0)
    j = COLUMNS.index("brightness")
    assert torch.equal(alone[:, j], mixed[:, j])


def test_composition_commutes() -> None:
    one, other = Rotation(10) | Blur(1), Blur(1) | Rotation(10)
    assert one == other
    assert hash(one) == hash(other)
    assert torch.equal(one.parameters(5, seed=0), other.parameters(5, seed=0))
    assert one != Rotation(10)


def test_the_same_kind_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="rotation twice"):
        Rotation(10) | Blur(1) | Rotation(5)
    with pytest.raises(TypeError):
        Rotation(10) | 5


def test_call_transforms_each_image_by_its_own_row() -> None:
    x, t = torch.rand(3, 2, 5, 6), Rotation(30) | Brightness(0.2)
    out = t(x, seed=4, first_sample=9, stream=1)
    rows = t.parameters(3, seed=4, first_sample=9, stream=1)
    for i in range(3):
        assert torch.equal(out[i], csam_kernels.semantic_batch(x[i], rows[i : i + 1])[0])
        assert torch.equal(out[i], t(x[i], seed=4, first_sample=9 + i, stream=1))
    assert not torch.equal(out, x)


def test_call_takes_other_dtypes_and_an_empty_batch() -> None:
    t = Brightness(0.2)
    assert t(torch.rand(2, 1, 3, 3, dtype=torch.float64), seed=0).dtype == torch.float32
    assert t(torch.empty(0, 1, 3, 3), seed=0).shape == (0, 1, 3, 3)


@pytest.mark.parametrize("x", [torch.linspace(-2, 2, 16), torch.full((16,), 1.01), torch.full((16,), torch.nan)])
def test_pixels_outside_their_range_are_refused_and_clipped_only_as_asked(x: torch.Tensor) -> None:
    x = x.view(1, 1, 4, 4)
    low, high = float(x.min()), float(x.max())
    for t in (Rotation(1e-6), GaussianNoise(0.1)):
        with pytest.raises(ValueError, match=rf"^x must have pixels in \[0, 1\], got {low:g} .. {high:g}; normalise"):
            t(x, seed=0)
        if high == high:
            assert torch.equal(t.clipped(x, seed=0)[0], t.clipped(x[0], seed=0))
            assert 0 <= t.clipped(x, seed=0).min() <= t.clipped(x, seed=0).max() <= 1
    nearly = torch.tensor([-1e-7, 1 + 1e-3]).view(1, 1, 2)  # as resampling may leave
    assert torch.equal(Brightness(1e-9)(nearly, seed=0), nearly.clamp(0, 1))


def test_call_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    Rotation(10)(torch.rand(1, 4, 4, generator=torch.Generator()), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_parameters_do_not_depend_on_the_default_device() -> None:
    want = Rotation(10).parameters(5, seed=0)
    with torch.device("meta"):
        got = Rotation(10).parameters(5, seed=0)
    assert torch.equal(got, want)


@pytest.mark.parametrize("text", ["rotation:10", "rotation:10,brightness:0.2", "scale:1.1,gamma:0.5,blur:1.25"])
def test_parse_and_str_are_inverse(text: str) -> None:
    assert str(transforms.parse(text)) == text


@pytest.mark.parametrize("kind", transforms.KINDS)
def test_every_kind_can_be_parsed(kind: str) -> None:
    assert transforms.parse(f" {kind} : 0.1 ") == transforms.KINDS[kind](0.1)


def test_str_keeps_every_bit() -> None:
    assert transforms.parse(str(Rotation(1 / 3))) == Rotation(1 / 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "transform must be one of rotation, translation"),
        ("shear:3", "transform must be one of .* got 'shear:3'"),
        ("rotation", "rotation must have a number"),
        ("rotation:ten", "rotation must have a number, as rotation:0.5, got 'ten'"),
        ("rotation:10,rotation:5", "rotation twice"),
        ("rotation:-3", r"rotation must be in \(0, 180\], got -3"),
        ("rotation:10,", "transform must be one of"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transforms.parse(text)


def test_parse_refuses_what_is_no_string() -> None:
    with pytest.raises(TypeError, match="text must be a string of kind:value pairs, got float"):
        transforms.parse(0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Rotation, 0),
        (Rotation, 181),
        (Translation, 1.5),
        (Scale, 1),
        (Scale, 2),
        (Scale, 2 - 1e-14),
        (Contrast, 1),
        (Contrast, 1 + 1e-14),
        (Contrast, 2.5),
        (Brightness, -0.1),
        (Gamma, 1),
        (Gamma, 0),
        (Blur, 33),
        (Blur, math.nan),
        (Rotation, math.inf),
    ],
)
def test_values_out_of_range(kind: type, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{kind.__name__.lower()} must"):
        kind(value)


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="rotation must be a number"):
        Rotation("wide")
    with pytest.raises(ValueError, match=r"x must be \[B, C, H, W\] or \[C, H, W\]"):
        Rotation(10)(torch.rand(4, 4), seed=0)
    with pytest.raises(ValueError, match="seed must be in"):
        Rotation(10)(torch.rand(1, 4, 4), seed=-1)
