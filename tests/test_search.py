"""MaskSearch against a plain twin of the whole step, and what a training loop relies on."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from conftest import assert_close
from csam import search as of_search
from csam import transforms
from csam.masks import group_norms, sparsity
from csam.nn import GRANULARITIES, convert, expand_mask, masked_layers
from csam.search import MaskSearch, consistency_term, margin_term, structural_term
from csam_kernels import perturb_masks

OFF: dict[str, float] = {"task": 0, "structural": 0, "consistency": 0, "margin": 0, "budget": 0}
ARMS = ("adversarial", "uniform", None)


def plain_model(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def shifted(x: Tensor, *, seed: int) -> Tensor:
    """A transform with a random draw of its own."""
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.flip(3) + 0.5 * noise.to(x.dtype)


def flipped(x: Tensor, *, seed: int) -> Tensor:
    """A transform that treats every image alike."""
    return x.flip(3)


def batch(n: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 2, 6, 6, dtype=dtype), torch.arange(n) % 4


def masked_model(granularity: str = "weight", dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    model = convert(plain_model(**options), granularity, 5).to(dtype).train()
    with torch.no_grad():
        for layer in masked_layers(model).values():
            layer.weight.mul_(3)  # logits far enough apart for every term to matter
    return model


def scores_of(model: nn.Module) -> list[Tensor]:
    return [layer.mask_score.detach().clone() for layer in masked_layers(model).values()]


@dataclass
class Twin:
    """One step of the objective in ordinary torch operators and autograd, from the search's own settings."""

    search: MaskSearch
    transform: Any

    def __post_init__(self) -> None:
        self.layers = masked_layers(self.search.model)
        self.net = copy.deepcopy(self.search.model)
        self.scores = [s.requires_grad_() for s in scores_of(self.search.model)]
        own = dict(self.search.model.named_parameters())
        self.theta = {n: p.detach().clone().requires_grad_() for n, p in own.items() if not n.endswith("mask_score")}

    def logits(self, soft: list[Tensor], x: Tensor) -> Tensor:
        replaced = dict(self.theta)
        for (name, layer), m in zip(self.layers.items(), soft, strict=True):
            full = expand_mask(m, layer.weight.shape, layer.block_size or 0)
            replaced[f"{name}.weight"] = self.theta[f"{name}.weight"] * full
        # the masks left in the copy are all ones
        return functional_call(self.net, replaced, (x,))

    def perturbed(self, x: Tensor, y: Tensor) -> list[Tensor]:
        s = self.search
        if s.perturbation is None:
            return self.scores
        if s.perturbation == "uniform":
            detached = [c.detach() for c in self.scores]
            moved = perturb_masks(detached, kind="uniform", radius=s.radius, seed=s.seed, step=s.steps)
        else:
            grads = torch.autograd.grad(F.cross_entropy(self.logits(self.scores, x), y), self.scores)
            total = torch.cat([g.flatten() for g in grads]).norm()
            norms = [g.norm() if s.norm == "layer" else total for g in grads]
            moved = [(c + s.rho * g / n).clamp(0, 1) for c, g, n in zip(self.scores, grads, norms, strict=True)]
        return [c + (m - c).detach() for c, m in zip(self.scores, moved, strict=True)]

    def binary(self) -> list[Tensor]:
        flats = [c.detach().flatten() for c in self.scores]
        groups = [[f] for f in flats] if self.search.scope == "layer" else [flats]
        kept = []
        for group in groups:
            flat = torch.cat(group)
            hard = torch.zeros_like(flat)
            hard[flat.topk(math.ceil(round((1 - self.search.sparsity) * flat.numel(), 9))).indices] = 1
            kept += list(hard.split([len(f) for f in group]))
        return [c + (k.view_as(c) - c).detach() for c, k in zip(self.scores, kept, strict=True)]

    def loss(self, x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        s, terms = self.search, {}
        soft, clean = self.logits(self.perturbed(x, y), x), self.logits(self.scores, x)
        p, p_soft = clean.softmax(1), soft.softmax(1)
        p_hard = self.logits(self.binary(), x).softmax(1)
        terms["task"] = -soft.log_softmax(1)[torch.arange(len(y)), y].mean()
        terms["structural"] = (p_soft - p).abs().max(1).values.mean()
        terms["consistency"] = (p * (p.log() - p_hard.log())).sum(1).mean()
        p_moved = self.logits(self.perturbed(x, y), self.transform(x, seed=seed)).softmax(1)
        first, second = p_soft.sort(1, descending=True).values[:, :2].unbind(1)
        gap = (p_soft - p_moved).abs().max(1).values - (first - second) / 2
        terms["margin"] = torch.where(gap > 0, gap, 0.0).mean()
        mean = torch.cat([c.flatten() for c in self.scores]).mean()
        terms["budget"] = mean if s.budget_form == "l1" else (mean - (1 - s.sparsity)).abs()
        return sum(s.lambdas[name] * term for name, term in terms.items()), terms


def seen_seed(search: MaskSearch) -> list[int]:
    """Record the seeds that the search hands to its transform."""
    seeds: list[int] = []
    inner = search.transform

    def recording(x: Tensor, *, seed: int) -> Tensor:
        seeds.append(seed)
        return inner(x, seed=seed)

    search.transform = recording
    return seeds


def compare_with_twin(search: MaskSearch, steps: int = 1) -> None:
    """Terms, gradient norm and updated scores (and theta) of a few steps, in float64."""
    for step in range(steps):
        x, y = batch(dtype=torch.float64)
        seeds = seen_seed(search) if search.transform else []
        twin = Twin(search, shifted)
        logged = search.step(x, y)
        search.steps -= 1
        total, terms = twin.loss(x, y, seeds[0] if seeds else 0)
        search.steps += 1
        for name, weight in search.lambdas.items():
            assert (name in logged) == (weight > 0)
            if weight:
                assert logged[name] == pytest.approx(float(terms[name].detach()), rel=1e-9, abs=1e-12)
        assert logged["loss"] == pytest.approx(float(total.detach()), rel=1e-9)
        wanted = [*twin.scores, *twin.theta.values()]
        grads = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
        score_grads, theta_grads = grads[: len(twin.scores)], grads[len(twin.scores) :]
        norm = torch.cat([g.flatten() for g in score_grads]).norm()
        assert logged["grad_norm"] == pytest.approx(float(norm), rel=1e-9)
        for c, g, now in zip(twin.scores, score_grads, scores_of(search.model), strict=True):
            assert_close(now, (c.detach() - search.lr * g).clamp(0, 1))
        now = dict(search.model.named_parameters())
        for (name, old), g in zip(twin.theta.items(), theta_grads, strict=True):
            assert_close(now[name].detach(), old.detach() - 0.1 * g if search.joint else old.detach())
        assert search.steps == step + 1


def plain_sgd(**options: Any) -> dict[str, Any]:
    return {"optimizer": "sgd", "momentum": 0, "lr": 2.0, "sparsity": 0.6, "rho": 0.4, "seed": 3} | options


@pytest.mark.parametrize("perturbation", ARMS, ids=str)
@pytest.mark.parametrize("term", [*OFF, "all"])
def test_each_term_alone_equals_the_plain_twin(term: str, perturbation: str | None) -> None:
    if term == "structural" and perturbation is None:
        pytest.skip("zero without a perturbation")
    weights = {"task": 0.7, "structural": 1.3, "consistency": 0.9, "margin": 1.1, "budget": 2.0}
    if term != "all":
        weights = OFF | {term: 1.5}
    model = masked_model(dtype=torch.float64)
    search = MaskSearch(model, **plain_sgd(perturbation=perturbation, transform=shifted, **weights))
    compare_with_twin(search, steps=2)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("joint", [False, True], ids=["frozen", "joint"])
@pytest.mark.parametrize("perturbation", ARMS, ids=str)
def test_granularities_and_joint_training_equal_the_plain_twin(
    granularity: str, joint: bool, perturbation: str | None
) -> None:
    model = masked_model(granularity, dtype=torch.float64)
    rates = {"weight_lr": 0.1, "weight_momentum": 0, "weight_decay": 0}
    search = MaskSearch(model, **plain_sgd(perturbation=perturbation, transform=shifted, joint=joint, tau=0.8, **rates))
    compare_with_twin(search)


@pytest.mark.parametrize(
    "options",
    [{"norm": "layer"}, {"scope": "layer"}, {"budget_form": "l1"}, {"norm": "layer", "scope": "layer"}],
    ids=str,
)
def test_norm_scope_and_budget_options_equal_the_plain_twin(options: dict[str, Any]) -> None:
    model = masked_model(dtype=torch.float64)
    compare_with_twin(MaskSearch(model, **plain_sgd(transform=shifted, **options)))


def test_joint_training_sees_every_use_of_a_tied_weight() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed((x * 5).long()).mean(1))

    model = convert(Tied()).double()
    rates = {"weight_lr": 0.1, "weight_momentum": 0, "weight_decay": 0}
    search = MaskSearch(model, perturbation=None, joint=True, **rates, **(OFF | {"task": 1}))
    theta = model.embed.weight.detach().clone().requires_grad_()
    x, y = torch.rand(6, 3, dtype=torch.float64), torch.arange(6) % 5
    logits = F.linear(theta[(x * 5).long()].mean(1), theta * model.head.mask_score, model.head.bias)
    (grad,) = torch.autograd.grad(F.cross_entropy(logits, y), theta)
    search.step(x, y)
    assert_close(model.embed.weight.detach(), theta.detach() - 0.1 * grad)


