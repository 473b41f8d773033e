"""The `csam` command: demo, train, certify, report, bench, info.

Exit codes: 0 done, 1 failed (a full disk, a diverged training, no backend), 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import csam_kernels
from csam import microbench, models, pipeline, processes, records, report, runs, sequential, training, transforms
from csam.adapters import ModelError
from csam.laws import LAWS
from csam.nn import GRANULARITIES
from csam.settings import DTYPES, OF_STOPPING, PRESETS, PRETRAINED, Settings, merged, override
from csam_kernels import backend

LONG_SECONDS = 600  # whose speed tells what is left
TOLD_SECONDS = 60  # between lines where there is no bar to see
T = TypeVar("T")
Command = Callable[..., Any]
messages = Console(stderr=True, highlight=False, markup=False)  # names of files may hold brackets
results = Console(highlight=False, markup=False)


class Interrupted(Exception):
    """Ctrl-C in a job that can be continued."""


class Failed(Exception):
    """A job that ended for a reason outside its input."""


class Values(click.ParamType):
    """Comma-separated values of one type, as a tuple."""

    def __init__(self, kind: type, name: str) -> None:
        self.kind = kind
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self.kind(part.strip()) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a comma-separated list of {self.name}", param, ctx)


class Model(click.ParamType):
    """A file that exists, or package.module:factory."""

    name = "FILE or MODULE:FACTORY"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        own = models.names_factory(str(value))
        found: Path | str = str(value) if own else FILE.convert(value, param, ctx)
        return found


class OrNone(click.ParamType):
    """Another type, or "none", which unsets what the preset or the file of --config sets."""

    def __init__(self, kind: Any) -> None:
        self.kind = click.types.convert_type(kind)
        self.name = self.kind.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "none" else self.kind.convert(value, param, ctx)

    def get_metavar(self, *args: Any, **named: Any) -> str | None:  # a context from click 8.2 on
        return self.kind.get_metavar(*args, **named)


NUMBERS = Values(float, "NUMBER,...")
NAMES = Values(str, "NAME,...")
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
PLACE = click.Path(exists=True, path_type=Path)
MODEL = Model()

# (flag, place in Settings, type, help): the options that change a preset.
DATA_OPTIONS = (
    ("--train-subset", "train_subset", OrNone(int), "Train on this many images, stratified (none: all)."),
    ("--test-subset", "test_subset", OrNone(int), "Test on this many images, stratified (none: all)."),
    ("--resize", "resize", OrNone(int), "Of images: what their shorter side becomes, in pixels."),
    ("--crop", "crop", OrNone(int), "Of images: side of the central square that is kept, in pixels."),
    ("--model", "model", click.Choice(list(models.ARCHITECTURES)), "Network."),
    (
        "--normalization",
        "normalization",
        OrNone(click.Choice(list(models.NORMALIZATION))),
        "Pixel statistics of the network.",
    ),
    (
        "--transform",
        "transform",
        str,
        f"Transforms of training and CC-Cert, as kind:value,...: {', '.join(transforms.KINDS)}.",
    ),
    ("--seed", "seed", int, "Seed of everything random."),
)
CORRUPTION_OPTIONS = (
    ("--corruption", "corruption", OrNone(str), "Of CIFAR-10-C: the name of a file, such as fog."),
    ("--severity", "severity", OrNone(int), "Of the corruption, 1 to 5."),
)
TRAIN_OPTIONS = (
    ("--weights", "weights", FILE, "Start from this safetensors file (then --epochs 3, --lr 0.02 if not given)."),
    ("--sigma", "train.sigma", float, "Standard deviation of the noise of training and smoothing, pixels in [0, 1]."),
    ("--noise", "train.noise", click.Choice(list(LAWS)), "Its law. Radii are l2 under Gaussian noise, l1 otherwise."),
    ("--epochs", "train.epochs", int, "Epochs of the dense network."),
    ("--search-epochs", "train.search_epochs", int, "Epochs of the mask search."),
    ("--finetune-epochs", "train.finetune_epochs", int, "Epochs of fine-tuning after the search."),
    ("--batch-size", "train.batch_size", int, "Images a step."),
    ("--lr", "train.lr", float, "Learning rate of the dense network."),
    ("--finetune-lr", "train.finetune_lr", float, "Learning rate of fine-tuning."),
    ("--precision", "train.precision", click.Choice(training.PRECISIONS), "Arithmetic of training."),
    (
        "--granularity",
        "train.granularity",
        click.Choice(GRANULARITIES),
        "One mask value a.",
    ),
    (
        "--perturbation",
        "search.perturbation",
        click.Choice(["adversarial", "uniform", "none"]),
        "Mask noise of C-SAM.",
    ),
    ("--rho", "search.rho", float, "Length of the adversarial step over all masks."),
    ("--radius", "search.radius", float, "Half-width of the uniform mask noise."),
    ("--joint", "search.joint", bool, "Train the weights during the mask search too (true, false)."),
    ("--search-lr", "search.lr", float, "Learning rate of the mask scores."),
    ("--tau", "search.tau", float, "Quantile of the initial masks."),
    ("--structural", "search.structural", float, "Weight of the structural-stability term."),
    ("--consistency", "search.consistency", float, "Weight of the soft/hard consistency term."),
    ("--margin", "search.margin", float, "Weight of the margin term."),
    ("--budget", "search.budget", float, "Weight of the sparsity term."),
    ("--task", "search.task", float, "Weight of the cross-entropy."),
)
CERTIFY_OPTIONS = (
    ("--images", "certify.images", OrNone(int), "Certify this many test images, evenly spaced (none: all)."),
    ("--n0", "certify.n0", int, "Noise samples that choose the class."),
    ("--n --samples", "certify.n", int, "Noise samples that certify it (under torchrun --n is ambiguous)."),
    ("--alpha", "certify.alpha", float, "Probability that a certificate is wrong."),
    ("--adaptive/--fixed", "certify.adaptive", bool, "Stop before n samples when the answer is settled."),
    (
        "--target-radius",
        "certify.target_radius",
        OrNone(float),
        "Adaptive: stop if this radius is certified or out of reach.",
    ),
    (
        "--rtol",
        "certify.rtol",
        OrNone(float),
        "Adaptive: stop within this share of the radius that n samples would give.",
    ),
    (
        "--method",
        "certify.method",
        OrNone(click.Choice(list(sequential.METHODS))),
        "Adaptive: rule for stopping (none: the best).",
    ),
    (
        "--dtype",
        "certify.dtype",
        OrNone(click.Choice([dtype for dtype in DTYPES if dtype])),
        "Fast path in this arithmetic (none: the plain module). int8: what is certified is the quantised network.",
    ),
    (
        "--sound-float/--plain-float",
        "certify.sound_float",
        bool,
        "Noise on the grid of the pixels: the proof covers floating point.",
    ),
    ("--radii", "certify.radii", NUMBERS, "Radii of the table."),
    ("--cc-n", "certify.cc_n", int, "CC-Cert: draws a block."),
    ("--cc-k", "certify.cc_k", int, "CC-Cert: blocks."),
    ("--delta", "certify.delta", float, "CC-Cert: divisor of the bound."),
    ("--eps", "certify.eps", NUMBERS, "CC-Cert: eps of the table."),
)
COMPARE_OPTIONS = (
    ("--methods", "methods", NAMES, f"Rows of the comparison, among {', '.join(pipeline.METHODS)}."),
    ("--sparsities", "sparsities", NUMBERS, "Fractions of the weights to remove."),
)


def setting_options(*groups: Sequence[tuple[str, str, Any, str]]) -> Callable[[Command], Command]:
    """The click options of these groups; an option not given leaves the preset's value."""

    def decorate(command: Command) -> Command:
        for flag, place, kind, text in reversed([option for group in groups for option in group]):
            values = {name: _shown(_lookup(PRESETS[name], place)) for name in PRESETS}
            same = len(set(values.values())) == 1
            shown = values["digits"] if same else ", ".join(f"{name}: {v}" for name, v in values.items())
            command = click.option(
                *flag.split(), place.replace(".", "__"), type=kind, default=None, help=f"{text}  [{shown}]"
            )(command)
        return command

    return decorate


