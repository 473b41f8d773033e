"""Randomized smoothing: exact bounds, soundness, and certificates that depend on nothing but their inputs."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

import csam.nn
from csam.sequential import Prediction
from csam.smoothing import ABSTAIN, Smooth, certified_radius, lower_confidence_bound, run_tiles

SHAPE = (1, 4, 4)
SIGMA = 0.5


class Linear(nn.Module):
    """Two classes cut by a hyperplane: class 1 with probability Phi(distance / sigma) under Gaussian noise."""

    def __init__(self, x: Tensor, distance: float) -> None:
        super().__init__()
        normal = torch.randn(x.numel(), generator=torch.Generator().manual_seed(0))
        normal /= normal.norm()
        self.register_buffer("normal", normal)
        self.register_buffer("offset", distance - normal @ x.flatten())

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.normal + self.offset
        return torch.stack([-score, score], 1)


class Constant(nn.Module):
    def __init__(self, label: int = 2, classes: int = 4) -> None:
        super().__init__()
        self.register_buffer("logits", F.one_hot(torch.tensor(label), classes).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


class Net(nn.Module):
    """Two convolutions with batch-norm, a residual and random weights: near ties are common."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.linear = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))


def net(model: nn.Module | None = None) -> nn.Module:
    """A model with random weights and running statistics, its logits centred so that several classes win."""
    torch.manual_seed(1)
    model = model or Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        logits = model.eval()(picture() + SIGMA * torch.randn(200, *SHAPE))
        model.linear.bias -= logits.mean(0)
    return model.train()


def picture() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(3))


def no_worse_than(alpha: float, errors: int, trials: int) -> float:
    """p-value of `errors` in `trials` under an error rate of at most alpha."""
    return stats.binomtest(errors, trials, alpha, alternative="greater").pvalue


# The bound