def test_adam_moves_the_scores_as_torch_does() -> None:
    model = masked_model(dtype=torch.float64)
    search = MaskSearch(model, 0.6, lr=0.05, perturbation="uniform")
    mirror = [s.requires_grad_() for s in scores_of(model)]
    adam = torch.optim.Adam(mirror, lr=0.05)
    for _ in range(4):
        x, y = batch(dtype=torch.float64)
        twin = Twin(search, shifted)
        total, _ = twin.loss(x, y, 0)
        for own, g in zip(mirror, torch.autograd.grad(total, twin.scores), strict=True):
            own.grad = g
        adam.step()
        search.step(x, y)
        for own, now in zip(mirror, scores_of(model), strict=True):
            own.data.clamp_(0, 1)
            assert_close(now, own.detach())


def test_terms_on_hand_made_probabilities() -> None:
    p = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.25, 0.25]], dtype=torch.float64)
    q = torch.tensor([[0.4, 0.4, 0.2], [0.5, 0.3, 0.2]], dtype=torch.float64)
    assert float(structural_term(p.log(), q.log())) == pytest.approx((0.2 + 0.05) / 2)
    assert float(consistency_term(p.log(), q.log())) == pytest.approx(float((p * (p / q).log()).sum() / 2))
    # Z = .2, .05 and d = .15, .125: only the first image is not safe
    assert float(margin_term(p.log(), q.log())) == pytest.approx((0.2 - 0.15) / 2)
    assert float(consistency_term(p.log(), p.log())) == pytest.approx(0)


