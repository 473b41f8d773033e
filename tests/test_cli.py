"""The `csam` command: what it prints, its exit codes, and one clear line for everything that can go wrong."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save as to_safetensors

from conftest import shared_data
from csam import cli, data, microbench, models, pipeline, processes, records, report, runs, training
from csam.settings import PRESETS, Settings

TINY = [
    *("--train-subset", "64", "--test-subset", "20", "--batch-size", "32", "--epochs", "1"),
    *("--search-epochs", "1", "--finetune-epochs", "1"),
]
CERTIFY = [*("--images", "2", "--n0", "5", "--n", "40", "--cc-n", "5", "--cc-k", "2")]
DEMO = ["demo", *TINY, *CERTIFY, "--sparsities", "0.9", "--seed", "3"]

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def csam(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command in this process; returns exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        threads = torch.get_num_threads()
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(a) for a in arguments])
        torch.set_num_threads(threads)
        out, err = capfd.readouterr()
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, out, err

    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of `csam demo`."""
    folder = tmp_path_factory.mktemp("cli") / "demo"
    with pytest.raises(SystemExit) as exit_:
        cli.main([*DEMO, "--out", str(folder)])
    assert exit_.value.code == 0
    return folder


def test_demo_prints_the_table_of_its_summary(csam: Command, trained: Path) -> None:
    code, out, err = csam(*DEMO, "--out", trained)
    assert code == 0
    assert "finished before" in err
    for row in json.loads((trained / "summary.json").read_text())["rows"]:
        assert f"{100 * row['clean_accuracy']:.1f}" in out
    assert "C-SAM" in out
    assert json.loads((trained / "summary.json").read_text())["settings"]["transform"] in "".join(out.split())


def test_demo_repeats_from_its_config(csam: Command, trained: Path, tmp_path: Path) -> None:
    code, _, err = csam("demo", "--config", trained / "config.json", "--methods", "dense", "--out", tmp_path / "d")
    assert code == 0, err
    first, second = (json.loads((f / "summary.json").read_text())["rows"][0] for f in (trained, tmp_path / "d"))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_config_of_a_run_from_given_weights(csam: Command, trained: Path, tmp_path: Path) -> None:
    weights = trained / "models" / "dense.safetensors"
    short = [*DEMO, "--methods", "dense"]
    assert csam(*short, "--weights", weights, "--out", tmp_path / "a")[0] == 0
    again = ["--config", tmp_path / "a" / "config.json"]
    code, _, err = csam("demo", *again, "--out", tmp_path / "b")
    assert code == 2
    assert "name the file with --weights" in err
    code, _, err = csam("demo", *again, "--weights", weights, "--out", tmp_path / "b")
    assert code == 0, err
    code, _, err = csam("certify", tmp_path / "a" / "models" / "dense.safetensors", *again, "--out", tmp_path / "c")
    assert code == 0, err
    rows = [json.loads((tmp_path / f / "summary.json").read_text())["rows"][0] for f in ("a", "b")]
    assert {**rows[0], "seconds": 0} == {**rows[1], "seconds": 0}


def test_certify_writes_the_record_and_goes_on(csam: Command, trained: Path, tmp_path: Path) -> None:
    model = trained / "models" / "csam-0.9.safetensors"
    command = ["certify", model, *CERTIFY, "--test-subset", 20, "--train-subset", 64, "--seed", 3, "--out", tmp_path]
    code, out, err = csam(*command, "--cc-cert")
    assert code == 0, err
    assert "PCA under" in out
    record = tmp_path / "certificates" / "smoothing.tsv"
    whole = record.read_text().splitlines()
    assert whole[0].split() == ["idx", "label", "predict", "radius", "correct", "time"]
    # The demo certified the same images of the same model with the same seed.
    demo = (trained / "certificates" / "csam-0.9.tsv").read_text().splitlines()
    assert [line.split()[:5] for line in whole] == [line.split()[:5] for line in demo]
    record.write_text("\n".join(whole[:2]) + "\n" + whole[2][:7])
    assert csam(*command, "--cc-cert")[0] == 0
    assert [line.split()[:5] for line in record.read_text().splitlines()] == [line.split()[:5] for line in whole]


def test_certify_takes_more_images_and_tabulates_those_asked_for(csam: Command, trained: Path, tmp_path: Path) -> None:
    model = trained / "models" / "csam-0.9.safetensors"
    command = ["certify", model, *CERTIFY, "--test-subset", 20, "--train-subset", 64, "--seed", 3, "--out", tmp_path]
    assert csam(*command)[0] == 0
    code, out, err = csam(*command, "--images", 3, "--radii", "0.125", "--certificate", "both", "--eps", 0.3)
    assert code == 0, err
    assert "r=0.125" in out
    assert "ε=0.3" in out
    assert "smoothing.tsv: 4 images, 3 of them in the table" in out
    assert "cc-cert.tsv:" not in out
    assert [row.idx for row in records.read_tsv(tmp_path / "certificates" / "smoothing.tsv")] == [0, 10, 6, 13]
    # what the folder was asked for last can be asked for again
    code, out, err = csam("certify", model, "--config", tmp_path / "config.json", "--out", tmp_path)
    assert code == 0, err
    assert "r=0.125" in out
    code, out, err = csam("report", tmp_path, "--no-plot")
    assert (code, " 4 " in out) == (0, True), err
    code, _, err = csam(*command, "--n", 41)
    assert (code, "made with other settings (settings.certify.n: 40 there, 41 now)" in err) == (2, True), err