@pytest.mark.parametrize("n", [1, 10, 1000, 100_000, 1_000_000])
@pytest.mark.parametrize("alpha", [1e-12, 0.001, 0.05])
def test_bound_is_where_the_upper_tail_is_alpha(n: int, alpha: float) -> None:
    for successes in {1, (n + 1) // 2, max(1, n - 1), n}:
        bound = lower_confidence_bound(successes, n, alpha)
        assert stats.binom.sf(successes - 1, n, bound) == pytest.approx(alpha, rel=1e-6)


def test_bound_at_the_ends() -> None:
    assert lower_confidence_bound(0, 50, 0.001) == 0
    assert lower_confidence_bound(50, 50, 0.001) == pytest.approx(0.001 ** (1 / 50), rel=1e-12)


def test_radius_abstains_below_one_half() -> None:
    assert certified_radius(50, 100, 1.0, 0.001) is None
    expected = 0.25 * stats.norm.ppf(lower_confidence_bound(99, 100, 0.001))
    assert certified_radius(99, 100, 0.25, 0.001) == pytest.approx(expected)


def test_radius_is_zero_at_one_half() -> None:
    assert certified_radius(1, 1, 1.0, 0.5) == 0
    assert certified_radius(1, 1, 1.0, 0.499) is None


@pytest.mark.parametrize(
    ("successes", "n", "sigma", "alpha", "message"),
    [
        (11, 10, 1.0, 0.1, r"successes must be in \[0, 10\], got 11"),
        (-1, 10, 1.0, 0.1, r"successes must be in \[0, 10\]"),
        (0, 0, 1.0, 0.1, "n must be in"),
        (9, 10, 0.0, 0.1, "sigma must be > 0"),
        (9, 10, 1.0, 1.5, r"alpha must be in \(0, 1\)"),
        (99983, 100000, 1.0, 1e-300, "alpha must be at least 1e-50"),
    ],
)
def test_counts_that_cannot_be_have_no_radius(successes: int, n: int, sigma: float, alpha: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        certified_radius(successes, n, sigma, alpha)


# Soundness, on drawn counts (the statistics) and through a network (the whole)


def errors_of(chosen: np.ndarray, votes: np.ndarray, n: int, p: np.ndarray, alpha: float) -> int:
    """Certificates beyond the true radius: the bound on the chosen class lies above its probability."""
    bound = {v: lower_confidence_bound(int(v), n, alpha) for v in np.unique(votes)}
    bounds = np.array([bound[v] for v in votes])
    return int(((bounds >= 0.5) & (bounds > p[chosen])).sum())


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize("p", [(0.5, 0.5), (0.55, 0.3, 0.15), (0.9, 0.1), (0.999, 0.001)], ids=str)
@pytest.mark.parametrize("n", [20, 1000])
def test_wrong_certificates_are_rarer_than_alpha(p: tuple[float, ...], n: int, alpha: float) -> None:
    rng, trials = np.random.default_rng(0), 20_000
    chosen = rng.multinomial(5, p, size=trials).argmax(1)
    votes = rng.multinomial(n, p, size=trials)[np.arange(trials), chosen]
    errors = errors_of(chosen, votes, n, np.array(p), alpha)
    assert no_worse_than(alpha, errors, trials) > 1e-3


def test_choosing_and_counting_with_the_same_samples_would_be_wrong_too_often() -> None:
    rng, trials, p, alpha = np.random.default_rng(0), 20_000, (0.5, 0.5), 0.05
    votes = rng.multinomial(1000, p, size=trials)
    chosen = votes.argmax(1)
    errors = errors_of(chosen, votes.max(1), 1000, np.array(p), alpha)
    assert no_worse_than(alpha, errors, trials) < 1e-6


def test_linear_classifier_votes_follow_the_closed_form() -> None:
    x, distance, n = picture(), 0.3, 20_000
    votes = Smooth(Linear(x, distance), 2, SIGMA).counts(x, n)
    p = stats.norm.cdf(distance / SIGMA)
    assert stats.binomtest(int(votes[1]), n, p).pvalue > 1e-3


def test_linear_classifier_is_certified_within_its_distance() -> None:
    x, distance, alpha, trials = picture(), 0.3, 0.1, 300
    smooth = Smooth(Linear(x, distance), 2, SIGMA)
    answers = [smooth.certify(x, n0=10, n=190, alpha=alpha, stream=i) for i in range(trials)]
    errors = sum(radius > distance or label == 0 for label, radius in answers)
    assert no_worse_than(alpha, errors, trials) > 1e-3
    assert max(radius for _, radius in answers) > 0.8 * distance


def test_constant_classifier_has_the_largest_radius() -> None:
    label, radius = Smooth(Constant(), 4, SIGMA).certify(picture(), n0=10, n=1000, alpha=0.001)
    assert label == 2
    assert radius == pytest.approx(SIGMA * stats.norm.ppf(0.001 ** (1 / 1000)), rel=1e-12)


# Prediction


@pytest.mark.parametrize(
    ("counts", "answer"),
    [((50, 50, 0), ABSTAIN), ((60, 40, 0), ABSTAIN), ((0, 99, 1), 1), ((3, 3, 94), 2), ((0, 0, 1), ABSTAIN)],
    ids=str,
)
def test_predict_tests_the_top_two(counts: tuple[int, ...], answer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Smooth, "counts", lambda *args: torch.tensor(counts))
    assert Smooth(Constant(classes=3), 3, SIGMA).predict(picture(), n=sum(counts), alpha=0.001) == answer


def test_predict_is_wrong_less_often_than_alpha() -> None:
    rng, trials, alpha, p = np.random.default_rng(0), 4000, 0.05, (0.4, 0.36, 0.24)
    smooth, x, wrong = Smooth(Constant(classes=3), 3, SIGMA), picture(), 0
    with pytest.MonkeyPatch.context() as patch:
        for votes in torch.from_numpy(rng.multinomial(100, p, size=trials)):
            patch.setattr(Smooth, "counts", lambda *args, votes=votes: votes)
            wrong += smooth.predict(x, n=100, alpha=alpha) not in (ABSTAIN, 0)
    assert no_worse_than(alpha, wrong, trials) > 1e-3


def test_predict_through_a_network() -> None:
    x = picture()
    assert Smooth(Linear(x, 0.6), 2, SIGMA).predict(x, n=200) == 1
    assert Smooth(Linear(x, 0.0), 2, SIGMA).predict(x, n=200) == ABSTAIN


# The same answer whatever the batch size and the number of threads


@pytest.mark.parametrize("choices", ["module", "dense"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_counts_do_not_depend_on_batch_size_or_threads(dtype: torch.dtype | None, choices: str) -> None:
    smooth, x = Smooth(net(), 5, SIGMA, dtype=dtype, seed=2**64 - 1, tile=16, choices=choices), picture()
    want = smooth.counts(x, 333, 21, stream=4)
    assert (want > 0).sum() >= 2
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for batch_size in (1, 16, 100, 10_000):
                assert smooth.counts(x, 333, 21, batch_size, 4).tolist() == want.tolist()
                assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_counts_add_up_over_any_split() -> None:
    smooth, x = Smooth(net(), 5, SIGMA, tile=16, choices="module"), picture()
    whole = smooth.counts(x, 100)
    parts = [smooth.counts(x, n, first) for first, n in ((0, 7), (7, 25), (32, 1), (33, 67))]
    assert torch.equal(sum(parts), whole)


def test_tiles_are_whole_aligned_and_count_only_the_wanted_rows() -> None:
    seen: list[int] = []

    class Watch(Constant):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x)

    smooth = Smooth(Watch(), 4, SIGMA, tile=8)
    smooth.counts(picture(), 1)
    seen.clear()
    assert smooth.counts(picture(), 10, first_sample=7).sum() == 10
    assert seen == [8, 8, 8]


@pytest.mark.parametrize("field", ["seed", "stream", "first_sample"])
def test_other_noise_for_another(field: str) -> None:
    x, model = picture(), net()
    first = Smooth(model, 5, SIGMA).counts(x, 400)
    if field == "seed":
        second = Smooth(model, 5, SIGMA, seed=1).counts(x, 400)
    else:
        second = Smooth(model, 5, SIGMA).counts(x, 400, **{field: 1000})
    assert not torch.equal(first, second)


# The prepared network


def logits_of(smooth: Smooth, x: Tensor) -> Tensor:
    smooth.counts(x[0], 1)
    with torch.no_grad():
        return smooth.prepared.module(x.to(smooth.prepared.dtype)).float()


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 0), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str)
def test_prepared_network_is_the_model(dtype: torch.dtype | None, tolerance: float) -> None:
    model, x = net(), torch.rand(64, *SHAPE)
    with torch.no_grad():
        want = model.eval()(x)
    smooth = Smooth(model, 5, SIGMA, dtype=dtype, choices="auto" if dtype else "module")
    assert (logits_of(smooth, x) - want).abs().max() <= tolerance
    if dtype is not None:
        assert Smooth(model, 5, SIGMA, dtype=str(dtype).removeprefix("torch.")).settings == smooth.settings
        assert smooth.prepared.steps[0] == "2 of 2 batch-norm layers folded"
        assert not any(isinstance(m, nn.BatchNorm2d) for m in smooth.prepared.module.modules())


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(5, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.double())


class Pixels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.min() >= 0
        return x


def test_unasked_the_engine_runs_what_it_can_in_float32() -> None:
    model, x = net(), picture()
    unasked, asked = Smooth(model, 5, SIGMA, choices="dense"), Smooth(model, 5, SIGMA, dtype="float32", choices="dense")
    plain = Smooth(model, 5, SIGMA, choices="module")
    assert torch.equal(unasked.counts(x, 500), asked.counts(x, 500))
    assert torch.equal(unasked.counts(x, 500), plain.counts(x, 500))
    assert (unasked.prepared.sampler is None, plain.prepared.sampler is None) == (False, True)
    assert unasked.recipe(x)["fingerprint"] == asked.recipe(x)["fingerprint"]
    assert (unasked.settings["dtype"], plain.prepared.steps) == (None, ("the model's own modules",))
    assert isinstance(unasked.prepared.module, nn.Module)
    for other in (net().double(), Constant()):  # another dtype; no steps for it
        left = Smooth(other, 4 if isinstance(other, Constant) else 5, SIGMA)
        left.counts(x, 10)
        assert left.prepared.sampler is None
        assert left.prepared.steps[0] == "the model's own modules"
    hooked = net()
    next(m for m in hooked.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(lambda *_: None)
    wide = nn.Sequential(net(), Double())
    for other, steps in (
        (hooked, ["the model's own modules, since layer 'conv1' has a forward hook"]),
        (wide, ["the model's own modules"]),
        (nn.Sequential(Pixels(), net()), ["the model's own modules", "run by torch: AssertionError: "]),
    ):
        cert = csam.CCCert(other, csam.transforms.Rotation(10), n=10, k=2)
        assert 0 <= cert.certify(x).bound <= 1
        assert cert.prepared.sampler is None
        assert len(cert.prepared.steps) == len(steps)
        assert all(map(str.startswith, cert.prepared.steps, steps))
    bounds = [
        csam.CCCert(model, csam.transforms.Rotation(10), n=10, k=2, choices=c).certify(x) for c in ("dense", "module")
    ]
    assert bounds[0].bound == pytest.approx(bounds[1].bound, rel=1e-4)


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_masked_model_votes_like_the_folded_one(dtype: torch.dtype | None) -> None:
    model, x = csam.nn.convert(net()), picture()
    for layer in csam.nn.masked_layers(model).values():
        layer.set_mask(torch.rand(layer.mask.shape) < 0.6)
    how: dict[str, Any] = {"dtype": dtype, "choices": "auto" if dtype else "module"}
    smooth = Smooth(model, 5, SIGMA, **how)
    assert torch.equal(smooth.counts(x, 200), Smooth(csam.nn.fold(model), 5, SIGMA, **how).counts(x, 200))
    assert ("3 of 3 masked layers folded" in smooth.prepared.steps) == (dtype is not None)


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_soft_masks_are_refused_until_hard_ones_are_in_force(dtype: torch.dtype | None) -> None:
    model, x = csam.nn.convert(net()), picture()
    layers = csam.nn.masked_layers(model)
    search = csam.MaskSearch(model, 0.5)
    name, last = list(layers.items())[-1]
    last.soft = True
    smooth = Smooth(model, 5, SIGMA, dtype=dtype)
    bounds = csam.CCCert(model, csam.transforms.Brightness(0.2), n=20, k=2, dtype=dtype)
    wholes = [lambda: smooth.counts(x, 100), lambda: smooth.recipe(x), lambda: bounds.certify(x)]
    if dtype is not None:
        wholes.append(lambda: csam.sampling.plan(model.eval(), x, dtype=dtype))
    for whole in wholes:
        with pytest.raises(ValueError, match=rf"soft ones in 1 layers such as '{name}'; set layer\.soft = False"):
            whole()
    search.apply()
    last.soft = False
    for whole in wholes:
        whole()
    folded = csam.nn.fold(model)
    assert torch.equal(smooth.counts(x, 100), Smooth(folded, 5, SIGMA, dtype=dtype).counts(x, 100))
    last.soft = True  # which nothing prepared before takes over
    assert torch.equal(smooth.counts(x, 100), Smooth(folded, 5, SIGMA, dtype=dtype).counts(x, 100))


def test_the_first_image_does_not_decide_what_is_folded() -> None:
    model, x = csam.nn.convert(nn.Sequential(nn.Flatten(), nn.Linear(16, 5))), picture()
    model[1].effective_weight = 0.7 * model[1].weight.detach()
    smooth = Smooth(model, 5, SIGMA, dtype=torch.float32)
    smooth.counts(torch.zeros(SHAPE), 10)
    assert torch.equal(smooth.counts(x, 500), Smooth(model, 5, SIGMA).counts(x, 500))
    assert "masked layers not folded" in smooth.prepared.steps[0]


def test_the_callers_autocast_changes_nothing() -> None:
    model, x = net(), picture()
    plain, smooth = (Smooth(model, 5, SIGMA, dtype=torch.float32) for _ in range(2))
    want = plain.counts(x, 100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(smooth.counts(x, 100), want)
    assert smooth.prepared.steps == plain.prepared.steps


def test_a_model_that_does_not_run_in_the_dtype_is_refused() -> None:
    class Upcast(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    with pytest.raises(ValueError, match=r"dtype must be None: the model does not run in torch.bfloat16"):
        Smooth(net(Upcast()), 5, SIGMA, dtype=torch.bfloat16).counts(picture(), 10)


class Branches(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else x + 0)


class Shared(Net):
    """One convolution called twice, each time before another batch-norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear((self.bn1(self.conv1(x)) + self.bn2(self.conv1(x))).mean((2, 3)))


class Read(Net):
    """The first convolution's output is wanted as it is, too."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.linear((x + self.bn2(self.conv2(self.bn1(x)))).mean((2, 3)))


class Viewing(Net):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.bn1(self.conv1(x)).view(len(x), -1))


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        (Branches, "batch-norm layers not folded: TraceError"),
        (Shared, "2 of 2 batch-norm layers folded"),
        (Read, "1 of 2 batch-norm layers folded"),
        (Viewing, "kept contiguous"),
    ],
)
def test_odd_models_keep_their_logits_and_steps_say_how(kind: type[Net], step: str) -> None:
    model, x = net(kind()), torch.rand(16, *SHAPE)
    smooth = Smooth(model, 5, SIGMA, dtype=torch.float32)
    with torch.no_grad():
        want = model.eval()(x)
    torch.testing.assert_close(logits_of(smooth, x), want, rtol=1e-4, atol=1e-4)
    assert any(step in s for s in smooth.prepared.steps)


def change_weight(model: nn.Module) -> None:
    with torch.no_grad():
        model.linear.weight.neg_()


def load_weights(model: nn.Module) -> None:
    model.load_state_dict({k: -v if k == "linear.weight" else v for k, v in model.state_dict().items()})


def replace_parameter(model: nn.Module) -> None:
    model.linear.weight = nn.Parameter(-model.linear.weight.detach())


@pytest.mark.parametrize("change", [change_weight, load_weights, replace_parameter])
def test_a_changed_model_is_prepared_again(change: object) -> None:
    model, x = net(), picture()
    smooth = Smooth(model, 5, SIGMA, dtype=torch.bfloat16)
    before, prepared = smooth.counts(x, 300), smooth.prepared
    assert torch.equal(smooth.counts(x, 300), before)
    assert smooth.prepared is prepared
    change(model)
    after = smooth.counts(x, 300)
    assert not torch.equal(after, before)
    assert torch.equal(after, Smooth(model, 5, SIGMA, dtype=torch.bfloat16).counts(x, 300))


def test_a_change_that_torch_does_not_count_is_seen_too() -> None:
    x = picture()
    with torch.inference_mode():
        model = net()
    smooth = Smooth(model, 5, SIGMA)
    before = smooth.counts(x, 300)
    with torch.inference_mode():
        change_weight(model)
    assert not torch.equal(smooth.counts(x, 300), before)


# The caller's state


def test_model_and_grad_mode_are_left_alone() -> None:
    model = net().train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    Smooth(model, 5, SIGMA).certify(picture(), n0=10, n=60)
    assert model.training
    assert torch.is_grad_enabled()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_tiles_run_on_one_intra_op_thread_without_grad() -> None:
    seen = []
    run_tiles(lambda tile: seen.append((torch.get_num_threads(), torch.is_grad_enabled())), range(20), 4)
    assert seen == [(1, False)] * 20


def in_a_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_other_threads_keep_their_number_of_threads() -> None:
    own, others = torch.get_num_threads(), in_a_thread(torch.get_num_threads)
    in_a_thread(lambda: torch.set_num_threads(3))  # and that of all threads to come
    try:
        run_tiles(lambda tile: None, range(20), 2)
        assert torch.get_num_threads() == own
        assert in_a_thread(torch.get_num_threads) == 3
    finally:
        in_a_thread(lambda: torch.set_num_threads(others))


@pytest.mark.parametrize("choices", ["module", "dense"])
def test_one_smooth_serves_several_threads(choices: str) -> None:
    smooth, x = Smooth(net(), 5, SIGMA, tile=8, choices=choices), picture()
    want = [smooth.certify(x, 10, 50, 0.1, stream=i) for i in range(8)]
    again = Smooth(net(), 5, SIGMA, tile=8, choices=choices)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: again.certify(x, 10, 50, 0.1, stream=i), range(8))) == want


