"""The sampling engine votes as the model does, whatever it runs, and its cost falls with every weight pruned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import csam
import csam_kernels
from csam import engine, inference, sampling

SIGMA = 0.25


def pruned(name: str, sparsity: float, granularity: str = "weight", **options: Any) -> nn.Module:
    """A network with batch-norm statistics of its own and magnitude masks, in eval mode."""
    torch.manual_seed(0)
    model = csam.models.build(name, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    head = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    model = csam.convert(model, granularity=granularity, exclude=head)
    csam.masks.global_magnitude(model, sparsity)
    model.eval()
    with torch.no_grad():  # no class wins everywhere, so that votes tell one run from another
        channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
        model.get_submodule(head[0]).bias -= model(torch.rand(64, channels, 8, 8)).mean(0)
    return model


def logits(prepared: csam.smoothing.Prepared, x: Tensor) -> Tensor:
    with torch.inference_mode():
        batch = inference.laid_out(x.to(prepared.dtype), prepared.memory_format)
        return (prepared.sampler.logits(batch) if prepared.sampler else prepared.module(batch)).float()


@pytest.mark.parametrize("choices", ["dense", "sparse", "auto", "module"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", ["resnet20", "resnet18", "digits"])
def test_logits_are_the_models(name: str, dtype: torch.dtype, tolerance: float, choices: str) -> None:
    model = pruned(name, 0.9)
    channels = 1 if name == "digits" else 3
    x = torch.rand(33, channels, 8, 8)
    plan = sampling.plan(model, x[0], dtype=dtype, choices=choices)
    with torch.no_grad():
        wanted = model(x)
    assert (logits(plan.prepared, x) - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert (plan.prepared.sampler is None) == (choices == "module") or choices == "auto"
    assert choices in ("auto", "module") or {layer.engine for layer in plan.layers} == {choices}


def test_a_mixture_of_engines_is_the_model_too() -> None:
    model, x = pruned("resnet20", 0.9), torch.rand(32, 3, 8, 8)
    names = [layer.name for layer in sampling.plan(model, x[0], choices="dense").layers]
    choices = {name: engine.ENGINES[i % 2] for i, name in enumerate(names)}
    plan = sampling.plan(model, x[0], dtype=torch.float32, choices=choices)
    assert plan.choices == choices
    with torch.no_grad():
        torch.testing.assert_close(logits(plan.prepared, x), model(x), rtol=1e-4, atol=1e-4)


def test_votes_do_not_depend_on_batches_threads_or_splits() -> None:
    model, x = pruned("digits", 0.9), torch.rand(1, 8, 8)
    plan = sampling.plan(model, x, choices="sparse")
    wanted = plan.votes(x, SIGMA, 500, seed=3)
    assert int(wanted.sum()) == 500
    assert int((wanted > 0).sum()) > 1
    before = torch.get_num_threads()
    for number, batch_size in ((1, 1), (2, 64), (3, 1000)):
        torch.set_num_threads(number)
        assert torch.equal(plan.votes(x, SIGMA, 500, seed=3, batch_size=batch_size), wanted)
    torch.set_num_threads(before)
    split = plan.votes(x, SIGMA, 77, seed=3) + plan.votes(x, SIGMA, 423, seed=3, first_sample=77)
    assert torch.equal(split, wanted)
    assert not torch.equal(plan.votes(x, SIGMA, 500, seed=4), wanted)


def test_smooth_and_cc_cert_take_a_prepared_network() -> None:
    model, x = pruned("digits", 0.9), torch.rand(1, 8, 8)
    plan = sampling.plan(model, x, choices="sparse")
    smooth = csam.Smooth(plan.prepared, num_classes=10, sigma=SIGMA, seed=3)
    assert torch.equal(smooth.counts(x, 200), plan.votes(x, SIGMA, 200, seed=3))
    assert smooth.prepared is plan.prepared
    assert smooth.settings["dtype"] == "bfloat16"
    bound = csam.CCCert(plan.prepared, csam.transforms.Rotation(10), n=20, k=2).certify(x).bound
    assert 0 < bound <= 1
    with pytest.raises(ValueError, match="tile must be None or the prepared network's 50"):
        csam.Smooth(plan.prepared, num_classes=10, sigma=SIGMA, tile=51)


def test_smooth_runs_the_plan_by_default() -> None:
    model, x = pruned("digits", 0.9), torch.rand(1, 8, 8)
    smooth = csam.Smooth(model, num_classes=10, sigma=SIGMA, seed=3, dtype=torch.float32)
    plan = sampling.plan(model, x, dtype=torch.float32)
    assert torch.equal(smooth.counts(x, 200), plan.votes(x, SIGMA, 200, seed=3))
    assert smooth.prepared is not None
    assert smooth.prepared.sampler is not None
    assert smooth.prepared.sampler.fingerprint == plan.prepared.sampler.fingerprint


def test_explain_names_every_layer_and_what_was_done() -> None:
    plan = sampling.plan(pruned("digits", 0.9), torch.rand(1, 8, 8))
    text = plan.explain()
    for layer in plan.layers:
        assert layer.name[:20] in text
    assert "batch-norm layers folded" in text
    assert "samples innermost" in text
    assert plan.memory is not None


def test_the_cost_of_a_sparse_layer_is_its_weights() -> None:
    """Counted, not timed: what the kernel walks over is the surviving weights."""
    few, many = (sampling.plan(pruned("resnet20", s), torch.rand(3, 8, 8), choices="sparse") for s in (0.95, 0.5))
    pairs = [pair for pair in zip(few.layers, many.layers, strict=True) if pair[0].weight[2] == 3]
    assert len(pairs) == 19
    assert all(less.predicted < more.predicted for less, more in pairs[1:])


def test_filter_masks_shrink_the_dense_layers() -> None:
    model, x = pruned("resnet20", 0.5, "filter"), torch.rand(32, 3, 8, 8)
    plan = sampling.plan(model, x[0], dtype=torch.float32, choices="dense")
    with torch.no_grad():
        torch.testing.assert_close(logits(plan.prepared, x), model(x), rtol=1e-4, atol=1e-4)
    before = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    after = sum(torch.Size(layer.weight).numel() for layer in plan.layers if layer.weight[2] == 3)
    assert after < 0.5 * before


def test_a_network_that_cannot_be_traced_runs_as_it_is() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.head((x if x.sum() > -1e9 else -x).mean((2, 3)))

    x = torch.rand(1, 8, 8)
    plan = sampling.plan(Branching().eval(), x)
    assert plan.layers == ()
    assert int(plan.votes(x, SIGMA, 100).sum()) == 100
    assert plan.choices == "module"
    assert "run by torch: TraceError" in plan.explain()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ("fast", "choices must be one of"),
        ({"nowhere": "dense"}, "choices must give dense or sparse for every layer of the plan, got nowhere: dense"),
        ({}, "choices must give .* no conv1"),
    ],
    ids=str,
)
def test_bad_choices(choices: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampling.plan(pruned("digits", 0.9), torch.rand(1, 8, 8), choices=choices)


@pytest.mark.parametrize("choices", ["auto", "sparse"])
def test_int8_votes_as_the_model_does(choices: str) -> None:
    model, examples = pruned("digits", 0.7), torch.rand(4, 1, 8, 8)
    plan = sampling.plan(model, examples, dtype="int8", sigma=SIGMA, choices=choices)
    assert plan.prepared.sampler is not None
    x = csam_kernels.smoothing_noise(examples[0], 500, SIGMA, seed=3)
    with torch.no_grad():
        wanted = model(x)
    found = plan.prepared.sampler.logits(x)
    assert (found - wanted).abs().max() <= 0.1 * wanted.abs().max()
    assert (found.argmax(1) == wanted.argmax(1)).float().mean() >= 0.95
    assert torch.equal(plan.votes(examples[0], SIGMA, 500, seed=3), torch.bincount(found.argmax(1), minlength=10))
    assert "int8, calibrated on 4 x 16 noisy images of sigma 0.25" in plan.explain()
    again = sampling.plan(model, examples, dtype="int8", sigma=SIGMA, choices=plan.choices)
    assert again.prepared.sampler is not None
    assert again.prepared.sampler.fingerprint == plan.prepared.sampler.fingerprint
    assert csam.Smooth(plan.prepared, num_classes=10, sigma=SIGMA).settings["dtype"] == "int8"


def test_int8_is_sparse_where_few_weights_are_left() -> None:
    plan = sampling.plan(pruned("resnet20", 0.97), torch.rand(3, 16, 16), dtype="int8", sigma=SIGMA)
    assert sum(layer.engine == "sparse" for layer in plan.layers) > len(plan.layers) // 2


def test_a_limit_of_memory_bounds_the_threads() -> None:
    model, x = pruned("digits", 0.7), torch.rand(1, 8, 8)
    need = sampling.plan(model, x).memory
    assert need is not None
    bounded = sampling.plan(model, x, memory=2 * need)
    assert bounded.prepared.threads == 2
    assert torch.equal(bounded.votes(x, SIGMA, 300), sampling.plan(model, x).votes(x, SIGMA, 300))
    with pytest.raises(ValueError, match=f"memory must be at least the {need} bytes of one thread, got 1000"):
        sampling.plan(model, x, memory=1000)
    with pytest.raises(ValueError, match="memory needs a network whose samples lie innermost: run by torch: as chosen"):
        sampling.plan(model, x, memory=2 * need, choices="module")


def test_models_that_cannot_be_planned() -> None:
    model, x = pruned("digits", 0.7), torch.rand(1, 8, 8)
    plan = sampling.plan(model, x)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(ValueError, match="model has changed"):
        plan.votes(x, SIGMA, 10)
    with pytest.raises(ValueError, match="sigma must be given for dtype 'int8'"):
        sampling.plan(model, x, dtype="int8")
    with pytest.raises(ValueError, match="model must be in eval mode"):
        sampling.plan(model.train(), x)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="model must have finite weights, got NaN or inf in conv1"):
        sampling.plan(model.eval(), x)


def test_bad_arguments() -> None:
    model, x = pruned("digits", 0.9), torch.rand(1, 8, 8)
    with pytest.raises(ValueError, match="dtype must be one of"):
        sampling.plan(model, x, dtype=torch.float64)
    plan = sampling.plan(model, x, choices="dense")
    with pytest.raises(ValueError, match="sigma must be > 0"):
        plan.votes(x, 0.0, 10)
    with pytest.raises(ValueError, match="n must be in"):
        plan.votes(x, SIGMA, 0)
    with pytest.raises(ValueError, match="x must have finite pixels"):
        plan.votes(torch.full_like(x, torch.nan), SIGMA, 10)