PASSES = [
    ({"task": 1}, None, 1),
    ({"task": 1}, "uniform", 1),
    ({"task": 1}, "adversarial", 2),
    ({"structural": 1}, "uniform", 2),
    ({"structural": 1}, "adversarial", 2),
    ({"consistency": 1}, None, 2),
    ({"consistency": 1}, "adversarial", 2),
    ({"margin": 1}, None, 2),
    ({"margin": 1}, "uniform", 2),
    ({"margin": 1}, "adversarial", 3),
    ({"budget": 1}, "adversarial", 0),
    (dict.fromkeys(OFF, 1), None, 3),
    (dict.fromkeys(OFF, 1), "uniform", 4),
    (dict.fromkeys(OFF, 1), "adversarial", 4),
]


@pytest.mark.parametrize(("weights", "perturbation", "passes"), PASSES, ids=str)
def test_a_zero_weight_skips_the_passes_only_it_needs(
    weights: dict[str, float], perturbation: str | None, passes: int
) -> None:
    model = masked_model()
    search = MaskSearch(model, perturbation=perturbation, transform=shifted, **(OFF | weights))
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    search.step(*batch())
    assert len(calls) == passes


@pytest.mark.parametrize("joint", [False, True], ids=["frozen", "joint"])
def test_a_step_leaves_buffers_generators_and_gradients_alone(joint: bool) -> None:
    model = masked_model(dropout=0.3)
    search = MaskSearch(model, transform=shifted, joint=joint)
    before = copy.deepcopy(model.state_dict())
    x, y = batch()
    generator = torch.get_rng_state()
    search.step(x, y)
    assert torch.equal(torch.get_rng_state(), generator)
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    trained = {n for n, _ in model.named_parameters() if joint or n.endswith("mask_score")}
    assert moved == trained
    assert all(p.grad is None for p in model.parameters())
    assert all(layer.effective_weight is None for layer in masked_layers(model).values())