def _lookup(settings: Any, place: str) -> Any:
    for name in place.split("."):
        settings = getattr(settings, name)
    return settings


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def common_options(command: Command) -> Command:
    """Options of the commands that load data."""
    for option in (
        click.option("--threads", type=click.IntRange(1), help="CPU threads  [torch's choice]"),
        click.option(
            "--config", type=FILE, help="Settings from a JSON file: a run's config.json, or {setting: value}."
        ),
        click.option(
            "--data-dir",
            type=PLACE,
            help="Where the data is (cifar10: a folder or a tar, any usual form; cifar10c: its unpacked folder; "
            "images: a folder or a tar of class folders).",
        ),
        click.option(
            "--data",
            type=click.Choice(list(PRESETS)),
            help="Data set; cifar10c has test images only and is for certify; images are your own, in class folders as "
            "ImageNet's.  [digits]",
        ),
    ):
        command = option(command)
    return command


def settings_from(
    data: str | None, data_dir: Path | None, config: Path | None, threads: int | None, given: dict[str, Any]
) -> Settings:
    """The preset of the data set, changed by the configuration file, changed by the options given."""
    if threads:
        torch.set_num_threads(threads)
    stored = _stored_settings(config, given) if config else {}
    preset = PRESETS[data or stored.get("data", "digits")]
    nested: dict[str, Any] = {"data": preset.data}
    if given.get("certify__adaptive") is False:  # so that --fixed needs no more beside a file that says how to stop
        nested["certify"] = dict.fromkeys(OF_STOPPING)
    if data_dir:
        nested["data_dir"] = str(data_dir)
    for name, value in given.items():
        if value is None:
            continue
        *groups, last = name.split("__")
        target = nested
        for group in groups:
            target = target.setdefault(group, {})
        target[last] = None if value == "none" else str(value) if isinstance(value, Path) else value
    return override(preset, merged(PRETRAINED if given.get("weights") else {}, stored, nested))


