"""Which way a network runs and why; what the machine's arithmetic takes is measured once."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import csam
from csam import costs, engine, lanes
from csam.costs import Rates
from csam_kernels import _C, compress, sample_network
from csam_kernels.ops.sample_network import Program, Step, Value

LEVEL = Rates(sparse=1.0, dense=1.0, module=1.0, narrow=0.0)


class Small(nn.Module):
    """A convolution, `body` of its output, the mean over the image and a linear layer."""

    def __init__(self, body: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.second(F.relu(self.first(x)))).mean((2, 3)))


def ready(network: nn.Module, dtype: torch.dtype = torch.float32, choices: Any = "auto", off: float = 0.0) -> Any:
    network, probe = network.eval().requires_grad_(False), torch.rand(2, 3, 8, 8)
    return engine.ready(network, probe, network(probe) + off, dtype, choices)


def given(monkeypatch: pytest.MonkeyPatch, **rates: float) -> None:
    monkeypatch.setattr(engine, "rates", lambda _: Rates(**asdict(LEVEL) | rates))


# What is decided


def test_a_network_runs_where_it_is_predicted_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, module=1e6)
    made, step = ready(Small())
    assert made is not None
    assert step.startswith("samples innermost: ")
    given(monkeypatch, module=1e-6)
    made, step = ready(Small())
    assert made is None
    assert step.startswith("run by torch, which is faster: 0.000 ms a sample predicted, ")
    assert ready(Small(), choices="dense")[0] is not None  # as chosen, whatever is predicted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_each_layer_runs_the_way_that_is_predicted_to_be_faster(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    network = Small()
    network.second.weight.data *= torch.rand(network.second.weight.shape) < 0.03
    for rates, wanted in (({"sparse": 1e-3}, {True}), ({"dense": 1e-3}, {False}), ({}, {False, True})):
        given(monkeypatch, module=1e9, **rates)
        made, step = ready(network, dtype)
        kinds = {s.name: s.engine for s in made.program.steps if s.weight is not None}
        assert {kind == "sparse" for kind in kinds.values()} == wanted
        assert all(f"{list(kinds.values()).count(kind)} {kind}" in step for kind in kinds.values())
    assert kinds["second"] == "sparse"


def attention(x: Tensor) -> Tensor:
    return F.softmax(x, 1)


def branch(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def unnamed(x: Tensor) -> Tensor:
    """What torch.fx stops at is no hindrance, but what torch.export finds behind it is."""
    return F.softmax(x, 1) if x.dim() == 4 else x


def broken(x: Tensor) -> Tensor:
    if isinstance(x, fx.Proxy) or torch.compiler.is_exporting():
        raise RuntimeError("one line\nand another")
    return x


@pytest.mark.parametrize(
    ("network", "options", "reason"),
    [
        (Small(), {"choices": "module"}, "run by torch: as chosen"),
        (Small(), {"dtype": torch.float16}, "run by torch: torch.float16 is not offered otherwise"),
        (Small(attention), {}, "run by torch: NotLowered: softmax: no step for softmax"),
        (Small(branch), {}, "run by torch: control flow depends on values: File "),
        (Small(unnamed), {}, "run by torch: NotLowered: softmax: no step for softmax"),
        (Small(broken), {"choices": "dense"}, "run by torch: RuntimeError: one line"),
        (Small(), {"off": 0.5}, "run by torch: in steps the logits would move by 0.5"),
        (Small(), {"off": float("nan")}, "run by torch: in steps the logits would move by nan"),
    ],
    ids=["chosen", "float16", "attention", "branch", "both", "broken", "moved", "nan"],
)
def test_says_why_torch_runs_a_network(network: nn.Module, options: dict[str, Any], reason: str) -> None:
    made, step = ready(network, **options)
    assert made is None
    assert step.startswith(reason)
    assert "\n" not in step


@pytest.mark.parametrize(
    "body",
    [
        lambda x: F.relu(x) if x.shape[1] == 16 else x,
        lambda x: sum((x for _ in range(x.shape[-1] // 3)), 0 * x),
        lambda x: (torch._assert(x.dim() == 4, "images"), x)[1],
    ],
    ids=["branch", "loop", "assertion"],
)
def test_what_python_decides_by_shapes_is_no_hindrance(body: Callable[[Tensor], Tensor]) -> None:
    made, step = ready(Small(body), choices="dense")
    assert made is not None
    assert "samples innermost" in step


def test_torchs_convolutions_are_counted_in_networks_that_only_torch_export_traces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given(monkeypatch, module=1e-6)
    network = Small(lambda x: F.relu(x) if x.shape[1] == 16 else x)
    assert ready(network)[1].startswith("run by torch, which is faster: 0.000 ms a sample predicted, ")
    given(monkeypatch, module=1e6)
    assert ready(network)[0] is not None


def test_what_torch_fx_traces_is_not_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(lanes, "exported")
    assert ready(Small(), choices="dense")[0] is not None


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        (
            {},
            ValueError,
            "for every layer of the plan that it is offered for, got no first, no head, no mean, no second",
        ),
        ({"first": "dense", "second": "quick", "mean": "dense", "head": "dense"}, ValueError, "got second: quick"),
        ({"other": "dense"}, ValueError, "got other: dense, no first"),
        ("quick", ValueError, "choices must be one of 'auto', 'module', 'sparse', 'dense', 'winograd', got 'quick'"),
        (["dense"], TypeError, "choices must be a name or layer -> sparse, dense, winograd, got list"),
    ],
    ids=str,
)
def test_bad_choices(choices: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ready(Small(), choices=choices)


def test_choices_by_name_are_obeyed() -> None:
    choices = {"first": "dense", "second": "sparse", "mean": "dense", "head": "sparse"}
    made, step = ready(Small(), choices=choices)
    assert {s.name: s.engine for s in made.program.steps} == choices
    assert "layers 2 sparse, 2 dense;" in step


# What is predicted


def program(share: float, filters: float = 1.0) -> lanes.Program:
    """Of a ResNet-20 with a share of its weights and of its filters; what a smaller share keeps, a larger keeps too."""
    torch.manual_seed(0)
    network = csam.models.build("resnet20").eval().requires_grad_(False)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight *= torch.rand(layer.weight.shape) < share
            layer.weight *= (torch.rand(len(layer.weight)) < filters).view(-1, 1, 1, 1)
    made = lanes.lower(fx.symbolic_trace(network), torch.Size((3, 8, 8)))
    lanes.simplify(made)
    return made


@pytest.fixture
def without_tiles() -> Iterator[None]:
    """AMX takes as long for 1 filter as for 16, and multiplies what Winograd's transforms would."""
    if _C.isa() == "amx":
        _C.set_isa("avx512")
    yield
    _C.set_isa("auto")