@pytest.mark.parametrize("error", [ZeroDivisionError, IndexError, KeyboardInterrupt])
def test_an_error_in_a_tile_stops_the_rest_and_is_raised(error: type[BaseException]) -> None:
    done = []

    def evaluate(tile: int) -> None:
        done.append(tile)
        if tile == 3:
            raise error("tile 3")

    with pytest.raises(error, match="tile 3"):
        run_tiles(evaluate, range(10_000), 2)
    assert len(done) < 5000


def test_tiles_are_taken_one_by_one() -> None:
    class Endless(Sequence[int]):
        def __len__(self) -> int:
            return 10**11

        def __getitem__(self, tile: Any) -> Any:
            assert tile < 100, "tiles are listed"
            return tile

    def evaluate(tile: int) -> None:
        if tile == 20:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_tiles(evaluate, Endless(), 2)


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread")
def test_ctrl_c_stops_promptly() -> None:
    done, running = [], threading.active_count()

    def evaluate(tile: int) -> None:
        done.append(tile)
        if len(done) == 5:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        threading.Event().wait(0.002)

    with pytest.raises(KeyboardInterrupt):
        run_tiles(evaluate, range(5000), 2)
    assert len(done) < 500
    assert threading.active_count() == running


# Bad input


def test_nan_logits_are_counted_and_refused() -> None:
    class Broken(Linear):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return torch.where(logits[:, :1] > 0, torch.nan, logits)

    x = picture()
    nan = int(Smooth(Linear(x, 0.3), 2, SIGMA).counts(x, 200)[0])
    with pytest.raises(ValueError, match=f"NaN logits for {nan} of 200 samples"):
        Smooth(Broken(x, 0.3), 2, SIGMA).counts(x, 200)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sigma": 0.0}, "sigma must be > 0, got 0"),
        ({"sigma": -1.0}, "sigma must be > 0, got -1"),
        ({"sigma": math.nan}, "sigma must be finite"),
        ({"sigma": 1e300}, "sigma must be in float32.s range"),
        ({"num_classes": 1}, "num_classes must be >= 2"),
        ({"choices": "quick"}, "choices must be one of 'auto', 'module', 'sparse'"),
        ({"seed": -1}, "seed must be in"),
        ({"seed": 2**64}, "seed must be in"),
        ({"tile": 0}, "tile must be >= 1"),
        ({"dtype": torch.float8_e5m2}, "dtype must be one of"),
    ],
    ids=str,
)
def test_wrong_settings(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Smooth(Constant(), **({"num_classes": 4, "sigma": SIGMA} | wrong))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n0": 0}, "n0 must be in"),
        ({"n0": 10**10 + 1}, r"n0 must be in \[1, 10000000000\], got 10000000001"),
        ({"n": 0}, "n must be >= 1"),
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\)"),
        ({"alpha": 1.0}, r"alpha must be in \(0, 1\)"),
        ({"alpha": math.nan}, "alpha must be finite"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"stream": 2**32}, "stream must be in"),
        ({"x": torch.full(SHAPE, math.nan)}, "finite pixels, got 16 of 16"),
        ({"x": torch.full(SHAPE, math.inf)}, "finite pixels"),
        ({"x": torch.rand(4, 4)}, r"x must be one image \[C, H, W\]"),
        ({"x": torch.rand(2, *SHAPE)}, r"x must be one image \[C, H, W\]"),
        ({"x": torch.rand(SHAPE, device="meta")}, "x must hold values, got a tensor on the meta device"),
        ({"x": torch.rand(3, 4, 4)}, r"model does not take images x of shape \(3, 4, 4\)"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_wrong_arguments(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Smooth(net(), 5, SIGMA).certify(**({"x": picture(), "n0": 1, "n": 1} | wrong))


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="x must have dtype"):
        Smooth(Constant(), 4, SIGMA).certify((picture() * 255).to(torch.uint8))
    with pytest.raises(TypeError, match="n must be an integer"):
        Smooth(Constant(), 4, SIGMA).certify(picture(), n=10.5)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        Smooth("net", 4, SIGMA)
    with pytest.raises(TypeError, match="choices must be a name or layer -> sparse, dense, winograd, got list"):
        Smooth(Constant(), 4, SIGMA, choices=["dense"])


def test_wrong_models() -> None:
    with pytest.raises(ValueError, match="num_classes must be the width of the model's logits, 4, got 10"):
        Smooth(Constant(), 10, SIGMA).certify(picture())
    with pytest.raises(ValueError, match=r"model must map \(2, 1, 4, 4\) to logits"):
        Smooth(nn.Identity(), 10, SIGMA).certify(picture())
    with pytest.raises(ValueError, match="'1' is a batch-norm without running statistics"):
        Smooth(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16, track_running_stats=False)), 16, SIGMA)