@pytest.mark.parametrize("kind", ["batch_norm", "instance_norm", "spectral_norm"])
def test_a_step_leaves_every_kind_of_buffer_alone(kind: str) -> None:
    model = plain_model()
    if kind == "instance_norm":
        model[1] = nn.InstanceNorm2d(6, track_running_stats=True)
    if kind == "spectral_norm":
        nn.utils.parametrizations.spectral_norm(model[0])
    model = convert(model).train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    MaskSearch(model, transform=shifted).step(*batch())
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_dropout_is_the_same_in_every_pass() -> None:
    search = MaskSearch(masked_model(dropout=0.5), perturbation="uniform", radius=0.0)
    assert search.step(*batch())["structural"] == 0


def test_an_exception_in_the_model_leaves_it_usable() -> None:
    model = masked_model()
    search = MaskSearch(model)
    with pytest.raises(RuntimeError):
        search.step(torch.rand(4, 3, 6, 6), torch.arange(4))
    assert all(layer.effective_weight is None for layer in masked_layers(model).values())
    model(batch()[0])
    assert model[1].num_batches_tracked == 1


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    model = convert(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 3)))
    with torch.no_grad():
        model[1].weight.fill_(1e30)
        model[2].weight.fill_(1e30)
    search = MaskSearch(model)
    before = search.state_dict()
    with pytest.raises(FloatingPointError, match="at step 0: nothing was updated"):
        search.step(torch.ones(2, 4), torch.tensor([0, 1]))
    after = search.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_a_gradient_of_theta_that_is_not_finite_changes_nothing() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.shift = nn.Linear(4, 3), nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + self.shift.sqrt()  # of infinite slope at zero

    model = convert(Root())
    search = MaskSearch(model, joint=True)
    before = search.state_dict()
    with pytest.raises(FloatingPointError, match=r"gradient norm [\d.]+ \(of theta (inf|nan)\) at step 0"):
        search.step(torch.rand(5, 4), torch.arange(5) % 3)
    assert all(torch.equal(v, before[k]) for k, v in search.state_dict().items())


@pytest.mark.parametrize("last", ["convolution", "norm"])
@pytest.mark.parametrize("perturbation", ARMS, ids=str)
def test_activations_that_are_computed_anew_are_refused(perturbation: str | None, last: str) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
            self.head = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            part = (self.norm, nn.ReLU(), self.second) if last == "convolution" else (self.second, self.norm)
            return self.head(checkpoint(nn.Sequential(*part), self.first(x), use_reentrant=False).flatten(1))

    model = convert(Checkpointed())
    search = MaskSearch(model, perturbation=perturbation)
    before = scores_of(model)
    with pytest.raises(ValueError, match=r"switch its torch\.utils\.checkpoint off"):
        search.step(*batch())
    assert all(torch.equal(a, b) for a, b in zip(before, scores_of(model), strict=True))
    model(batch()[0]).sum().backward()  # the layers are free again


