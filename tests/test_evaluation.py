"""Certifying data sets: every image has its own certificate, and no kill, crash or full disk loses one."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import csam
from csam import evaluation, runs, sequential
from csam.evaluation import certify_dataset
from csam.records import Row, TsvWriter, mean_samples, read_tsv, read_votes, votes_path
from csam.smoothing import ABSTAIN, Smooth


class Brighter(nn.Module):
    """Class 1 where the mean pixel exceeds 1/2."""

    def forward(self, x: Tensor) -> Tensor:
        score = x.mean((1, 2, 3)) - 0.5
        return torch.stack([-score, score], 1)


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(8, 1, 3, 3, generator=generator), torch.randint(2, (8,), generator=generator)


def certify(path: Path, images: tuple[Tensor, Tensor], **kwargs: object) -> list[Row]:
    return certify_dataset(Smooth(Brighter(), 2, 0.25), *images, path, n0=10, n=100, **kwargs)


def without_time(rows: list[Row]) -> list[tuple[object, ...]]:
    return [(r.idx, r.label, r.predict, r.radius, r.correct) for r in rows]


# Whole data sets


def test_certify_dataset_records_every_image(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    seen: list[Row] = []
    rows = certify(tmp_path / "r.tsv", images, on_result=seen.append)
    assert rows == seen
    assert [r.idx for r in rows] == list(range(8))
    for row in rows:
        answer = Smooth(Brighter(), 2, 0.25).certify(x[row.idx], n0=10, n=100, stream=row.idx)
        assert (row.predict, row.radius) == answer
        assert row.correct == (row.predict == int(y[row.idx]))
    assert without_time(read_tsv(tmp_path / "r.tsv")) == without_time(rows)


def test_an_interrupted_run_ends_with_the_same_rows(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    def interrupt(row: Row) -> None:
        if row.idx == 3:
            raise KeyboardInterrupt

    whole = certify(tmp_path / "whole.tsv", images)
    path = tmp_path / "killed.tsv"
    with pytest.raises(KeyboardInterrupt):
        certify(path, images, on_result=interrupt)
    assert [r.idx for r in read_tsv(path)] == [0, 1, 2, 3]
    with path.open("a") as file:
        file.write("4\t1\t1\t0.")
    again: list[Row] = []
    rows = certify(path, images, on_result=again.append)
    assert [r.idx for r in again] == [4, 5, 6, 7]
    assert without_time(rows) == without_time(whole)


def test_the_order_of_images_does_not_matter(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    forward = certify(tmp_path / "a.tsv", images)
    backward = certify(tmp_path / "b.tsv", images, indices=[6, 4, 2])
    assert without_time(backward) == without_time([forward[i] for i in (6, 4, 2)])


def test_bytes_are_pixels_over_255(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    x, y = (images[0] * 255).to(torch.uint8), images[1].tolist()
    as_bytes = certify(tmp_path / "bytes.tsv", (x, y))
    as_floats = certify(tmp_path / "floats.tsv", (x.float() / 255, y))
    assert without_time(as_bytes) == without_time(as_floats)


def test_the_record_of_another_data_set_is_refused(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    path = tmp_path / "r.tsv"
    certify(path, images)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"r.tsv is the record of another data set: image 0 has label"):
        certify(path, (images[0], 1 - images[1]))
    with pytest.raises(ValueError, match="the data set has only 5 images"):
        certify(path, (images[0][:5], images[1][:5]))
    assert path.read_bytes() == before


def test_wrong_arguments(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    path = tmp_path / "r.tsv"
    with pytest.raises(ValueError, match=r"x must be a tensor \[N, C, H, W\] with one label each"):
        certify(path, (images[0], images[1][:3]))
    with pytest.raises(ValueError, match=r"indices must be in \[0, 7\], got 8"):
        certify(path, images, indices=[0, 8])
    with pytest.raises(TypeError, match=r"indices must be an integer, got 1.5"):
        certify(path, images, indices=[1.5])
    with pytest.raises(ValueError, match=r"y must be in .* got -1"):
        certify(path, (images[0], -torch.ones_like(images[1])))
    with pytest.raises(ValueError, match=r"y must be in \[0, 1\], got 2"):
        certify(path, (images[0], [2] * len(images[0])))
    with pytest.raises(TypeError, match="y must be a tensor or a sequence of labels, got int"):
        certify(path, (images[0], 5))
    with pytest.raises(TypeError, match=r"y must be an integer, got 0.5"):
        certify(path, (images[0], [0.5] * len(images[0])))
    with pytest.raises(ValueError, match="alpha must be in"):
        certify(path, images, alpha=2)
    assert not path.exists()


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32, "choices": "dense"}], ids=["torch", "engine"])
def test_an_image_that_cannot_be_certified_is_named_before_any_work(
    tmp_path: Path, images: tuple[Tensor, Tensor], options: dict[str, Any]
) -> None:
    x, path = (images[0] * 255).round() / 255, tmp_path / "r.tsv"
    for pixel, message in ((torch.nan, "x must have finite pixels"), (0.1234, "x must hold whole numbers / 255")):
        x[5, 0, 1, 1] = pixel
        with pytest.raises(ValueError, match=f"^image 5: {message}"):
            certify_dataset(Smooth(Net(), 3, 0.5, sound_float=True, **options), x, images[1], path, n0=5, n=50)
    assert not path.exists()


def test_an_error_of_the_network_names_the_image(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    net, x = Net(), images[0].clone()
    x[4] += 1
    smooth = Smooth(lambda x: net(x)[: None if x.mean() < 1 else -1], 3, 0.5)
    with pytest.raises(ValueError, match=r"^image 4: model must map"):
        certify_dataset(smooth, x, images[1], tmp_path / "r.tsv", n0=5, n=50)
    assert [row.idx for row in read_tsv(tmp_path / "r.tsv")] == list(range(4))


def test_a_finished_row_that_calls_itself_correct_is_refused(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    path = tmp_path / "r.tsv"
    certify(path, images)
    head, first, *rest = path.read_text().splitlines()
    idx, label, predict, radius, correct, seconds = first.split()
    flipped = "\t".join([idx, label, predict, radius, str(1 - int(correct)), seconds])
    path.write_text("\n".join([head, flipped, *rest, ""]))
    with pytest.raises(ValueError, match=r"r\.tsv, line 2: correct must be 1 where predict is the label"):
        certify(path, images)


# Several images under way, and nothing lost


class Net(nn.Module):
    """A convolution and random weights: votes are divided."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.linear = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.conv(x)).mean((2, 3)))


