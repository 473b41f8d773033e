"""The epoch loop: order, noise, augmentation, bit-for-bit resumption, batch-norm statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from csam import training
from csam.runs import Run, RunError
from csam.training import Feed, Optimizer

FEED = Feed(epochs=4, batch_size=16, sigma=0.1, padding=1, flip=True, seed=3)
QUICK = Optimizer(lr=0.05)


def images(n: int = 72) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (n,), generator=g)
    x = torch.randint(0, 100, (n, 2, 6, 6), generator=g, dtype=torch.uint8)
    x[torch.arange(n), 0, y] += 150
    return x, y


def network(seed: int = 0, width: int = 8) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 16, 3)
        )


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


class Killed(Exception):
    pass


def stop_after(steps: int) -> Any:
    """An `on_step` that ends the run after so many steps, as a kill would."""
    left = [steps]

    def on_step(done: int) -> None:
        left[0] -= done
        if left[0] <= 0:
            raise Killed

    return on_step


def test_fit_learns_and_leaves_eval_mode() -> None:
    x, y = images(256)
    model = network()
    training.fit(model, x, y, Feed(epochs=5, batch_size=32), QUICK)
    assert not model.training
    assert training.accuracy(model, x, y, batch_size=100) > 0.95


@pytest.mark.parametrize("steps", [1, 4, 9, 15], ids=lambda s: f"killed-at-step-{s}")
def test_killed_training_continues_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    x, y = images()
    straight = network()
    with Run(tmp_path / "straight", {}) as run:
        training.fit(straight, x, y, FEED, QUICK, stage=run.stage("fit"))
        expected = list(run.metrics())
    with pytest.raises(Killed), Run(tmp_path / "killed", {}) as run:
        training.fit(
            network(),
            x,
            y,
            FEED,
            QUICK,
            stage=run.stage("fit"),
            on_step=stop_after(steps),
        )
    # Before the first epoch's checkpoint the caller's own start is all there is.
    resumed = network(seed=1 if steps > 4 else 0)
    with Run(tmp_path / "killed", {}) as run:
        training.fit(resumed, x, y, FEED, QUICK, stage=run.stage("fit"))
        assert list(run.metrics()) == expected
    assert same(straight, resumed)


def test_dropout_continues_bit_for_bit_and_leaves_global_rng_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    x, y = images()
    straight, resumed = (nn.Sequential(nn.Dropout(), *network()) for _ in range(2))
    before = torch.random.get_rng_state()
    training.fit(straight, x, y, FEED, QUICK)
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(Killed), Run(tmp_path, {}) as run:
        training.fit(resumed, x, y, FEED, QUICK, stage=run.stage("fit"), on_step=stop_after(9))
    torch.manual_seed(1)  # as another process would stand
    with Run(tmp_path, {}) as run:
        training.fit(resumed, x, y, FEED, QUICK, stage=run.stage("fit"))
    assert same(straight, resumed)


def test_finished_stage_is_restored_not_repeated(tmp_path: Path) -> None:
    x, y = images()
    model, again = network(), network(seed=5)
    with Run(tmp_path, {}) as run:
        training.fit(model, x, y, FEED, QUICK, stage=run.stage("fit"))
        ticks: list[int] = []
        training.fit(again, x, y, FEED, QUICK, stage=run.stage("fit"), on_step=ticks.append)
    assert same(model, again)
    assert ticks == [16]


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    x, y = images()
    with Run(tmp_path, {}) as run:
        training.fit(network(), x, y, FEED, QUICK, stage=run.stage("fit"))
        with pytest.raises(RunError, match=r"fit\.safetensors is of another model: size mismatch for 0\.weight"):
            training.fit(network(width=4), x, y, FEED, QUICK, stage=run.stage("fit"))


def test_epochs_draw_without_replacement_and_depend_on_seed_and_epoch() -> None:
    x, y = images(48)
    feed = Feed(epochs=1, batch_size=16, seed=1)

    def pixels(feed: Feed, epoch: int) -> Tensor:
        return torch.cat([b for b, _ in training.batches(x, y, feed, epoch)])

    first = pixels(feed, 0)
    assert torch.equal(first, pixels(feed, 0))
    assert torch.equal(first.flatten(1).sum(1).sort().values, (x.float() / 255).flatten(1).sum(1).sort().values)
    assert not torch.equal(first, pixels(feed, 1))
    assert not torch.equal(first, pixels(Feed(epochs=1, batch_size=16, seed=2), 0))


def test_incomplete_batch_is_left_out_unless_it_is_the_only_one() -> None:
    x, y = images(40)
    assert [len(b) for b, _ in training.batches(x, y, Feed(epochs=1, batch_size=16), 0)] == [16, 16]
    assert [len(b) for b, _ in training.batches(x, y, Feed(epochs=1, batch_size=64), 0)] == [40]


def test_noise_has_the_asked_sigma_and_leaves_global_rng_alone() -> None:
    x, y = images(512)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    clean = torch.cat([b for b, _ in training.batches(x, y, Feed(epochs=1, batch_size=512), 0)])
    noisy = torch.cat([b for b, _ in training.batches(x, y, Feed(epochs=1, batch_size=512, sigma=0.25), 0)])
    noise = noisy - clean
    assert abs(noise.std().item() - 0.25) < 0.005
    assert abs(noise.mean().item()) < 0.005
    assert torch.equal(before, torch.get_rng_state())


def test_augment_makes_exactly_the_crops_and_flips() -> None:
    x = torch.arange(2 * 4 * 5, dtype=torch.uint8).view(1, 2, 4, 5).repeat(200, 1, 1, 1) + 1
    out = training.augment(x, 1, True, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x[0], (1, 1, 1, 1))
    crops = [padded[:, i : i + 4, j : j + 5] for i in range(3) for j in range(3)]
    possible = {tuple(c.flatten().tolist()) for c in crops} | {tuple(c.flip(2).flatten().tolist()) for c in crops}
    assert {tuple(o.flatten().tolist()) for o in out} == possible
    assert training.augment(x, 0, False, torch.Generator()) is x


def test_cosine_schedule_ends_near_zero() -> None:
    model = nn.Linear(1, 2)
    sgd = training.Sgd(model, Optimizer(lr=1.0, momentum=0, nesterov=False, weight_decay=0), 100)
    rates = []
    for _ in range(100):
        sgd.step(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64))
        rates.append(sgd._optimizer.param_groups[0]["lr"])
    assert rates[0] == 1.0
    assert rates[50] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-3
    assert rates == sorted(rates, reverse=True)


def test_momentum_may_be_zero() -> None:
    x, y = images()
    models = [network() for _ in range(2)]
    for model, recipe in zip(models, (Optimizer(momentum=0), Optimizer(momentum=0, nesterov=False)), strict=True):
        training.fit(model, x, y, FEED, recipe)
    assert same(*models)


def test_reestimated_statistics_are_the_plain_average() -> None:
    x, y = images(48)
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3))
    model[0].running_mean.fill_(9)
    feed = Feed(epochs=1, batch_size=16)
    training.reestimate_batchnorm(model, x, y, feed)
    xs = [b for b, _ in training.batches(x, y, feed, -1)]
    torch.testing.assert_close(model[0].running_mean, torch.stack([b.mean((0, 2, 3)) for b in xs]).mean(0))
    torch.testing.assert_close(model[0].running_var, torch.stack([b.var((0, 2, 3)) for b in xs]).mean(0))
    assert model[0].momentum == 0.1
    assert model.training


def test_reestimation_leaves_other_models_and_modes_alone() -> None:
    x, y = images(16)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(72, 3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    training.reestimate_batchnorm(model, x, y, FEED)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    mixed = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3)).eval()
    training.reestimate_batchnorm(mixed, x, y, FEED)
    assert not any(m.training for m in mixed.modules())


def test_a_failure_leaves_statistics_and_modes_as_they_were() -> None:
    x, y = images()
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(4, 3)).train()
    model[1].eval()  # frozen
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for use in (lambda: training.reestimate_batchnorm(model, x, y, FEED), lambda: training.accuracy(model, x, y)):
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            use()
        assert [module.training for module in model] == [True, False, True, True, True]
        assert model[1].momentum == 0.1
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="images must be uint8"):
        training.reestimate_batchnorm(model, x.float() / 255, y, FEED)
    with pytest.raises(ValueError, match="max_batches must be >= 1, got 0"):
        training.reestimate_batchnorm(model, x, y, FEED, max_batches=0)


def test_divergence_is_reported() -> None:
    x, y = images()
    with pytest.raises(training.TrainingDiverged, match="loss is nan in epoch"):
        training.fit(network(), x, y, FEED, Optimizer(lr=1e30))


def test_bfloat16_trains() -> None:
    x, y = images(256)
    model = network()
    training.fit(model, x, y, Feed(epochs=5, batch_size=32), Optimizer(lr=0.05, precision="bfloat16"))
    assert training.accuracy(model, x, y, precision="bfloat16") > 0.9
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Feed(epochs=-1), "epochs must be >= 0, got -1"),
        (lambda: Feed(epochs=1, batch_size=0), "batch_size must be >= 1, got 0"),
        (lambda: Feed(epochs=1, sigma=float("nan")), "sigma must be finite, got nan"),
        (lambda: Optimizer(lr=0), "lr must be > 0, got 0"),
        (lambda: Optimizer(precision="half"), "precision must be one of float32, bfloat16, got 'half'"),
        (lambda: Optimizer(label_smoothing=1), r"label_smoothing must be in \[0, 1\), got 1"),
    ],
    ids=["epochs", "batch", "sigma", "lr", "precision", "smoothing"],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_settings_of_another_kind() -> None:
    for name, value in (("epochs", 2.0), ("batch_size", 16.0), ("padding", True), ("sigma", "1")):
        with pytest.raises(TypeError, match=f"{name} must be an? (integer|number), got {value!r}"):
            Feed(**{"epochs": 1, name: value})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"transform must be callable, .*, got 'rotation:10'"):
        Feed(epochs=1, transform="rotation:10")  # type: ignore[arg-type]
    x, y = images()
    with pytest.raises(ValueError, match="precision must be one of 'float32', 'bfloat16', got 'bf16'"):
        training.accuracy(network(), x, y, precision="bf16")
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        training.accuracy(network(), x, y, batch_size=0)


def test_bad_images() -> None:
    x, y = images()
    with pytest.raises(ValueError, match="images must be uint8"):
        training.fit(network(), x.float(), y, FEED)
    with pytest.raises(ValueError, match=r"labels must be int64 \[72\]"):
        training.accuracy(network(), x, y[:5])
    with pytest.raises(ValueError, match="at least one image"):
        training.accuracy(network(), x[:0], y[:0])


class Pair(nn.Module):
    """A model with two outputs, as those with an auxiliary classifier."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize("use", [lambda *args: training.fit(*args, FEED), training.accuracy], ids=["fit", "accuracy"])
def test_labels_and_outputs_that_do_not_fit_are_named(use: Any) -> None:
    x, y = images()
    with pytest.raises(ValueError, match="labels must be below the model's 3 classes, got 3"):
        use(network(), x, y + 1)
    with pytest.raises(ValueError, match="labels must be >= 0, got -100"):  # which torch's loss would leave out
        use(network(), x, torch.where(y == 0, -100, y))
    with pytest.raises(ValueError, match=r"model must return logits \[\d+, classes\], got tuple"):
        use(nn.Sequential(nn.Conv2d(2, 3, 3), Pair()), x, y)
    with pytest.raises(ValueError, match=r"model must return logits \[\d+, classes\], got \[\d+, 8, 4, 4\]"):
        use(network()[:1], x, y)


def test_derived_seeds_differ() -> None:
    seeds = {training.derive_seed(s, w, e) for s in range(5) for w in ("order", "noise") for e in range(5)}
    assert len(seeds) == 50
    assert all(0 <= s < 2**63 for s in seeds)
