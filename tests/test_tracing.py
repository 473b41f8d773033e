"""Preparing a network while other threads run, print and prepare others."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import csam
from csam import inference, lanes, tracing
from test_smoothing import SHAPE, SIGMA, net, picture


class Meanwhile(nn.Module):
    """Runs `call` on another thread while this network is being traced by torch.fx or torch.export."""

    def __init__(self, call: Callable[[], Any], export: bool) -> None:
        super().__init__()
        self.net, self.call, self.export = net(), call, export

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting() if self.export else isinstance(x, torch.fx.Proxy):
            with ThreadPoolExecutor(1) as other:
                other.submit(self.call).result()
        return self.net(x)


def meanwhile(call: Callable[[], Any], export: bool) -> list[Any]:
    """What `call` gave on another thread while a network was traced, each time that its forward ran."""
    found: list[Any] = []
    model, x = Meanwhile(lambda: found.append(call()), export).eval(), torch.rand(2, *SHAPE)
    if export:
        lanes.exported(model, x)
    else:
        inference.trace(model)
    return found


@pytest.mark.parametrize("export", [False, True], ids=["fx", "export"])
def test_other_threads_run_networks_while_one_is_traced(export: bool) -> None:
    x, owner = picture(), net().eval()
    others = [
        csam.Smooth(net().eval(), 5, SIGMA),
        csam.Smooth(csam.convert(net().eval()), 5, SIGMA, dtype=torch.bfloat16, choices="module"),
        csam.Smooth(lambda x: owner(x), 5, SIGMA),
    ]
    plain, batch = nn.Sequential(net().eval(), nn.Sequential(nn.ReLU())), torch.rand(3, *SHAPE)
    wanted, logits = [smooth.counts(x, 300) for smooth in others], plain(batch)
    methods = nn.Module.__call__, nn.Module.__getattr__
    found_each_time = meanwhile(lambda: ([smooth.counts(x, 300) for smooth in others], plain(batch), plain[0]), export)
    assert found_each_time
    for found in found_each_time:
        assert all(map(torch.equal, found[0], wanted))
        assert torch.equal(found[1], logits)
        assert found[2] is plain[0]
    assert (nn.Module.__call__, nn.Module.__getattr__) == methods


def test_other_threads_print_and_log_while_one_is_exported() -> None:
    stream, logged = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(logged)
    logging.getLogger("csam.test").addHandler(handler)

    def say() -> None:
        print("heard", file=sys.stderr)
        logging.getLogger("csam.test").error("logged")

    def told() -> None:
        with tracing.quiet():
            say()
            with ThreadPoolExecutor(1) as other:
                other.submit(say).result()
            print("still in silence", file=sys.stderr)
        say()

    try:
        with contextlib.redirect_stderr(stream):
            before = sys.stderr
            told()
            assert sys.stderr is before
    finally:
        logging.getLogger("csam.test").removeHandler(handler)
    assert (stream.getvalue(), logged.getvalue()) == ("heard\n" * 2, "logged\n" * 2)
    assert not handler.filters


class Deciding(nn.Module):
    """Python that torch.fx cannot trace, so that torch.export is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 1:
            raise ValueError("x must be grey")
        return self.head(F.relu(self.first(x)).flatten(1))


def test_many_threads_prepare_at_once() -> None:
    x, models = picture(), [kind().eval() for kind in (Deciding, net) for _ in range(4)]
    wanted = [csam.Smooth(model, 5, SIGMA, dtype=torch.bfloat16).counts(x, 100) for model in models]
    with ThreadPoolExecutor(8) as pool:
        made = [csam.Smooth(model, 5, SIGMA, dtype=torch.bfloat16) for model in models]
        assert all(map(torch.equal, pool.map(lambda smooth: smooth.counts(x, 100), made), wanted))
        one = csam.Smooth(models[0], 5, SIGMA, dtype=torch.bfloat16)
        assert len({id(prepared) for prepared in pool.map(lambda _: one.prepare(x), range(8))}) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_prepares_while_the_parent_did() -> None:
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with tracing.alone():
            held.set()
            over.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    child = os.fork()
    if not child:
        with tracing.alone():
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    over.set()
    holder.join()
