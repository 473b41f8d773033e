"""What argument checks accept, and what their messages say."""

from __future__ import annotations

import math
from typing import Any

import pytest

from csam_kernels import checks


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "wanted"),
    [
        ({"above": 0}, 1e-300, 0, "> 0"),
        ({"least": 0}, 0, -0.5, ">= 0"),
        ({"below": 1}, -7, 1, "< 1"),
        ({"most": 1}, 1, 1.5, "<= 1"),
        ({"above": 0, "below": 1}, 0.5, 2, "in (0, 1)"),
        ({"above": 0, "most": 1}, 1, 0, "in (0, 1]"),
        ({"least": 0, "below": 1}, 0, 1, "in [0, 1)"),
        ({"least": 0, "most": 1}, 0, -1e300, "in [0, 1]"),
    ],
)
def test_real_states_its_range(bounds: dict[str, float], inside: float, outside: float, wanted: str) -> None:
    assert checks.real("eps", inside, **bounds) == inside
    with pytest.raises(ValueError, match="eps") as error:
        checks.real("eps", outside, **bounds)
    assert str(error.value) == f"eps must be {wanted}, got {outside:g}"
    with pytest.raises(ValueError, match=r"^eps must be finite, got nan$"):
        checks.real("eps", math.nan, **bounds)


def test_a_seed_is_carried_as_an_int64() -> None:
    for seed in (0, 2**63 - 1, 2**63, 2**64 - 1):
        assert checks.seed(seed) == seed
        assert -(2**63) <= checks.signed(seed) < 2**63
        assert checks.signed(seed) & checks.WORD == seed
    for bad in (-1, 2**64):
        for check in (checks.seed, checks.signed):
            with pytest.raises(ValueError, match=rf"^seed must be in \[0, {2**64 - 1}\], got {bad}$"):
                check(bad)


@pytest.mark.parametrize("bad", [0, -2])
def test_block_size(bad: Any) -> None:
    assert [checks.block_size(n) for n in (None, 1, 7)] == [0, 1, 7]
    with pytest.raises(ValueError, match=f"^block_size must be >= 1, got {bad}$"):
        checks.block_size(bad)
