"""Run folders: atomic files, locks, resumption, and refusals that name what is wrong."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from csam import runs

CONFIG = {"seed": 0, "nested": {"sigma": 0.25}, "list": [1, 2]}


def test_state_survives_a_round_trip(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    state = {
        "a.b": shared[:3],
        "a": {"b": shared, 7: [torch.tensor(True), None, 1.5]},
        "pair": (torch.zeros(0, 2), "text"),
        "transposed": torch.arange(6).view(2, 3).t(),
        "bf16": torch.ones(2, dtype=torch.bfloat16),
        "empty": {},
    }
    runs.save_state(tmp_path / "s.safetensors", state)
    loaded = runs.load_state(tmp_path / "s.safetensors")
    assert torch.equal(loaded["a.b"], shared[:3])
    assert torch.equal(loaded["a"]["b"], shared)
    assert loaded["a"][7][1:] == [None, 1.5]
    assert bool(loaded["a"][7][0])
    assert loaded["pair"][0].shape == (0, 2)
    assert isinstance(loaded["pair"], tuple)
    assert torch.equal(loaded["transposed"], state["transposed"])
    assert loaded["bf16"].dtype == torch.bfloat16
    assert loaded["empty"] == {}


def test_state_refuses_objects() -> None:
    with pytest.raises(TypeError, match=r"got object at 'x\.1'"):
        runs.flatten({"x": [1, object()]})


@pytest.mark.parametrize("keep", [0, 4, 40, -1], ids=["empty", "in-the-length", "in-the-header", "one-byte-short"])
def test_truncated_checkpoint_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "c.safetensors"
    runs.save_state(path, {"w": torch.ones(10)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(runs.RunError, match=r"c\.safetensors is not a whole safetensors file"):
        runs.load_state(path)
    with pytest.raises(runs.RunError, match=r"c\.safetensors is not a whole safetensors file"):
        runs.read_description(path)


def test_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(runs.to_safetensors({"w": torch.ones(1)}))
    with pytest.raises(runs.RunError, match="is not a csam checkpoint"):
        runs.load_state(path)
    assert runs.read_description(path) == {}


def test_model_file_is_plain_and_described(tmp_path: Path) -> None:
    layer = torch.nn.Conv2d(1, 2, 3).to(memory_format=torch.channels_last)
    runs.save_model(tmp_path / "m.safetensors", layer, {"model": "digits"})
    tensors, _ = runs.read_safetensors(tmp_path / "m.safetensors")
    assert sorted(tensors) == ["bias", "weight"]
    assert torch.equal(tensors["weight"], layer.weight.detach())
    assert runs.read_description(tmp_path / "m.safetensors") == {"model": "digits"}


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.json"
    runs.write_json(path, {"a": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        runs.write_json(path, {"a": 2})
    assert caught.value.filename == str(path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        runs.write_json(tmp_path / "f.json", float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_folder_resumes_and_counts_nothing_twice(tmp_path: Path) -> None:
    with runs.Run(tmp_path / "r", CONFIG) as run:
        stage = run.stage("train")
        assert stage.load() is None
        assert stage.result() is None
        stage.record(1, loss=2.0)
        stage.save({"epoch": 1})
        stage.record(2, loss=1.0)
    with open(tmp_path / "r" / "metrics.jsonl", "a") as file:
        file.write('{"stage": "train", "epo')
    (tmp_path / "r" / "models" / ".csam-tmp-1-x").write_text("left by a kill")
    with runs.Run(tmp_path / "r", CONFIG) as run:
        stage = run.stage("train")
        assert stage.load() == {"epoch": 1}
        stage.record(2, loss=1.0)
        stage.record(3, loss=0.5)
        stage.finish({"done": True})
        assert stage.result() == {"done": True}
        assert not stage.checkpoint.exists()
        assert [(r["epoch"], r["loss"]) for r in run.metrics()] == [(1, 2.0), (2, 1.0), (3, 0.5)]
        assert not list((tmp_path / "r").glob("**/.csam-tmp-*"))
    log = (tmp_path / "r" / "log.txt").read_text()
    assert "started" in log
    assert "resumed" in log


def test_folder_stopped_while_it_is_made_is_a_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    # In the order they happen: the lock's content, config.json, the log.
    for owner, name in ((os, "write"), (os, "fsync"), (runs.Run, "log")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match="No space left"), runs.Run(tmp_path, CONFIG):
                pass
    with runs.Run(tmp_path, CONFIG) as run:
        run.stage("train").save({"epoch": 1})


def test_other_settings_are_refused(tmp_path: Path) -> None:
    with runs.Run(tmp_path / "r", CONFIG):
        pass
    with (
        pytest.raises(runs.RunError, match=r"nested\.sigma: 0\.25 there, 0\.5 now.*--out"),
        runs.Run(tmp_path / "r", {**CONFIG, "nested": {"sigma": 0.5}}),
    ):
        pass
    assert json.loads((tmp_path / "r" / "config.json").read_text())["config"] == CONFIG


def test_what_is_free_may_change_and_the_last_is_kept(tmp_path: Path) -> None:
    free = ["nested", "lis"]  # no part of a name
    with runs.Run(tmp_path, CONFIG, free):
        begun = json.loads((tmp_path / "config.json").read_text())
    other = {**CONFIG, "nested": {"sigma": 0.5, "more": None}}
    with runs.Run(tmp_path, other, free):
        assert json.loads((tmp_path / "config.json").read_text()) == {**begun, "config": other}
    assert "asked for nested.sigma: 0.5 instead of 0.25" in (tmp_path / "log.txt").read_text()
    with (
        pytest.raises(runs.RunError, match=r"settings \(list: .*\[1\] now\);"),
        runs.Run(tmp_path, {"seed": 0, "list": [1]}, free),
    ):
        pass
    assert json.loads((tmp_path / "config.json").read_text())["config"] == other


def test_what_is_not_asked_about_stays(tmp_path: Path) -> None:
    with runs.Run(tmp_path, CONFIG):
        pass
    kept = ["nested.sigma", "nested.more"]
    with runs.Run(tmp_path, {**CONFIG, "nested": {**CONFIG["nested"], "sigma": 0.5, "more": 1}}, kept=kept) as run:
        assert run.config == CONFIG
    assert json.loads((tmp_path / "config.json").read_text())["config"] == CONFIG


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with (
        pytest.raises(runs.RunError, match=r"holds 'thesis\.tex' but no config\.json"),
        runs.Run(tmp_path, CONFIG),
    ):
        pass
    with pytest.raises(runs.RunError, match="is a file"), runs.Run(tmp_path / "thesis.tex", CONFIG):
        pass
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(runs.RunError, match="was not written by csam"), runs.Run(tmp_path, CONFIG):
        pass
    (tmp_path / "config.json").write_text('{"a":')
    with pytest.raises(runs.RunError, match=r"config\.json is damaged"), runs.Run(tmp_path, CONFIG):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_second_process_is_locked_out(tmp_path: Path) -> None:
    code = "import sys; from csam.runs import Run\nwith Run(sys.argv[1], {}): print('in', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "r")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"in\n"
        with (
            pytest.raises(runs.RunError, match=f"in use by process {holder.pid}"),
            runs.Run(tmp_path / "r", {}),
        ):
            pass
        holder.kill()
        holder.wait()
    with runs.Run(tmp_path / "r", {}):
        pass


def test_lock_is_released_after_a_refusal(tmp_path: Path) -> None:
    with runs.Run(tmp_path, CONFIG):
        pass
    refused = runs.Run(tmp_path, {})
    with pytest.raises(runs.RunError), refused:
        pass
    with runs.Run(tmp_path, CONFIG):
        pass


def test_stage_names_stay_inside_the_folder(tmp_path: Path) -> None:
    with runs.Run(tmp_path, CONFIG) as run, pytest.raises(ValueError, match="stage name"):
        run.stage("../elsewhere")


def test_environment_names_what_matters() -> None:
    found = runs.environment()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert {"csam-kernels", "python", "processor", "backend", "commit"} <= found.keys()
