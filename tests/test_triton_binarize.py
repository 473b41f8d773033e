"""Triton binarize in the interpreter: the CPU's masks exactly, on every path of the selection."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import csam_kernels as ck
from csam_kernels import backend, cpu, reference

if not backend.INTERPRETED:
    pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from csam_kernels import triton as provider
from csam_kernels.triton import tuning
from csam_kernels.triton.kernels import binarize as kernels
from csam_kernels.triton.launch import record
from csam_kernels.triton.launchers import binarize as launcher
from csam_kernels.triton.launchers.selection import Selection, select

CHUNK, LIST, SAMPLE = 256, 64, 512
SAMPLED = 4 * SAMPLE  # scores from which a selection is sampled
N = 2 * SAMPLED + 13
MAKES: dict[str, Callable[[int], Tensor]] = {
    "random": torch.rand,
    "normal": torch.randn,
    "ones": torch.ones,
    "clipped": lambda n: torch.rand(n).mul(1.4).sub(0.2).clamp(0, 1),
    "few-values": lambda n: torch.randint(0, 3, (n,)).float(),
    "signed-zeros": lambda n: torch.where(torch.rand(n) < 0.5, 0.0, -0.0),
    "falling": lambda n: -torch.arange(n).float(),
    "infinite": lambda n: torch.where(torch.rand(n) < 0.5, math.inf, -math.inf),
    "subnormal": lambda n: torch.randn(n) * 1e-42,
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    tune = {"BLOCK": CHUNK, "LIST": LIST, "SAMPLE": SAMPLE, "num_warps": 4, "maxnreg": 128, "bracket_warps": 4}
    monkeypatch.setitem(tuning.BINARIZE, "sm80", tune)
    monkeypatch.setattr(tuning, "TOTALS", {"BLOCK": 8, "num_warps": 4})


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> list[Selection]:
    """What each selection left behind: which path it took."""
    seen: list[Selection] = []

    def spy(*args: object, **kwargs: object) -> Selection:
        seen.append(select(*args, **kwargs))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(launcher, "select", spy)
    return seen


def missed(selection: Selection) -> bool:
    return bool(selection.state[:, kernels.MISSED.value].any())


def kept(scores: list[Tensor], share: float, scope: str) -> list[int]:
    sizes = [s.numel() for s in scores]
    return [math.ceil(share * n) for n in ([sum(sizes)] if scope == "global" else sizes)]


def check(scores: list[Tensor], keep: list[int], scope: str) -> None:
    masks = provider.binarize(scores, keep, scope)
    expected = cpu.binarize(scores, keep, scope)
    naive = reference.binarize([s.float() for s in scores], keep, scope)
    assert sum(int(m.sum()) for m in masks) == sum(keep)
    for mask, want, plain in zip(masks, expected, naive, strict=True):
        assert mask.dtype is torch.bool
        assert torch.equal(mask, want)
        assert torch.equal(mask, plain)


@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("make", MAKES)
def test_masks_are_the_cpus(make: str, scope: str, share: float) -> None:
    scores = [MAKES[make](n) for n in (N, 1, 700)] + [MAKES[make](513).reshape(27, 19)]
    check(scores, kept(scores, share, scope), scope)


@pytest.mark.parametrize("keep", [0, 1, 2, N - 1, N])
def test_none_few_and_all_are_kept(keep: int) -> None:
    for make in ("random", "clipped", "ones"):
        check([MAKES[make](N - 300), MAKES[make](300)], [keep], "global")


def test_small_selections_are_not_sampled() -> None:
    scores = [torch.rand(n) for n in (1, 5, 255, 256, 257)]
    check(scores, kept(scores, 0.4, "layer"), "layer")
    check(scores, [0, 5, 0, 256, 1], "layer")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_and_mixtures_of_dtypes(dtype: torch.dtype) -> None:
    scores = [torch.randn(N).to(dtype), torch.randn(33, 7, 3).to(dtype)]
    check(scores, kept(scores, 0.3, "global"), "global")
    check([scores[0], scores[1].float()], kept(scores, 0.3, "layer"), "layer")


def test_strided_and_unaligned_scores_are_taken_in_logical_order() -> None:
    last = torch.randint(0, 4, (8, 6, 3, 3)).float().to(memory_format=torch.channels_last)
    scores = [last, torch.rand(401)[1:], torch.rand(40, 30).T]
    check(scores, kept(scores, 0.5, "global"), "global")


def test_empty_layers() -> None:
    check([torch.empty(0, 3), torch.rand(4), torch.empty(0)], [2], "global")
    check([torch.empty(0, 3), torch.rand(4), torch.empty(0)], [0, 2, 0], "layer")
    check([torch.empty(0)], [0], "global")


def test_spread_scores_are_listed_and_settled_from_the_lists(selections: list[Selection]) -> None:
    scores = [torch.rand(N)]
    check(scores, [N // 20], "global")
    (selection,) = selections
    assert not missed(selection)
    assert 0 < int(selection.found.sum()) < N // 4
    assert int(selection.found.max()) <= LIST


def test_crowded_chunks_are_read_again(selections: list[Selection]) -> None:
    """Ties at the threshold: more candidates than a list holds, in some chunks only."""
    scores = torch.rand(N)
    scores[3 * CHUNK : 9 * CHUNK] = 0.5
    check([scores], [N // 2], "global")
    (selection,) = selections
    assert not missed(selection)
    assert int(selection.found.max()) > LIST
    assert int((selection.found <= LIST).sum()) > 0


@pytest.mark.parametrize("below", [True, False])
def test_a_bracket_that_missed_is_replaced(selections: list[Selection], below: bool) -> None:
    """The sampled scores are made all low or all high, so that they say nothing of the rest."""
    scores, chunks = torch.rand(N) + 1, -(-N // CHUNK)
    lane = torch.arange(SAMPLE)
    run = lane // 8
    place = ((run * 0x9E3779B9 & 0xFFFFFFFF) >> 16) % (CHUNK // 8) * 8 + lane % 8
    index = run * chunks // (SAMPLE // 8) * CHUNK + place
    scores[index[index < N]] = 0.0 if below else 3.0
    check([scores], [N // 2], "global")
    assert missed(selections[0])


def test_not_a_number_ranks_below_every_number() -> None:
    scores = torch.randn(600)
    scores[::3] = math.nan
    scores[1::3] = -math.inf
    (mask,) = provider.binarize([scores], [400], "global")
    assert torch.equal(mask, ~scores.isnan())
    (mask,) = provider.binarize([scores], [401], "global")
    assert bool(mask[0])
    assert int(mask.sum()) == 401


def test_public_function(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = [torch.rand(300), torch.rand(17, 4)]
    expected = ck.binarize(scores, 0.7)
    monkeypatch.setenv("CSAM_BACKEND", "triton")
    assert all(torch.equal(a, b) for a, b in zip(ck.binarize(scores, 0.7), expected, strict=True))


def test_launches_are_fixed_and_nothing_is_read_on_the_host() -> None:
    """Meta tensors have no values: whatever asked for one would fail. Twelve launches for any number of layers."""
    for count in (1, 20):
        for scope, keep in (("global", [5]), ("layer", [5] * count)):
            with record() as launches:
                provider.binarize([torch.empty(100, device="meta")] * count, keep, scope)
            assert len(launches) == 12


def test_bytes_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores and masks once, and the candidates' lists: a fifth on top, where reading twice would be four fifths."""
    monkeypatch.undo()
    n = 11_000_000
    with record() as launches:
        provider.binarize([torch.empty(n, device="meta")], [n // 3], "global")
    assert sum(launch.bytes_read + launch.bytes_written for launch in launches) <= 1.2 * 5 * n


def test_kernels_compile_without_spills() -> None:
    """For sm_80, sm_90 and sm_100, in a process without the interpreter."""
    script = Path(__file__).with_name("triton_mask_calls.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script, "binarize"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {row[2] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    assert [row for row in rows if row[4] != "0"] == []