OWN = """
import torch
import csam

def module():
    return csam.models.build("digits", seed=SEED).eval()

def spoilt():
    net = module()
    list(net.parameters())[2].data.view(-1)[3] = float("nan")
    return net

def choosy():
    class Choosy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = module()

        def forward(self, x):
            return self.net(x) if x.sum() > 0 else self.net(-x)

    return Choosy().eval()

def function():
    net = module()
    return csam.Opaque(lambda x: net(x), name="net SEED")

class Nothing:
    pass

def broken():
    net = module()
    return lambda x: torch.where(x.mean((1, 2, 3))[:, None] > 0.35, torch.nan, net(x))
"""


ODD = """
import torch

class Odd(torch.nn.Module):
    def forward(self, x):
        return torch.sin(x).flatten(1)[:, :10]

def unlicensed():
    raise RuntimeError("no licence")
"""


def test_certify_takes_what_a_factory_gives(csam: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for seed in (1, 2):
        (tmp_path / f"own{seed}.py").write_text(OWN.replace("SEED", str(seed)))
    options = [*CERTIFY, "--test-subset", 20, "--train-subset", 64, "--sigma", 0.3]
    rows = {}
    for factory in ("module", "function"):
        out = tmp_path / factory
        code, printed, err = csam("certify", f"own1:{factory}", *options, "--cc-cert", "--out", out)
        assert code == 0, err
        assert f"own1:{factory}" in printed
        record = out / "certificates" / "smoothing.tsv"
        rows[factory] = [line.split()[:5] for line in record.read_text().splitlines()]
        record.write_text("".join(record.read_text().splitlines(keepends=True)[:2]))
        assert csam("certify", f"own1:{factory}", *options, "--cc-cert", "--out", out)[0] == 0
        assert [line.split()[:5] for line in record.read_text().splitlines()] == rows[factory]
        assert records.read_votes(record)[0].get("functions") == (["net 1"] if factory == "function" else None)
    assert [(r[0], r[2]) for r in rows["module"]] == [(r[0], r[2]) for r in rows["function"]]
    # another factory, other weights, another name
    code, _, err = csam("certify", "own2:module", *options, "--cc-cert", "--out", tmp_path / "module")
    assert (code, "made with other settings (model: '" in err) == (2, True), err
    (tmp_path / "own1.py").write_text(OWN.replace("SEED", "2"))
    monkeypatch.delitem(sys.modules, "own1")
    for cache in tmp_path.glob("__pycache__/*"):
        cache.unlink()
    for factory, message in (("module", "(model: '"), ("function", "(functions: ['net 1'] there, ['net 2'] now")):
        code, _, err = csam("certify", f"own1:{factory}", *options, "--cc-cert", "--out", tmp_path / factory)
        assert (code, f"made with other settings {message}" in err) == (2, True), err
    with pytest.warns(RuntimeWarning, match=r"had NaN logits and voted for no class; smoothing\.votes\.jsonl"):
        assert csam("certify", "own1:broken", *options, "--out", tmp_path / "nan")[0] == 0


def test_what_cannot_be_planned_is_told_and_nan_weights_are_refused(
    csam: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own3.py").write_text(OWN.replace("SEED", "3"))
    options = [*CERTIFY, "--test-subset", 20, "--train-subset", 64, "--sigma", 0.3, "--images", 1]
    with pytest.warns(
        UserWarning, match="is not for the sampling engine, but run by torch: control flow depends on va"
    ):
        code, _, err = csam("certify", "own3:choosy", *options, "--out", tmp_path / "a")
    assert code == 0, err
    code, _, err = csam("certify", "own3:spoilt", *options, "--out", tmp_path / "b")
    assert (code, "csam: model must have finite weights, got NaN or inf in " in err) == (2, True), err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("each", [None, 1000])
def test_a_bar_tells_what_is_left_of_long_steps(monkeypatch: pytest.MonkeyPatch, each: int | None) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown = io.StringIO()
    monkeypatch.setattr(cli, "messages", Console(file=shown, width=200))
    with cli.bar("smoothing", 100, each) as advance:
        advance(10)  # from before
        for i in range(360):
            now[0] += 10
            advance(i % 12 == 11, 1000 / 12)  # an image in two minutes
    lines = [line for line in shown.getvalue().splitlines() if " left" in line]
    assert len(lines) > 40
    assert re.fullmatch(r"smoothing: 39/100, 8 samples/s, (1:5\d|2:0\d):\d\d left", lines[-1]), lines[-1]


def test_a_callable_that_fails_midway_is_one_line(
    csam: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tired.py").write_text(TIRED)
    options = [*CERTIFY, "--test-subset", 20, "--train-subset", 64, "--sigma", 0.3, "--out", tmp_path / "run"]
    code, _, err = csam("certify", "tired:made", *options)
    assert (code, "csam: image 0: net 1 gave no logits for (50, 1, 8, 8): out of memory" in err) == (1, True), err
    assert "Traceback" not in err


TIRED = """
import csam

def made():
    calls = []

    def net(x):
        calls.append(1)
        if len(calls) > 7:
            raise RuntimeError("out of memory")
        return x.flatten(1)[:, :10]

    return csam.Opaque(net, name="net 1")
"""


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("nowhere:net", [], "must be a file or package.module:factory, got 'nowhere:net' (No module named 'nowhere')"),
        ("json:net", [], "module 'json' has no attribute 'net'"),
        (":net", [], "Empty module name"),
        ("json:__name__", [], "json:__name__ must give a torch.nn.Module or another callable, got NoneType"),
        ("json:JSONDecoder", [], "must give a torch.nn.Module or another callable, got JSONDecoder"),
        ("torch.nn:Identity", ["--architecture", "digits"], "--architecture and --normalization are for files"),
        ("torch.nn:Identity", [], "torch.nn:Identity on digits (10 classes): model must map (2, 1, 8, 8) to logits"),
        (
            "torch.nn:Flatten",
            [],
            "torch.nn:Flatten on digits (10 classes): num_classes must be the width of the model's logits, 64",
        ),
        (
            "torch.nn:Flatten",
            ["--certificate", "cc-cert"],
            "Flatten on digits (10 classes): model must give 10 logits, got 64",
        ),
        (
            "own:Odd",
            ["--dtype", "int8"],
            "own:Odd on digits (10 classes): dtype int8 needs a network whose samples lie innermost",
        ),
        ("own:unlicensed", [], "own:unlicensed must give a model, got RuntimeError: no licence"),
        ("broken:net", [], "broken must import, got NameError: name 'undefined' is not defined"),
        ("own:Odd", ["--n", 10**23], f"n must be <= {10**10}, got {10**23}"),
        ("own:Odd", ["--n0", 2**60], f"n0 must be <= {10**10}, got {2**60}"),
        ("own:Odd", ["--sigma", 1e300], "sigma must be in float32's range [1.17549e-38, 3.40282e+38], got 1e+300"),
    ],
)
def test_wrong_input_is_found_before_there_is_a_folder(
    csam: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, more: list[Any], message: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own.py").write_text(ODD)
    (tmp_path / "broken.py").write_text("net = undefined\n")
    options = [*CERTIFY, "--test-subset", 20, "--train-subset", 64, "--sigma", 0.3, *more, "--out", tmp_path / "run"]
    code, _, err = csam("certify", model, *options)
    assert code == 2
    assert message in " ".join(err.split()), err
    assert not (tmp_path / "run").exists()


def test_adaptive_certificates_say_what_they_saved(csam: Command, trained: Path, tmp_path: Path) -> None:
    model, run = trained / "models" / "dense.safetensors", tmp_path / "run"
    command = ["certify", model, "--images", 2, "--n0", 5, "--test-subset", 20, "--train-subset", 64, "--out", run]
    adaptive = [*command, "--n", 4000, "--adaptive", "--target-radius", 0.01]
    code, out, err = csam(*adaptive, "--rtol", 0.2)
    assert code == 0, err
    assert "samples/s" in err
    recipe, votes = records.read_votes(run / "certificates" / "smoothing.tsv")
    assert (recipe["target_radius"], recipe["rtol"], recipe["method"]) == (0.01, 0.2, "exact")
    mean = sum(v["samples"] for v in votes.values()) / 2
    assert mean < 4005
    for printed in (out, csam("report", run, "--no-plot")[1]):
        assert f"{mean:.0f} {4005 / mean:.1f}×" in " ".join(printed.split())
    code, _, err = csam(*adaptive)
    assert (code, "certify.rtol: 0.2 there, None now" in err) == (2, True), err
    code, _, err = csam(*command, "--rtol", 0.1)
    assert (code, "rtol must be none unless adaptive is true" in err) == (2, True), err


def test_cc_cert_alone_and_its_report(csam: Command, trained: Path, tmp_path: Path) -> None:
    model, run = trained / "models" / "dense.safetensors", tmp_path / "run"
    command = ["certify", model, *CERTIFY, "--test-subset", 20, "--train-subset", 64, "--out", run]
    alone = [*command, "--certificate", "cc-cert", "--transform", "rotation:10,brightness:0.2", "--eps", "0.3,1"]
    code, out, err = csam(*alone)
    assert code == 0, err
    shown = csam("report", run, "--no-plot", "--eps", "0.3,1")[1]
    for printed in (out, shown):
        assert {"ε=0.3", "ε=1", "δ", "images", "clean"} <= set(printed.split())
        line = next(line for line in printed.splitlines() if "rotation:10,brightness:0.2" in line)
        assert line.split()[1:8] == ["rotation:10,brightness:0.2", "5", "2", "0.9", "0.0001..10000", "(500)", "2"]
        assert report.SAMPLING_ERROR in printed
        assert "ACR" not in printed
    file = csam("report", run / "certificates" / "cc-cert.jsonl", "--no-plot", "--eps", "0.3,1")[1]
    assert file.replace("─", "").split() == shown.replace("─", "").replace("run/cc-cert", "cc-cert").split()
    _, known = records.read_bounds(run / "certificates" / "cc-cert.jsonl")
    pca = records.pca([r["bound"] for r in known.values()], [r["correct"] for r in known.values()], 0.3)
    assert f"{100 * pca:.1f} %" in shown
    before = (run / "certificates" / "cc-cert.tsv").read_bytes()
    assert csam(*alone)[0] == 0
    assert (run / "certificates" / "cc-cert.tsv").read_bytes() == before
    code, _, err = csam(*alone, "--cc-cert")
    assert (code, "--cc-cert is --certificate both" in err) == (2, True), err
    table = run / "certificates" / "cc-cert.tsv"
    assert csam("report", table, "--no-plot", "--eps", "0.3,1")[1] == file
    other = tmp_path / "alone.tsv"
    other.write_bytes(table.read_bytes())
    code, _, err = csam("report", other, "--no-plot")
    assert (code, "alone.jsonl" in err) == (2, True), err
    code, _, err = csam("report", run, "--no-plot", "--eps", "0")
    assert (code, "eps must be in (0, 1], got 0" in err) == (2, True), err


def test_a_process_that_is_not_the_first_reads_no_files(
    csam: Command, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be on another machine."""
    made = [records.Row(0, 1, 1, 0.1, True, 0.1)], [{"idx": 0, "bound": 0.1, "correct": True}]
    monkeypatch.setattr(pipeline, "certify", lambda *_, **__: made)
    monkeypatch.setattr(processes, "joined", lambda: nullcontext(1))
    for console in (cli.messages, cli.results):
        monkeypatch.setattr(console, "quiet", False)
    model = trained / "models" / "dense.safetensors"
    assert csam("certify", model, *CERTIFY, "--cc-cert", "--out", tmp_path / "run") == (0, "", "")


def test_cc_cert_alone_needs_no_sigma(csam: Command, trained: Path, tmp_path: Path) -> None:
    model = tmp_path / "foreign.safetensors"
    tensors, _ = runs.read_safetensors(trained / "models" / "dense.safetensors")
    model.write_bytes(to_safetensors(tensors))
    command = ["certify", model, *CERTIFY, "--architecture", "digits", "--test-subset", 20, "--train-subset", 64]
    code, _, err = csam(*command, "--out", tmp_path / "a")
    assert (code, "does not say its sigma; give --sigma" in err) == (2, True), err
    code, out, err = csam(*command, "--certificate", "cc-cert", "--out", tmp_path / "b")
    assert (code, "PCA under" in out) == (0, True), err


def test_certify_in_int8_is_calibrated_on_training_images(csam: Command, trained: Path, tmp_path: Path) -> None:
    model, run = trained / "models" / "dense.safetensors", tmp_path / "run"
    command = ["certify", model, *CERTIFY, "--test-subset", 20, "--dtype", "int8", "--cc-cert", "--out", run]
    code, out, err = csam(*command, "--train-subset", 64)
    assert code == 0, err
    assert "PCA under" in out
    record = run / "certificates" / "smoothing.tsv"
    recipe = records.read_votes(record)[0]
    assert recipe["dtype"] == "int8"
    whole = record.read_text().splitlines()
    record.write_text(whole[0] + "\n")
    assert csam(*command, "--train-subset", 64, "--threads", 1)[0] == 0
    assert [line.split()[:5] for line in record.read_text().splitlines()] == [line.split()[:5] for line in whole]
    code, _, err = csam(*command, "--train-subset", 63)
    assert (code, "train_subset: 64 there, 63 now" in err) == (2, True), err
    assert "what is certified is the quantised network" in " ".join(csam("certify", "--help")[1].split())


def test_certify_with_sound_float_is_recorded_and_goes_on_in_no_other_mode(
    csam: Command, trained: Path, tmp_path: Path
) -> None:
    model, run = trained / "models" / "dense.safetensors", tmp_path / "run"
    command = ["certify", model, *CERTIFY, "--test-subset", 20, "--train-subset", 64, "--out", run]
    code, _, err = csam(*command, "--sound-float")
    assert code == 0, err
    record = run / "certificates" / "smoothing.tsv"
    recipe = records.read_votes(record)[0]
    assert recipe["sound_float"]["grid"] == 255
    whole = record.read_text().splitlines()
    record.write_text(whole[0] + "\n")
    assert csam(*command, "--sound-float", "--threads", 1)[0] == 0
    assert [line.split()[:5] for line in record.read_text().splitlines()] == [line.split()[:5] for line in whole]
    code, _, err = csam(*command)
    assert (code, "certify.sound_float: True there, None now" in err) == (2, True), err
    plain = [*command[:-1], tmp_path / "plain"]
    assert csam(*plain)[0] == 0
    assert "sound_float" not in (tmp_path / "plain" / "config.json").read_text()
    code, _, err = csam(*plain, "--sound-float")
    assert (code, "certify.sound_float: None there, True now" in err) == (2, True), err


@pytest.mark.parametrize("noise", ["uniform", "laplace"])
def test_training_certificates_and_reports_are_of_the_law(
    csam: Command, trained: Path, tmp_path: Path, noise: str
) -> None:
    short = ("--methods", "dense", "--noise", noise, "--out", tmp_path / "demo")
    code, out, err = csam(*DEMO, *short)
    assert code == 0, err
    assert f"ℓ1 radii by smoothing with {noise} noise" in out
    model, run = tmp_path / "demo" / "models" / "start.safetensors", tmp_path / "run"
    command = ["certify", model, *CERTIFY, "--test-subset", 20, "--train-subset", 64, "--out", run]
    code, out, err = csam(*command, "--adaptive", "--target-radius", 0.1)  # under the law that the model names
    assert code == 0, err
    assert "ℓ1" in out
    recipe = records.read_votes(run / "certificates" / "smoothing.tsv")[0]
    assert (recipe["noise"], recipe["norm"], recipe["sigma"]) == (noise, "l1", 0.25)
    for other in {"gaussian", "uniform", "laplace"} - {noise}:
        code, _, err = csam(*command, "--adaptive", "--target-radius", 0.1, "--noise", other)
        there = f"train.noise: '{noise}' there, {None if other == 'gaussian' else repr(other)} now"
        assert (code, there in err) == (2, True), err
    code, out, err = csam("report", run, trained, "--plot", tmp_path / "p.png")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    made = [noise, "σ=0.25", "n<=40", "α=0.001", "float32", "ℓ1"]
    assert ["run/smoothing", *made] in [line[:7] for line in lines]
    assert ["demo/dense", "σ=0.25", "n=40", "α=0.001", "float32", "ℓ2"] in [line[:6] for line in lines]
    assert "ℓ2 radii by smoothing with gaussian noise" in out


def test_a_folder_from_before_there_were_laws_goes_on(trained: Path) -> None:
    assert "noise" not in json.loads((trained / "config.json").read_text())["config"]["settings"]["train"]


def test_train_makes_an_ordinary_weight_file(csam: Command, tmp_path: Path) -> None:
    code, out, err = csam("train", *TINY, "--method", "magnitude", "--sparsity", 0.8, "--out", tmp_path)
    assert code == 0, err
    assert "sparsity 0.7999" in out or "sparsity 0.8000" in out
    models.load_weights(models.build("digits"), tmp_path / "models" / "magnitude-0.8.safetensors")


def test_train_repeats_from_its_config(csam: Command, tmp_path: Path) -> None:
    code, _, err = csam("train", *TINY, "--method", "magnitude", "--sparsity", 0.8, "--out", tmp_path / "a")
    assert code == 0, err
    again = ["train", "--config", tmp_path / "a" / "config.json"]
    code, out, err = csam(*again, "--out", tmp_path / "b")
    assert code == 0, err
    first, second = (tmp_path / f / "models" / "magnitude-0.8.safetensors" for f in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    code, out, err = csam(*again, "--sparsity", 0.5, "--out", tmp_path / "c")
    assert code == 0, err
    assert "magnitude-0.5.safetensors: sparsity 0.5000" in out


def test_report_reads_runs_and_the_records_of_others(csam: Command, trained: Path, tmp_path: Path) -> None:
    published = shared_data("cohen-cifar10-sigma_0.25.tsv")
    code, out, err = csam("report", trained, published, "--plot", tmp_path / "p.png", "--radii", "0.25,0.5")
    assert code == 0, err
    assert "60.0 %" in out
    assert "demo/magnitude-0.9" in out
    assert (tmp_path / "p.png").exists()


def test_no_number_of_a_table_is_cut_short(csam: Command, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    radii = [f"0.{i}1" for i in range(10)]
    code, out, err = csam("report", trained, "--no-plot", "--radii", ",".join(radii))
    assert code == 0, err
    assert "…" not in out
    assert all(f"r={radius}" in out for radius in radii)
    for row in json.loads((trained / "summary.json").read_text())["rows"]:
        assert f"{100 * row['clean_accuracy']:.1f}" in out


def test_table_on_a_terminal_without_greek(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["report", str(trained), "--no-plot"])
    stream.flush()
    assert exit_.value.code == 0
    assert b"C-SAM" in stream.buffer.getvalue()  # type: ignore[attr-defined]


def test_report_tells_apart_what_has_the_same_name(csam: Command, trained: Path, tmp_path: Path) -> None:
    record = (trained / "certificates" / "dense.tsv").read_text()
    for name in ("a", "b"):
        (tmp_path / name / "run" / "certificates").mkdir(parents=True)
        (tmp_path / name / "run" / "certificates" / "dense.tsv").write_text(record)
        (tmp_path / name / "run" / "certificates" / ".csam-tmp-1-cc-cert.tsv").write_text("")  # of a killed run
        (tmp_path / name / "mine.tsv").write_text(record)
    places = [tmp_path / name / what for what in ("run", "mine.tsv") for name in ("a", "b")]
    code, out, err = csam("report", *places, "--no-plot")
    assert code == 0, err
    for label in (*(f"{place}/dense" for place in places[:2]), *map(str, places[2:])):
        assert f" {label} " in out


def test_names_with_brackets_are_printed_whole(csam: Command, trained: Path, tmp_path: Path) -> None:
    record = tmp_path / "a[bold].tsv"
    record.write_text((trained / "certificates" / "dense.tsv").read_text())
    code, out, err = csam("report", record, "--plot", tmp_path / "p[red].png")
    assert code == 0, err
    assert " a[bold] " in out
    assert str(tmp_path / "p[red].png") in out


def test_report_calls_the_current_folder_by_its_name(
    csam: Command, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    assert " demo/dense " in csam("report", ".", "--no-plot")[1]


def test_info_says_who_serves_and_why_not(csam: Command) -> None:
    code, out, _ = csam("info")
    assert code == 0
    for word in ("torch", "threads", "instruction set", "backend cpu", "backend triton", "backend reference"):
        assert word in out


def test_bench_times_both_sides(csam: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microbench, "SIZE", (8, 8, 3, 3))
    code, out, _ = csam("bench", "--builtin")
    assert code == 0
    assert out.count("×\n") + out.count("× │") >= len(microbench.CASES)


@pytest.mark.parametrize("command", ["", "demo", "train", "certify", "report", "bench", "info"])
def test_help(csam: Command, command: str) -> None:
    code, out, _ = csam(*command.split(), "--help")
    assert code == 0
    assert "Usage: csam" in out


def test_every_option_names_a_setting() -> None:
    for group in (cli.DATA_OPTIONS, cli.TRAIN_OPTIONS, cli.CERTIFY_OPTIONS, cli.COMPARE_OPTIONS):
        for _, place, _, _ in group:
            cli._lookup(PRESETS["digits"], place)


@pytest.mark.parametrize(
    ("stored", "arguments", "wanted"),
    [
        ({"target_radius": 0.2}, ["--adaptive"], {"target_radius": 0.2, "adaptive": True}),
        ({"adaptive": True, "rtol": 0.2}, ["--fixed"], {}),
        ({"adaptive": True, "rtol": 0.2}, ["--rtol", "none"], {"adaptive": True}),
        ({"dtype": "int8", "images": 5}, ["--dtype", "none", "--images", "none"], {"dtype": None, "images": None}),
        ({}, ["--dtype", "float16"], {"dtype": "float16"}),
    ],
)
def test_options_change_a_config_and_the_sum_is_judged(
    tmp_path: Path, stored: dict[str, Any], arguments: list[str], wanted: dict[str, Any]
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"certify": stored}))
    options = cli.demo.make_context("demo", ["--config", str(config), *arguments]).params
    given = {
        key: value for key, value in options.items() if key not in ("out", "data", "data_dir", "config", "threads")
    }
    settings = cli.settings_from(None, None, options["config"], None, given)
    assert settings.certify == replace(PRESETS["digits"].certify, **wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--sparsities", "1.5"], "csam: sparsity must be in [0, 1), got 1.5"),
        (["demo", "--sparsities", "a,b"], "is not a comma-separated list"),
        (["demo", "--data", "cifar10"], "data_dir must say where CIFAR-10 is"),
        (["demo", "--data", "cifar10", "--data-dir", "/nowhere"], "'/nowhere' does not exist"),
        (["demo", "--transform", "shear:1"], "csam: transform must be one of"),
        (["demo", "--sigma", "-1"], "csam: sigma must be > 0, got -1.0"),
        (["demo", "--methods", "magic"], "csam: methods must be among"),
        (["demo", "--images", "9999"], "csam: images must be in [1, 360]"),
        (["demo", "--seed", str(2**63)], "csam: seed must be in [0, 2^63)"),
        (["demo", "--rho", "nan"], "csam: search.rho must be finite, got nan"),
        (["demo", "--epochs", "x"], "'x' is not a valid integer"),
        (["train"], "Missing option '--out'"),
        (["certify", "/nowhere.safetensors", "--out", "x"], "does not exist"),
        (["report"], "Missing argument"),
        (["frobnicate"], "No such command"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, list) else "",
)
def test_bad_input_is_one_line_and_code_2(
    csam: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = csam(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_bad_files_are_named(csam: Command, trained: Path, tmp_path: Path) -> None:
    model = trained / "models" / "csam-0.9.safetensors"
    (tmp_path / "cut.safetensors").write_bytes(model.read_bytes()[:-100])
    (tmp_path / "bad.tsv").write_text("idx\tlabel\n1\t2\n")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "data.json").write_text('{"data": ["mnist"]}')
    foreign = tmp_path / "foreign"
    (foreign / "certificates").mkdir(parents=True)
    (foreign / "certificates" / "dense.tsv").write_bytes((trained / "certificates" / "dense.tsv").read_bytes())
    (foreign / "summary.json").write_text("{}")
    out = tmp_path / "out"
    for arguments, message in (
        (["certify", tmp_path / "cut.safetensors", "--out", out], "cut.safetensors is not a whole safetensors file"),
        (["certify", model, "--architecture", "resnet20", "--out", out], "csam-0.9.safetensors is of another model"),
        (["report", tmp_path / "bad.tsv"], "bad.tsv, line 1"),
        (["report", tmp_path], "holds no certificates"),
        (["report", foreign], "foreign/summary.json was not written by csam demo"),
        (["report", trained, "--plot", out / "p.png"], "must lie in a folder that exists, got"),
        (["report", trained, "--plot", tmp_path / "p.txt"], "must end in .png, .pdf or .svg, got"),
        (["report", trained, "--radii", "0.1,nan"], "radius must be >= 0, got nan"),
        (["demo", "--config", tmp_path / "bad.json"], "bad.json is damaged"),
        (
            ["demo", "--config", tmp_path / "data.json"],
            "data.json: data must be one of digits, cifar10, cifar10c, images, got ['mnist']",
        ),
        (["demo", "--config", tmp_path / "list.json"], "list.json must hold a JSON object"),
        ([*DEMO, "--alpha", "0.01", "--out", trained], "certify.alpha: 0.001 there, 0.01 now"),
    ):
        code, printed, err = csam(*arguments)
        assert (code, message in err, printed) == (2, True, ""), err
        assert err.count("\n") == 1
    assert not out.exists()


def test_model_that_does_not_say_its_sigma(csam: Command, tmp_path: Path) -> None:
    runs.save_model(tmp_path / "m.safetensors", models.build("digits"), {})
    code, _, err = csam("certify", tmp_path / "m.safetensors", "--out", tmp_path / "run")
    assert code == 2
    assert "give --sigma" in err


def test_certify_repeats_from_its_config(csam: Command, trained: Path, tmp_path: Path) -> None:
    record, dense = Path("certificates", "smoothing.tsv"), trained / "models" / "dense.safetensors"
    runs.save_model(tmp_path / "m.safetensors", models.build("digits"), {})  # which does not say its sigma
    for model in (dense, tmp_path / "m.safetensors"):
        a, b = (tmp_path / f"{model.stem}-{name}" for name in "ab")
        assert csam("certify", model, *CERTIFY, "--sigma", 0.1, "--noise", "laplace", "--out", a)[0] == 0
        code, _, err = csam("certify", model, "--config", a / "config.json", "--out", b)
        assert code == 0, err
        assert [replace(row, time=0) for row in records.read_tsv(b / record)] == [
            replace(row, time=0) for row in records.read_tsv(a / record)
        ]
        assert records.read_votes(b / record)[0] == records.read_votes(a / record)[0]


@pytest.mark.parametrize("stored", [None, "cifar10"])
def test_normalization_of_the_file_wins_over_the_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str | None
) -> None:
    class Seen(Exception):
        pass

    def see(settings: Settings, *_: Any, **__: Any) -> None:
        raise Seen(settings.normalization)

    monkeypatch.setattr(pipeline, "certify", see)
    runs.save_model(tmp_path / "m.safetensors", models.build("resnet20"), {"sigma": 0.25, "normalization": stored})
    with pytest.raises(Seen) as seen:
        cli.main(["certify", str(tmp_path / "m.safetensors"), "--data", "cifar10", "--out", str(tmp_path / "run")])
    assert seen.value.args == (stored,)


def test_full_disk_is_a_clear_line_and_loses_nothing(
    csam: Command, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [12]
    sync = os.fsync

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = csam(*DEMO, "--out", tmp_path / "demo")
    monkeypatch.undo()
    assert code == 1
    assert f"csam: no space left on the disk while writing {tmp_path / 'demo'}" in err
    assert "same command again" in err
    assert not list(tmp_path.glob("**/.csam-tmp-*"))
    code, _, err = csam(*DEMO, "--out", tmp_path / "demo")
    assert code == 0, err
    rows = [json.loads((f / "summary.json").read_text())["rows"] for f in (trained, tmp_path / "demo")]
    assert [{**r, "seconds": 0} for r in rows[0]] == [{**r, "seconds": 0} for r in rows[1]]


def test_ctrl_c_says_how_to_go_on(csam: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "certify_variant", interrupt)
    code, _, err = csam(*DEMO, "--out", tmp_path / "demo")
    assert code == 130
    assert f"csam: interrupted; what was finished is in {tmp_path / 'demo'}; give the same command again" in err


def test_the_end_of_a_file_is_no_ctrl_c(csam: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(settings: Settings) -> None:
        raise EOFError("No data left in file")

    monkeypatch.setattr(pipeline, "load_data", ended)
    code, _, err = csam(*DEMO, "--out", tmp_path / "demo")
    assert (code, err.strip()) == (1, "csam: a file ends too early: No data left in file")


def test_real_ctrl_c_ends_the_process_with_130(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "csam", "demo", "--epochs", "5000", "--out", str(tmp_path / "demo")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            while process.poll() is None and not (tmp_path / "demo" / "metrics.jsonl").exists():
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()  # leaving the block waits for the process, for ever if it did not end
    assert process.returncode == 130
    assert "same command again" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("seconds", [0.2, 0.3, 0.6, 1.0])
def test_ctrl_c_while_torch_is_loaded_is_one_line(seconds: float) -> None:
    command = [shutil.which("csam", path=sysconfig.get_path("scripts")), "info"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode in (130, 0)  # 0 where the command was faster
    # a blank line before it where the command was at work already
    assert err.removeprefix("\n") == ("csam: interrupted\n" if process.returncode else "")


def test_diverged_training_fails_with_advice(csam: Command, tmp_path: Path) -> None:
    code, _, err = csam(*DEMO, "--lr", "1e30", "--out", tmp_path / "demo")
    assert code == 1
    assert "a lower learning rate may help" in err


def test_debug_shows_the_traceback(csam: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CSAM_DEBUG", "1")
    code, _, err = csam("demo", "--sigma", "-1", "--out", tmp_path / "demo")
    assert code == 2
    assert "Traceback" in err


def test_a_defect_is_not_reported_as_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise TypeError("a defect")

    monkeypatch.setattr(training, "fit", broken)
    with pytest.raises(TypeError, match="a defect"):
        cli.main([*DEMO, "--out", str(tmp_path / "demo")])


def test_given_weights_shorten_the_dense_training_unless_told_otherwise(tmp_path: Path) -> None:
    weights = {"weights": tmp_path / "w.safetensors"}
    assert cli.settings_from("cifar10", None, None, None, weights).train.epochs == 3
    assert cli.settings_from("cifar10", None, None, None, {**weights, "train__epochs": 7}).train.epochs == 7
    assert cli.settings_from("cifar10", None, None, None, {}).train == PRESETS["cifar10"].train


def test_certify_on_class_folders(csam: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net3.py").write_text(
        "import torch\ndef two():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),"
        " torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    generator = np.random.default_rng(0)
    for split, label, i in itertools.product(("train", "val"), ("cat", "dog"), range(3)):
        file = tmp_path / "pets" / split / label / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20 + i, 24, 3), dtype=np.uint8)).save(file)
    asked = ["--data", "images", "--data-dir", tmp_path / "pets", "--resize", 16, "--crop", 14, "--sigma", 0.25]
    command = ["certify", "net3:two", *asked, "--n0", 5, "--n", 20]
    code, out, err = csam(*command, "--images", 4, "--out", tmp_path / "run")
    assert code == 0, err
    table = Path(out.split()[-1])
    assert [(row.idx, row.label) for row in records.read_tsv(table)] == [(0, 0), (1, 0), (3, 1), (4, 1)]
    assert csam(*command, "--images", 6, "--out", tmp_path / "run")[0] == 0
    assert sorted(row.label for row in records.read_tsv(table)) == [0, 0, 0, 1, 1, 1]
    assert csam(*command, "--dtype", "int8", "--images", 1, "--out", tmp_path / "bytes")[0] == 0
    assert csam(*command, "--test-subset", 2, "--out", tmp_path / "two")[0] == 0  # of these all
    assert len(records.read_tsv(tmp_path / "two" / "certificates" / "smoothing.tsv")) == 2
    head, row, *rows = table.read_text().splitlines()
    idx, label, predict, _, *rest = row.split("\t")
    table.write_text("\n".join([head, "\t".join([idx, label, predict, "0.9", *rest]), *rows]) + "\n")
    code, _, err = csam("report", tmp_path / "run", "--no-plot")
    assert (code, "the row of image 0 is not the one of its votes" in err) == (2, True), err
    code, _, err = csam(*command[:6], "--sigma", 0.25, "--out", tmp_path / "other")
    assert (code, "(resize and crop make images of one size)" in err) == (2, True), err


def test_what_a_model_raises_is_told(csam: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd4.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n    def forward(self, x):\n        raise KeyError('head')\n"
        "def function():\n    return lambda x: {}['logits']\n"
        "def net():\n    return Net().eval()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    function = "gave no logits for (50, 1, 8, 8): KeyError: 'logits'"
    for factory, message in (("function", function), ("net", "(1, 8, 8): KeyError: 'head'")):
        code, _, err = csam("certify", f"odd4:{factory}", *CERTIFY, "--sigma", 0.25, "--out", tmp_path / "run")
        assert (code, "does not take images x of shape (1, 8, 8)" in err, message in err) == (2, True, True), err


def test_folders_of_older_versions_go_on() -> None:
    dataset = data.load("digits", train_subset=10, test_subset=10)
    settings = pipeline.identity("certify", PRESETS["digits"], dataset)["settings"]
    assert not {"resize", "crop"} & settings.keys()
    changed = pipeline.identity("certify", replace(PRESETS["digits"], crop=8), dataset)["settings"]
    assert changed == settings | {"crop": 8}


def test_certify_on_cifar10c(csam: Command, tmp_path: Path) -> None:
    folder, model = tmp_path / "CIFAR-10-C", tmp_path / "m.safetensors"
    folder.mkdir()
    np.save(folder / "fog.npy", np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8))
    np.save(folder / "labels.npy", np.arange(20) % 4)
    runs.save_model(model, models.build("resnet20").eval(), {"model": "resnet20", "sigma": 0.25})
    command = ["certify", model, "--data", "cifar10c", "--data-dir", folder, "--images", 2, "--n0", 5, "--n", 20]
    config = tmp_path / "trained.json"
    config.write_text(json.dumps({"data": "cifar10", "train_subset": 10}))
    asked = ["--config", config, "--corruption", "fog", "--severity", 2]
    code, out, err = csam(*command, *asked, "--out", tmp_path / "run")
    assert code == 0, err
    assert [row.label for row in records.read_tsv(Path(out.split()[-1]))] == [0, 2]
    fog = [*command, "--corruption", "fog", "--severity", 2, "--cc-n", 5, "--cc-k", 2, "--certificate", "cc-cert"]
    transform = "rotation:10,brightness:0.2,gaussian_noise:0.04,jpeg_compression:80"
    code, out, err = csam(*fog, "--transform", transform, "--out", tmp_path / "bounded")
    assert (code, transform in out) == (0, True), err
    bounds = records.read_bounds(tmp_path / "bounded" / "certificates" / "cc-cert.jsonl")[1]
    assert [(b["idx"], b["label"]) for b in bounds.values()] == [(0, 0), (2, 2)]
    code, _, err = csam(*command, "--out", tmp_path / "other")
    assert (code, "corruption must be one of those in" in err) == (2, True), err
    code, _, err = csam(*command, "--corruption", "fog", "--dtype", "int8", "--out", tmp_path / "other")
    assert (code, "needs training images to calibrate on, cifar10c has none" in err) == (2, True), err
    code, _, err = csam("train", "--data", "cifar10c", "--data-dir", folder, "--out", tmp_path / "other")
    assert code == 2, err