def _stored_settings(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    found = runs.read_json(path)
    for key in ("config", "settings"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object of settings, got {type(found).__name__}")
    if found.get("data", "digits") not in list(PRESETS):
        raise ValueError(f"{path}: data must be one of {', '.join(PRESETS)}, got {found['data']!r}")
    if given.get("weights", "unused"):  # named anew, or of no use to the command
        return {**found, "weights": None}
    if found.get("weights") and not Path(str(found["weights"])).exists():
        raise ValueError(f"{path} was made with given weights, which a run does not keep; name the file with --weights")
    return found


@contextmanager
def bar(title: str, total: int, each: int | None = None) -> Iterator[pipeline.Advance]:
    """A progress bar on standard error, with the speed of samples and the time left; where that is no terminal, a line
    a minute. If it is known how many samples `each` step takes, the bar moves within a step.
    """
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[speed]}"),
    )
    # An image may take minutes, which count in what is left.
    with Progress(
        *columns,
        console=messages,
        refresh_per_second=1,
        speed_estimate_period=LONG_SECONDS,
        get_time=time.monotonic,
    ) as progress:
        task, done, known, drawn = progress.add_task(title, total=total, speed=""), 0, 0, 0
        start = shown = told = time.monotonic()

        def show() -> None:
            speed = f"{drawn / max(time.monotonic() - start, 1e-9):,.0f} samples/s" if drawn else ""
            within = known + drawn / each if each else 0
            progress.update(task, completed=min(total, max(done, within)), speed=speed)

        def advance(steps: int, samples: int = 0) -> None:
            nonlocal done, known, drawn, shown, told
            done, drawn = done + steps, drawn + samples
            if not drawn:
                known = done  # from before
            now = time.monotonic()
            if now - shown > 0.5:
                shown = now
                show()
            if now - told > TOLD_SECONDS and not messages.is_terminal:
                told = now
                left = progress.tasks[task].time_remaining
                parts = [f"{title}: {done}/{total}", progress.tasks[task].fields["speed"]]
                parts += [] if left is None else [f"{timedelta(seconds=round(left))} left"]
                messages.print(", ".join(filter(None, parts)), soft_wrap=True)

        try:
            yield advance
        finally:
            show()


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Meet the processes of torchrun, and turn what may stop a long job from outside into a line on how to go on."""
    again = f"what was finished is in {folder}; give the same command again to continue"
    try:
        with processes.joined() as rank:
            messages.quiet = results.quiet = rank > 0
            yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {again}") from None
    except processes.Lost as error:
        raise Failed(f"{error}; {again}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f" while writing {error.filename}" if error.filename else ""
        raise Failed(f"no space left on the disk{place}; {again} when there is space") from error


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(runs.version(), prog_name="csam")
def cli() -> None:
    """Prune networks by compression-aware sharpness minimisation (C-SAM) and certify what is left."""


@cli.command()
@common_options
@setting_options(DATA_OPTIONS, TRAIN_OPTIONS, COMPARE_OPTIONS, CERTIFY_OPTIONS)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True, help="Run folder."
)
def demo(
    out: Path, data: str | None, data_dir: Path | None, config: Path | None, threads: int | None, **given: Any
) -> None:
    """Train, prune, fine-tune and certify: C-SAM beside magnitude pruning and the dense network.

    Prints one table and writes summary.json, summary.csv and certified_accuracy.png into the run folder. Stopped
    at any moment, the same command continues and ends with the same numbers.
    """
    settings = settings_from(data, data_dir, config, threads, given)
    with resumable(out):
        before = (out / "summary.json").exists()
        summary = pipeline.demo(settings, out, bar)
    show_demo(out, summary)
    if before:
        messages.print("(this run was finished before; --out another folder computes it afresh)", soft_wrap=True)


def show(table: Table) -> None:
    """Print a table at its full width: a terminal may wrap it, but no number is cut short."""
    table.width = results.measure(table, options=results.options.update(max_width=10_000)).maximum
    results.print(table, crop=False)


def show_demo(folder: Path, summary: dict[str, Any]) -> None:
    """Print a demo's table with all that its numbers depend on."""
    settings = summary["settings"]
    certify, images = settings["certify"], len(settings["certified_images"])
    most = "<" if certify.get("adaptive") else ""
    proved = ", proved for floating point" if certify.get("sound_float") else ""
    noise = settings["train"].get("noise", "gaussian")
    norm = report.NORMS[LAWS[noise].norm]
    titles = {name: method.title for name, method in pipeline.METHODS.items()}
    show(report.summary_table(summary["rows"], titles))
    results.print(
        f"{settings['dataset']['name']}, all in per cent: clean accuracy on "
        f"{settings['dataset']['test_images']} test images, "
        f"certificates on {images} of them (standard error <= {100 * report.standard_error(images):.1f} points). "
        f"PCA: CC-Cert under {settings['transform']}, n={certify['cc_n']}, k={certify['cc_k']}, "
        f"δ={certify['delta']:g}, t={report.grid_text(settings['cc_cert']['t'])}. "
        f"cert.: {norm} radii by smoothing with {noise} noise, σ={settings['train']['sigma']:g}, n0={certify['n0']}, "
        f"n{most}={certify['n']}, α={certify['alpha']:g}{proved}. One seed ({settings['seed']}).",
        soft_wrap=True,
    )
    results.print(f"{folder}/summary.json, summary.csv, certified_accuracy.png", soft_wrap=True)


