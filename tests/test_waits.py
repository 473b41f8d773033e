"""How often the host waits for a GPU: once an image in a certificate, not at all in the operations of a training step.

There is no GPU here: see fake_gpu.py for what stands for it.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

import csam
import csam_kernels as ck
from csam_kernels import backend

if not backend.INTERPRETED:
    pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from csam.smoothing import Prepared, certified_radius
from fake_gpu import CUDA, gpu, moved, on_gpu

SHAPE = (3, 4, 4)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).eval()


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    """The network as a GPU would run it, made in the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CSAM_BACKEND", "triton")
        smooth = csam.Smooth(network(), 3, 0.5, dtype=torch.bfloat16, tile=8)
        smooth.counts(torch.rand(SHAPE), 1, batch_size=1)
    assert smooth.prepared is not None
    assert smooth.prepared.head is not None
    return smooth.prepared


def there(prepared: Prepared) -> Prepared:
    module, head = moved((prepared.module, prepared.head))
    return replace(prepared, module=module, head=head, device=CUDA)


def kernels(launches: list[Any]) -> list[str]:
    return [launch.kernel.fn.__name__ for launch in launches]


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_one_wait_a_smoothing_certificate(prepared: Prepared, where: str) -> None:
    """100 + 1000 samples are 138 tiles, one of which is counted in two parts; the answer is that of counts read back,
    the image's NaN among them."""
    x = torch.rand(SHAPE)
    counts = torch.tensor([0, 5, 90, 5, 10, 980, 10])
    with gpu(lambda t: counts) as (watch, launches):
        smooth = csam.Smooth(there(prepared), 3, 0.5)
        answer = smooth.certify(on_gpu(x) if where == "cuda" else x, n0=100, n=1000)
        assert len(watch.waits) == 1, watch.waits
        assert all(watch.sent)  # the image, if at all, out of pinned memory and not waited for
    assert answer == (1, certified_radius(980, 1000, 0.5, 0.001))
    tile = ["smoothing_noise", "masked_conv2d_kernel", "count_votes"]
    assert kernels(launches) == [*tile * 13, "count_votes", *tile * 125]


def test_one_wait_a_sound_certificate(prepared: Prepared) -> None:
    """The table of the noise is sent once; an image on the CPU is looked at there, and not again."""
    x = torch.randint(0, 256, SHAPE, dtype=torch.uint8)
    counts = torch.tensor([0, 5, 90, 5, 10, 980, 10])
    with gpu(lambda t: counts) as (watch, launches):
        smooth = csam.Smooth(there(prepared), 3, 0.5, sound_float=True)
        smooth.certify(csam.data.to_unit(x), n0=100, n=1000)
        watch.waits.clear(), launches.clear()
        label, radius = smooth.certify(csam.data.to_unit(x), n0=100, n=1000)
        assert len(watch.waits) == 1, watch.waits
    assert label == 1
    assert radius == pytest.approx(certified_radius(980, 1000, 0.5, 0.001), rel=1e-3)
    assert kernels(launches)[:1] == ["smoothing_noise"]
    assert kernels(launches).count("smoothing_noise") == 138
    assert kernels(launches).count("count_votes") == 138 + 1


def test_an_image_with_nan_is_refused_after_the_wait(prepared: Prepared) -> None:
    with gpu(lambda t: torch.tensor([7, 0, 0, 0])) as (watch, _):
        smooth = csam.Smooth(there(prepared), 3, 0.5)
        with pytest.raises(ValueError, match="x must have finite pixels, got 7 of 48"):
            smooth.counts(on_gpu(torch.rand(SHAPE)), 10)
        assert len(watch.waits) == 1


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_one_wait_a_cc_certificate(prepared: Prepared, where: str) -> None:
    x, k, n = torch.rand(SHAPE), 3, 20
    read = [0.0, 0.1, 0.9, 0.7, 0.2, 0.1, *[0.01] * (k * n), 2, 0]  # NaN, extrema, probabilities, Y, flips, broken
    with gpu(lambda t: torch.tensor(read, dtype=torch.float64)) as (watch, launches):
        cert = csam.CCCert(there(prepared), csam.transforms.Rotation(10), n=n, k=k)
        result = cert.certify(on_gpu(x) if where == "cuda" else x)
        assert len(watch.waits) == 1, watch.waits
        assert all(watch.sent)
    assert (result.prediction, result.flips, result.discrepancy.shape) == (0, 2, (k, n))
    assert result.margin == pytest.approx(0.25)
    assert kernels(launches).count("transform") == 8


