"""Classifiers that are no ordinary module: callables, a denoiser in front, preprocessing inside, NHWC."""

from __future__ import annotations

import copy
import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import csam
from csam import evaluation, runs
from csam.adapters import ModelError
from csam.evaluation import certify_dataset
from csam.models import NORMALIZATION
from csam.records import read_tsv, read_votes
from csam.smoothing import Smooth
from csam.transforms import Brightness
from test_smoothing import SHAPE, SIGMA, net, picture

N = {"n0": 20, "n": 600, "alpha": 0.01}


class Owner:
    """Has a network, and a method that is no module."""

    def __init__(self) -> None:
        self.net = net().eval()

    def logits(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.net(x)


CALLABLES: dict[str, Callable[[Owner], Callable[[Tensor], Tensor]]] = {
    "lambda": lambda owner: lambda x: owner.net(x),
    "method": lambda owner: owner.logits,
    "partial": lambda owner: functools.partial(owner.logits, scale=1.0),
    "other-runtime": lambda owner: lambda x: torch.from_numpy(owner.net(torch.from_numpy(x.numpy())).numpy()),
}


# Callables


@pytest.mark.parametrize("kind", CALLABLES)
def test_a_callable_is_certified_as_its_network(kind: str, threads: int) -> None:
    owner, x = Owner(), picture()
    want = Smooth(owner.net, 5, SIGMA, choices="module")
    for batch_size in (1, 400):
        smooth = Smooth(CALLABLES[kind](owner), 5, SIGMA)
        assert torch.equal(smooth.counts(x, 777, 33, batch_size), want.counts(x, 777, 33))
        assert smooth.certify(x, **N, batch_size=batch_size) == want.certify(x, **N)
        stop = {"adaptive": True, "rtol": 0.2}
        assert smooth.certificate(x, **N, **stop) == want.certificate(x, **N, **stop)
        assert smooth.predict(x, 500) == want.predict(x, 500)
    assert smooth.prepared is not None
    assert smooth.prepared.steps[-1].startswith("run as it is: ")
    cc_cert = functools.partial(csam.CCCert, transform=Brightness(0.2), n=20, k=2, choices="module")
    bounds = [cc_cert(f).certify(x) for f in (CALLABLES[kind](owner), owner.net)]
    assert bounds[0].bound == bounds[1].bound


def test_a_callable_gets_whole_tiles_one_at_a_time() -> None:
    """Such as one that was exported for a batch of its own and is not made for threads."""
    shapes, inside, most, owner = set(), [0], [0], Owner()

    def fixed(x: Tensor) -> Tensor:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(1e-3)
        shapes.add((tuple(x.shape), x.dtype, x.is_contiguous()))
        inside[0] -= 1
        return owner.net(x)

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        Smooth(fixed, 5, SIGMA, tile=16).counts(picture(), 333, 5)
        assert (shapes, most) == ({((16, *SHAPE), torch.float32, True)}, [1])
        Smooth(csam.Opaque(fixed, threads=3), 5, SIGMA, tile=16).counts(picture(), 333, 5)
    finally:
        torch.set_num_threads(before)
    assert 1 < most[0] <= 3


@pytest.mark.parametrize("stop", [{"adaptive": True, "target_radius": 0.05}, {}], ids=["adaptive", "fixed"])
def test_no_tile_of_an_image_is_run_twice(stop: dict[str, Any]) -> None:
    rows, owner = [], Owner()

    def counting(x: Tensor) -> Tensor:
        rows.append(len(x))
        return owner.net(x)

    smooth = Smooth(csam.Opaque(counting), 5, SIGMA, tile=200)
    smooth.prepare(picture())
    rows.clear()
    found = smooth.certificate(picture(), 150, 1000, **stop)  # those that choose the class end within a tile
    assert sum(rows) == -(-found.samples // 200) * 200
    votes = smooth.votes(picture(), ((150, 0), (50, 150), (333, 200), (10, 7)), 400, 0)
    apart = [smooth.counts(picture(), n, first) for n, first in ((150, 0), (50, 150), (333, 200), (10, 7))]
    assert [v.tolist() for v in votes] == [v.tolist() for v in apart]


def test_one_call_at_a_time_whoever_certifies() -> None:
    inside, owner = threading.Lock(), Owner()

    def alone(x: Tensor) -> Tensor:
        assert inside.acquire(blocking=False)
        time.sleep(1e-3)
        inside.release()
        return owner.net(x)

    smooth, found = Smooth(alone, 5, SIGMA), []
    pool = [threading.Thread(target=lambda: found.append(smooth.counts(picture(), 500))) for _ in range(3)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    assert len(found) == 3
    assert all(torch.equal(votes, found[0]) for votes in found)


def test_a_callable_is_neither_copied_nor_changed() -> None:
    owner = Owner()
    owner.net.train()
    owner.net.bn1.eval()
    owner.net.bn2.eval()
    function = csam.Opaque(owner.logits)
    assert copy.deepcopy(nn.Sequential(nn.Identity(), function))[1] is function
    Smooth(function, 5, SIGMA).counts(picture(), 10)
    assert owner.net.training
    assert all(p.requires_grad for p in owner.net.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: lambda x: f(x) + torch.rand(len(x), 1), "each row of a batch, got logits .* when asked again"),
        (lambda f: lambda x: f(x - x.mean(0)), "each row of a batch, got logits that change by .* with the other rows"),
        (lambda f: lambda x: f(x).numpy(), r"logits \(50, K\) with K >= 2, got ndarray"),
        (lambda f: lambda x: f(x)[0], r"logits \(50, K\) with K >= 2, got shape \(5,\)"),
        (lambda f: lambda x: f(x)[:, :1], r"got shape \(50, 1\)"),
        (lambda f: lambda x: f(x).argmax(1, keepdim=True).expand(-1, 5), "floating-point logits .* got torch.int64"),
        (lambda f: lambda x: f(x).to("meta"), "where it gets the images, on cpu, got torch.float32 on meta"),
        (lambda f: lambda x: f(x.flatten()), r"model does not take images x of shape \(1, 4, 4\)"),
    ],
    ids=["random", "train-mode", "numpy", "one-row", "one-class", "integers", "device", "shape"],
)
def test_what_is_no_function_of_a_row_is_refused(change: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Smooth(change(Owner().logits), 5, SIGMA).counts(picture(), 10)


def test_a_callable_that_changes_its_mind_later_is_refused() -> None:
    owner, calls = Owner(), []

    def shrinking(x: Tensor) -> Tensor:
        calls.append(1)
        return owner.net(x)[: len(x) - (len(calls) > 4)]

    with pytest.raises(ValueError, match=r"logits \(50, K\) with K >= 2, got shape \(49, 5\)"):
        Smooth(shrinking, 5, SIGMA).counts(picture(), 500)


def test_what_a_callable_does_later_is_said_of_it(tmp_path: Path) -> None:
    owner, calls = Owner(), []

    def changing(x: Tensor) -> Tensor:
        calls.append(1)
        return owner.net(x)[:, : 5 - (len(calls) > 4)]

    def failing(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("out of memory")
        return owner.net(x)

    with pytest.raises(ValueError, match="model must give logits of one width, 5, got 4"):
        Smooth(changing, 5, SIGMA).counts(picture(), 500)
    calls.clear()
    with pytest.raises(ModelError, match=r"^net 1 gave no logits for \(50, 1, 4, 4\): out of memory"):
        Smooth(csam.Opaque(failing, name="net 1"), 5, SIGMA).counts(picture(), 500)
    calls.clear()
    with pytest.raises(ModelError, match=r"^image 0: net 1 gave no logits"):
        certify_dataset(Smooth(csam.Opaque(failing, name="net 1"), 5, SIGMA), picture()[None], [0], tmp_path / "r.tsv")


def test_wrong_callables() -> None:
    for function in (3, "net", None):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module or another callable, got"):
            Smooth(function, 5, SIGMA)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="function must be a callable"):
            csam.Opaque(function)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"other than a torch\.nn\.Module, which goes without Opaque"):
        csam.Opaque(nn.Identity())
    with pytest.raises(TypeError, match="name must be a string or None, got int"):
        csam.Opaque(abs, name=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"device must be one of torch's, .*, got 'gpu'"):
        csam.Opaque(abs, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device must be one that torch can use here, got 'cuda:0'"):
            csam.Opaque(abs, device="cuda:0")
    with pytest.raises(ValueError, match="threads must be >= 1, got 0"):
        csam.Opaque(abs, threads=0)
    for model in (abs, nn.Sequential(nn.Identity(), csam.Opaque(abs))):
        with pytest.raises(ValueError, match=r"dtype must be None or torch\.float32 for a callable"):
            Smooth(model, 5, SIGMA, dtype=torch.bfloat16)


def exported(model: nn.Module) -> nn.Module:
    return torch.export.export(model, (torch.rand(50, *SHAPE),)).module()


def scripted(model: nn.Module) -> nn.Module:
    return torch.jit.trace(model, torch.rand(50, *SHAPE))


@pytest.mark.filterwarnings("ignore")  # torch.jit's of its age
@pytest.mark.parametrize("make", [exported, scripted])
def test_exported_modules_go_as_callables(make: Callable[[nn.Module], nn.Module]) -> None:
    """Those that were made for a tile of their own, too."""
    model, x = net().eval(), picture()
    other = make(model)
    assert torch.equal(Smooth(lambda x: other(x), 5, SIGMA).counts(x, 300), Smooth(model, 5, SIGMA).counts(x, 300))


@pytest.mark.filterwarnings("ignore")
def test_a_module_that_cannot_be_frozen_is_refused() -> None:
    with pytest.raises(ValueError, match=r"that can be put in eval mode and frozen, .* lambda x: model\(x\)"):
        Smooth(scripted(net().eval()), 5, SIGMA).counts(picture(), 10)


# In a data set: votes are kept, a run that was stopped goes on, images end when they are decided


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, *SHAPE, generator=generator), torch.randint(5, (6,), generator=generator)


class Stop(BaseException):
    """Stands for a kill."""


def rows_of(path: Path) -> list[tuple[Any, ...]]:
    return [(r.idx, r.label, r.predict, r.radius, r.correct) for r in read_tsv(path)]


def kept(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in votes.items() if k != "time"} for _, votes in sorted(read_votes(path)[1].items())]