@cli.command()
@common_options
@click.option(
    "--method",
    type=click.Choice(list(pipeline.METHODS)),
    help="How the weights to remove are chosen; dense removes none.  [dense, or the one of --config]",
)
@click.option("--sparsity", type=float, help="Fraction of the weights to remove.  [0.7, or the one of --config]")
@setting_options(DATA_OPTIONS, TRAIN_OPTIONS)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run folder.")
def train(
    method: str | None,
    sparsity: float | None,
    out: Path,
    data: str | None,
    data_dir: Path | None,
    config: Path | None,
    threads: int | None,
    **given: Any,
) -> None:
    """Train one network: dense, or dense and then pruned and fine-tuned.

    The result is OUT/models/NAME.safetensors, an ordinary state dict with zeros for the removed weights.
    """
    settings = settings_from(data, data_dir, config, threads, given)
    methods, sparsities = _one(settings.methods, method, "dense"), _one(settings.sparsities, sparsity, 0.7)
    settings = replace(settings, methods=methods, sparsities=sparsities)
    with resumable(out):
        path, result = pipeline.train(settings, out, bar)
    results.print(
        f"{path}: sparsity {result['sparsity']:.6f}, clean accuracy {100 * result['clean_accuracy']:.2f} %",
        soft_wrap=True,
    )


def _one(stored: tuple[T, ...], given: T | None, default: T) -> tuple[T, ...]:
    """What is given, or what a configuration names alone, or the default."""
    return (given,) if given is not None else stored if len(stored) == 1 else (default,)