STOP = {"adaptive": True, "rtol": 0.3}


def lanes(weights: int = 1, sigma: float = 0.5, **kwargs: Any) -> Smooth:
    """A smoothed classifier that runs in the sampling engine."""
    return Smooth(Net(weights), 3, sigma, dtype=torch.float32, **({"choices": "dense"} | kwargs))


def whole(shade: float = 0.0) -> Smooth:
    """The same in int8, calibrated on images of a shade."""
    images = shade + torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    return Smooth(Net(), 3, 0.5, dtype="int8", choices="dense", calibration=images)


def laplace() -> Smooth:
    return lanes(noise="laplace")


def modules() -> Smooth:
    """The same, run by torch."""
    return Smooth(Net(), 3, 0.5, tile=8, choices="module")


def run(path: Path, images: tuple[Tensor, Tensor], make: Callable[[], Smooth] = lanes, **kwargs: Any) -> list[Row]:
    return certify_dataset(make(), *images, path, **({"n0": 20, "n": 2000, "alpha": 0.01} | STOP | kwargs))


def kept(path: Path) -> list[dict[str, Any]]:
    """The last that is known of each image, without its time."""
    return [{k: v for k, v in votes.items() if k != "time"} for _, votes in sorted(read_votes(path)[1].items())]


@pytest.mark.parametrize("make", [lanes, modules])
@pytest.mark.parametrize("stop", [{}, {"adaptive": False, "rtol": None}, {"target_radius": 0.2}], ids=str)
def test_images_that_share_the_machine_are_certified_as_alone(
    tmp_path: Path, images: tuple[Tensor, Tensor], threads: int, make: Callable[[], Smooth], stop: dict[str, Any]
) -> None:
    drawn: list[int] = []
    rows = run(tmp_path / "r.tsv", images, make, **stop, on_samples=drawn.append)
    assert [row.idx for row in read_tsv(tmp_path / "r.tsv")] == list(range(8))
    recipe, votes = read_votes(tmp_path / "r.tsv")
    alone = make()
    for row in rows:
        want = alone.certificate(images[0][row.idx], 20, 2000, 0.01, stream=row.idx, **(STOP | stop))
        assert (row.predict, row.radius) == want[:2]
        assert (votes[row.idx]["samples"], votes[row.idx]["reason"]) == want[2:]
    total = sum(v["samples"] for v in votes.values())
    assert sum(drawn) == total
    assert mean_samples(tmp_path / "r.tsv", rows) == (total / 8, 2020)
    assert (recipe["n"], recipe["sigma"]) == (2000, 0.5)
    assert (recipe["fingerprint"] is None) == (make is modules)


