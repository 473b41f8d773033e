"""discrepancy: the largest move of the float64 softmax, and whether argmax changes."""

from __future__ import annotations

import pytest
import torch

import csam_kernels as ck
from conftest import assert_close
from csam_kernels import _C, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (5, 1), (50, 10), (2000, 33)], ids=str)
def test_matches_reference(isa: str, threads: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    clean, logits = (3 * torch.randn(shape[1])).to(dtype), (3 * torch.randn(shape)).to(dtype)
    logits[::7] = torch.randint(-2, 3, logits[::7].shape).to(dtype)  # ties
    moved, changed = ck.discrepancy(clean, logits)
    expected, flips = reference.discrepancy(clean, logits)
    assert_close(moved, expected)
    assert torch.equal(changed, flips)
    _C.set_isa("generic")
    assert all(map(torch.equal, ck.discrepancy(clean, logits), (moved, changed)))


def test_by_hand() -> None:
    clean = torch.tensor([2.0, 1.0, 0.0]).log()
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [1.0, 1.0, 0.0]]).log()
    moved, changed = ck.discrepancy(clean, logits)
    torch.testing.assert_close(moved, torch.tensor([0, 1 / 3, 1 / 6], dtype=torch.float64), rtol=1e-6, atol=1e-7)
    assert changed.tolist() == [False, True, False]  # the lowest index wins the tie


def test_a_row_is_the_same_alone_and_among_others() -> None:
    clean, logits = torch.randn(10), torch.randn(64, 10)
    moved, changed = ck.discrepancy(clean, logits)
    for i in (0, 17, 63):
        one, flip = ck.discrepancy(clean, logits[i : i + 1])
        assert (one[0], flip[0]) == (moved[i], changed[i])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_has_no_softmax_is_nan_and_no_flip(bad: float) -> None:
    clean, logits = torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 1.0], [bad, 1.0], [0.0, bad]])
    for serve in (ck.discrepancy, reference.discrepancy):
        moved, changed = serve(clean, logits)
        assert moved.isnan().tolist() == [False, True, True]
        assert changed.tolist() == [True, False, False]
        moved, changed = serve(torch.tensor([bad, 0.0]), logits)
        assert moved.isnan().all()
        assert not changed.any()


def test_takes_strided_rows_and_columns() -> None:
    clean, wide = torch.randn(6)[::2], torch.randn(20, 6)
    want = reference.discrepancy(clean, wide[:, :3])
    for laid in (wide[:, :3], wide[:, :3].T.contiguous().T):
        moved, changed = ck.discrepancy(clean, laid)
        assert_close(moved, want[0])
        assert torch.equal(changed, want[1])


@pytest.mark.parametrize(
    ("clean", "logits", "message"),
    [
        (torch.zeros(1, 2), torch.zeros(3, 2), "clean must have 1 dimension"),
        (torch.zeros(2), torch.zeros(2), "logits must have 2 dimensions"),
        (torch.zeros(3), torch.zeros(5, 2), r"clean must be \[K\] and logits \[n, K\]"),
        (torch.zeros(0), torch.zeros(5, 0), "K >= 1"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(5, 2), "clean must have dtype"),
    ],
)
def test_bad_arguments(clean: torch.Tensor, logits: torch.Tensor, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ck.discrepancy(clean, logits)