@pytest.mark.usefixtures("without_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_what_is_predicted_falls_with_the_weights(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    given(monkeypatch)
    monkeypatch.setattr(engine, "_CLOSE", 0.0)  # nothing is timed
    totals: dict[str, list[float]] = {"sparse": [], "dense": [], "winograd": [], "auto": []}
    for left in ({"share": 1.0}, {"share": 0.4}, {"share": 0.1}, {"share": 0.02}, {"share": 1.0, "filters": 0.5}):
        made = program(**left)
        for kind, total in totals.items():
            engine.choose(made, dtype, kind)
            times = engine.milliseconds(made, dtype)
            assert all(t > 0 for t in times)
            total.append(sum(times))
    assert all(more > less for more, less in zip(totals["sparse"], totals["sparse"][1:4], strict=False))
    assert totals["winograd"][0] < totals["dense"][0]
    for kind in ("sparse", "dense", "winograd"):
        assert totals[kind][4] < 0.6 * totals[kind][0]
        assert all(best <= other for best, other in zip(totals["auto"], totals[kind], strict=True))


@pytest.mark.usefixtures("without_tiles")
def test_of_two_ways_that_are_close_the_one_that_was_faster_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch)
    made = program(share=0.3)
    monkeypatch.setattr(engine, "_CLOSE", 0.0)
    engine.choose(made, torch.float32, "auto")
    predicted = {step.name: step.engine for step in made.steps if step.weight is not None}
    for name, limit in (("_CLOSE", math.inf), ("_LEAST_MS", 0.0)):
        monkeypatch.setattr(engine, name, limit)
    asked = []

    def kept(name: str, about: Any, measure: Any, valid: Any) -> dict[str, float]:
        times = measure()
        assert (name, valid(times)) == ("layers", True)
        assert all(0 < ms < 1e3 for ms in times.values())
        asked.append((about, times))
        return {way: float(way in slow) for way in times}

    monkeypatch.setattr(engine, "kept", kept)
    slow = {f"{name} {kind}" for name, kind in predicted.items()}
    engine.choose(made, torch.float32, "auto")
    chosen = {step.name: step.engine for step in made.steps if step.weight is not None}
    assert all(chosen[name] != kind for name, kind in predicted.items())
    slow = {f"{name} {kind}" for name, kind in chosen.items()}
    engine.choose(made, torch.float32, "auto")
    assert {step.name: step.engine for step in made.steps if step.weight is not None} == predicted
    assert asked[0][0] == asked[1][0]
    engine.choose(program(share=0.1), torch.float32, "auto")
    assert asked[2][0] != asked[0][0]


@pytest.mark.parametrize(
    ("dtype", "size", "kind"),
    [
        (torch.bfloat16, 8, "winograd"),
        (torch.float32, 16, "winograd"),
        (torch.float32, 8, "dense"),
        (torch.int8, 16, "dense"),
    ],
    ids=str,
)
def test_a_strided_layer_is_planned_as_it_runs(dtype: torch.dtype, size: int, kind: str) -> None:
    """Dense where Winograd's transform has no form for it: its weights are then rounded as those of dense layers."""
    x, weight = Value(4, size, size), compress(torch.randn(4, 4, 3, 3))
    out = Value(4, size // 2, size // 2)
    step = Step(x, out, weight=weight, kernel=(3, 3), stride=(2, 2), padding=(1, 1), name="strided")
    engine.choose(Program(x, out, [step]), dtype, "winograd")
    assert step.engine == kind


def test_torchs_convolutions_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, module=2.0, narrow=8.0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2))
    first, second = 3 * 8 * 9 * 36 * (2 + 8 / 3), 4 * 4 * 36 * (2 + 8 / 2)
    for images in (1, 5):
        found = engine.module_ms(network, torch.rand(images, 3, 8, 8), torch.float32)
        assert found == pytest.approx(1e-6 * (first + second))
    assert not any(m._forward_hooks for m in network.modules())