@pytest.mark.parametrize("stop", [{}, {"adaptive": True, "rtol": 0.2}], ids=["fixed", "adaptive"])
def test_an_interrupted_run_of_a_callable_ends_with_the_same_rows(
    tmp_path: Path, images: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, stop: dict[str, Any]
) -> None:
    owner = Owner()
    certify_dataset(Smooth(owner.net, 5, SIGMA, choices="module"), *images, tmp_path / "whole.tsv", **N, **stop)
    monkeypatch.setattr(evaluation, "SAVE_SECONDS", 0.0)  # votes are saved whenever a few tiles are done
    path, left, stops, drawn = tmp_path / "r.tsv", [0], 0, []

    def dying(x: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise Stop
        return owner.net(x)

    while True:
        left[0] = 3 + 20  # the tiles that are tried first, and enough to finish an image
        try:
            smooth = Smooth(csam.Opaque(dying, name="net 1"), 5, SIGMA)
            certify_dataset(smooth, *images, path, **N, **stop, on_samples=drawn.append)
            break
        except Stop:
            stops += 1
            assert stops < 50
    assert stops >= 2
    assert rows_of(path) == rows_of(tmp_path / "whole.tsv")
    assert kept(path) == kept(tmp_path / "whole.tsv")
    recipe = read_votes(path)[0]
    assert (recipe["functions"], recipe["choices"], recipe["fingerprint"]) == (["net 1"], "module", None)


def test_a_run_goes_on_under_the_same_name_alone(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    owner, path = Owner(), tmp_path / "r.tsv"

    def run(name: str | None, **options: Any) -> None:
        certify_dataset(Smooth(csam.Opaque(owner.logits, name=name), 5, SIGMA), *images, path, **N, **options)

    run("net 1", indices=[0, 1])
    for other in ("net 2", None):
        with pytest.raises(runs.RunError, match=r"functions: \['net 1'\] there, .* now"):
            run(other)
    with pytest.raises(runs.RunError, match=r"functions: \['net 1'\] there, None now"):
        certify_dataset(Smooth(owner.net, 5, SIGMA), *images, path, **N)
    run("net 1")
    assert len(read_tsv(path)) == 6


# A denoiser in front, and preprocessing inside


class Residual(nn.Module):
    """x - net(x), as DnCNN denoises (Zhang et al. 2017); the result may be clamped to the pixels' range."""

    def __init__(self, clamp: bool) -> None:
        super().__init__()
        self.net = (
            nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            )
            .append(nn.ReLU())
            .append(nn.Conv2d(8, 3, 3, padding=1))
        )
        self.clamp = clamp

    def forward(self, x: Tensor) -> Tensor:
        x = x - self.net(x)
        return x.clamp(0, 1) if self.clamp else x


class Resized(nn.Module):
    """Interpolated, normalised by buffers, and classified."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        for name, values in NORMALIZATION["imagenet"]._asdict().items():
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, size=(12, 12), mode="bilinear", align_corners=False)
        return self.classifier((x.clamp(0, 1) - self.mean) / self.std)


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return csam.models.build("resnet20", num_classes=4, **NORMALIZATION["imagenet"]._asdict()).eval()


@pytest.mark.parametrize("clamp", [False, True], ids=["plain", "clamped"])
def test_a_denoiser_in_front_is_planned(clamp: bool) -> None:
    model, x = nn.Sequential(Residual(clamp), classifier()).eval(), torch.rand(3, 8, 8)
    plan = csam.sampling.plan(model, x, dtype=torch.float32, choices="dense")
    sampler = plan.prepared.sampler
    assert sampler is not None, plan.prepared.steps
    noisy = x + SIGMA * torch.randn(40, *x.shape)
    wanted = model(noisy).detach()
    assert float((sampler.logits(noisy) - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_a_node_that_has_no_step_is_named_and_the_rest_goes_on() -> None:
    model, x = Resized(classifier()).eval(), torch.rand(3, 8, 8)
    plan = csam.sampling.plan(model, x, dtype=torch.float32)
    assert plan.choices == "module"
    assert "upsample_bilinear2d: no step for upsample_bilinear2d" in plan.explain()
    smooth, alone = (Smooth(model, 4, SIGMA, dtype=dtype) for dtype in (torch.float32, None))
    assert smooth.certify(x, n0=20, n=200)[0] == alone.certify(x, n0=20, n=200)[0]


def test_a_denoiser_in_front_of_a_callable() -> None:
    denoiser, net, x = Residual(True).eval(), classifier(), torch.rand(3, 8, 8)
    mixed = Smooth(nn.Sequential(denoiser, csam.Opaque(lambda x: net(x))), 4, SIGMA)
    assert torch.equal(mixed.counts(x, 300), Smooth(nn.Sequential(denoiser, net), 4, SIGMA).counts(x, 300))
    before = mixed.prepared
    with torch.no_grad():
        denoiser.net[0].weight.zero_()  # a change of a module is seen
    mixed.counts(x, 10)
    assert mixed.prepared is not before


# NHWC


class Last(nn.Module):
    """A network's twin that takes [B, H, W, C]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.permute(0, 3, 1, 2))


def test_a_pixel_gets_the_same_noise_in_both_layouts() -> None:
    seen: dict[str, list[Tensor]] = {"NCHW": [], "NHWC": []}

    def linear(layout: str) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            assert x.is_contiguous()
            seen[layout].append(x if layout == "NCHW" else x.permute(0, 3, 1, 2))
            return seen[layout][-1].double().flatten(1)[:, :3]

        return call

    before, x = torch.get_num_threads(), torch.rand(3, 5, 4)
    torch.set_num_threads(1)  # for the order of the calls
    try:
        votes = [
            Smooth(linear(layout), 3, SIGMA, layout=layout).counts(image, 500, 7)
            for layout, image in (("NCHW", x), ("NHWC", x.permute(1, 2, 0)))
        ]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*votes)
    assert len(seen["NCHW"]) == len(seen["NHWC"]) > 10
    assert all(map(torch.equal, seen["NCHW"], seen["NHWC"]))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, "int8"], ids=str)