def test_a_model_that_changes_its_input_is_refused() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = masked_model()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x.sub_(0.5).div_(0.2))

    with pytest.raises(ValueError, match="model must leave its input as it is"):
        MaskSearch(InPlace()).step(*batch())


def test_layers_that_the_forward_skips_stay_put() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = convert(Skips())
    search = MaskSearch(model, budget=0)
    before = scores_of(model)
    x, y = torch.rand(5, 4), torch.arange(5) % 3
    search.step(x, y)
    used, unused = (not torch.equal(a, b) for a, b in zip(before, scores_of(model), strict=True))
    assert used
    assert not unused
    model.used = nn.Linear(4, 3)
    for trained in (True, False):
        with pytest.raises(ValueError, match="model must call its masked layers"):
            MaskSearch(model.requires_grad_(trained)).step(x, y)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("s", [0.0, 0.5, 0.7, 0.95])
def test_the_achieved_sparsity_is_exact(granularity: str, scope: str, s: float) -> None:
    model = masked_model(granularity)
    search = MaskSearch(model, s, scope=scope, lr=0.3)
    for _ in range(3):
        search.step(*batch())
    search.apply()
    layers = list(masked_layers(model).values())
    for part in [[layer] for layer in layers] if scope == "layer" else [layers]:
        n = sum(layer.mask.numel() for layer in part)
        assert sum(int(layer.mask.sum()) for layer in part) == math.ceil(round((1 - s) * n, 9))
    assert {n: torch.equal(t, masked_layers(model)[n].mask) for n, t in search.masks().items()} == dict.fromkeys(
        masked_layers(model), True
    )


def test_one_search_can_be_cut_at_several_sparsities() -> None:
    model = masked_model()
    search = MaskSearch(model, 0.7)
    search.step(*batch())
    loose, tight = search.masks(0.5), search.masks(0.9)
    assert all(bool((loose[n] | ~tight[n]).all()) for n in loose)
    search.apply(0.9)
    assert sparsity(model) == pytest.approx(0.9, abs=2e-3)
    with pytest.raises(ValueError, match="sparsity"):
        search.apply(1.0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scores_start_percentile_scaled_and_stay_in_range(granularity: str) -> None:
    model = masked_model(granularity)
    search = MaskSearch(model, tau=0.8, lr=0.4)
    for layer in masked_layers(model).values():
        norms = group_norms(layer)
        assert_close(layer.mask_score.detach(), (norms / norms.flatten().quantile(0.8)).clamp(0, 1))
    search.step(*batch())
    assert all(float(s.min()) >= 0 and float(s.max()) <= 1 for s in scores_of(model))
    kept = scores_of(model)
    MaskSearch(model, tau=None)
    assert all(torch.equal(a, b) for a, b in zip(kept, scores_of(model), strict=True))


def run(search: MaskSearch, first: int, last: int) -> list[dict[str, float]]:
    logs = []
    for t in range(first, last):
        torch.manual_seed(100 + t)
        search.lr = 0.05 / (1 + t)
        logs.append(search.step(*batch()))
    return logs


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    "options",
    [{}, {"optimizer": "sgd"}, {"joint": True}, {"perturbation": "uniform", "dtype": torch.bfloat16}],
    ids=["adam", "sgd", "joint", "uniform-bf16"],
)
def test_resuming_equals_an_uninterrupted_run_bit_for_bit(
    options: dict[str, Any], layout: torch.memory_format, tmp_path: Path
) -> None:
    start = masked_model(dropout=0.2).to(memory_format=layout)
    options = {"transform": shifted, "seed": 11} | options
    whole = MaskSearch(copy.deepcopy(start), **options)
    logs = run(whole, 0, 5)

    first = MaskSearch(copy.deepcopy(start), **options)
    run(first, 0, 2)
    save_file(first.state_dict(), tmp_path / "search.safetensors")
    second = MaskSearch(copy.deepcopy(start), **options)
    run(second, 0, 1)  # whatever it held before is replaced
    second.load_state_dict(load_file(tmp_path / "search.safetensors"))
    assert second.steps == 2
    assert run(second, 2, 5) == logs[2:]
    resumed, expected = second.state_dict(), whole.state_dict()
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[k], expected[k]) for k in expected)
    assert all(torch.equal(second.masks()[n], m) for n, m in whole.masks().items())


