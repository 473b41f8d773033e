"""CC-Cert: the bound against exact values where float32 fails, and the certificate end to end."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import csam_kernels
from csam.cc_cert import CCCert, cc_cert_bound, default_t
from csam.transforms import Brightness, Rotation, Transform, parse

SHAPE = (1, 6, 6)
MIX = Rotation(20) | Brightness(0.3)
CORRUPT = Rotation(10) | parse("fog:0.5,shot_noise:100,gaussian_noise:0.05,impulse_noise:0.02,pixelate:0.6")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return 5 * self.linear(self.conv(x).relu().flatten(1))


class Threshold(nn.Module):
    """Class 1 where the mean pixel exceeds 1/2, with logits so steep that every discrepancy is 0 or 1."""

    def forward(self, x: Tensor) -> Tensor:
        score = 1e4 * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack([-score, score], 1)


def picture() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))


def naive_float32(y: np.ndarray, margin: float, delta: float = 0.9) -> float:
    """The formula as written, in float32, leaving out what overflowed to inf/inf."""
    with np.errstate(over="ignore", invalid="ignore"):
        t = default_t().astype(np.float32)
        y = y.astype(np.float32)
        top = np.exp(t[:, None, None] * y).mean(2, dtype=np.float32)
        ratio = top / np.exp(t * np.float32(margin))[:, None]
    return float(np.nanmin(ratio, axis=0).max() / delta)


# The bound


def test_default_grid_is_the_public_one() -> None:
    t = default_t()
    assert (t[0], t[-1], len(t)) == (1e-4, 1e4, 500)


def test_float32_would_return_zero_where_the_bound_is_a_hundredth() -> None:
    y = np.zeros((1, 100))
    y[0, :2] = 0.0088
    exact = 0.02 * math.exp(-1e4 * (0.0089 - 0.0088)) / 0.9
    assert naive_float32(y, 0.0089) == 0
    assert cc_cert_bound(y, 0.0089) == pytest.approx(exact, rel=1e-9)
    assert cc_cert_bound(y, 0.0089) == pytest.approx(1e-2, rel=0.3)


def test_float32_would_return_a_thousandth_where_the_bound_is_1e_45() -> None:
    y = np.zeros((1, 100))
    y[0, 0] = 0.47
    exact = 0.01 * math.exp(-1e4 * 0.01) / 0.9
    assert naive_float32(y, 0.48) == pytest.approx(2e-3, rel=0.2)
    assert cc_cert_bound(y, 0.48) == pytest.approx(exact, rel=1e-9)
    assert 1e-46 < cc_cert_bound(y, 0.48) < 1e-45


def test_small_cases_by_hand() -> None:
    y = torch.tensor([[0.1, 0.3], [0.2, 0.2]], dtype=torch.float64)
    per_block = [(math.exp(0.1 * 2) + math.exp(0.3 * 2)) / 2, math.exp(0.2 * 2)]
    want = max(per_block) / math.exp(0.4 * 2) / 0.95
    assert cc_cert_bound(y, 0.4, delta=0.95, t=[2.0]) == pytest.approx(want, rel=1e-12)


def test_the_best_t_is_chosen_for_each_block() -> None:
    y, t = np.random.default_rng(0).random((3, 20)), [0.5, 2.0, 8.0]
    alone = [cc_cert_bound(block[None], 0.9, t=t) for block in y]
    assert cc_cert_bound(y, 0.9, t=t) == max(alone)
    assert min(cc_cert_bound(y[:1], 0.9, t=[one]) for one in t) == alone[0]


def test_never_zero_and_never_above_one() -> None:
    assert cc_cert_bound(np.zeros((1, 5)), 0.5) == 5e-324
    assert cc_cert_bound(np.ones((1, 5)), 0.0) == 1.0
    assert cc_cert_bound(np.ones((1, 5)), 0.0, t=[1e4]) == 1.0


unit = st.floats(0, 1)


@settings(max_examples=60, deadline=None)
@given(y=st.lists(unit, min_size=1, max_size=30), data=st.data())
def test_a_draw_at_the_margin_forces_one_nth(y: list[float], data: st.DataObject) -> None:
    margin = data.draw(st.floats(0, max(y)))
    assert cc_cert_bound([y], margin) >= min(1.0, 1 / (len(y) * 0.9)) * (1 - 1e-9)


@settings(max_examples=60, deadline=None)
@given(y=st.lists(unit, min_size=1, max_size=30), margin=unit, more=st.floats(0, 1))
def test_larger_margins_and_fewer_discrepancies_never_hurt(y: list[float], margin: float, more: float) -> None:
    bound = cc_cert_bound([y], margin)
    assert cc_cert_bound([y], margin + more) <= bound * (1 + 1e-9)
    assert cc_cert_bound([[v / 2 for v in y]], margin) <= bound * (1 + 1e-9)
    assert cc_cert_bound([y, [0.0] * len(y)], margin) >= bound * (1 - 1e-9)


def test_bound_lies_above_the_true_probability() -> None:
    rng, margin = np.random.default_rng(0), 0.8
    bounds = [cc_cert_bound(rng.random((10, 100)), margin) for _ in range(50)]
    assert min(bounds) > 1 - margin


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"discrepancy": [0.1, 0.2]}, r"discrepancy must be \[k, n\]"),
        ({"discrepancy": "0.1"}, r"discrepancy must be \[k, n\]"),
        ({"discrepancy": [["a"]]}, "discrepancy must be an array of numbers, got list: could not convert"),
        ({"discrepancy": [[0.1], [0.1, 0.2]]}, "discrepancy must be an array of numbers, got list"),
        ({"discrepancy": torch.zeros(2, 3, device="meta")}, "discrepancy must be an array of numbers, got Tensor"),
        ({"t": "dense"}, "t must be an array of numbers, got str"),
        ({"discrepancy": np.zeros((2, 0))}, r"discrepancy must be \[k, n\]"),
        ({"discrepancy": [[math.nan]]}, "discrepancy must be finite"),
        ({"discrepancy": [[-0.1]]}, "discrepancy must be finite and >= 0"),
        ({"margin": -0.1}, "margin must be >= 0"),
        ({"margin": math.nan}, "margin must be finite"),
        ({"delta": 0.0}, r"delta must be in \(0, 1\)"),
        ({"delta": 1.0}, r"delta must be in \(0, 1\)"),
        ({"t": []}, "t must be"),
        ({"t": [0.0, 1.0]}, "t must be"),
        ({"t": [math.inf]}, "t must be"),
    ],
    ids=str,
)
def test_wrong_arguments_of_the_bound(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cc_cert_bound(**({"discrepancy": [[0.1]], "margin": 0.5} | wrong))


# The certificate


def test_certificate_is_the_definition() -> None:
    model, x, n, k, seed, stream = Net().eval(), picture(), 7, 3, 5, 11
    rows = MIX.parameters(n * k, seed=seed, stream=stream)
    with torch.no_grad():
        clean = model(x[None]).double().softmax(1)[0]
        drawn = model(csam_kernels.semantic_batch(x, rows)).double().softmax(1)
    discrepancy = (drawn - clean).abs().amax(1).reshape(k, n)
    top = clean.sort(descending=True).values
    result = CCCert(model, MIX, n=n, k=k, seed=seed, tile=8).certify(x, stream=stream)
    torch.testing.assert_close(result.discrepancy, discrepancy, rtol=0, atol=1e-5)
    assert result.prediction == int(clean.argmax())
    assert result.margin == pytest.approx(float(top[0] - top[1]) / 2, abs=1e-6)
    assert result.flips == int((drawn.argmax(1) != clean.argmax()).sum())
    assert result.bound == cc_cert_bound(result.discrepancy, result.margin)
    assert (result.n, result.k, result.delta, len(result.t)) == (n, k, 0.9, 500)


def test_certificate_under_corruptions_is_the_definition() -> None:
    model, x = Net().eval(), picture()
    copies = CORRUPT(x.expand(21, *SHAPE), seed=5, stream=11)
    with torch.no_grad():
        moved, flips = csam_kernels.discrepancy(model(x[None])[0], model(copies))
    result = CCCert(model, CORRUPT, n=7, k=3, seed=5, tile=8).certify(x, stream=11)
    torch.testing.assert_close(result.discrepancy.flatten(), moved, rtol=0, atol=1e-5)
    assert result.flips == int(flips.sum())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transform", [MIX, CORRUPT], ids=["semantic", "corruptions"])
def test_certificate_does_not_depend_on_batch_size_or_threads(dtype: torch.dtype | None, transform: Transform) -> None:
    model, x, before = Net(), picture(), torch.get_num_threads()
    results = []
    try:
        for threads, batch_size in ((1, 1), (1, 400), (2, 16), (2, 400)):
            torch.set_num_threads(threads)
            cert = CCCert(model, transform, n=20, k=3, dtype=dtype, tile=8, choices="auto" if dtype else "module")
            results.append(cert.certify(x, stream=2, batch_size=batch_size))
    finally:
        torch.set_num_threads(before)
    assert len({(r.bound, r.prediction, r.margin, r.flips) for r in results}) == 1
    assert all(torch.equal(r.discrepancy, results[0].discrepancy) for r in results)


def test_what_no_transform_changes_is_certified() -> None:
    x = torch.full(SHAPE, 0.9)
    result = CCCert(Threshold(), Brightness(0.1), n=20, k=2).certify(x)
    assert (result.prediction, result.margin, result.flips) == (1, 0.5, 0)
    assert result.bound == 5e-324
    assert "discrepancy" not in repr(result)


def test_what_transforms_change_is_not() -> None:
    x = torch.full(SHAPE, 0.52)
    result = CCCert(Threshold(), Brightness(0.1), n=50, k=2).certify(x)
    flipped = result.flips / 100
    assert 0.25 < flipped < 0.55
    assert result.bound >= flipped


def test_settings_say_what_must_be_reported() -> None:
    cert = CCCert(Net(), MIX, n=30, k=4, delta=0.8, t=[1.0, 2.0], seed=3, dtype=torch.bfloat16, tile=10)
    assert cert.settings == {
        "transform": "rotation:20,brightness:0.3",
        "n": 30,
        "k": 4,
        "delta": 0.8,
        "t": (1.0, 2.0, 2),
        "seed": 3,
        "dtype": "bfloat16",
        "tile": 10,
    }


def test_certificate_does_not_depend_on_the_default_device() -> None:
    model, x = Net(), picture()
    want = CCCert(model, MIX, n=5, k=2).certify(x)
    with torch.device("meta"):
        got = CCCert(model, MIX, n=5, k=2).certify(x)
    assert torch.equal(got.discrepancy, want.discrepancy)
    assert got.bound == want.bound


def test_model_keeps_its_mode() -> None:
    model = Net().train()
    CCCert(model, MIX, n=2, k=2).certify(picture())
    assert model.training


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "n must be >= 1"),
        ({"k": 0}, "k must be >= 1"),
        ({"delta": 1.0}, "delta must be in"),
        ({"t": [-1.0]}, "t must be"),
        ({"choices": "quick"}, "choices must be one of 'auto', 'module', 'sparse'"),
        ({"seed": -1}, "seed must be in"),
    ],
    ids=str,
)
def test_wrong_settings(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CCCert(Net(), MIX, **wrong)


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match=r"transform must be a csam.transforms.Transform, got str"):
        CCCert(Net(), "rotation:10")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        CCCert("net", MIX)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (picture() + 1, r"x must have pixels in \[0, 1\]"),
        (picture() * math.nan, "finite pixels"),
        (torch.rand(2, *SHAPE), "x must be one image"),
    ],
    ids=["range", "nan", "batch"],
)
def test_wrong_images(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CCCert(Net(), MIX, n=2, k=2).certify(x)


def test_nan_logits_are_refused() -> None:
    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.nan

    with pytest.raises(ValueError, match="NaN probabilities for 5 of 5 images"):
        CCCert(Broken(), MIX, n=2, k=2).certify(picture())
    found = CCCert(Broken(), MIX, n=2, k=2).measure(picture())
    assert (found.bound, found.prediction, found.margin, found.nan) == (1.0, -1, 0.0, 5)


def test_draws_with_nan_logits_show_nothing() -> None:
    def broken(x: Tensor) -> Tensor:
        logits = x.flatten(1)[:, :2]
        return torch.where((x == picture()).flatten(1).all(1, keepdim=True), logits, torch.nan)

    found = CCCert(broken, MIX, n=2, k=2).measure(picture())
    assert (found.bound, found.prediction, found.nan) == (1.0, int(picture().flatten()[:2].argmax()), 4)