def test_certificates_are_the_same_in_both_layouts(dtype: torch.dtype | str | None, threads: int) -> None:
    model, x = classifier(), torch.rand(3, 8, 8)
    shown = torch.rand(4, 3, 8, 8) if dtype == "int8" else None
    options: dict[str, Any] = {"dtype": dtype, "choices": "dense" if dtype else "module"}
    first = Smooth(model, 4, SIGMA, calibration=shown, **options)
    last = Smooth(
        Last(model),
        4,
        SIGMA,
        layout="NHWC",
        calibration=None if shown is None else shown.permute(0, 2, 3, 1),
        **options,
    )
    image = x.permute(1, 2, 0)
    assert last.certify(image, **N) == last.certify(image[None], **N) == first.certify(x, **N)
    assert last.predict(image, 300) == first.predict(x, 300)
    if dtype is not None:
        assert last.recipe(image) == first.recipe(x) | {"choices": last.recipe(image)["choices"]}  # nodes' names differ
        assert last.recipe(image)["fingerprint"] is not None


def test_a_data_set_and_a_bound_in_nhwc(tmp_path: Path) -> None:
    model, x, y = classifier(), torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8), [0, 1, 2, 3]
    rows = [
        certify_dataset(smooth, images, y, tmp_path / f"{smooth.layout}.tsv", **N)
        for smooth, images in (
            (Smooth(model, 4, SIGMA, dtype=torch.float32), x),
            (Smooth(Last(model), 4, SIGMA, dtype=torch.float32, layout="NHWC"), x.permute(0, 2, 3, 1)),
        )
    ]
    assert [(r.idx, r.predict, r.radius) for r in rows[0]] == [(r.idx, r.predict, r.radius) for r in rows[1]]
    image = x[0] / 255
    options: dict[str, Any] = {"transform": Brightness(0.2), "n": 20, "k": 2, "dtype": torch.float32}
    twin = csam.CCCert(Last(model), layout="NHWC", **options).certify(image.permute(1, 2, 0))
    assert twin.bound == csam.CCCert(model, **options).certify(image).bound