@cli.command()
@click.argument("model", type=MODEL)
@common_options
@setting_options([option for option in DATA_OPTIONS if option[0] != "--model"], CORRUPTION_OPTIONS, CERTIFY_OPTIONS)
@click.option(
    "--architecture", type=click.Choice(list(models.ARCHITECTURES)), help="Network, if the file does not say."
)
@click.option("--sigma", type=float, help="Noise, pixels in [0, 1]  [that of --config, or of the model's training]")
@click.option("--noise", type=click.Choice(list(LAWS)), help="Its law  [that of --config, or of the model's training]")
@click.option(
    "--certificate",
    type=click.Choice(pipeline.CERTIFICATES),
    help="Smoothing (norm balls), CC-Cert (random transforms, those of --transform), or both.  [smoothing]",
)
@click.option("--cc-cert", is_flag=True, help="The same as --certificate both.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run folder.")
def certify(
    model: Path | str,
    architecture: str | None,
    sigma: float | None,
    noise: str | None,
    certificate: str | None,
    cc_cert: bool,
    out: Path,
    data: str | None,
    data_dir: Path | None,
    config: Path | None,
    threads: int | None,
    **given: Any,
) -> None:
    """Certify MODEL by randomized smoothing, CC-Cert, or both: a safetensors file, or package.module:factory for any
    classifier.

    The factory is called without arguments and gives a torch.nn.Module or another callable (csam.Opaque gives that one
    a name), which maps pixels in [0, 1] to logits; its code is run, so name only what you trust.

    Smoothing writes OUT/certificates/smoothing.tsv (idx label predict radius correct time), one line an image, and
    continues it when run again; smoothing.votes.jsonl beside it has each image's samples, votes and why it stopped.
    CC-Cert writes cc-cert.jsonl, what decides its bounds and then a line an image, which it continues, and at the end
    cc-cert.tsv (idx label predict bound correct margin flips time).

    OUT takes more or fewer --images later, other --radii and --eps, and the other --certificate: what it holds is not
    made again, and stays. The tables printed are of the images asked for; csam report OUT is of all that OUT holds.

    Files made by csam say their architecture, normalisation, noise and sigma themselves. Radii are in the l2 norm under
    Gaussian noise, in the l1 norm under uniform and Laplace noise of standard deviation sigma.
    """
    if cc_cert and certificate not in (None, "both"):
        raise click.UsageError(f"--cc-cert is --certificate both; leave it out for --certificate {certificate}")
    certificate = certificate or ("both" if cc_cert else "smoothing")
    own = isinstance(model, str)
    if own and (architecture or given["normalization"]):
        raise click.UsageError(f"--architecture and --normalization are for files; {model} gives a whole classifier")
    said = {"model": model} if isinstance(model, str) else runs.read_description(model)
    given["model"] = architecture or said.get("model")
    if given["normalization"] is None and "normalization" in said:
        given["normalization"] = said["normalization"] or "none"
    if config and isinstance(stored := _stored_settings(config, given).get("train"), dict):
        said |= stored  # sigma and noise, if it says them
    given["train__sigma"] = sigma if sigma is not None else said.get("sigma")
    if given["train__sigma"] is None and certificate != "cc-cert":
        raise click.UsageError(f"{model} does not say its sigma; give --sigma")
    given["train__noise"] = noise or said.get("noise")
    settings = settings_from(data, data_dir, config, threads, given)
    with resumable(out):
        rows, bounds = pipeline.certify(settings, model, out, bar, certificate=certificate)
    if results.quiet:
        return  # the first process has the files, and tells
    folder, title = out / "certificates", model if isinstance(model, str) else model.stem
    if rows:
        show(report.certificates_table([curve_of(folder / "smoothing.tsv", title, rows)], settings.certify.radii))
        held = len(records.read_tsv(folder / "smoothing.tsv"))
        results.print(_held(folder / "smoothing.tsv", held, len(rows)), soft_wrap=True)
    if bounds:
        show_bounds([bounds_of(folder / "cc-cert.jsonl", title, bounds)], settings.certify.eps)
        known = records.read_bounds(folder / "cc-cert.jsonl")[1]
        results.print(_held(folder / "cc-cert.tsv", len(known), len(bounds)), soft_wrap=True)


def _held(file: Path, held: int, asked: int) -> str:
    return f"{file}" + (f": {held} images, {asked} of them in the table" if held > asked else "")


