"""The GPU ledger: what every kernel costs, known without a GPU.

`python bench/gpu_ledger.py` (`make gpu-ledger`) calls each launcher of the Triton provider on tensors of the meta
device, compiles every launch it records ahead of time for sm_80, sm_90 and sm_100 with that class's tuning row,
compiles every csrc/cuda/*.cu for the same, and writes bench/gpu_ledger.csv: registers, spills, shared memory,
theoretical occupancy, bytes and FLOPs a call against the least possible, launches, and the time that the card's
published bandwidth and peak allow. `--check` compares with the committed ledger instead and fails on any spill and on
an occupancy or a byte count that got worse. It compiles what the ledger has no stamp of, which names the kernel's
source, its arguments and Triton's version, and every sixteenth of the rest; `--check-all` compiles everything.

Bytes are those of the tensors that a launch reads and writes, each once: what the caches do not hold comes on top.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from csam_kernels import backend
from csam_kernels import triton as provider
from csam_kernels.triton import tuning
from csam_kernels.triton.launch import Launch, record
from gpu_cases import Case, allow_tf32, cases, tensors
from nvcc import compile_kernels, nvcc

T = TypeVar("T")
LEDGER = Path(__file__).with_name("gpu_ledger.csv")
TRUST = 16  # `--check` compiles one in so many kernels again whose stamp the ledger has
MORE_THAN_LEAST = 1.05  # bytes a call over each input once + each output once


class Card(NamedTuple):
    """An accelerator; figures from NVIDIA's data sheets (A100 80GB SXM, H100 SXM, H200 SXM, B200), dense."""

    name: str
    bandwidth: float  # bytes/s
    peak: dict[str, float]  # FLOP/s by what multiplies
    shared: int  # bytes of shared memory a multiprocessor (CUDA C++ Programming Guide, compute capabilities)

    def seconds(self, moved: int, flops: int, peak: str) -> float:
        """The least time for so many bytes and operations."""
        return max(moved / self.bandwidth, flops / self.peak[peak])


CARDS = {
    80: Card("A100", 2.039e12, {"float32": 19.5e12, "tf32": 156e12, "half": 312e12}, 164 << 10),
    90: Card("H100", 3.35e12, {"float32": 67e12, "tf32": 494.7e12, "half": 989.4e12}, 228 << 10),
    100: Card("B200", 8.0e12, {"float32": 80e12, "tf32": 1100e12, "half": 2250e12}, 228 << 10),
}
H200 = CARDS[90]._replace(name="H200", bandwidth=4.8e12)
CUDA = Path(__file__).resolve().parents[1] / "csrc/cuda"
WARPS, REGISTERS, BLOCKS = 64, 65536, 32  # a multiprocessor's limits, the same for the three classes

FIELDS = (
    "provider",
    "op",
    "case",
    "kernel",
    "variant",
    "arch",
    "registers",
    "spill_bytes",
    "shared_bytes",
    "warps",
    "occupancy",
    "launches",
    "bytes",
    "least_bytes",
    "flops",
    "flops_per_byte",
    "predicted_us",
    "stamp",
)


