"""semantic_batch against the reference and against transforms with known answers."""

from __future__ import annotations

import pytest
import torch

import csam_kernels as ck
from conftest import assert_close
from csam_kernels import _C, reference

NEUTRAL = list(ck.SEMANTIC_NEUTRAL)


def row(**values: float) -> torch.Tensor:
    params = torch.tensor([NEUTRAL])
    for name, value in values.items():
        params[0, ck.SEMANTIC_COLUMNS.index(name)] = value
    return params


def random_rows(n: int) -> torch.Tensor:
    low = torch.tensor(
        [-180.0, -0.5, -0.5, 0.5, 0.0, 0.5, -0.3, 1.0]
    )  # gamma < 1 is steep at 0: see the photometric map
    high = torch.tensor([180.0, 0.5, 0.5, 2.0, 2.0, 1.5, 0.3, 2.0])
    return low + (high - low) * torch.rand(n, 8)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (2, 5, 9), (1, 1, 1), (5, 17, 33)], ids=str)
def test_matches_reference(isa: str, threads: int, shape: tuple[int, int, int]) -> None:
    x, params = torch.rand(shape), random_rows(9)
    out = ck.semantic_batch(x, params)
    assert_close(out, reference.semantic_batch(x, params))
    _C.set_isa("generic")
    assert torch.equal(out, ck.semantic_batch(x, params))


@pytest.mark.parametrize("shape", [(3, 5, 0), (3, 0, 5), (0, 5, 5)], ids=str)
def test_images_without_a_pixel(isa: str, shape: tuple[int, int, int]) -> None:
    out = ck.semantic_batch(torch.zeros(shape), torch.cat([row(), row(blur=2.0)]))
    assert out.shape == (2, *shape)


def test_copies_moved_out_of_the_image_are_dark() -> None:
    x, params = torch.ones(3, 6, 7), torch.cat([row(translate_x=1e30), row(translate_y=-2.0), row(scale=1e-30)])
    out = ck.semantic_batch(x, params)
    assert not out[:2].any()
    assert int((out[2] > 0).sum()) <= 3  # at most the pixel at the centre


def test_neutral_row_is_the_identity() -> None:
    x = torch.rand(3, 9, 7)
    assert torch.equal(ck.semantic_batch(x, torch.tensor([NEUTRAL, NEUTRAL])), x.expand(2, 3, 9, 7))


def test_quarter_turn_is_counter_clockwise() -> None:
    x = torch.rand(2, 8, 8)
    torch.testing.assert_close(ck.semantic_batch(x, row(rotation=90))[0], x.rot90(1, (1, 2)), rtol=0, atol=1e-5)


def test_translation_moves_content_right_and_down() -> None:
    x = torch.zeros(1, 8, 8)
    x[0, 2, 3] = 1
    moved = ck.semantic_batch(x, row(translate_x=0.25, translate_y=0.125))[0]
    assert moved[0, 3, 5] == pytest.approx(1, abs=1e-6)
    assert float(moved.sum()) == pytest.approx(1, abs=1e-5)


def test_scale_enlarges_about_the_centre() -> None:
    x = torch.zeros(1, 9, 9)
    x[0, 3:6, 3:6] = 1
    assert float(ck.semantic_batch(x, row(scale=2.0)).sum()) > 2.5 * float(x.sum())


def test_photometric_map() -> None:
    x = torch.rand(3, 4, 4)
    out = ck.semantic_batch(x, row(contrast=1.5, brightness=-0.2, gamma=0.7))[0]
    assert_close(out, (1.5 * x - 0.2).clamp(0, 1) ** 0.7)


def test_blur_keeps_constants_and_matches_scipy() -> None:
    from scipy.ndimage import gaussian_filter

    assert torch.allclose(ck.semantic_batch(torch.full((1, 6, 6), 0.3), row(blur=1.0)), torch.tensor(0.3))
    x = torch.rand(16, 16)
    want = gaussian_filter(x.double().numpy(), 1.2, mode="nearest", radius=4)
    out = ck.semantic_batch(x[None], row(blur=1.2))[0, 0]
    assert_close(out, torch.from_numpy(want).float())


@pytest.mark.parametrize(
    ("x", "params", "message"),
    [
        (torch.rand(3, 4, 4), torch.zeros(1, 7), "params must be"),
        (torch.rand(4, 4), torch.tensor([NEUTRAL]), "x must have 3 dimensions"),
        (torch.rand(3, 4, 4), row(scale=0.0), "scale must be > 0"),
        (torch.rand(3, 4, 4), row(gamma=-1.0), "gamma must be > 0"),
        (torch.rand(3, 4, 4), row(gamma=1.0).double() * 1e-300, "scale must be > 0"),  # 0 in float32
        (torch.rand(3, 4, 4), row(contrast=1.0).double() * 1e300, "params must be finite"),
        (torch.rand(3, 4, 4), row(blur=40.0), "blur must be in"),
        (torch.rand(3, 4, 4), row(rotation=float("inf")), "params must be finite"),
    ],
)
def test_bad_arguments(x: torch.Tensor, params: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ck.semantic_batch(x, params)