def show_bounds(bounds: Sequence[report.Bounds], eps: Sequence[float]) -> None:
    """Print PCA with what the bounds were computed from, and what they do not promise."""
    show(report.bounds_table(bounds, eps))
    results.print(report.SAMPLING_ERROR, soft_wrap=True)


def bounds_of(file: Path, label: str, bounds: Sequence[dict[str, Any]] | None = None) -> report.Bounds:
    """CC-Cert in the journal `file`: of these bounds, or of all. Raises ValueError if there is none."""
    recipe, known = records.read_bounds(file)
    bounds = list(known.values()) if bounds is None else bounds
    if not bounds:
        missing = "is missing, without which its table says not enough" if not file.exists() else "holds no bounds yet"
        raise ValueError(f"{file} {missing}")
    return report.Bounds(label, [b["bound"] for b in bounds], [b["correct"] for b in bounds], recipe)


@cli.command("report")
@click.argument("places", metavar="RUN_OR_TSV...", nargs=-1, required=True, type=PLACE)
@click.option("--radii", type=NUMBERS, default=(0.0, 0.25, 0.5, 0.75, 1.0), help="Radii of the table.  [0,0.25,...,1]")
@click.option("--eps", type=NUMBERS, default=(0.01, 0.05, 0.1), help="CC-Cert: eps of the table.  [0.01,0.05,0.1]")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("certified_accuracy.png"),
    show_default=True,
    help="Where to draw the curves (.png, .pdf, .svg).",
)
@click.option("--no-plot", is_flag=True, help="Print only.")
def report_command(
    places: tuple[Path, ...], radii: tuple[float, ...], eps: tuple[float, ...], plot: Path, no_plot: bool
) -> None:
    """Tabulate and draw certificates: run folders of csam, and TSVs of any tool in the field's format.

    Of CC-Cert (certificates/*.jsonl of a run folder, or the table beside one) it prints probabilistically certified
    accuracy (PCA).
    """
    if not no_plot:
        report.check_picture(plot)
    curves = [
        curve for place, title in zip(places, titles_of(places), strict=True) for curve in curves_of(place, title)
    ]
    bounds = [b for place, title in zip(places, titles_of(places), strict=True) for b in all_bounds_of(place, title)]
    if not curves and not bounds:
        raise ValueError("there must be a certificate in at least one of the places")
    tables = [report.certificates_table(curves, radii)] if curves else []
    if bounds:
        report.bounds_table(bounds, eps)  # refuses eps out of range before anything is printed
    demos = [place for place in places if (place / "summary.json").exists()]
    for place, summary in [(place, report.read_summary(place)) for place in demos]:
        show_demo(place, summary)
    for table in tables:
        show(table)
    if bounds:
        show_bounds(bounds, eps)
    if curves and not no_plot:
        report.plot_curves(curves, plot)
        results.print(str(plot), soft_wrap=True)


def titles_of(places: Sequence[Path]) -> list[str]:
    """Short names of run folders and TSVs; whole paths where two would be called the same."""
    short = [place.resolve().name if place.is_dir() else place.stem for place in places]
    return [name if short.count(name) == 1 else str(place) for place, name in zip(places, short, strict=True)]


def curves_of(place: Path, title: str) -> list[report.Curve]:
    """One curve for a TSV file of smoothing, one for each of a run folder; none for files of CC-Cert.

    Raises ValueError if a folder holds certificates of neither.
    """
    files = sorted((place / "certificates").glob("[!.]*.tsv")) if place.is_dir() else [place]
    files = [file for file in files if file.suffix != ".jsonl" and not records.holds_bounds(file)]
    if not files and not journals_of(place):
        raise ValueError(f"{place} holds no certificates (certificates/*.tsv); is it a csam run folder?")
    curves = []
    for file in files:
        rows = records.read_tsv(file)
        if not rows:
            messages.print(f"csam: {file} holds no certificates yet", soft_wrap=True)
            continue
        curves.append(curve_of(file, f"{title}/{file.stem}" if place.is_dir() else title, rows))
    return curves


def journals_of(place: Path) -> list[Path]:
    """The journals of CC-Cert in a run folder; the place itself if it is one, or the one beside its table."""
    if not place.is_dir():
        return [place.with_suffix(".jsonl")] if place.suffix == ".jsonl" or records.holds_bounds(place) else []
    return sorted(p for p in (place / "certificates").glob("[!.]*.jsonl") if not p.name.endswith(".votes.jsonl"))


