"""binarize: exact counts, exact order, ties by index, on every path of the selection."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import csam_kernels as ck
from csam_kernels import reference

LARGE = 300_000  # beyond the sampled bracket's threshold


def check(scores: list[torch.Tensor], sparsity: float, scope: str = "global") -> None:
    from csam_kernels.ops.binarize import kept

    masks = ck.binarize(scores, sparsity, scope)
    sizes = [s.numel() for s in scores]
    keep = [kept(sparsity, sum(sizes))] if scope == "global" else [kept(sparsity, n) for n in sizes]
    expected = reference.binarize([s.float() for s in scores], keep, scope)
    assert sum(int(m.sum()) for m in masks) == sum(keep)
    for a, b in zip(masks, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.7, 0.9, 0.99, 0.999999])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_random_scores(isa: str, sparsity: float, scope: str, dtype: torch.dtype) -> None:
    scores = [torch.randn(LARGE + 13).to(dtype), torch.rand(33, 7, 3, 3).to(dtype), torch.randn(1).to(dtype)]
    check(scores, sparsity, scope)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: torch.ones(n),
        lambda n: torch.rand(n).mul(1.4).clamp(max=1),
        lambda n: torch.randint(0, 3, (n,)).float(),
        lambda n: torch.where(torch.rand(n) < 0.5, 0.0, -0.0),
        lambda n: torch.arange(n).float(),
        lambda n: -torch.arange(n).float(),
        lambda n: torch.cat((torch.full((n // 2,), float("inf")), torch.full((n - n // 2,), -float("inf")))),
        lambda n: torch.randn(n) * 1e-42,
    ],
    ids=["ones", "clipped", "few-values", "signed-zeros", "rising", "falling", "infinite", "subnormal"],
)
@pytest.mark.parametrize("n", [1, 17, LARGE])
def test_ties_and_orders(isa: str, sparsity: float, make, n: int) -> None:  # type: ignore[no-untyped-def]
    check([make(n)], sparsity)
    check([make(n), make(n)], sparsity)


def test_same_masks_for_any_thread_count() -> None:
    scores = [torch.rand(LARGE), torch.rand(5 * LARGE)]
    masks = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        masks.append(ck.binarize(scores, 0.7))
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40), st.integers(0, 99))
def test_any_floats_any_sparsity(values: list[float], percent: int) -> None:
    check([torch.tensor(values)], percent / 100)


def test_decimal_sparsity_is_exact() -> None:
    """ceil((1 - s) N) on the decimal that was written: 1 - 0.9 is not 0.1 in binary, and 0.1 * 10 must keep one."""
    for n in (10, 100, 1000):
        for s, part in ((0.9, 0.1), (0.7, 0.3), (0.5, 0.5)):
            (mask,) = ck.binarize([torch.rand(n)], s)
            assert int(mask.sum()) == math.ceil(round(part * n, 6))


def test_empty_list_and_empty_layers() -> None:
    assert ck.binarize([], 0.5) == []
    masks = ck.binarize([torch.empty(0), torch.rand(4)], 0.5)
    assert masks[0].shape == (0,)
    assert int(masks[1].sum()) == 2


@pytest.mark.parametrize(
    ("scores", "sparsity", "scope", "message"),
    [
        ([torch.rand(3)], 1.0, "global", r"^sparsity must be in \[0, 1\), got 1$"),
        ([torch.rand(3)], -0.1, "global", r"^sparsity must be in \[0, 1\), got -0.1$"),
        ([torch.rand(3)], 0.5, "row", "scope must be one of"),
        ([torch.tensor([1.0, float("nan")])], 0.5, "global", "NaN"),
        ([torch.ones(3, dtype=torch.int64)], 0.5, "global", "must have dtype"),
    ],
)
def test_bad_arguments(scores: list, sparsity: float, scope: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ck.binarize(scores, sparsity, scope)