def test_the_rate_of_theta_is_kept() -> None:
    search = MaskSearch(masked_model(), joint=True)
    search.weight_lr = 1e-3
    again = MaskSearch(masked_model(), joint=True)
    again.load_state_dict(search.state_dict())
    assert (again.weight_lr, again.lr) == (1e-3, search.lr)
    with pytest.raises(ValueError, match="weight_lr must be > 0, got 0"):
        again.load_state_dict(search.state_dict() | {"weight_lr": torch.zeros((), dtype=torch.float64)})


def test_state_lies_where_its_parameter_does() -> None:
    scores = torch.empty(3, 2, 2, 2, device="meta").to(memory_format=torch.channels_last)
    moment = of_search._laid_out_as(scores, torch.ones(3, 2, 2, 2))
    assert (moment.device, moment.stride()) == (scores.device, scores.stride())
    assert of_search._laid_out_as(scores, torch.ones(())).is_meta


def test_a_model_may_change_its_memory_format_between_steps() -> None:
    start = masked_model()
    x, y = batch()
    models = [copy.deepcopy(start) for _ in range(2)]
    plain, moved = (MaskSearch(m, perturbation=None, optimizer="sgd", lr=1.0, joint=True) for m in models)
    for search in (plain, moved):
        search.step(x, y)
    models[1].to(memory_format=torch.channels_last)
    for search in (plain, moved):
        search.step(x, y)
    for name, value in plain.state_dict().items():
        assert_close(moved.state_dict()[name].double(), value.double(), torch.float32)


def test_the_seed_decides_the_noise() -> None:
    start = masked_model()
    logs = [run(MaskSearch(copy.deepcopy(start), perturbation="uniform", seed=s), 0, 2) for s in (0, 0, 1)]
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]


def test_a_foreign_state_is_refused_and_changes_nothing() -> None:
    search = MaskSearch(masked_model())
    search.step(*batch())
    good = search.state_dict()
    other = MaskSearch(masked_model(), optimizer="sgd")
    other.step(*batch())
    cases = [
        ({k: v for k, v in good.items() if k != "score.3"}, "the key 'score.3' is missing"),
        (good | {"score.9": good["score.3"]}, "unknown key 'score.9'"),
        (good | {"score.3": good["score.3"][:1]}, r"state\['score.3'\] must have shape \(8, 6, 3, 3\)"),
        (other.state_dict(), "unknown key 'score.momentum_buffer.0'"),
        ({k: v for k, v in good.items() if k != "score.exp_avg_sq.3"}, "the key 'score.exp_avg_sq.3' is missing"),
        (good | {"step": torch.tensor(5), "lr": torch.tensor(math.nan)}, "lr must be finite"),
        (good | {"step": 5}, r"state\['step'\] must be a torch.Tensor, got int"),
    ]
    for state, message in cases:
        with pytest.raises((TypeError, ValueError), match=message):
            search.load_state_dict(state)
    assert all(torch.equal(v, good[k]) for k, v in search.state_dict().items())


@pytest.mark.parametrize("perturbation", ARMS, ids=str)
def test_bfloat16_gives_the_float32_terms_within_its_precision(perturbation: str | None) -> None:
    start = masked_model()
    x, y = batch(16)
    logs = [
        MaskSearch(copy.deepcopy(start), perturbation=perturbation, transform=shifted, dtype=dtype).step(x, y)
        for dtype in (None, torch.bfloat16)
    ]
    assert logs[0].keys() == logs[1].keys()
    for name, exact in logs[0].items():
        if name != "accuracy":
            assert logs[1][name] == pytest.approx(exact, rel=0.15, abs=0.03), name


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_memory_format_does_not_change_the_search(granularity: str) -> None:
    start = masked_model(granularity)
    x, y = batch()
    nchw, nhwc = copy.deepcopy(start), copy.deepcopy(start).to(memory_format=torch.channels_last)
    plain = MaskSearch(nchw, perturbation="uniform", optimizer="sgd", lr=1.0)
    last = MaskSearch(nhwc, perturbation="uniform", optimizer="sgd", lr=1.0)
    for _ in range(2):
        plain.step(x, y)
        last.step(x.to(memory_format=torch.channels_last), y)
    for a, b in zip(scores_of(nchw), scores_of(nhwc), strict=True):
        assert_close(b, a)


