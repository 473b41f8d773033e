"""The whole comparison on a few images: rows, fairness, exact sparsity, and the same numbers after any kill."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from csam import data, evaluation, models, pipeline, records, runs, training
from csam.adapters import Opaque
from csam.records import read_tsv, read_votes
from csam.settings import PRESETS, Settings, override

TINY = override(
    PRESETS["digits"],
    {
        "train_subset": 96,
        "test_subset": 30,
        "sparsities": [0.5, 0.9],
        "train": {"epochs": 3, "search_epochs": 1, "finetune_epochs": 2, "batch_size": 32},
        "certify": {"images": 3, "n0": 10, "n": 60, "cc_n": 10, "cc_k": 2, "radii": [0, 0.1]},
    },
)


def without_seconds(summary: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in summary["rows"]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    return folder, pipeline.demo(TINY, folder)


def test_rows_and_files(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert [(row["method"], round(row["sparsity"], 2)) for row in summary["rows"]] == [
        ("dense", 0.0),
        ("magnitude", 0.5),
        ("csam", 0.5),
        ("magnitude", 0.9),
        ("csam", 0.9),
    ]
    for row in summary["rows"]:
        assert set(row) == {"method", "sparsity", "clean_accuracy", "pca", "norm", "certified_accuracy", "seconds"}
        assert list(row["certified_accuracy"]) == ["0", "0.1"]
        assert row["seconds"] > 0
    assert (folder / "summary.csv").exists()
    assert (folder / "certified_accuracy.png").stat().st_size > 10_000
    assert list((folder / "checkpoints").iterdir()) == []


def test_sparsity_is_exact_and_in_the_file(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    for name, details in summary["settings"]["variants"].items():
        tensors, _ = runs.read_safetensors(folder / "models" / f"{name}.safetensors")
        prunable = {k: t for k, t in tensors.items() if t.dim() in (2, 4)}
        total = sum(t.numel() for t in prunable.values())
        assert details["prunable_weights"] == total
        asked = float(name.split("-")[1]) if "-" in name else 0.0
        assert details["kept_weights"] == total - int(asked * total)
        # A weight that is kept may still be zero, but hardly ever is.
        assert sum(int(t.count_nonzero()) for t in prunable.values()) == details["kept_weights"]


def test_every_row_has_the_same_steps_images_and_seed(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    variants = summary["settings"]["variants"]
    assert {v["mask_steps"] + v["finetune_steps"] for v in variants.values()} == {9}
    assert {name: v["mask_steps"] for name, v in variants.items() if v["mask_steps"]} == {"csam-0.5": 3, "csam-0.9": 3}
    images = {tuple(r.idx for r in read_tsv(path)) for path in (folder / "certificates").glob("*.tsv")}
    assert images == {(0, 10, 20)} == {tuple(summary["settings"]["certified_images"])}


def test_methods_meet_the_same_batches_in_the_same_order() -> None:
    dataset = pipeline.load_data(TINY)
    job = pipeline.Job(TINY, dataset, None)  # type: ignore[arg-type]
    all_epochs, after_search = job.feed("prune", 3), job.feed("prune", 2, start=1)
    a = training.batches(dataset.train_x, dataset.train_y, all_epochs, all_epochs.start + 1)
    b = training.batches(dataset.train_x, dataset.train_y, after_search, after_search.start + 0)
    assert all(torch.equal(x, z) for (x, _), (z, _) in zip(a, b, strict=True))


def test_settings_are_enough_to_run_again(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, summary = finished
    stored = json.loads((folder / "config.json").read_text())["config"]["settings"]
    again = override(PRESETS["digits"], stored)
    assert again == TINY
    only = replace(again, methods=("csam",), sparsities=(0.9,))
    row = pipeline.demo(only, tmp_path / "again")["rows"][0]
    assert {**row, "seconds": 0} == {**summary["rows"][-1], "seconds": 0}


def test_finished_run_is_not_computed_again(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, summary = finished
    monkeypatch.setattr(training, "fit", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr(pipeline, "bound_images", lambda *a, **k: pytest.fail("certified again"))
    assert pipeline.demo(TINY, folder)["rows"] == summary["rows"]


class Crash(BaseException):
    """Stands for a kill: nothing in the code under test catches it to go on."""


def test_crash_at_any_write_changes_no_number(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file that counts is flushed with fsync, so a crash before or after a random one is a crash anywhere."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    sync, draws = os.fsync, random.Random(0)
    left = [0]

    def crashing(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Crash
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", crashing)
    crashes = 0
    while True:
        left[0] = draws.randrange(1, 25)
        try:
            summary = pipeline.demo(TINY, tmp_path / "demo")
            break
        except Crash:
            crashes += 1
    assert crashes >= 5
    assert without_seconds(summary) == without_seconds(finished[1])
    with runs.Run(tmp_path / "demo", json.loads((tmp_path / "demo" / "config.json").read_text())["config"]) as run:
        seen = [(r["stage"], r["epoch"]) for r in run.metrics()]
    assert len(seen) == len(set(seen)) == 3 + 5 * 3


def test_kill_9_at_random_times_changes_no_number(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    (tmp_path / "config.json").write_text((finished[0] / "config.json").read_text())
    command = [sys.executable, "-m", "csam", "demo", "--config", str(tmp_path / "config.json"), "--out", str(folder)]
    draws = random.Random(time.time_ns())
    waits = [draws.uniform(0, 3) for _ in range(3)]
    for wait in waits:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not (folder / "log.txt").exists():
                time.sleep(0.05)
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"after kills at {waits}: {done.stderr}"
    summary = json.loads((folder / "summary.json").read_text())
    assert without_seconds(summary) == without_seconds(finished[1]), f"after kills at {waits}"


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    runs.save_model(tmp_path / "w.safetensors", models.build("resnet20"), {})
    settings = replace(TINY, weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(ValueError, match=r"w\.safetensors is of another model: .*layer1\.1"):
        pipeline.demo(settings, tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_another_folder_setting_is_refused(finished: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(runs.RunError, match=r"settings\.seed: 0 there, 1 now"):
        pipeline.demo(replace(TINY, seed=1), finished[0])


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    """A checkpoint that was copied in by hand."""
    dataset = pipeline.load_data(TINY)
    with runs.Run(tmp_path, pipeline.identity("demo", TINY, dataset)) as run:
        sgd = training.Sgd(models.build("resnet20", in_channels=1), training.Optimizer(), 1)
        run.stage("start").save({"epoch": 1, "seconds": 0.0, "stepper": sgd.state_dict()})
    with pytest.raises(runs.RunError, match=r"start\.safetensors is of another model: .*layer1\.1"):
        pipeline.demo(TINY, tmp_path)


def test_every_method_makes_a_row(tmp_path: Path) -> None:
    settings = replace(TINY, methods=tuple(pipeline.METHODS), sparsities=(0.7,))
    rows = pipeline.demo(settings, tmp_path / "all")["rows"]
    assert [row["method"] for row in rows] == ["dense", *(m for m in pipeline.METHODS if m != "dense")]


def test_sparsities_close_to_each_other_have_names_of_their_own() -> None:
    names = [pipeline.variant_name("csam", sparsity) for sparsity in (0, 0.7, 0.700001, 0.7000011)]
    assert names == ["csam-0", "csam-0.7", "csam-0.700001", "csam-0.7000011"]


@pytest.mark.parametrize("granularity", ["filter", "channel", "block"])
def test_group_masks_keep_the_first_and_the_last_layer(tmp_path: Path, granularity: str) -> None:
    settings = override(TINY, {"methods": ["magnitude"], "sparsities": [0.5], "train": {"granularity": granularity}})
    path, result = pipeline.train(settings, tmp_path / "run")
    tensors, _ = runs.read_safetensors(path)
    assert int(tensors["conv1.weight"].count_nonzero()) == tensors["conv1.weight"].numel()
    assert 0.3 < result["sparsity"] < 0.7


def test_train_then_certify(tmp_path: Path) -> None:
    settings = replace(TINY, methods=("dense",))
    path, result = pipeline.train(settings, tmp_path / "train")
    assert runs.read_description(path)["sigma"] == 0.25
    assert 0 <= result["clean_accuracy"] <= 1
    rows, bounds = pipeline.certify(settings, path, tmp_path / "certify", certificate="both")
    assert [r.idx for r in rows] == [b["idx"] for b in bounds] == [0, 10, 20]
    record = tmp_path / "certify" / "certificates" / "smoothing.tsv"
    record.write_bytes(record.read_bytes().replace(b"\n10\t", b"\n\0\0\t"))  # as a power cut may leave it
    again, _ = pipeline.certify(settings, path, tmp_path / "certify", certificate="both")
    assert [row.idx for row in read_tsv(record)] == [0, 10, 20]
    assert [replace(row, time=0) for row in again] == [replace(row, time=0) for row in rows]


def test_cc_cert_alone_goes_on_and_refuses_other_settings(tmp_path: Path) -> None:
    settings = override(replace(TINY, methods=("dense",)), {"certify": {"dtype": "bfloat16"}})
    path, _ = pipeline.train(settings, tmp_path / "train")
    rows, bounds = pipeline.certify(settings, path, tmp_path / "run", certificate="cc-cert")
    both = pipeline.certify(settings, path, tmp_path / "both", certificate="both")[1]
    assert rows == []
    assert [{**b, "time": 0} for b in both] == [{**b, "time": 0} for b in bounds]
    folder = tmp_path / "run" / "certificates"
    assert {file.name for file in folder.iterdir()} == {"cc-cert.jsonl", "cc-cert.tsv"}
    recipe, known = records.read_bounds(folder / "cc-cert.jsonl")
    assert list(known.values()) == bounds
    assert (recipe["n"], recipe["k"], recipe["delta"]) == (settings.certify.cc_n, settings.certify.cc_k, 0.9)
    assert (recipe["t"], recipe["transform"], recipe["dtype"]) == ([1e-4, 1e4, 500], settings.transform, "bfloat16")
    head, *lines = (folder / "cc-cert.tsv").read_text().splitlines()
    assert head.split() == list(records.BOUND_COLUMNS)
    for line, bound in zip(lines, bounds, strict=True):
        assert [float(v) for v in line.split()[:7]] == [float(bound[name]) for name in records.BOUND_COLUMNS[:7]]

    journal = folder / "cc-cert.jsonl"
    whole = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(whole[:2]) + whole[2][:9])  # killed while it wrote the second image
    (folder / "cc-cert.tsv").unlink()
    again = pipeline.certify(settings, path, tmp_path / "run", certificate="cc-cert")[1]
    assert [{**b, "time": 0} for b in again] == [{**b, "time": 0} for b in bounds]
    assert again[0] == bounds[0]
    for change in ({"transform": "rotation:3"}, {"certify": {"cc_k": 3}}, {"certify": {"delta": 0.8}}):
        with pytest.raises(runs.RunError, match=r"made with other settings \(settings\."):
            pipeline.certify(override(settings, change), path, tmp_path / "run", certificate="cc-cert")
    with pytest.raises(ValueError, match="certificate must be one of 'smoothing', 'cc-cert', 'both', got 'all'"):
        pipeline.certify(settings, path, tmp_path / "run", certificate="all")


def test_a_folder_of_certificates_takes_more_images_and_other_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(TINY, methods=("dense",))
    path, _ = pipeline.train(settings, tmp_path / "train")
    folder = tmp_path / "run"
    made: list[list[int]] = []
    monkeypatch.setattr(
        evaluation, "_Image", lambda i, *rest, new=evaluation._Image: (made[-1].append(i), new(i, *rest))[1]
    )

    def certified(certificate: str, **change: Any) -> tuple[list[int], list[int]]:
        made.append([])
        asked = override(settings, {"certify": change})
        rows, bounds = pipeline.certify(asked, path, folder, titles, certificate=certificate)
        stored = json.loads((folder / "config.json").read_text())["config"]
        assert override(Settings(), stored["settings"]) == asked
        return [row.idx for row in rows], [bound["idx"] for bound in bounds]

    shown: dict[str, list[int]] = {}

    def titles(title: str, total: int, each: int | None = None) -> Any:
        steps = shown[title] = [total]
        return nullcontext(lambda count, samples=0: steps.extend([count] if count else []))

    assert certified("smoothing") == ([0, 10, 20], [])
    first = (folder / "certificates" / "smoothing.tsv").read_bytes()
    assert certified("smoothing", images=6, radii=[0.3]) == ([0, 5, 10, 15, 20, 25], [])
    assert (shown["smoothing"], made) == ([6, 3, 1, 1, 1], [[0, 10, 20], [5, 15, 25]])
    # a certificate more, whose settings have decided nothing yet; then fewer images, none of them new
    assert certified("both", images=4, eps=[0.2], cc_k=3) == ([0, 7, 15, 22], [0, 7, 15, 22])
    assert certified("both", images=2, cc_k=3) == ([0, 15], [0, 15])
    assert (shown["smoothing"], shown["CC-Cert"], made[-1]) == ([2, 2], [2, 2], [])
    rows = read_tsv(folder / "certificates" / "smoothing.tsv")
    assert [row.idx for row in rows] == [0, 10, 20, 5, 15, 25, 7, 22]
    assert (folder / "certificates" / "smoothing.tsv").read_bytes().startswith(first)
    table = (folder / "certificates" / "cc-cert.tsv").read_text().splitlines()[1:]
    assert [line.split()[0] for line in table] == ["0", "7", "15", "22"]
    whole = pipeline.certify(override(settings, {"certify": {"images": 4}}), path, tmp_path / "whole")[0]
    assert [replace(row, time=0) for row in whole] == [replace(rows[k], time=0) for k in (0, 6, 4, 7)]
    # what decides the certificate that is not asked for stays as it was
    for certificate, change in (
        ("smoothing", {"transform": "rotation:3", "certify": {"cc_k": 5, "delta": 0.8, "images": 2}}),
        ("cc-cert", {"train": {"sigma": 0.5, "noise": "laplace"}, "certify": {"n": 61, "cc_k": 3, "images": 2}}),
    ):
        pipeline.certify(override(settings, change), path, folder, certificate=certificate)
        stored = json.loads((folder / "config.json").read_text())["config"]["settings"]
        assert override(Settings(), stored) == override(settings, {"certify": {"cc_k": 3, "images": 2}})
    for change in ({"n": 61}, {"alpha": 0.01}, {"adaptive": True}, {"sound_float": True}, {"dtype": "bfloat16"}):
        with pytest.raises(runs.RunError, match=r"made with other settings \(settings\.certify\."):
            certified("smoothing", **change)
    stored = json.loads((folder / "config.json").read_text())["config"]["settings"]
    assert (stored["certify"]["n"], stored["certify"]["images"]) == (60, 2)


def test_bounds_of_two_plans_are_not_mixed_and_older_journals_go_on(tmp_path: Path) -> None:
    settings = override(replace(TINY, methods=("dense",)), {"certify": {"dtype": "bfloat16"}})
    dataset = pipeline.load_data(settings)
    cert = pipeline.make_cc_cert(pipeline.build(settings, dataset), dataset, settings)
    other = pipeline.make_cc_cert(pipeline.build(settings, dataset), dataset, settings, "module")
    journal = tmp_path / "a.jsonl"
    first = pipeline.bound_images(cert, dataset, [0], journal)
    with pytest.raises(runs.RunError, match="choices"):
        pipeline.bound_images(other, dataset, [0, 1], journal)
    assert pipeline.bound_images(cert, dataset, [0, 1], journal)[0] == first[0]
    older = runs.Journal(tmp_path / "older.jsonl")  # begun before there were recipes
    older.append(first[0])
    assert pipeline.bound_images(cert, dataset, [0, 1], older.path)[0] == first[0]
    assert records.read_bounds(older.path)[0] == {}
    foreign = runs.Journal(tmp_path / "foreign.jsonl")
    foreign.append({"idx": 0})
    with pytest.raises(runs.RunError, match="does not hold bounds of CC-Cert: bound, correct"):
        pipeline.bound_images(cert, dataset, [0], foreign.path)


def test_bounds_of_a_callable_that_changed_are_not_mixed(tmp_path: Path) -> None:
    dataset = pipeline.load_data(TINY)
    factor, journal = 1.0, tmp_path / "a.jsonl"

    def network(x: torch.Tensor) -> torch.Tensor:
        return factor * x.flatten(1)[:, :10]

    def bounds(chosen: list[int]) -> list[dict[str, Any]]:
        cert = pipeline.make_cc_cert(Opaque(network, name="a"), dataset, TINY)
        return pipeline.bound_images(cert, dataset, chosen, journal)

    first = bounds([0])
    assert bounds([0, 1])[0] == first[0]
    factor = 2.0
    with pytest.raises(runs.RunError, match=r"made with other settings \(logits: "):
        bounds([0, 1, 2])


def test_nan_probabilities_bound_one_image_alone(tmp_path: Path) -> None:
    dataset = pipeline.load_data(TINY)
    network = pipeline.build(TINY, dataset).eval()
    means = data.to_unit(dataset.test_x[:3]).mean((1, 2, 3))
    limit = (means.sort().values[1:].sum() / 2).item()  # one image of three is brighter

    class Dazzled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(x.mean((1, 2, 3))[:, None] > limit, torch.nan, network(x))

    settings = override(TINY, {"transform": "rotation:1"})
    cert = pipeline.make_cc_cert(Dazzled(), dataset, settings)
    journal = tmp_path / "a.jsonl"
    with pytest.warns(RuntimeWarning, match=r"draws of 1 of 3 images had NaN .* are 1; a\.jsonl has their"):
        bounds = pipeline.bound_images(cert, dataset, [0, 1, 2], journal)
    (broken,) = (bound for bound in bounds if "nan" in bound)
    assert broken["idx"] == int(means.argmax())
    assert (broken["bound"], broken["predict"], broken["correct"]) == (1.0, -1, False)
    assert list(records.read_bounds(journal)[1].values()) == bounds


def test_adaptive_certificates_stop_early_and_go_on_with_the_plan_they_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = override(replace(TINY, methods=("dense",)), {"certify": {"n": 3000, "adaptive": True, "rtol": 0.2}})
    path, _ = pipeline.train(settings, tmp_path / "train")
    rows, _ = pipeline.certify(settings, path, tmp_path / "whole")
    recipe, votes = read_votes(tmp_path / "whole" / "certificates" / "smoothing.tsv")
    assert (recipe["rtol"], recipe["n"], recipe["method"]) == (0.2, 3000, "exact")
    assert sum(v["samples"] for v in votes.values()) < 3 * 3010
    one = replace(settings, certify=replace(settings.certify, images=1))
    assert pipeline.certify(one, path, tmp_path / "one")[0][0].radius == rows[0].radius

    record = tmp_path / "whole" / "certificates" / "smoothing.tsv"
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:2]))
    began = {"module": "dense"}.get(str(recipe["choices"]), "module")
    monkeypatch.setattr(
        pipeline, "begun_choices", lambda read, path: began
    )  # as if the cost model had changed its mind
    with pytest.raises(runs.RunError, match="votes of two plans must not be mixed"):
        pipeline.certify(settings, path, tmp_path / "whole")
    monkeypatch.undo()
    again, _ = pipeline.certify(settings, path, tmp_path / "whole")
    assert [replace(row, time=0) for row in again] == [replace(row, time=0) for row in rows]


def test_int8_is_calibrated_on_evenly_spaced_training_images() -> None:
    settings = override(TINY, {"train_subset": 128, "certify": {"dtype": "int8"}})
    dataset = pipeline.load_data(settings)
    shown = pipeline.calibration(dataset, settings)
    assert shown is not None
    assert torch.equal(shown, data.to_unit(dataset.train_x[::2]))
    few = dataset.subset(train=10)
    assert torch.equal(pipeline.calibration(few, settings), data.to_unit(few.train_x))
    assert pipeline.calibration(dataset, TINY) is None
    none = replace(dataset, train_x=dataset.train_x[:0], train_y=dataset.train_y[:0])
    with pytest.raises(ValueError, match="dtype int8 needs training images to calibrate on, digits has none"):
        pipeline.check_certificates(settings, none)


def test_demo_in_int8(tmp_path: Path) -> None:
    settings = override(replace(TINY, methods=("dense",)), {"train": {"epochs": 1}, "certify": {"dtype": "int8"}})
    summary = pipeline.demo(settings, tmp_path / "demo")
    assert summary["settings"]["smoothing"]["dtype"] == summary["settings"]["cc_cert"]["dtype"] == "int8"
    assert read_votes(tmp_path / "demo" / "certificates" / "dense.tsv")[0]["dtype"] == "int8"


def test_cifar10_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (24, 3, 32, 32), generator=g, dtype=torch.uint8)
    y = torch.arange(24) % 10
    dataset = data.Dataset("cifar10", [str(i) for i in range(10)], x, y, x[:10], y[:10])
    runs.save_model(tmp_path / "w.safetensors", models.build("resnet20", seed=1), {})
    settings = override(
        PRESETS["cifar10"],
        {
            "weights": str(tmp_path / "w.safetensors"),
            "sparsities": [0.9],
            "train": {"epochs": 0, "search_epochs": 1, "finetune_epochs": 1, "batch_size": 12, "threads": 1},
            "certify": {"images": 1, "n0": 5, "n": 20, "cc_n": 5, "cc_k": 1},
        },
    )
    summary = pipeline.demo(settings, tmp_path / "demo", dataset=dataset)
    assert [round(row["sparsity"], 3) for row in summary["rows"]] == [0, 0.9, 0.9]
    assert summary["settings"]["dense_training"]["steps"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsities": [1.0]}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"sparsities": [0.5, 0.5]}, "sparsities must hold at least one value and none twice"),
        ({"methods": ["magic"]}, "methods must be among dense, magnitude, csam, csam-uniform, got 'magic'"),
        ({"train": {"sigma": 0.0}}, "sigma must be > 0, got 0.0"),
        ({"train": {"epochs": "many"}}, r"train\.epochs must be int, got 'many'"),
        ({"train": {"speed": 1}}, "TrainSettings has no setting 'speed'"),
        ({"train": {"epochs": -1}}, "epochs must be >= 0, got -1"),
        ({"train": {"threads": 0}}, "threads must be >= 1, got 0"),
        ({"train": {"momentum": math.nan}}, r"train\.momentum must be finite, got nan"),
        ({"seed": -1}, r"seed must be in \[0, 2\^63\), got -1"),
        ({"train": {"lr": 0.0}}, "lr must be > 0, got 0.0"),
        ({"train": {"granularity": "row"}}, "granularity must be one of .* got 'row'"),
        ({"search": {"rho": -1.0}}, "rho must be >= 0, got -1"),
        ({"search": {"optimizer": "lion"}}, "optimizer must be one of 'adam', 'sgd', got 'lion'"),
        ({"certify": {"dtype": "float8"}}, "dtype must be one of .* got"),
        ({"certify": {"alpha": 1.0}}, r"alpha must be in \(0, 1\), got 1"),
        ({"certify": {"alpha": 1e-60}}, "alpha must be at least 1e-50"),
        ({"certify": {"n": 0}}, "n must be >= 1, got 0"),
        ({"certify": {"rtol": 0.1}}, "rtol must be none unless adaptive is true, got 0.1"),
        ({"certify": {"adaptive": True, "rtol": 1.0}}, r"rtol must be in \(0, 1\), got 1.0"),
        ({"certify": {"adaptive": True, "target_radius": -1.0}}, "target_radius must be > 0, got -1.0"),
        ({"certify": {"adaptive": True, "method": "peek"}}, "method must be one of .* got 'peek'"),
        ({"certify": {"adaptive": True, "n": 10**8}}, "n must be <= 10000000 if adaptive"),
        ({"certify": {"eps": []}}, "eps must hold at least one value"),
        ({"certify": {"images": 31}}, r"images must be in \[1, 30\], the size of the test set, got 31"),
        ({"transform": "shear:3"}, "transform must be one of .*'shear:3'"),
        ({"normalization": "mnist"}, "normalization must be one of imagenet, cifar10, got 'mnist'"),
        ({"train_subset": 10**6}, "train_subset must be <= 1437"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_settings_are_refused_before_any_work(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.demo(override(TINY, change), tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_settings_survive_json() -> None:
    for preset in PRESETS.values():
        assert override(Settings(), json.loads(json.dumps(asdict(preset)))) == preset
