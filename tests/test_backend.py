"""Who serves a call: forced providers, reasons, and the torch thread pool."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import csam_kernels as ck
from csam_kernels import _C


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_cpu_serves_and_the_others_say_why_not() -> None:
    report = ck.backends()
    assert report["cpu"] == "available"
    assert report["cuda"] != "available"
    assert run("import csam_kernels as ck; print(ck.backends()['triton'])").stdout.startswith(
        "loads, but torch sees no"
    )
    text = ck.explain("masked_conv2d", torch.zeros(1), [torch.zeros(1)])
    assert text.splitlines()[0] == "cpu: serves masked_conv2d"
    with pytest.raises(ValueError, match="op must be one of"):
        ck.explain("conv9d")


def test_forced_backend() -> None:
    code = "import torch, csam_kernels as ck; print(ck.binarize([torch.tensor([1., 2.])], 0.5), ck.explain('binarize'))"
    forced = run(code, CSAM_BACKEND="reference")
    assert "reference: serves binarize" in forced.stdout
    for name, message in (
        ("triton", "triton: serves cuda tensors, the call is on cpu"),
        ("opencl", "CSAM_BACKEND must be one of"),
    ):
        refused = run(code, CSAM_BACKEND=name)
        assert refused.returncode != 0
        assert message in refused.stderr


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_what_takes_no_tensor_is_served_on_the_cpu_whoever_is_forced(name: str) -> None:
    code = "import csam_kernels as ck; print(ck.philox_uniform(1, 2, seed=0).device, ck.explain('philox_uniform'))"
    served = run(code, CSAM_BACKEND=name).stdout.splitlines()
    assert served[0] == "cpu cpu: serves philox_uniform"
    assert served[3] == f"reference: no, CSAM_BACKEND={name}"


def test_triton_is_interpreted_on_request_only() -> None:
    code = (
        "import sys; sys.modules['csam_kernels._C'] = sys.modules['csam_kernels._CUDA'] = None\n"
        "import torch, csam_kernels as ck\n"
        "print(ck.explain('binarize'))\n"
        "print(ck.binarize([torch.tensor([1., 2.])], 0.5))"
    )
    refused = run(code, TRITON_INTERPRET="1")
    assert refused.stdout.splitlines()[2:] == [
        "triton: no, only on request (CSAM_BACKEND=triton)",
        "reference: no, only on request (CSAM_BACKEND=reference)",
    ]
    assert "BackendUnavailable: binarize: cpu: csam_kernels._C does not load" in refused.stderr
    assert "triton: serves binarize" in run(code, TRITON_INTERPRET="1", CSAM_BACKEND="triton").stdout


def test_who_comes_after_the_one_that_serves_is_not_imported() -> None:
    code = (
        "import sys, csam_kernels as ck; ck.philox_uniform(1, 1, seed=0)\n"
        "print([n for n in ck.backend.PROVIDERS if f'csam_kernels.{n}' in sys.modules])"
    )
    assert run(code).stdout == "['cpu']\n"
    assert run(code, CSAM_BACKEND="reference").stdout == "['reference']\n"


def test_the_reference_has_no_sample_network() -> None:
    """It gives logits of a program, `reference.sample_logits`, and is nothing to draw votes from."""
    code = "import torch, csam_kernels as ck; ck.backend.serve('sample_network', torch.device('cpu'))"
    assert run(code, CSAM_BACKEND="reference").stderr.splitlines()[-1] == (
        "csam_kernels.backend.BackendUnavailable: sample_network: reference: has no sample_network; "
        "unset CSAM_BACKEND=reference, and cpu serves it"
    )


def test_unserved_device_is_an_error_that_names_the_reasons() -> None:
    with pytest.raises(ck.BackendUnavailable, match=r"cpu: serves cpu tensors"):
        ck.backend.serve("binarize", torch.device("xpu"))


def test_isa_can_be_forced_and_bad_names_are_refused() -> None:
    assert run("from csam_kernels import _C; import torch; print(_C.isa())", CSAM_ISA="generic").stdout == "generic\n"
    with pytest.raises(ValueError, match="must be one of auto"):
        _C.set_isa("sse9")


def test_kernels_share_torchs_openmp_pool() -> None:
    """One OpenMP runtime in the process: a second one would fight torch's threads for the cores."""
    code = (
        "import torch, csam_kernels as ck\n"
        "torch.randn(1000, 1000) @ torch.randn(1000, 1000)\n"
        "ck.smoothing_noise(torch.rand(3, 32, 32), 400, 0.5, seed=0)\n"
        "maps = {l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l or 'libiomp' in l}\n"
        "print(len(maps), len(__import__('os').listdir('/proc/self/task')))"
    )
    runtimes, threads = run(code, OMP_NUM_THREADS="2").stdout.split()
    assert runtimes == "1"
    assert int(threads) <= 4
