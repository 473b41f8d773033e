"""Triton count_votes in the interpreter: the votes of the CPU's, and of torch's argmax."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from csam_kernels import backend, cpu, reference

if not backend.INTERPRETED:
    pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

import csam_kernels as ck
from csam_kernels.triton import tuning
from csam_kernels.triton.launch import record
from csam_kernels.triton.launchers.count_votes import count_votes

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
INF, NAN = float("inf"), float("nan")


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs, so that each takes several blocks of rows."""
    few = {"BLOCK": 16, "values": 128, "num_warps": 4, "programs": 2, "histogram": True}
    many = {**few, "BLOCK": 32, "histogram": False}
    table = {40: few, 2**31: many}
    monkeypatch.setattr(tuning, "COUNT_VOTES", dict.fromkeys(tuning.CLASSES.values(), table))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "shape", [(0, 3), (1, 1), (5, 10), (301, 10), (50, 33), (77, 100), (9, 1000)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_votes_of_the_cpu(few_programs: None, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Ties, NaN and rows of -inf, more blocks of rows than programs, more classes than one block holds."""
    logits = torch.randint(-4, 5, shape).to(dtype)
    logits[::7] = torch.randn_like(logits[::7])
    logits[3::5, shape[1] // 2] = NAN
    logits[1:2] = -INF
    layouts = (logits, logits.T.contiguous().T, torch.cat((logits, logits), 1)[:, : shape[1]])
    for laid in layouts:
        out = torch.arange(shape[1])
        expected, by_argmax = out.clone(), out.clone()
        count_votes(laid, out)
        cpu.count_votes(laid, expected)
        reference.count_votes(laid, by_argmax)
        assert torch.equal(out, expected)
        assert torch.equal(out, by_argmax)


@pytest.mark.parametrize("classes", [10, 100, 129, 1000])
def test_votes_of_the_table_s_rows(classes: int) -> None:
    logits = torch.randn(200, classes)
    out = torch.zeros(classes, dtype=torch.int64)
    count_votes(logits, out)
    assert torch.equal(out, torch.bincount(logits.argmax(1), minlength=classes))


def test_lowest_index_wins_and_nan_casts_no_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CSAM_BACKEND", "triton")
    rows = [[1, 1, 0], [-INF, -INF, -INF], [0, INF, INF], [-0.0, 0, 0], [NAN, 1, 2], [0, 1, NAN], [INF, NAN, 0]]
    for dtype in DTYPES.values():
        assert ck.count_votes(torch.tensor(rows, dtype=dtype)).tolist() == [3, 1, 0]


def test_a_forced_provider_that_cannot_serve_names_one_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CSAM_BACKEND", "cuda")
    with pytest.raises(ck.BackendUnavailable, match="unset CSAM_BACKEND=cuda, and cpu serves it"):
        ck.count_votes(torch.zeros(1, 2))


def test_ties_across_blocks_of_classes(few_programs: None) -> None:
    logits = torch.zeros(6, 100)
    logits[0, [40, 8, 99]] = 1
    logits[1, [99, 67]] = 1
    logits[2] = -INF
    logits[3, 70] = NAN
    logits[4, 95], logits[4, 96] = 1, 2
    out = torch.zeros(100, dtype=torch.int64)
    count_votes(logits, out)
    assert out.nonzero().flatten().tolist() == [0, 8, 67, 96]
    assert out[0] == 2


def test_doubles_are_compared_as_doubles() -> None:
    logits = torch.tensor([[1.0, 1.0 + 2**-50]], dtype=torch.float64)
    out = torch.zeros(2, dtype=torch.int64)
    count_votes(logits, out)
    assert out.tolist() == [0, 1]


def test_rows_beyond_32_bit_indices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits must have at most 2\^31 - 2\^22 rows"):
        count_votes(torch.empty(2**31 - 1, 2, device="meta"), torch.empty(2, dtype=torch.int64, device="meta"))


def test_one_launch_reads_the_logits_once() -> None:
    logits, out = torch.empty(10_000, 1000, device="meta"), torch.empty(1000, dtype=torch.int64, device="meta")
    with record() as launches:
        count_votes(logits, out)
    assert len(launches) == 1
    assert launches[0].bytes_read + launches[0].bytes_written == logits.nbytes + 2 * out.nbytes