def test_one_image_with_a_batch_axis_is_taken() -> None:
    smooth, x = Smooth(net(), 5, SIGMA), picture()
    assert smooth.certify(x[None], n0=10, n=40) == smooth.certify(x, n0=10, n=40)
    assert torch.equal(smooth.counts(x.double(), 40), smooth.counts(x, 40))


# Stopping early


def stream_of(smooth: Smooth, x: Tensor, last: int, stream: int) -> np.ndarray:
    """Votes [last, num_classes] of the samples one by one."""
    return np.stack([smooth.counts(x, 1, i, stream=stream).numpy() for i in range(last)])


ADAPTIVE = [
    {"rtol": 0.2},
    {"target_radius": 0.2},
    {"target_radius": 0.2, "rtol": 0.2, "method": "spending"},
    {},
    {"rtol": 0.2, "method": "pilot"},
]


@pytest.mark.parametrize("stop", ADAPTIVE, ids=str)
def test_an_adaptive_certificate_is_the_rule_on_the_stream_of_votes(stop: dict[str, Any]) -> None:
    x, n0, n, alpha = picture(), 10, 400, 0.01
    smooth = Smooth(Linear(x, 0.5), 2, SIGMA, tile=8)
    rule = smooth.rule(x, n0, n, alpha, adaptive=True, **stop)
    assert all((n0 + look) % 8 == 0 for look in rule.looks[:-1])
    for stream in range(2):
        votes = stream_of(smooth, x, n0 + n, stream)
        chosen = int(votes[:n0].sum(0).argmax())
        counts = [int(votes[n0 : n0 + look, chosen].sum()) for look in rule.looks]
        decision = next(d for k in range(len(counts)) if (d := rule.decide(counts[: k + 1])) is not None)
        want = (ABSTAIN, 0.0) if decision.radius is None else (chosen, decision.radius)
        found = smooth.certificate(x, n0, n, alpha, stream=stream, adaptive=True, **stop)
        assert found == (*want, n0 + decision.samples, decision.reason)
        assert smooth.certify(x, n0, n, alpha, stream=stream, adaptive=True, **stop) == want


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_an_adaptive_certificate_does_not_depend_on_batch_size_or_threads(dtype: torch.dtype | None) -> None:
    smooth, x = Smooth(net(), 5, SIGMA, dtype=dtype, tile=16), picture()

    def answers(batch_size: int) -> list[Any]:
        return [
            (
                smooth.certificate(x, 10, 600, 0.05, batch_size, stream=i, adaptive=True, rtol=0.3),
                smooth.predict(x, 600, 0.05, batch_size, stream=i, adaptive=True),
            )
            for i in range(3)
        ]

    before = torch.get_num_threads()
    want = answers(1)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert answers(1000 // threads) == want
    finally:
        torch.set_num_threads(before)


def test_an_adaptive_certificate_takes_no_more_samples_than_it_says() -> None:
    seen = []

    class Watch(Constant):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x)

    smooth, x = Smooth(Watch(), 4, SIGMA, tile=10), picture()
    assert smooth.certificate(x, 10, 100_000).samples == 100_010
    assert smooth.certificate(x, 10, 200).reason == "n"
    seen.clear()
    label, radius, samples, reason = smooth.certificate(x, 10, 100_000, adaptive=True, target_radius=SIGMA)
    assert (label, reason) == (2, "target")
    assert SIGMA <= radius < 2 * SIGMA
    assert sum(seen) == samples < 500


