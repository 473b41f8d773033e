"""Several processes: the rows of one, whatever is killed; and training that is one process's up to rounding."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import test_evaluation
import test_pipeline
from conftest import assert_close
from csam import cli, convert, evaluation, pipeline, processes, records, runs, training, transforms
from csam.evaluation import certify_dataset
from csam.records import read_tsv, votes_path
from csam.search import MaskSearch
from csam.settings import PRESETS, override
from csam.smoothing import Smooth
from csam_kernels.ops.sample_network import Range, SampleNetwork
from test_evaluation import kept, without_time

Answers = list[tuple[int, str]]  # of each process: its exit status, and the error that ended it
Together = Callable[..., Answers]


class Processes:
    """Forks teams of processes from one that has imported torch and done nothing else."""

    def __init__(self) -> None:
        script = "import sys; sys.path[:0] = [sys.argv[1]]; import test_processes; test_processes.serve()"
        command = [sys.executable, "-c", script, str(Path(__file__).parent)]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(
        self, size: int, folder: Path, name: str, *, kill: tuple[int, Path, float] | None = None, **kwargs: Any
    ) -> Answers:
        """Run `name(folder, **kwargs)` in so many processes; kill is (rank, file, seconds after it has grown)."""
        assert self.server.stdin
        assert self.server.stdout
        print(json.dumps([size, str(folder), name, kill, kwargs], default=str), file=self.server.stdin, flush=True)
        return [(status, error) for status, error in json.loads(self.server.stdout.readline())]


def size_of(path: str) -> int:
    return Path(path).stat().st_size if Path(path).exists() else 0


def serve() -> None:
    importlib.import_module("torch._dynamo")  # else every process of a team that trains imports it
    for number, line in enumerate(sys.stdin):
        size, folder, name, kill, kwargs = json.loads(line)
        errors = [Path(folder) / f"error-{number}-{rank}" for rank in range(size)]
        pids = []
        for rank in range(size):
            pids.append(os.fork())
            if not pids[-1]:
                status = 1
                try:
                    if size > 1:
                        store = f"file://{folder}/store-{number}"
                        timeout = timedelta(seconds=20)
                        dist.init_process_group("gloo", store, timeout, rank=rank, world_size=size)
                    globals()[name](Path(folder), **kwargs)
                    status = 0
                except BaseException as error:
                    errors[rank].write_text("".join(traceback.format_exception_only(error)))
                finally:
                    os._exit(status)
        if kill is not None:
            victim, place, seconds = kill
            before = size_of(place)
            while size_of(place) == before and not os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
                time.sleep(0.005)
            time.sleep(seconds)
            os.kill(pids[victim], signal.SIGKILL)
        ends = [os.waitpid(pid, 0)[1] for pid in pids]
        print(
            json.dumps([(end, e.read_text() if e.exists() else "") for end, e in zip(ends, errors, strict=True)]),
            flush=True,
        )


@pytest.fixture(scope="module")
def together() -> Iterator[Processes]:
    made = Processes()
    yield made
    assert made.server.stdin
    made.server.stdin.close()
    assert made.server.wait(timeout=60) == 0


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def images(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 1, 3, 3, generator=generator), torch.randint(2, (count,), generator=generator)


def certified(folder: Path, path: str, make: str = "lanes", count: int = 6, threads: int = 1, **kwargs: Any) -> None:
    torch.set_num_threads(threads)
    drawn, votes = [0], SampleNetwork.votes_of

    def counted(self: SampleNetwork, ranges: Sequence[Range], sigma: float, **options: Any) -> Tensor:
        drawn[0] += sum(n for _, n, _, _ in ranges)
        return votes(self, ranges, sigma, **options)

    SampleNetwork.votes_of = counted  # type: ignore[method-assign]
    rows = test_evaluation.run(folder / path, images(count), getattr(test_evaluation, make), **kwargs)
    assert without_time(rows) == without_time(read_tsv(folder / path))
    (folder / f"{path}.{rank()}").write_text(str(drawn[0]))


def saved_often(folder: Path, **kwargs: Any) -> None:
    evaluation.SAVE_SECONDS, evaluation.WRITE_SECONDS = 0.0, 0.02
    certified(folder, **kwargs)


FIXED = {"adaptive": False, "rtol": None}


@pytest.mark.parametrize("make", ["lanes", "modules", "laplace"])
@pytest.mark.parametrize("stop", [{}, FIXED], ids=["adaptive", "fixed"])
def test_any_number_of_processes_writes_the_rows_of_one(
    tmp_path: Path, together: Together, make: str, stop: dict[str, Any]
) -> None:
    for size, threads, batch_size in ((1, 2, 400), (2, 1, 64), (2, 2, 400), (4, 1, 9)):
        path = f"{size}-{threads}.tsv"
        assert (
            together(size, tmp_path, "certified", path=path, make=make, threads=threads, batch_size=batch_size, **stop)
            == [(0, "")] * size
        )
        assert without_time(read_tsv(tmp_path / path)) == without_time(read_tsv(tmp_path / "1-2.tsv"))
        assert kept(tmp_path / path) == kept(tmp_path / "1-2.tsv")


def test_one_image_is_drawn_by_all(tmp_path: Path, together: Together) -> None:
    for size in (1, 4):
        done = together(size, tmp_path, "certified", path=f"{size}.tsv", count=1, n=5_000_000, **FIXED)
        assert done == [(0, "")] * size
    assert without_time(read_tsv(tmp_path / "4.tsv")) == without_time(read_tsv(tmp_path / "1.tsv"))
    drawn = [int((tmp_path / f"4.tsv.{rank}").read_text()) for rank in range(4)]
    assert sum(drawn) == int((tmp_path / "1.tsv.0").read_text()) == 5_000_020
    assert min(drawn) > 100_000


def test_a_killed_process_ends_all_and_the_next_ones_go_on(tmp_path: Path, together: Together) -> None:
    options: dict[str, Any] = {"count": 200, "n": 100_000}
    assert together(1, tmp_path, "certified", path="whole.tsv", **options) == [(0, "")]
    seed = time.time_ns() % 2**32
    draws, killed = random.Random(seed), [0, 0, 0]
    for attempt in itertools.count():
        victim = (attempt % 3, votes_path(tmp_path / "r.tsv"), draws.uniform(0.0, 0.2)) if attempt < 6 else None
        done = together(3, tmp_path, "saved_often", kill=victim, path="r.tsv", **options)
        if [status for status, _ in done] == [0, 0, 0]:
            break
        assert victim, done
        assert done[victim[0]][0] in (0, signal.SIGKILL)
        killed[victim[0]] += done[victim[0]][0] == signal.SIGKILL
        for rank, (status, error) in enumerate(done):
            assert rank == victim[0] or status == 0 or "Lost" in error, (seed, error)
    assert sum(killed) >= 3, f"seed {seed}"
    assert without_time(read_tsv(tmp_path / "r.tsv")) == without_time(read_tsv(tmp_path / "whole.tsv")), f"seed {seed}"
    assert kept(tmp_path / "r.tsv") == kept(tmp_path / "whole.tsv"), f"seed {seed}"


def other_weights(folder: Path, fast: bool) -> None:
    smooth = Smooth(test_evaluation.Net(1 + rank()), 3, 0.5, dtype=torch.float32 if fast else None, choices="dense")
    certify_dataset(smooth, *images(), folder / "r.tsv", n0=5, n=50)


@pytest.mark.parametrize("fast", [True, False])
def test_processes_of_different_networks_are_refused(tmp_path: Path, together: Together, fast: bool) -> None:
    what = "fingerprint" if fast else "logits"
    for _, error in together(2, tmp_path, "other_weights", fast=fast):
        assert "all processes must have the same network, settings and images, got" in error
        assert re.search(rf"{what}: '\w+' in process 0, '\w+' in process 1", error)
    assert not (tmp_path / "r.tsv").exists()


def failing(folder: Path, where: int) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a defect")

    if rank() == where:
        SampleNetwork.votes_of = broken  # type: ignore[method-assign, assignment]
    certified(folder, "r.tsv")


@pytest.mark.parametrize("where", [0, 1])
def test_an_error_in_one_process_ends_all(tmp_path: Path, together: Together, where: int) -> None:
    said = ["process 0 has failed or was stopped", "process 1 has failed; it says why", "a defect"]
    done = together(3, tmp_path, "failing", where=where)
    expected = [said[2], said[0], said[0]] if where == 0 else [said[1], said[2], said[0]]
    for (status, error), text in zip(done, expected, strict=True):
        assert status
        assert text in error


def test_a_record_in_use_is_refused_in_all_processes(tmp_path: Path, together: Together) -> None:
    with records.TsvWriter(tmp_path / "r.tsv"):
        first, second = together(2, tmp_path, "certified", path="r.tsv")
    assert "r.tsv is being written by another run" in first[1]
    assert "process 0 has failed" in second[1]


# Training


class Wide:
    """A stepper in float64, and what else is to be done in a step."""

    def __init__(self, stepper: training.Stepper, then: Callable[[], None] = lambda: None) -> None:
        self.stepper, self.model, self.then = stepper, stepper.model, then

    def step(self, x: Tensor, y: Tensor) -> dict[str, float]:
        values = self.stepper.step(x.double(), y)
        self.then()
        return values

    state_dict = load_state_dict = None


def rotated(x: Tensor, *, seed: int) -> Tensor:
    return training.shared(transforms.Rotation(20))(x.float(), seed=seed).to(x.dtype)


def trained(folder: Path, path: str, search: bool, spoil: str = "", precision: str | None = None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = torch.float32 if precision else torch.float64
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    model = convert(model.to(dtype)).train()
    stepper: Any = training.Sgd(model, training.Optimizer(precision=precision or "float32"), 6)
    if search:
        stepper = MaskSearch(model, 0.5, transform=rotated, seed=3)

    def then() -> None:
        with torch.no_grad():
            if spoil == "mask_score" and rank() == 1:
                model[0].mask_score[0, 0, 0, 0] += 1e-6
            if spoil == "mask":
                model[0].mask[rank(), 0, 0, 0] = False  # as many weights are left in each

    x, y = (255 * torch.rand(24, 1, 4, 4)).to(torch.uint8), torch.arange(24) % 3
    feed = training.Feed(2, 8, sigma=0.1, padding=1, flip=True, transform=transforms.Rotation(10), seed=5)
    training.run_epochs(stepper if precision else Wide(stepper, then), x, y, feed)
    torch.save(model.state_dict(), folder / f"{path}.{rank()}")


@pytest.mark.parametrize("search", [False, True], ids=["sgd", "search"])
def test_two_processes_train_as_one_does(tmp_path: Path, together: Together, search: bool) -> None:
    for size in (1, 2):
        assert together(size, tmp_path, "trained", path=str(size), search=search) == [(0, "")] * size
    whole, first, second = (torch.load(tmp_path / name) for name in ("1.0", "2.0", "2.1"))
    for key, value in whole.items():
        if value.is_floating_point():
            assert_close(first[key], value)
        if not key.startswith("1.running"):
            assert torch.equal(first[key], second[key])


def test_two_processes_train_alike_in_bfloat16(tmp_path: Path, together: Together) -> None:
    assert together(2, tmp_path, "trained", path="2", search=False, precision="bfloat16") == [(0, "")] * 2
    first, second = (torch.load(tmp_path / name) for name in ("2.0", "2.1"))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("spoil", ["mask_score", "mask"])
def test_masks_that_differ_are_refused(tmp_path: Path, together: Together, spoil: str) -> None:
    for _, error in together(2, tmp_path, "trained", path="2", search=True, spoil=spoil):
        assert f"all processes must have the same weights and masks after epoch 1, got 0.{spoil}: " in error


def test_a_batch_must_be_shared_evenly(tmp_path: Path, together: Together) -> None:
    for _, error in together(3, tmp_path, "trained", path="3", search=False):
        assert "batch_size must be a multiple of the number of processes, 3, got 8" in error


def demo(folder: Path, out: str) -> None:
    torch.set_num_threads(1)
    less = {"sparsities": [0.5], "methods": ["dense", "csam"], "train": {"epochs": 1}}
    pipeline.demo(override(test_pipeline.TINY, less), folder / out)


def test_a_demo_of_two_processes_survives_a_kill(tmp_path: Path, together: Together) -> None:
    assert together(2, tmp_path, "demo", out="whole") == [(0, "")] * 2
    seed = time.time_ns() % 2**32
    draws = random.Random(seed)
    done = [
        together(2, tmp_path, "demo", out="r", kill=(rank, tmp_path / "r" / "metrics.jsonl", draws.uniform(0.0, 1.0)))
        for rank in (0, 1)
    ]
    assert together(2, tmp_path, "demo", out="r") == [(0, "")] * 2, (seed, done)
    whole, rows = (json.loads((tmp_path / out / "summary.json").read_text()) for out in ("whole", "r"))
    assert test_pipeline.without_seconds(rows) == test_pipeline.without_seconds(whole), (seed, done)
    assert len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) == len(
        (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    )


# The command line


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """The file of an untrained network for digits."""
    path = tmp_path / "network.safetensors"
    model = pipeline.build(PRESETS["digits"], pipeline.load_data(PRESETS["digits"]))
    runs.save_model(path, model, {"model": PRESETS["digits"].model, "normalization": None, "sigma": 0.25})
    return path


def worker(parent: int, rank: int, restart: int) -> int | None:
    """The process id of torchrun's worker of a rank after so many restarts."""
    wanted = {f"RANK={rank}", f"TORCHELASTIC_RESTART_COUNT={restart}"}
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with suppress(OSError):
            if wanted <= set(Path(f"/proc/{pid}/environ").read_text().split("\0")):
                return int(pid)
    return None