# Rates


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and no rates from before."""
    monkeypatch.setenv("CSAM_CACHE", str(tmp_path / "cache"))
    costs.rates.cache_clear()
    yield tmp_path / "cache"
    costs.rates.cache_clear()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """What was measured, by a measurement that takes no time and is different every time."""
    calls: list[torch.dtype] = []

    def measure(dtype: torch.dtype) -> Rates:
        calls.append(dtype)
        return Rates(0.1 + len(calls), 0.2, 0.3, 0.0)

    monkeypatch.setattr(costs, "_measured", measure)
    return calls


def again(dtype: torch.dtype = torch.float32) -> Rates:
    """As another process would find them."""
    costs.rates.cache_clear()
    return costs.rates(dtype)


def test_rates_are_measured_once_a_dtype(cache: Path, measured: list[torch.dtype]) -> None:
    found = again()
    assert again() == found
    assert again(torch.bfloat16) != found
    assert again(torch.bfloat16) == again(torch.bfloat16)
    assert measured == [torch.float32, torch.bfloat16]
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".json", ".lock", ".lock"]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"sparse": 1, "dense": 1, "module": 1}',
        b'{"sparse": 1, "dense": 1, "module": 1, "narrow": 1, "other": 1}',
        b'{"sparse": 1, "dense": 1, "module": 1, "narrow": null}',
        b'{"sparse": 0, "dense": 1, "module": 1, "narrow": 1}',
        b'{"sparse": 1, "dense": 1, "module": 1, "narrow": -1}',
        b'{"sparse": 1, "dense": NaN, "module": 1, "narrow": 1}',
        b'{"sparse": 1, "dense": Infinity, "module": 1, "narrow": 1}',
        b'{"sparse": 1' + b"0" * 400 + b', "dense": 1, "module": 1, "narrow": 1}',
    ],
    ids=lambda text: text[:60].decode(errors="replace"),
)
def test_a_damaged_file_is_measured_again_and_replaced(cache: Path, measured: list[torch.dtype], text: bytes) -> None:
    again()
    (file,) = cache.glob("*.json")
    file.write_bytes(text)
    found = again()
    assert len(measured) == 2
    assert json.loads(file.read_text()) == asdict(found)
    assert again() == found
    assert len(measured) == 2


def test_a_folder_that_cannot_be_written_is_no_hindrance(
    tmp_path: Path, cache: Path, measured: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CSAM_CACHE", str(tmp_path / "file" / "cache"))
    assert again() == again()  # in one process
    assert len(measured) == 1
    monkeypatch.setenv("CSAM_CACHE", str(cache))

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError

    kept = again()
    monkeypatch.setattr("csam.runs.os.replace", refuse)
    assert again() == kept
    next(cache.glob("*.json")).unlink()
    assert again() != kept
    assert all(file.suffix == ".lock" for file in cache.iterdir())

    def nobody(*_: Any) -> None:
        raise KeyError

    monkeypatch.delenv("CSAM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert again() != kept


def test_a_race_is_of_one_tile_and_layout(cache: Path) -> None:
    x, out = Value(2, 3, 3), Value(4, 1, 1)
    step = Step(x, out, weight=compress(torch.randn(4, 2, 3, 3)), kernel=(3, 3))
    network, raced = sample_network(Program(x, out, [step]), torch.float32), []
    for rival in ((8, torch.contiguous_format), (8, torch.contiguous_format), (1, torch.contiguous_format)):
        engine._raced(network, torch.rand(2, 3, 3), engine.Rival(lambda: raced.append(0), *rival))
    engine._raced(network, torch.rand(2, 3, 3), engine.Rival(lambda: raced.append(0), 1, torch.channels_last))
    assert len(raced) == 3 * engine._ROUNDS


def test_what_is_timed_has_one_thread_and_others_keep_theirs() -> None:
    seen = []

    def run() -> None:
        seen.append(torch.get_num_threads())
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(torch.get_num_threads).result())

    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(torch.get_num_threads).result()
    assert costs.least_ms(run, 2) > 0
    assert seen == [1, others] * 2


def test_two_processes_at_once_agree(cache: Path) -> None:
    code = "import torch; from csam.costs import rates; print(rates(torch.float32))"
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    (file,) = cache.glob("*.json")
    assert outputs[0].strip() == str(Rates(**json.loads(file.read_text())))


def test_measuring_leaves_threads_and_random_numbers_alone(cache: Path) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    found = costs.rates(torch.bfloat16)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert min(found.sparse, found.dense, found.module + found.narrow) > 0
    assert json.loads(next(cache.glob("*.json")).read_text()) == asdict(found)
