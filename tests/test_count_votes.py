"""count_votes: histogram of argmax, first index wins ties, NaN rows cast no vote."""

from __future__ import annotations

import pytest
import torch

import csam_kernels as ck
from csam_kernels import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 10), (20_000, 10), (777, 1000)], ids=str)
def test_matches_reference(isa: str, threads: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    logits = torch.randint(-4, 5, shape).to(dtype)  # many ties
    logits[::7] = torch.randn_like(logits[::7])
    expected = torch.zeros(shape[1], dtype=torch.int64)
    reference.count_votes(logits, expected)
    assert torch.equal(ck.count_votes(logits), expected)
    assert int(expected.sum()) == shape[0]


def test_lowest_index_wins_and_infinities_count() -> None:
    inf = float("inf")
    logits = torch.tensor([[1.0, 1.0, 0.0], [-inf, -inf, -inf], [0.0, inf, inf], [-0.0, 0.0, 0.0]])
    assert ck.count_votes(logits).tolist() == [3, 1, 0]


def test_nan_rows_cast_no_vote() -> None:
    logits = torch.tensor([[float("nan"), 1.0], [0.0, float("nan")], [0.0, 1.0]])
    assert ck.count_votes(logits).tolist() == [0, 1]


def test_accumulates_into_out_and_takes_strided_rows() -> None:
    out = torch.tensor([5, 0, 1])
    logits = torch.randn(100, 6)[:, :3]
    expected = out + torch.bincount(logits.argmax(1), minlength=3)
    assert ck.count_votes(logits, out) is out
    assert torch.equal(out, expected)
    assert torch.equal(ck.count_votes(logits.T.contiguous().T), expected - torch.tensor([5, 0, 1]))


@pytest.mark.parametrize(
    ("logits", "out", "message"),
    [
        (torch.randn(3), None, "logits must have 2 dimensions"),
        (torch.zeros(3, 0), None, "K >= 1"),
        (torch.zeros(3, 2, dtype=torch.int32), None, "logits must have dtype"),
        (torch.randn(3, 2), torch.zeros(2), "out must have dtype"),
        (torch.randn(3, 2), torch.zeros(3, dtype=torch.int64), "out must be a contiguous"),
        (torch.randn(3, 2), torch.zeros(4, dtype=torch.int64)[::2], r"stride \(2,\)"),
    ],
)
def test_bad_arguments(logits: torch.Tensor, out: torch.Tensor | None, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ck.count_votes(logits, out)
