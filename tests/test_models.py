"""The networks: their published sizes and keys, what torch can do with them, and loading weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import assert_close, shared_data
from csam import data, models

NAMES = list(models.ARCHITECTURES)
PARAMETERS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet18": 11_173_962,
    "digits": 75_002,
}


def images_for(model: models.CifarResNet, batch: int = 2) -> Tensor:
    size = 8 if model.in_channels == 1 else 32
    return torch.rand(batch, model.in_channels, size, size)


def macs(model: models.CifarResNet) -> int:
    """Multiply-adds of convolutions and linear layers for one image."""
    total = 0

    def count(layer: nn.Module, _: object, out: Tensor) -> None:
        nonlocal total
        total += layer.weight.numel() * out[0, 0].numel()

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    model.eval()(images_for(model, batch=1))
    return total


@pytest.mark.parametrize("name", NAMES)
def test_parameter_count(name: str) -> None:
    assert sum(p.numel() for p in models.build(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "expected"), [("resnet20", 40_551_040), ("resnet56", 125_485_696), ("resnet18", 555_422_720)]
)
def test_multiply_adds(name: str, expected: int) -> None:
    assert macs(models.build(name)) == expected


def test_resnet18_keys_are_the_usual_ones() -> None:
    keys = set(models.build("resnet18").state_dict())
    assert {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer4.1.bn2.running_var", "fc.bias"} <= keys
    assert {"layer2.0.downsample.0.weight", "layer2.0.downsample.1.running_mean"} <= keys
    assert not any(key.startswith("layer1.0.downsample") for key in keys)
    assert not {"mean", "std"} & keys


def test_cifar_keys_are_the_published_ones() -> None:
    published = safetensors.torch.load_file(shared_data("cifar10-resnet20.safetensors"))
    model = models.build("resnet20")
    assert {key for key in model.state_dict() if not key.endswith("num_batches_tracked")} == set(published)
    model.load_state_dict(published, strict=True)


def test_option_a_shortcut_subsamples_and_pads_both_sides() -> None:
    x = torch.rand(2, 4, 6, 6)
    out = models.PadShortcut(4, 8, 2)(x)
    assert out.shape == (2, 8, 3, 3)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert not out[:, :2].any()
    assert not out[:, 6:].any()


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = models.build(name, seed=0)
    F.cross_entropy(model(images_for(model, 4)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_normalisation_is_part_of_the_model() -> None:
    plain = models.build("resnet20", seed=0).eval()
    normalised = models.build("resnet20", seed=0, **models.NORMALIZATION["imagenet"]._asdict()).eval()
    x = images_for(plain)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in models.NORMALIZATION["imagenet"])
    assert torch.equal(normalised(x), plain((x - mean) / std))


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "digits"])
def test_fx_traces_and_still_checks(name: str) -> None:
    model = models.build(name).eval()
    traced = torch.fx.symbolic_trace(model)
    x = images_for(model)
    assert torch.equal(traced(x), model(x))
    with pytest.raises(ValueError, match="x must be images"):
        traced(x[0])


@pytest.mark.parametrize("name", ["resnet20", "digits"])
def test_compiles_as_one_graph(name: str) -> None:
    model = models.build(name).eval()
    x = images_for(model)
    assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "digits"])
def test_copies_are_equal_and_independent(name: str) -> None:
    model = models.build(name, seed=0, mean=[0.5] * models.ARCHITECTURES[name].in_channels).eval()
    x = images_for(model)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            other.conv1.weight.zero_()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_channels_last(name: str) -> None:
    model = models.build(name, seed=0, **models.NORMALIZATION["imagenet"]._asdict()).eval()
    x = images_for(model)
    expected = model(x)
    seen: list[bool] = []
    model.layer3.register_forward_hook(
        lambda _, __, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
    )
    model = model.to(memory_format=torch.channels_last)
    assert_close(model(x.contiguous(memory_format=torch.channels_last)), expected)
    assert seen == [True]


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "digits"])
def test_bfloat16(name: str) -> None:
    model = models.build(name, seed=0).eval()
    x = images_for(model, 8)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(x)
    half = model.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == autocast.dtype == torch.bfloat16
    for logits in (half, autocast):
        assert F.cosine_similarity(logits.float(), expected).min() > 0.999


def test_height_and_width_are_free() -> None:
    assert models.build("resnet20").eval()(torch.rand(1, 3, 40, 24)).shape == (1, 10)


def test_seed_repeats_and_leaves_the_global_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds the GPUs"))
    state = torch.get_rng_state()
    first, second, other = (models.build("digits", seed=seed).conv1.weight for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet21"}, "name must be one of resnet20, .* got 'resnet21'"),
        ({"name": "digits", "num_classes": 0}, "num_classes must be >= 1, got 0"),
        ({"name": "digits", "num_classes": 10.0}, "num_classes must be an integer, got 10.0"),
        ({"name": "digits", "in_channels": 0}, "in_channels must be >= 1, got 0"),
        ({"name": "resnet20", "mean": [0.5]}, "mean must hold one value for each of 3 channels, got 1"),
        ({"name": "resnet20", "mean": 0.5}, "mean must hold one value for each of 3 channels, got 0.5"),
        ({"name": "digits", "mean": [float("nan")]}, "mean must be finite"),
        ({"name": "digits", "std": [0.0]}, "std must be > 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_build_refuses(arguments: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        models.build(**arguments)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 32, 32, 3)], ids=str)
def test_forward_refuses_what_would_broadcast(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must be images \[B, 3, H, W\], got shape"):
        models.build("resnet20").eval()(torch.rand(shape))


class TestLoadWeights:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "weights.safetensors"
        safetensors.torch.save_file(models.build("digits", seed=1).state_dict(), path)
        return path

    @staticmethod
    def refuses(path: Path, message: str, error: type[Exception] = ValueError) -> None:
        """load_weights raises with the file's name, and the model stays as it was."""
        model = models.build("digits", seed=0)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(error, match=message) as caught:
            models.load_weights(model, path)
        assert str(path) in str(caught.value)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_round_trip(self, file: Path) -> None:
        model = models.build("digits", seed=0)
        models.load_weights(model, str(file))
        expected = models.build("digits", seed=1).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())

    @pytest.mark.parametrize("optional", ["num_batches_tracked", "mask"])
    def test_counters_and_masks_may_be_absent(self, file: Path, optional: str) -> None:
        tensors = safetensors.torch.load_file(file)
        kept = {key: value for key, value in tensors.items() if not key.endswith("num_batches_tracked")}
        safetensors.torch.save_file(kept, file)
        model = models.build("digits", seed=0)
        if optional == "mask":
            model.conv1.register_buffer("mask", torch.zeros(16, dtype=torch.bool))
        models.load_weights(model, file)
        assert torch.equal(model.conv1.weight, tensors["conv1.weight"])

    def test_no_such_file(self, tmp_path: Path) -> None:
        self.refuses(tmp_path / "none.safetensors", "does not exist", FileNotFoundError)

    def test_a_folder(self, tmp_path: Path) -> None:
        self.refuses(tmp_path, "must be a safetensors file")

    @pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1], ids=lambda k: f"cut_at_{k}")
    def test_truncated(self, file: Path, kept: float) -> None:
        content = file.read_bytes()
        file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
        self.refuses(file, "not a whole safetensors file")

    def test_foreign(self, file: Path) -> None:
        torch.save({"conv1.weight": torch.zeros(1)}, file)
        self.refuses(file, "not a whole safetensors file")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t | {"extra.weight": torch.zeros(1)}, "it has 'extra.weight'"),
            (lambda t: {k: v for k, v in t.items() if k != "linear.bias"}, "it has no 'linear.bias'"),
            (
                lambda t: t | {"linear.bias": torch.zeros(7)},
                r"'linear.bias' must have shape \[10\], got \[7\]",
            ),
        ],
        ids=["foreign_key", "missing_key", "wrong_shape"],
    )
    def test_another_model(self, file: Path, change: Callable[[dict], dict], message: str) -> None:
        safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file)
        self.refuses(file, f"is of another model: {message}")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """So small a network only waits for a second thread, for long where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_digits_model_learns_the_digits() -> None:
    dataset = data.load("digits")
    x, y, batch, epochs = data.to_unit(dataset.train_x), dataset.train_y, 128, 8
    model, generator = models.build("digits", seed=0), torch.Generator().manual_seed(0)
    steps = len(x) // batch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=epochs * steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=generator)[: steps * batch].view(steps, batch):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        correct = model.eval()(data.to_unit(dataset.test_x)).argmax(1) == dataset.test_y
    assert correct.float().mean() >= 0.97