def test_rows_are_in_order_though_images_end_out_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """The first image is close to the wanted radius and takes many samples, the others few."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-1 / 9], [1 / 9]]).expand(2, 9))
        model[1].bias.copy_(torch.tensor([0.5, -0.5]))
    smooth, x = Smooth(model, 2, 0.25, dtype=torch.float32, choices="dense"), torch.full((6, 1, 3, 3), 0.9)
    x[0] = 0.55
    ended: list[int] = []
    append = runs.Journal.append

    def watched(journal: runs.Journal, *records: dict[str, Any]) -> None:
        ended.extend(record["idx"] for record in records if "reason" in record)
        append(journal, *records)

    monkeypatch.setattr(runs.Journal, "append", watched)
    rows = certify_dataset(smooth, x, [1] * 6, tmp_path / "r.tsv", n0=20, n=5000, adaptive=True, target_radius=0.15)
    assert [row.idx for row in read_tsv(tmp_path / "r.tsv")] == [row.idx for row in rows] == list(range(6))
    assert sorted(ended) == list(range(6))
    assert ended[0] != 0


@pytest.mark.parametrize("make", [lanes, modules])
def test_many_samples_for_the_choice_of_the_class_are_drawn_in_parts(
    tmp_path: Path, images: tuple[Tensor, Tensor], make: Callable[[], Smooth], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(evaluation, "SAVE_SECONDS", 0.0)
    rows = run(tmp_path / "r.tsv", images, make, n0=3333, indices=[0, 1], on_samples=drawn.append)
    for row in rows:
        want = make().certificate(images[0][row.idx], 3333, 2000, 0.01, stream=row.idx, **STOP)
        assert (row.predict, row.radius, read_votes(tmp_path / "r.tsv")[1][row.idx]["samples"]) == want[:3]
    assert sum(drawn) == sum(votes["samples"] for votes in kept(tmp_path / "r.tsv"))
    rule = make().rule(images[0][0], 10**6, 2000, 0.01)
    one = evaluation._Image(0, images[0][0], evaluation.Certification(rule, 10**6), {})
    assert sum(piece.n for piece in one.cut(2048, 64, False)) == one.left <= 2 * 2048


class Crash(BaseException):
    """Stands for a kill: nothing in the code under test catches it to go on."""


@pytest.fixture
def a_write_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a journal is given together is written one by one, so that there are as many places to crash."""
    append = runs.Journal.append

    def each(journal: runs.Journal, *records: dict[str, Any]) -> None:
        for record in records:
            append(journal, record)

    monkeypatch.setattr(runs.Journal, "append", each)