def occupancy(registers: int, shared: int, warps: int, card: Card) -> float:
    """Theoretical share of a multiprocessor's warps that are resident."""
    a_warp = -(-max(registers, 1) * 32 // 256) * 256  # registers are given out in units of 256 a warp
    blocks = min(REGISTERS // (a_warp * warps), WARPS // warps, BLOCKS, card.shared // (shared + 1024))
    return blocks * warps / WARPS


class Compiled(NamedTuple):
    registers: int
    spill_bytes: int
    shared_bytes: int


def source_of(launch: Launch, arch: int) -> tuple[ASTSource, GPUTarget, dict[str, Any]]:
    """What Triton would compile for a launch on a device of the architecture."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = launch.arguments | launch.options
    bound, specialization, options = bind(**keywords)
    options, signature, constexprs, attrs = kernel._pack_args(backend, keywords, bound, specialization, options)
    source = ASTSource(kernel, signature, constexprs, attrs)
    return source, target, options.__dict__


def compile_source(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> Compiled:
    compiled = triton.compile(source, target=target, options=options)
    return assemble(compiled.asm["ptx"], compiled.metadata.shared)


def assemble(ptx: str, shared: int) -> Compiled:
    arch = re.search(r"\.target (sm_\w+)", ptx)
    assert arch, "PTX without a target"
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    ptxas = tools / ("ptxas-blackwell" if arch[1].startswith("sm_1") else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={arch[1]}", source, "-o", Path(folder, "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return Compiled(*ptxas_counts(said)[:2], shared)


def ptxas_counts(said: str) -> tuple[int, int, int]:
    """Registers, spilled bytes (stores and loads) and static shared memory from one kernel's `ptxas -v`."""
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    shared = re.search(r"(\d+) bytes smem", said)
    if not registers or not spills:
        raise RuntimeError(f"ptxas said nothing of registers: {said}")
    return int(registers[1]), int(spills[1]) + int(spills[2]), int(shared[1]) if shared else 0


def called(case: Case) -> list[Launch]:
    """The launches of a call, which are recorded and not run."""
    with record() as launches:
        getattr(provider, case.op)(*case.arguments)
    return launches


def compile_ahead(launches: list[Launch], arch: int) -> int:
    """Compile what was recorded, on all cores, for Triton's cache, where a launch finds it; how many do not compile."""
    jobs = {specialization(*job): job for job in (source_of(launch, arch) for launch in launches)}
    return _in_parallel(_compiles, list(jobs.values())).count(False)


def _compiles(index: int) -> bool:
    source, target, options = _jobs[index]
    try:
        triton.compile(source, target=target, options=options)
    except Exception:
        return False
    return True


def triton_rows(known: dict[str, Compiled]) -> Iterator[dict[str, Any]]:
    """A row for every kernel of a call and one, kernel "*", for the whole call, for each architecture.

    What is known by its stamp is not compiled.
    """
    calls, sources = [], {}
    for case in cases(torch.device("meta")):
        allow_tf32(case.peak == "tf32")
        for arch in CARDS:
            with tuning.forced(tuning.CLASSES[arch // 10]), record() as launches:
                out = getattr(provider, case.op)(*case.arguments)
            jobs = [source_of(launch, arch) for launch in launches]
            keys = [stamp(*job) for job in jobs]
            sources |= dict(zip(keys, jobs, strict=True))
            calls.append((case, arch, launches, keys, sum(t.nbytes for t in case.inputs() + tensors(out))))
    new = {key: job for key, job in sources.items() if key not in known}
    compiled = known | dict(zip(new, _in_parallel(_compile_job, list(new.values())), strict=True))
    for case, arch, launches, keys, least in calls:
        card = CARDS[arch]
        variants: Counter[str] = Counter()
        for key in dict.fromkeys(keys):
            mine = [launch for launch, k in zip(launches, keys, strict=True) if k == key]
            warps, c, kernel = mine[0].options["num_warps"], compiled[key], mine[0].kernel.__name__
            variants[kernel] += 1
            yield _row("triton", case, kernel, arch, mine, "") | {
                "variant": str(variants[kernel]),
                "registers": c.registers,
                "spill_bytes": c.spill_bytes,
                "shared_bytes": c.shared_bytes,
                "warps": warps,
                "occupancy": round(occupancy(c.registers, c.shared_bytes, warps, card), 3),
                "stamp": key,
            }
        yield _row("triton", case, "*", arch, launches, least)


def cuda_rows() -> Iterator[dict[str, Any]]:
    """A row for every kernel of csrc/cuda and architecture; their calls move what the Triton provider's move."""
    command = nvcc()
    if command is None:
        raise RuntimeError("no nvcc on PATH, under CUDA_HOME or from requirements-nvcc.txt (`make gpu-ledger`)")
    jobs = [(source, arch) for source in sorted(CUDA.glob("*.cu")) for arch in CARDS]
    with ThreadPoolExecutor(os.cpu_count()) as pool, tempfile.TemporaryDirectory() as folder:
        reports = pool.map(
            lambda job: compile_kernels(command, *job, Path(folder, f"{job[0].stem}{job[1]}.cubin")), jobs
        )
        for (source, arch), kernels in zip(jobs, reports, strict=True):
            warps = _block_threads(source) // 32
            for kernel in sorted(kernels):
                yield {
                    "provider": "cuda",
                    "op": source.stem,
                    "case": "",
                    "kernel": _demangled(kernel.name),
                    "arch": f"sm_{arch}",
                    "registers": kernel.registers,
                    "spill_bytes": kernel.spills + kernel.stack,
                    "shared_bytes": kernel.shared,
                    "warps": warps,
                    "occupancy": round(occupancy(kernel.registers, kernel.shared, warps, CARDS[arch]), 3),
                    "bytes": "",
                }


def _block_threads(source: Path) -> int:
    stated = re.search(r"kThreads = (\d+);", source.read_text())
    if not stated:
        raise RuntimeError(f"{source.name} must state its block size as `kThreads = N;`")
    return int(stated[1])


@cache
def _demangled(name: str) -> str:
    said = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"^void |csam::cuda::|\(anonymous namespace\)::|\(.*", "", said.split("(csam")[0])


def _row(name: str, case: Case, kernel: str, arch: int, launches: list[Launch], least: int | str) -> dict[str, Any]:
    card = CARDS[arch]
    moved = sum(launch.bytes_read + launch.bytes_written for launch in launches)
    flops = sum(launch.flops for launch in launches)
    return {
        "provider": name,
        "op": case.op,
        "case": case.name,
        "kernel": kernel,
        "arch": f"sm_{arch}",
        "launches": len(launches),
        "bytes": moved,
        "least_bytes": least,
        "flops": flops,
        "flops_per_byte": round(flops / moved, 2) if moved else "",
        "predicted_us": round(1e6 * card.seconds(moved, flops, case.peak), 2),
    }


def specialization(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> str:
    return f"{source.hash()} {sorted(options.items(), key=str)} {target.arch}"


def stamp(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> str:
    """Names what is compiled, on any machine: where the files of Triton's own library lie is left out."""
    here = {name: value for name, value in options.items() if name != "extern_libs"}
    return hashlib.sha256(f"{triton.__version__} {specialization(source, target, here)}".encode()).hexdigest()[:16]


_jobs: list[tuple[ASTSource, GPUTarget, dict[str, Any]]] = []


def _in_parallel(work: Callable[[int], T], jobs: list[tuple[ASTSource, GPUTarget, dict[str, Any]]]) -> list[T]:
    _jobs[:] = jobs  # reach the workers by fork: kernels do not pickle
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        return list(pool.map(work, range(len(jobs))))


def _compile_job(index: int) -> Compiled:
    source, target, options = _jobs[index]
    try:
        return compile_source(source, target, options)
    except Exception as error:
        constants = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}
        raise RuntimeError(f"{source.name} does not compile for sm_{target.arch} with {constants}: {error}") from error


def check(rows: list[dict[str, Any]], committed: list[dict[str, str]]) -> list[str]:
    """What is worse than the ledger or beyond the limits, in words."""
    known = {tuple(row.get(f, "") for f in FIELDS[:6]): row for row in committed}
    faults = []
    for row in rows:
        key = tuple(row.get(f, "") for f in FIELDS[:6])
        name, before = " ".join(part for part in key if part), known.get(key)
        if before is None:
            faults.append(f"{name}: not in the ledger; run `make gpu-ledger` and commit it")
            continue
        if row.get("spill_bytes"):
            faults.append(f"{name}: spills {row['spill_bytes']} bytes")
        if before["occupancy"] and row["occupancy"] < float(before["occupancy"]):
            faults.append(f"{name}: occupancy {row['occupancy']}, the ledger says {before['occupancy']}")
        if row["bytes"] and row["bytes"] > int(before["bytes"] or 0):
            faults.append(f"{name}: {row['bytes']} bytes, the ledger says {before['bytes']}")
    return faults


def trusted(committed: list[dict[str, str]]) -> dict[str, Compiled]:
    """What the ledger says of its stamps, but for every sixteenth."""
    stamped = {row["stamp"]: row for row in committed if row["stamp"]}
    measured = ("registers", "spill_bytes", "shared_bytes")
    return {s: Compiled(*(int(stamped[s][m]) for m in measured)) for i, s in enumerate(sorted(stamped)) if i % TRUST}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed ledger, write nothing")
    parser.add_argument("--check-all", action="store_true", help="the same, all kernels compiled anew")
    asked = parser.parse_args()
    if backend.INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set: kernels are compiled here, not interpreted; unset it")
    if asked.check or asked.check_all:
        with LEDGER.open(newline="") as file:
            committed = list(csv.DictReader(file))
        rows = [*triton_rows({} if asked.check_all else trusted(committed)), *cuda_rows()]
        faults = check(rows, committed)
        print("\n".join(faults) or f"{len(rows)} rows, none worse than the ledger")
        return 1 if faults else 0
    rows = [*triton_rows({}), *cuda_rows()]
    with LEDGER.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {LEDGER} ({len(rows)} rows)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