def test_a_certificate_is_cohens_unless_adaptive() -> None:
    x = picture()
    smooth = Smooth(Linear(x, 0.3), 2, SIGMA)
    votes = smooth.counts(x, 1000, 100)
    want = (1, certified_radius(int(votes[1]), 1000, SIGMA, 0.001))
    assert smooth.certify(x, 100, 1000) == want
    assert smooth.certificate(x, 100, 1000) == (*want, 1100, "n")


def test_an_adaptive_linear_classifier_is_certified_within_its_distance() -> None:
    x, distance, alpha, trials = picture(), 0.3, 0.1, 300
    smooth = Smooth(Linear(x, distance), 2, SIGMA)
    found = [
        smooth.certificate(x, 10, 490, alpha, stream=i, adaptive=True, target_radius=0.25, rtol=0.2)
        for i in range(trials)
    ]
    errors = sum(c.radius > distance or c.label == 0 for c in found)
    assert no_worse_than(alpha, errors, trials) > 1e-3
    assert max(c.radius for c in found) > 0.8 * distance
    assert sum(c.samples for c in found) < 0.9 * 500 * trials


def test_an_adaptive_prediction_is_the_test_on_the_stream_of_votes() -> None:
    x = picture()
    for distance, answer in ((0.9, 1), (0.0, ABSTAIN)):
        smooth = Smooth(Linear(x, distance), 2, SIGMA, tile=10)
        test = Prediction(2000, 0.001, 2, tile=10)
        votes = [smooth.counts(x, look).tolist() for look in test.looks]
        found = next(a for v, look in zip(votes, test.looks, strict=True) if (a := test.decide(v, look)) is not None)
        assert smooth.predict(x, 2000, adaptive=True) == found == answer


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rtol": 0.1}, "rtol must be None unless adaptive is true, got 0.1"),
        ({"target_radius": 0.1}, "target_radius must be None unless adaptive is true"),
        ({"method": "exact"}, "method must be None unless adaptive is true"),
        ({"adaptive": True, "rtol": 2.0}, r"rtol must be in \(0, 1\)"),
        ({"adaptive": True, "target_radius": -1}, "target_radius must be > 0"),
        ({"adaptive": True, "method": "peek"}, "method must be one of"),
        ({"adaptive": True, "n": 10**8}, "n must be in"),
        ({"adaptive": "no"}, "adaptive must be True or False, got 'no'"),
        ({"adaptive": True, "rtol": [0.1]}, r"rtol must be a number, got \[0.1\]"),
        ({"adaptive": True, "method": ["exact"]}, r"method must be one of .*, got \['exact'\]"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_wrong_ways_to_stop(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Smooth(Constant(), 4, SIGMA).certify(picture(), **wrong)


def test_a_prediction_is_adaptive_or_not() -> None:
    with pytest.raises(TypeError, match="adaptive must be True or False, got 'no'"):
        Smooth(Constant(), 4, SIGMA).predict(picture(), adaptive="no")