@pytest.mark.usefixtures("a_write_a_record")
@pytest.mark.parametrize("make", [lanes, modules])
@pytest.mark.parametrize("stop", [{}, {"adaptive": False, "rtol": None}], ids=["adaptive", "fixed"])
def test_a_crash_at_any_write_loses_no_image_and_no_vote(
    tmp_path: Path,
    images: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], Smooth],
    stop: dict[str, Any],
) -> None:
    """Votes are saved every 128 samples, and the run dies at random writes, so anywhere between two of them."""
    want = run(tmp_path / "whole.tsv", images, make, **stop)
    path, sync, left, drawn = tmp_path / "r.tsv", os.fsync, [0], []
    monkeypatch.setattr(evaluation, "SAVE_SECONDS", 0.0)
    cut = evaluation.Certification.wanted.fget
    assert cut is not None
    monkeypatch.setattr(
        evaluation.Certification, "wanted", property(lambda self: (setattr(self, "most", 128), cut(self))[1])
    )

    def crashing(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Crash
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", crashing)
    draws, crashes = random.Random(0), 0
    while True:
        left[0] = draws.randrange(2, 12)
        saved = sum(votes["samples"] if "reason" in votes else 20 + votes["seen"] for votes in kept(path))
        drawn.clear()
        try:
            rows = run(path, images, make, **stop, on_samples=drawn.append)
            break
        except Crash:
            crashes += 1
    assert crashes >= 5
    assert without_time(rows) == without_time(read_tsv(path)) == without_time(want)
    assert kept(path) == kept(tmp_path / "whole.tsv")
    states = [r for r in runs.Journal.read(votes_path(path)) if "chosen" in r]
    assert len(states) > 8
    assert sum(drawn) == sum(votes["samples"] for votes in kept(path)) - saved > 0


def test_a_votes_file_cut_at_any_byte_is_gone_on_with(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    want = run(tmp_path / "r.tsv", images)
    record, votes = (p.read_bytes() for p in (tmp_path / "r.tsv", votes_path(tmp_path / "r.tsv")))
    rows = record.count(b"\n") - 1
    for length in range(0, len(votes), 41):
        whole = max(0, votes[:length].count(b"\n") - 1)
        lines = record.splitlines(keepends=True)[: 1 + min(rows, whole)]
        keeps = [
            line
            for line in lines[1:]
            if int(line.split()[0]) in {r["idx"] for r in map(json.loads, votes[:length].splitlines()[1 : 1 + whole])}
        ]
        (tmp_path / "r.tsv").write_bytes(lines[0] + b"".join(keeps))
        votes_path(tmp_path / "r.tsv").write_bytes(votes[:length])
        assert without_time(run(tmp_path / "r.tsv", images)) == without_time(want)


def test_lines_that_a_power_cut_took_are_written_again_from_the_votes(
    tmp_path: Path, images: tuple[Tensor, Tensor]
) -> None:
    def refuse(n: int) -> None:
        raise AssertionError("samples are drawn again")

    path, smooth = tmp_path / "r.tsv", lanes()
    run(path, images, lambda: smooth)
    record, votes = path.read_bytes(), votes_path(path).read_bytes()
    for length in range(0, len(record) + 1, 3):
        left = [record[:length]]
        if b"\n" in record[:length]:  # the header is on the disk from the beginning
            rest = record[length:]
            left += [record[:length] + b"\0" * len(rest), record[:length] + b"\0" * (len(rest) // 2) + rest[-60:]]
        for content in left:
            path.write_bytes(content)
            run(path, images, lambda: smooth, on_samples=refuse)
            assert (path.read_bytes(), votes_path(path).read_bytes()) == (record, votes)
    path.unlink()
    run(path, images, lambda: smooth, on_samples=refuse)
    assert path.read_bytes() == record


def test_kill_9_loses_no_image_and_no_vote(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    more = images[0].repeat(25, 1, 1, 1), images[1].repeat(25)
    want = run(tmp_path / "whole.tsv", more, n=20_000)
    torch.save(more, tmp_path / "images.pt")
    script = (
        "import os, signal, sys, time, random\n"
        "sys.path[:0] = [sys.argv[1]]\n"
        "import test_evaluation as t, torch\n"
        "from pathlib import Path\n"
        "t.evaluation.SAVE_SECONDS, t.evaluation.WRITE_SECONDS = 0.0, 0.02\n"
        "more = torch.load(sys.argv[2] + '/images.pt')\n"
        "draws, kills = random.Random(int(sys.argv[3])), 0\n"
        "while True:\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        t.run(Path(sys.argv[2]) / 'r.tsv', more, n=20_000)\n"
        "        os._exit(0)\n"
        "    if kills < 10:\n"
        "        time.sleep(draws.uniform(0.0, 0.3))\n"
        "        os.kill(pid, signal.SIGKILL)\n"
        "    if os.waitpid(pid, 0)[1] == 0: break\n"
        "    kills += 1\n"
        "print(kills)\n"
    )
    seed = time.time_ns() % 2**32
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3, f"seed {seed}"
    assert without_time(read_tsv(tmp_path / "r.tsv")) == without_time(want), f"seed {seed}"
    assert kept(tmp_path / "r.tsv") == kept(tmp_path / "whole.tsv"), f"seed {seed}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"batch_size": "400"}, "batch_size must be an integer, got '400'"),
        ({"indices": 3}, "indices must be a sequence of integers or None, got int"),
    ],
    ids=str,
)
def test_bad_arguments_leave_no_files(
    tmp_path: Path, images: tuple[Tensor, Tensor], change: dict[str, Any], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        certify_dataset(lanes(), *images, tmp_path / "r.tsv", n0=5, n=5, **change)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.bool], ids=str)
def test_pixels_of_other_integers_are_refused(
    tmp_path: Path, images: tuple[Tensor, Tensor], dtype: torch.dtype
) -> None:
    """uint8 are divided by 255, and whether these should be is not said."""
    x, y = images
    with pytest.raises(TypeError, match=r"x must have dtype uint8, float32, .*, got (int|bool)"):
        certify_dataset(modules(), (x * 255).to(dtype), y, tmp_path / "r.tsv")
    assert not list(tmp_path.iterdir())


def test_more_samples_than_bounds_were_checked_for_are_refused(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    for name in ("n0", "n"):
        with pytest.raises(ValueError, match=rf"{name} must be in \[1, 10000000000\], got 1000000000000"):
            certify_dataset(lanes(), *images, tmp_path / "r.tsv", **{name: 10**12})
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("a_write_a_record")
def test_a_full_disk_stops_a_run_that_goes_on_later(
    tmp_path: Path, images: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    want = run(tmp_path / "whole.tsv", images)
    path, sync = tmp_path / "r.tsv", os.fsync
    for writes in range(1, 5):
        left = [writes]

        def full(descriptor: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as error:
            run(path, images)
        assert error.value.filename in (str(path), str(votes_path(path)))
    monkeypatch.undo()
    assert without_time(run(path, images)) == without_time(want)
    assert kept(path) == kept(tmp_path / "whole.tsv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rtol": 0.2}, r"made with other settings \(rtol: 0.3 there, 0.2 now.*give the same settings"),
        ({"target_radius": 0.1}, "target_radius: None there, 0.1 now"),
        ({"method": "spending"}, "method: 'exact' there, 'spending' now"),
        ({"n0": 21}, "n0: 20 there, 21 now"),
        ({"n": 2001}, "n: 2000 there, 2001 now"),
        ({"alpha": 0.02}, "alpha: 0.01 there, 0.02 now"),
        ({"make": partial(lanes, sigma=0.4)}, "sigma: 0.5 there, 0.4 now"),
        ({"make": partial(lanes, 1, seed=1)}, "seed: 0 there, 1 now"),
        ({"make": modules}, "dtype: 'float32' there, None now"),
        ({"make": partial(lanes, choices="sparse")}, "choices.conv: 'dense' there, 'sparse' now.*two plans"),
        ({"make": whole}, "dtype: 'float32' there, 'int8' now"),
        ({"make": partial(lanes, 2)}, r"\(fingerprint: '\w+' there, '\w+' now\); the network runs another way"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_other_settings_or_another_plan_are_refused(
    tmp_path: Path, images: tuple[Tensor, Tensor], change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "r.tsv"
    run(path, images, indices=[0])
    before = [p.read_bytes() for p in (path, votes_path(path))]
    with pytest.raises(runs.RunError, match=message):
        run(path, images, **change)
    assert [p.read_bytes() for p in (path, votes_path(path))] == before


@pytest.mark.parametrize("old", [False, True], ids=["moved", "counted"])
def test_looks_elsewhere_are_refused(
    tmp_path: Path, images: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    """As many as before, or a record that says no more than how many there were."""
    path, looks, digest = tmp_path / "r.tsv", sequential.geometric_looks, evaluation._digest
    with monkeypatch.context() as begun:
        if old:
            begun.setattr(evaluation, "_digest", lambda t: digest(t) if t[0].is_floating_point() else len(t[0]))
        run(path, images, modules, indices=[0])
    if not old:
        monkeypatch.setattr(sequential, "_made", sequential._made.__wrapped__)  # made anew, and not kept
        monkeypatch.setattr(sequential, "geometric_looks", lambda *args: (looks(*args)[0] + 8, *looks(*args)[1:]))
    with pytest.raises(runs.RunError, match=r"\(looks: .* there, '\w{16}' now\); .* version that began it"):
        run(path, images, modules)


def named() -> Smooth:
    """A callable."""
    net = Net()
    return Smooth(csam.Opaque(lambda x: net(x), name="net"), 3, 0.5, tile=8)


@pytest.mark.parametrize("make", [modules, named])
def test_another_network_that_torch_runs_is_refused(
    tmp_path: Path, images: tuple[Tensor, Tensor], make: Callable[[], Smooth], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.tsv"
    run(path, images, make, indices=[0])
    assert len(run(path, images, make)) == 8
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "Net", partial(Net, 2))
        other = make()
    with pytest.raises(runs.RunError, match=r"\(logits: '\w+' there, '\w+' now\); the network runs another way"):
        run(path, images, lambda: other)


@pytest.mark.parametrize("make", [lanes, modules])
def test_other_images_of_the_same_labels_are_refused(
    tmp_path: Path, images: tuple[Tensor, Tensor], make: Callable[[], Smooth], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, (x, y), fixed = tmp_path / "r.tsv", images, {"n": 5000, "adaptive": False, "rtol": None}

    def crash(journal: runs.Journal, *records: dict[str, Any]) -> None:
        append(journal, *(record for record in records if "reason" not in record))
        if any("reason" in record for record in records):
            raise Crash

    run(path, images, make, indices=[1, 2], **fixed)
    append = runs.Journal.append
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "SAVE_SECONDS", 0.0)
        patch.setattr(runs.Journal, "append", crash)
        with pytest.raises(Crash):
            run(path, images, make, indices=[3], **fixed)
    states = {i: "reason" in votes for i, votes in read_votes(path)[1].items()}
    assert states == {1: True, 2: True, 3: False}
    before = [p.read_bytes() for p in (path, votes_path(path))]
    for i in states:
        other = x.clone()
        other[i, 0, 2, 2] += 1e-6
        with pytest.raises(runs.RunError, match=f"of other images: image {i} has other pixels now"):
            run(path, (other, y), make, indices=[5], **fixed)
    assert [p.read_bytes() for p in (path, votes_path(path))] == before
    assert len(run(path, (x.double(), y), make, **fixed)) == 8


def test_int8_goes_on_with_its_calibration_and_no_other(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    want = without_time(run(tmp_path / "whole.tsv", images, whole))
    path = tmp_path / "r.tsv"
    run(path, images, whole, indices=[0, 1, 2])
    with pytest.raises(runs.RunError, match=r"\(fingerprint: '\w+' there, '\w+' now\); the network runs another way"):
        run(path, images, partial(whole, shade=1.0))
    assert without_time(run(path, images, whole)) == want


def test_rows_without_their_votes_are_refused(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    path = tmp_path / "r.tsv"
    run(path, images, indices=[0, 1])
    whole = path.read_text()
    path.write_text("\n".join([*whole.splitlines()[:2], "1\t0\t0\t9.5\t1\t0.1\n"]))
    with pytest.raises(runs.RunError, match=r"is damaged: the row of image 1 is not the one of its votes"):
        run(path, images)
    path.write_text(whole)
    votes = votes_path(path).read_text()
    votes_path(path).write_text(votes.replace('"reason"', '"reasom"'))
    with pytest.raises(runs.RunError, match=r"r\.votes\.jsonl line 2 is damaged: its checksum"):
        run(path, images)
    votes_path(path).unlink()
    with pytest.raises(runs.RunError, match=r"holds 2 rows, but r\.votes\.jsonl, which says how .* is missing"):
        run(path, images)


def test_two_runs_do_not_write_one_record(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    path = tmp_path / "r.tsv"
    with TsvWriter(path), pytest.raises(runs.RunError, match=r"r\.tsv is being written by another run"):
        run(path, images)
    assert len(run(path, images)) == 8


def test_an_error_of_a_thread_is_raised(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    smooth = lanes()
    sampler = smooth.prepare(images[0][0]).sampler
    assert sampler is not None

    def broken(*_: Any, **__: Any) -> Tensor:
        raise ZeroDivisionError("in a thread")

    sampler.votes_of = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError, match="in a thread"):
        certify_dataset(smooth, *images, tmp_path / "r.tsv", n0=5, n=50)


# Samples without an answer


class Overflowing(nn.Module):
    """Three classes, and NaN logits where the mean pixel is above 1.13; `other`: a fourth class there."""

    def __init__(self, other: bool = False) -> None:
        super().__init__()
        self.net, self.huge, self.other = Net(), nn.Linear(1, 3, bias=False), other
        nn.init.constant_(self.huge.weight, 3e38)

    def forward(self, x: Tensor) -> Tensor:
        huge = self.huge(x.mean((2, 3)))
        logits = self.net(x) + (huge - huge)
        if not self.other:
            return logits
        none = logits.isnan().any(1, keepdim=True)
        return torch.cat([logits.nan_to_num(0.0), torch.where(none, torch.inf, -torch.inf)], 1)


def bright(images: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return images[0] + torch.linspace(0, 0.6, 8).view(8, 1, 1, 1), images[1]


STOPS = [{}, {"adaptive": False, "rtol": None}, {"target_radius": 0.2}]


@pytest.mark.parametrize(
    "options",
    [{"tile": 8, "choices": "module"}, {"dtype": torch.float32, "choices": "dense"}],
    ids=["torch", "engine"],
)
@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_nan_logits_count_as_votes_for_no_class(
    tmp_path: Path, images: tuple[Tensor, Tensor], stop: dict[str, Any], options: dict[str, Any]
) -> None:
    """All is as if they had voted for a fourth class, but that this one is never named."""
    plain: dict[str, Any] = {"tile": 8, "choices": "module"}
    with pytest.warns(
        RuntimeWarning, match=r"samples of \d of 8 images had NaN logits and voted for no class; r\.votes"
    ):
        rows = run(tmp_path / "r.tsv", bright(images), lambda: Smooth(Overflowing(), 3, 0.5, **options), **stop)
    twin = run(tmp_path / "twin.tsv", bright(images), lambda: Smooth(Overflowing(other=True), 4, 0.5, **plain), **stop)
    silent = [row.idx for row in twin if row.predict == 3]
    assert all(rows[i].predict == ABSTAIN for i in silent)
    if "tile" in options:
        assert [r for r in without_time(rows) if r[0] not in silent] == [r for r in without_time(twin) if r[2] != 3]
    found = {i: votes["nan"] for i, votes in read_votes(tmp_path / "r.tsv")[1].items() if "nan" in votes}
    assert 3 <= len(found) <= 8
    for row in rows:
        sampled = Smooth(Overflowing(), 3, 0.5, **options)
        samples = read_votes(tmp_path / "r.tsv")[1][row.idx]["samples"]
        (votes,) = sampled.cast(bright(images)[0][row.idx], [(samples, 0)], 400, row.idx)
        assert samples - int(votes.sum()) == found.get(row.idx, 0)


def test_an_image_without_any_answer_is_no_class(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    def silent(x: Tensor) -> Tensor:
        return x.new_full((len(x), 3), torch.nan)

    with pytest.warns(RuntimeWarning, match="16160 samples of 8 of 8 images had NaN"):
        rows = run(tmp_path / "r.tsv", images, lambda: Smooth(silent, 3, 0.5), adaptive=False, rtol=None)
    assert {(row.predict, row.radius, row.correct) for row in rows} == {(ABSTAIN, 0.0, False)}


@pytest.mark.filterwarnings("ignore:.* had NaN logits")
def test_a_run_that_was_stopped_counts_each_nan_once(
    tmp_path: Path, images: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, drawn = bright(images), []

    def make() -> Smooth:
        return Smooth(Overflowing(), 3, 0.5, tile=8, choices="module")

    run(tmp_path / "whole.tsv", images, make)
    monkeypatch.setattr(evaluation, "SAVE_SECONDS", 0.0)
    for _ in range(100):
        budget = len(drawn) + 3

        def stopping(n: int, budget: int = budget) -> None:
            drawn.append(n)
            if len(drawn) >= budget:
                raise Crash

        try:
            run(tmp_path / "r.tsv", images, make, on_samples=stopping)
            break
        except Crash:
            pass
    else:
        raise AssertionError("it did not end")
    assert len(drawn) > 10
    assert kept(tmp_path / "r.tsv") == kept(tmp_path / "whole.tsv")
    assert any("nan" in votes for votes in kept(tmp_path / "r.tsv"))
