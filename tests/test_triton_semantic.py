"""Triton semantic_batch in the interpreter against the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from conftest import assert_close
from csam_kernels import backend, reference

if not backend.INTERPRETED:
    pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

import csam_kernels as ck
from csam_kernels.triton import tuning
from csam_kernels.triton.launch import record
from csam_kernels.triton.launchers.semantic_batch import semantic_batch
from test_semantic_batch import NEUTRAL, random_rows, row


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"BLOCK": 128, "num_warps": 4}
    monkeypatch.setattr(tuning, "SEMANTIC_BATCH", dict.fromkeys(tuning.CLASSES.values(), row))


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 8, 8), (2, 5, 9), (1, 1, 1), (2, 23, 14)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_matches_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Copies that blur and copies that do not, in one batch."""
    x, params = torch.rand(shape), random_rows(8)
    params[::2, ck.SEMANTIC_COLUMNS.index("blur")] = 0
    assert_close(semantic_batch(x, params.to(dtype)), reference.semantic_batch(x, params))


def test_neutral_row_is_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CSAM_BACKEND", "triton")
    x = torch.rand(3, 9, 7)
    assert torch.equal(ck.semantic_batch(x, torch.tensor([NEUTRAL, NEUTRAL])), x.expand(2, 3, 9, 7))
    assert ck.semantic_batch(x, torch.empty(0, 8)).shape == (0, 3, 9, 7)


@pytest.mark.parametrize("turns", [-7, -2, -1, 1, 2, 3, 4, 4001])
def test_quarter_turns_are_exact(turns: int) -> None:
    x = torch.rand(2, 8, 8)
    assert torch.equal(semantic_batch(x, row(rotation=90.0 * turns))[0], x.rot90(turns, (1, 2)))


@pytest.mark.parametrize("angle", [-179.0, -45.0, 44.9, 45.1, 134.9, 225.0, 1e5 + 33])
def test_any_angle(angle: float) -> None:
    x = torch.rand(1, 12, 12)
    assert_close(semantic_batch(x, row(rotation=angle)), reference.semantic_batch(x, row(rotation=angle)))


@pytest.mark.parametrize(("blur", "shape"), [(0.3, (1, 6, 6)), (32.0, (1, 7, 11)), (1.2, (2, 16, 13))])
def test_blur_alone(blur: float, shape: tuple[int, int, int]) -> None:
    """Radii 1 and 96, the second far beyond the image."""
    x = torch.rand(shape)
    assert_close(semantic_batch(x, row(blur=blur)), reference.semantic_batch(x, row(blur=blur)))


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.5])
def test_photometric_map(gamma: float) -> None:
    x = torch.rand(3, 4, 4)
    out = semantic_batch(x, row(contrast=1.5, brightness=-0.2, gamma=gamma))[0]
    assert_close(out, (1.5 * x - 0.2).clamp(0, 1) ** gamma)
    assert bool((out == 0).any())


def test_strided_input() -> None:
    x, params = torch.rand(6, 5, 3).permute(2, 1, 0), random_rows(8).T.contiguous().T
    assert torch.equal(semantic_batch(x, params), semantic_batch(x.contiguous(), params.contiguous()))


def test_an_image_beyond_32_bit_indices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x must have at most 2\^31 - 2\^22 elements"):
        semantic_batch(torch.empty(1, 1, 2**31 - 1, device="meta"), torch.empty(1, 8, device="meta"))


def test_launches_do_not_depend_on_the_parameters() -> None:
    x, params = torch.empty(3, 224, 224, device="meta"), torch.empty(100, 8, device="meta")
    with record() as launches:
        out = semantic_batch(x, params)
    least = x.nbytes + params.nbytes + out.nbytes
    assert len(launches) == 3
    assert sum(launch.bytes_read + launch.bytes_written for launch in launches) <= 1.05 * least