@pytest.mark.parametrize(
    ("read", "message"),
    [
        ([1, 0, 1], "x must have finite pixels"),
        ([0, -0.5, 1], r"pixels in \[0, 1\], got -0.5 .. 1"),
        ([0, 0, 1], "NaN"),
    ],
)
def test_what_is_wrong_is_said_after_the_wait(prepared: Prepared, read: list[float], message: str) -> None:
    read = [*read, 0.7, 0.2, 0.1, *[0.0] * 4, 0, 3]
    with gpu(lambda t: torch.tensor(read, dtype=torch.float64)):
        cert = csam.CCCert(there(prepared), csam.transforms.Rotation(10), n=2, k=2)
        with pytest.raises(ValueError, match=message):
            cert.certify(on_gpu(torch.rand(SHAPE)))


def test_operations_that_refuse_bad_values_wait_once() -> None:
    with gpu() as (watch, launches):
        ck.semantic_batch(on_gpu(torch.rand(SHAPE)), on_gpu(torch.rand(5, 8)))
        assert len(watch.waits) == 1
    assert "transform" in kernels(launches)


def test_transforms_wait_for_a_batch_and_not_for_its_images() -> None:
    with gpu() as (watch, _):
        csam.transforms.Rotation(10).clipped(on_gpu(torch.rand(5, *SHAPE)), seed=0)
        draws = len(watch.waits)  # which are sent
        assert draws <= 1
        csam.transforms.Rotation(10)(on_gpu(torch.rand(5, *SHAPE)), seed=0)
        assert len(watch.waits) == 2 * draws + 1, watch.waits  # the range


def test_percentile_init_waits_once_for_all_layers() -> None:
    with gpu(torch.ones_like) as (watch, launches):  # all are finite
        ck.percentile_init([on_gpu(torch.rand(9, 4)) for _ in range(7)])
        assert len(watch.waits) == 1
    assert "scale_by_quantile" in kernels(launches)


MASK_SHAPES = {"weight": (6, 4, 3, 3), "filter": (6, 1, 1, 1), "channel": (1, 4, 1, 1)}


@pytest.mark.parametrize("capturing", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("granularity", MASK_SHAPES)
def test_training_operations_wait_for_nothing(granularity: str, capturing: bool) -> None:
    """Nor does a repeated call: tables of addresses are at hand, or on their way out of pinned memory."""

    def calls(weights: list[Tensor], masks: list[Tensor], grads: list[Tensor], x: Tensor) -> None:
        for kind in ("uniform", "adversarial"):
            step = {"kind": kind, "grads": [m.clone() for m in masks] if kind == "adversarial" else None}
            ck.perturb_masks(masks, **step)
            ck.effective_weights(weights, masks, dtype=torch.bfloat16, **step)
        ck.binarize(masks, 0.7)
        ck.mask_gradients(grads, weights, masks)
        y = ck.masked_conv2d(x, weights[0], masks[0], padding=1)
        window = ([1, 1], [1, 1], [1, 1], 1, 0)
        torch.ops.csam.masked_conv2d_backward(y, x, weights[0], masks[0], *window, [True] * 3)

    with gpu(capturing=capturing) as (watch, launches):
        weights = [on_gpu(torch.empty(6, 4, 3, 3)) for _ in range(2)]
        masks = [on_gpu(torch.empty(MASK_SHAPES[granularity])) for _ in range(2)]
        grads = [on_gpu(torch.empty(6, 4, 3, 3, dtype=torch.bfloat16)) for _ in range(2)]
        x = on_gpu(torch.empty(2, 4, 8, 8))
        for _ in range(2):
            calls(weights, masks, grads, x)
        assert watch.waits == []
        assert watch.sent
        assert all(watch.sent)
        assert len(launches) > 20


def test_a_graph_copies_addresses_and_takes_the_tables_of_sizes_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a call like it, on whatever stream; the graph's results lie elsewhere."""
    with gpu() as (watch, _):
        masks = [on_gpu(torch.empty(6, 4, 3, 3)) for _ in range(7)]
        held = [ck.binarize(masks, 0.7), ck.perturb_masks(masks, kind="uniform")]
        assert watch.sent == [True] * 4  # addresses of both, chunks, the selection's numbers
        held += [ck.binarize(masks, 0.7), ck.perturb_masks(masks, kind="uniform")]
        assert watch.sent == [True] * 6
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=1))
        held += [ck.binarize(masks, 0.7), ck.perturb_masks(masks, kind="uniform")]
        assert watch.sent == [True] * 8
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        ck.binarize(masks, 0.7)  # another stream's tables are not waited for
        assert watch.sent == [True] * 11
        assert watch.waits == []


def test_the_watch_sees_what_it_watches_for() -> None:
    """Each way of waiting is counted, so that none found above means that there was none."""
    ways: list[Any] = [
        lambda t: t.cpu(),
        lambda t: t.sum().item(),
        lambda t: bool((t > 0).any()),
        lambda t: t.tolist(),
        lambda t: torch.rand(3).to(CUDA),
        lambda t: torch.tensor([1.0, 2.0], device=CUDA),
    ]
    for way in ways:
        with gpu() as (watch, _):
            way(on_gpu(torch.rand(4)))
            assert watch.waits
            assert watch.sent in ([], [False])