def all_bounds_of(place: Path, title: str) -> list[report.Bounds]:
    """What `bounds_of` makes of each journal of CC-Cert in a run folder, or of the one given."""
    return [bounds_of(file, f"{title}/{file.stem}" if place.is_dir() else title) for file in journals_of(place)]


def curve_of(file: Path, label: str, rows: Sequence[records.Row]) -> report.Curve:
    """The curve of a record's rows, with their samples and the norm of the radii where its votes lie beside it."""
    radii = [row.radius for row in rows if row.correct]
    recipe = records.read_votes(file)[0]
    samples, norm = records.mean_samples(file, rows), recipe.get("norm", "")
    return report.Curve(label, radii, len(rows), samples=samples, norm=norm, made=report.made_text(recipe))


@cli.command()
@click.option("--builtin", is_flag=True, help="Only the built-in comparison, also in a checkout.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(builtin: bool, arguments: tuple[str, ...]) -> None:
    """Time the operations against plain torch, side by side.

    In a checkout this runs its bench/ folder with pytest-benchmark (ARGUMENTS go to pytest, after --); elsewhere
    it times a few operations in this process.
    """
    folder = Path(__file__).resolve().parents[2] / "bench"
    if folder.is_dir() and any(folder.glob("*.py")) and not builtin:
        raise SystemExit(
            subprocess.call(
                [sys.executable, "-m", "pytest", str(folder), "--benchmark-only", *arguments], cwd=folder.parent
            )
        )
    if arguments:
        raise click.UsageError("arguments are for pytest, which runs in a checkout with a bench folder only")
    table = Table(caption="median, 20 % and 80 % percentiles of repeated calls in this process", caption_justify="left")
    for head in ("operation", "csam-kernels ms", "plain torch ms", "ratio"):
        table.add_column(head, justify="left" if head == "operation" else "right")
    with bar("timing", len(microbench.CASES)) as advance:
        for case in microbench.CASES:
            ours, theirs = microbench.compare(case)
            table.add_row(case.name, str(ours), str(theirs), f"{theirs.median / ours.median:.1f}×")
            advance(1)
    show(table)
    results.print(json.dumps(runs.environment()), soft_wrap=True)


@cli.command()
def info() -> None:
    """Versions, threads, instruction set, and who serves the operations, and why the others do not."""
    table = Table(show_header=False, box=None)
    found = runs.environment()
    for key, value in {**found, "commit": found["commit"] or "unknown"}.items():
        table.add_row(key, str(value))
    table.add_row("instruction set", backend.instruction_set())
    table.add_row("torch's", torch.backends.cpu.get_cpu_capability())
    for name, state in csam_kernels.backends().items():
        table.add_row(f"backend {name}", state)
    show(table)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit; errors are one line on standard error, with CSAM_DEBUG=1 a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ε still gets its table
    warnings.formatwarning = lambda message, *_, **__: f"csam: {' '.join(str(message).split())}\n"
    try:
        code = cli.main(args=arguments, prog_name="csam", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = 2
    except (click.Abort, KeyboardInterrupt) as error:
        early = error.__cause__ if isinstance(error.__cause__, EOFError) else None  # which click takes for Ctrl-C
        code = _complain(f"a file ends too early: {early}", 1) if early else _complain("interrupted", 130)
    except Interrupted as error:
        code = _complain(str(error), 130)
    except BrokenPipeError:
        # The reader of a pipe has gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (
        Failed,
        ModelError,
        training.TrainingDiverged,
        FloatingPointError,
        csam_kernels.BackendUnavailable,
    ) as error:
        code = _complain(str(error), 1)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        code = _complain(f"{place}{error.strerror or error}", 2 if isinstance(error, FileNotFoundError) else 1)
    except ValueError as error:
        code = _complain(str(error), 2)
    sys.exit(code if isinstance(code, int) else 0)


def _complain(text: str, code: int) -> int:
    if os.environ.get("CSAM_DEBUG"):
        messages.quiet = False
        messages.print_exception()
    which = f"process {os.environ.get('RANK')}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print(f"csam: {which}{' '.join(text.split())}", file=sys.stderr)
    return code