def test_layouts_are_not_guessed() -> None:
    with pytest.raises(ValueError, match="layout must be one of"):
        Smooth(classifier(), 4, SIGMA, layout="HWC")
    with pytest.raises(ValueError, match=r"x must be one image \[H, W, C\] or \[1, H, W, C\], got shape \(8, 8\)"):
        Smooth(Last(classifier()), 4, SIGMA, layout="NHWC").certify(torch.rand(8, 8))
    with pytest.raises(ValueError, match=r"x must be images \[B, 3, H, W\], got shape \[2, 8, 3, 8\]"):
        Smooth(Last(classifier()), 4, SIGMA, layout="NHWC").certify(torch.rand(3, 8, 8))


# Modules are tried as callables are, whatever runs them


class After(nn.Module):
    """A network of another, before and after which something is done."""

    def __init__(self, change: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.change, self.dropout = net().eval(), change, nn.Dropout()

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.dropout.train()  # as Monte Carlo dropout keeps it
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self, x)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("change", "when"),
    [
        (lambda m, x: F.dropout(m.net(x)), "when asked again"),
        (lambda m, x: m.dropout(m.net(x)), "when asked again"),
        (lambda m, x: m.net(x) + torch.rand(5), "when asked again"),
        (lambda m, x: m.net(x - x.mean()), "with the other rows"),
        (lambda m, x: m.net(x / x.abs().max()), "with the other rows"),
        (lambda m, x: m.net(x - x.min()), "with the other rows"),
        (lambda m, x: m.net((x - 0.5) / x.std()), "with the other rows"),
        (lambda m, x: F.batch_norm(m.net(x), None, None, training=True), "with the other rows"),
    ],
    ids=["dropout", "train-mode", "random", "mean", "max", "min", "spread", "batch-norm"],
)
def test_a_module_that_is_no_function_of_a_row_is_refused(
    change: Callable[[nn.Module, Tensor], Tensor], when: str, dtype: torch.dtype | None
) -> None:
    model, x = After(change).eval(), picture()
    message = rf"model must be a function of each row of a batch, got logits that change by .* {when}"
    with pytest.raises(ValueError, match=message):
        Smooth(model, 5, SIGMA, dtype=dtype).counts(x, 10)
    if dtype is not None:
        with pytest.raises(ValueError, match=rf"{message}|eval mode"):
            csam.sampling.plan(model, x, dtype=dtype)


def test_a_callable_that_divides_by_the_largest_pixel_of_its_tile_is_refused() -> None:
    owner = Owner()
    with pytest.raises(ValueError, match="with the other rows"):
        Smooth(lambda x: owner.net(x / x.max()), 5, SIGMA).counts(picture(), 10)


def test_a_model_on_the_meta_device_is_refused_by_name() -> None:
    for call in (
        lambda model: Smooth(model, 5, SIGMA).counts(picture(), 10),
        lambda model: csam.sampling.plan(model, picture()),
        lambda model: csam.CCCert(model, Brightness(0.2)).certify(picture()),
    ):
        with pytest.raises(ValueError, match=r"model must hold values, got conv1\.weight on the meta device"):
            call(net().eval().to("meta"))