@pytest.mark.parametrize("perturbation", ARMS, ids=str)
def test_the_search_finds_the_weights_that_matter(perturbation: str | None) -> None:
    """Useful weights on 4 inputs, larger harmful ones on 12: magnitude would pick the harmful."""
    layer = nn.Linear(16, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(2, 16) * 2)
        layer.weight[:, :4] = torch.tensor([[1.0], [-1.0]])
    model = convert(nn.Sequential(layer))
    search = MaskSearch(model, 0.75, perturbation=perturbation, rho=0.1, lr=0.05)
    for _ in range(80):
        x = torch.randn(64, 16)
        search.step(x, (x[:, :4].sum(1) < 0).long())
    search.apply()
    x = torch.randn(1000, 16)
    accuracy = float((model(x).argmax(1) == (x[:, :4].sum(1) < 0).long()).float().mean())
    assert accuracy > 0.95
    assert int(model[0].mask[:, :4].sum()) >= 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1"),
        ({"perturbation": "random"}, "perturbation must be one of 'adversarial', 'uniform', None, got 'random'"),
        ({"radius": -0.1}, "radius must be >= 0"),
        ({"rho": math.inf}, "rho must be finite"),
        ({"norm": "filter"}, "norm must be one of"),
        ({"scope": "block"}, "scope must be one of"),
        ({"tau": 0.0}, r"tau must be in \(0, 1\], got 0"),
        ({"task": -1.0}, "task must be >= 0"),
        ({"margin": 1.0}, "margin > 0 needs a transform, got margin=1 and transform=None"),
        (OFF, "one of task, structural, consistency, margin, budget must be > 0"),
        (OFF | {"structural": 1.0, "perturbation": None}, "structural needs a perturbation"),
        ({"budget_form": "hinge"}, "budget_form must be one of"),
        ({"optimizer": "lion"}, "optimizer must be one of 'adam', 'sgd', got 'lion'"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"dtype": torch.float16}, r"dtype must be one of None, torch\.bfloat16"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"joint": True, "weight_lr": -1.0}, "weight_lr must be > 0"),
        ({"joint": "no"}, "joint must be True or False, got 'no'"),
        ({"transform": "rotation:10"}, "transform must be a callable or None, got str"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_before_the_scores_change(options: dict[str, Any], message: str) -> None:
    model = masked_model()
    with pytest.raises((TypeError, ValueError), match=message):
        MaskSearch(model, **options)
    assert all(bool((s == 1).all()) for s in scores_of(model))


def test_unfit_models_are_refused() -> None:
    with pytest.raises(ValueError, match="model must hold masked layers"):
        MaskSearch(plain_model())
    with pytest.raises(ValueError, match="weights of one dtype, float32 or float64, got bfloat16"):
        MaskSearch(masked_model().bfloat16())
    with pytest.raises(ValueError, match=r"dtype=torch.bfloat16 needs a float32 model, got float64"):
        MaskSearch(masked_model().double(), dtype=torch.bfloat16)
    mixed = nn.Sequential(convert(nn.Linear(3, 3), "block", 2), convert(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="one block size"):
        MaskSearch(mixed)
    frozen = masked_model()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="joint=True needs model parameters that require a gradient"):
        MaskSearch(frozen, joint=True)
    computed = masked_model()
    parametrizations.weight_norm(computed[3])
    MaskSearch(computed).step(*batch())
    with pytest.raises(ValueError, match="masked layers whose weight is a parameter of their own, got '3'"):
        MaskSearch(computed, joint=True)


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (torch.rand(4, 2, 6, 6), torch.zeros(4), TypeError, "y must have dtype int64"),
        (torch.rand(4, 2, 6, 6), torch.zeros(3).long(), ValueError, r"x must be \[B, ...\] and y \[B\]"),
        (torch.rand(0, 2, 6, 6), torch.zeros(0).long(), ValueError, "B >= 1"),
        (torch.full((1, 2, 6, 6), torch.nan), torch.zeros(1).long(), ValueError, "x must be finite"),
        (torch.rand(1, 2, 6, 6), torch.tensor([-1]), ValueError, "y must hold class indices >= 0, got -1"),
        (torch.rand(2, 2, 6, 6), torch.tensor([0, 4]), ValueError, "y must hold .* below the model's 4, got 4"),
        (torch.ones(1, 2, 6, 6).byte(), torch.zeros(1).long(), TypeError, "x must have dtype"),
    ],
    ids=["float-labels", "lengths", "empty", "nan", "negative-label", "label", "bytes"],
)
def test_bad_batches_are_refused(x: Tensor, y: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MaskSearch(masked_model()).step(x, y)


def test_models_and_transforms_of_the_wrong_shape_are_named() -> None:
    features = convert(nn.Sequential(nn.Conv2d(2, 3, 3)))
    with pytest.raises(ValueError, match=r"logits of shape \(6, classes >= 2\), got \(6, 3, 4, 4\)"):
        MaskSearch(features).step(*batch())
    one = convert(nn.Sequential(nn.Flatten(), nn.Linear(72, 1)))
    with pytest.raises(ValueError, match=r"classes >= 2\), got \(6, 1\)"):
        MaskSearch(one).step(batch()[0], torch.zeros(6).long())
    search = MaskSearch(masked_model(), transform=lambda x, *, seed: x[:1])
    with pytest.raises(ValueError, match=r"tensor of shape \(6, 2, 6, 6\), got \(1, 2, 6, 6\)"):
        search.step(*batch())


def test_pixels_that_a_transform_would_clip_are_refused_and_nothing_is_updated() -> None:
    x, y = batch()
    search = MaskSearch(masked_model(), transform=transforms.Rotation(1e-6))
    before = search.state_dict()
    with pytest.raises(ValueError, match=r"^x must have pixels in \[0, 1\], got .*; normalise inside the model"):
        search.step((x - 0.5) / 0.25, y)
    assert all(torch.equal(value, before[key]) for key, value in search.state_dict().items())
    assert search.step(x, y)["margin"] == pytest.approx(0, abs=1e-3)
    MaskSearch(masked_model(), transform=transforms.Rotation(1).clipped).step(x + torch.randn_like(x), y)
    MaskSearch(masked_model(), transform=transforms.Rotation(1), margin=0.0).step(x * 3, y)  # which needs no x_T


def _search_in_a_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    start = torch.load(f"{folder}/start.pt", weights_only=False)
    search = MaskSearch(start["model"], **start["options"])
    half = slice(rank * 4, rank * 4 + 4)
    logs = [search.step(start["x"][half], start["y"][half]) for _ in range(3)]
    torch.save({"logs": logs, "state": search.state_dict()}, f"{folder}/{rank}.pt")
    os._exit(0)  # as in test_nn.py


@pytest.mark.parametrize("joint", [False, True], ids=["frozen", "joint"])
def test_two_processes_search_as_one_does(joint: bool, tmp_path: Path) -> None:
    model = masked_model(dtype=torch.float64).eval().to(memory_format=torch.channels_last)
    x, y = batch(8, torch.float64)
    options = {"transform": flipped, "joint": joint}
    torch.save({"model": model, "x": x, "y": y, "options": options}, tmp_path / "start.pt")
    mp.spawn(_search_in_a_process, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    whole = MaskSearch(model, **options)
    assert first["logs"] == second["logs"]
    assert first["logs"] == [pytest.approx(whole.step(x, y), rel=1e-9) for _ in range(3)]
    for key, value in whole.state_dict().items():
        assert torch.equal(first["state"][key], second["state"][key])
        assert_close(first["state"][key].double(), value.double())