def test_torchrun_takes_up_again_what_killed_workers_left(tmp_path: Path, network: Path) -> None:
    command = ["certify", str(network), "--images", "12", "--n", "20000"]
    with pytest.raises(SystemExit) as exit_:
        cli.main([*command, "--out", str(tmp_path / "one")])
    assert exit_.value.code == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    votes = tmp_path / "two" / "certificates" / "smoothing.votes.jsonl"
    killed = 0
    with subprocess.Popen(
        [*torchrun, "-m", "csam", "--", *command, "--out", str(tmp_path / "two")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            for restart, rank in enumerate((1, 0)):  # each is killed once another image was written
                while process.poll() is None:
                    time.sleep(0.02)
                    pid = worker(process.pid, rank, restart)
                    if pid and votes.exists() and votes.read_text().count("\n") > 1 + 3 * (restart + 1):
                        os.kill(pid, signal.SIGKILL)
                        killed += 1
                        break
            out, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0, out
    assert killed == 2
    records = [tmp_path / run / "certificates" / "smoothing.tsv" for run in ("one", "two")]
    assert without_time(read_tsv(records[1])) == without_time(read_tsv(records[0]))
    assert kept(records[1]) == kept(records[0])
    assert out.count(str(records[1])) == 1


def test_a_world_without_the_rest_is_refused(
    tmp_path: Path, network: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def call(**environment: str) -> tuple[Any, str]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as exit_:
            cli.main(["certify", str(network), "--images", "1", "--n", "10", "--out", str(tmp_path / "r")])
        return exit_.value.code, capfd.readouterr().err

    code, err = call(WORLD_SIZE="2", RANK="1")
    assert code == 2
    assert "got 2 without MASTER_ADDR, MASTER_PORT; start with torchrun --nproc-per-node 2 -m csam -- " in err
    monkeypatch.setattr(processes, "MEET", timedelta(seconds=1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code, err = call(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    assert code == 1
    assert f"csam: process 1: the 2 processes of WORLD_SIZE did not meet at 127.0.0.1:{port}" in err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("met", [False, True])
def test_what_a_dead_start_left_in_the_store_is_not_taken(met: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MEET", timedelta(seconds=5))
    store = dist.HashStore()
    for key, value in {"csam": "old", "old/1": "dead", **({"old/seen": "dead"} if met else {})}.items():
        store.set(key, value)
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(processes._own, store, rank, 3) for rank in (1, 2)]
        time.sleep(0.2)
        early = [other.done() for other in others]
        processes._own(store, 0, 3).set("address", "fresh")
        assert [other.result().get("address") for other in others] == [b"fresh"] * 2
    assert early == [False, False]


def other_folder(folder: Path) -> None:
    with runs.Run(folder / f"r{rank()}", {"seed": 0}):
        raise AssertionError("opened")


def test_processes_of_different_folders_are_refused(tmp_path: Path, together: Together) -> None:
    for _, error in together(2, tmp_path, "other_folder"):
        assert "all processes must have the same run folder, settings and data, got folder" in error
    assert not (tmp_path / "r0").exists()
