"""The whole C-SAM pipeline: train, prune, fine-tune, certify, compare; every stage resumable.

dense training -> for each method and sparsity: mask -> fine-tuning (batch-norm statistics re-estimated) ->
clean accuracy, CC-Cert, randomized smoothing -> one summary. After the dense training every method gets the same
number of optimisation steps on the same batches in the same order: where C-SAM searches masks for the first
epochs, magnitude pruning and the dense network already fine-tune. Certificates use one seed and the same images.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from csam import data, evaluation, masks, models, records, report, runs, training, transforms
from csam.adapters import Classifier
from csam.cc_cert import CCCert
from csam.engine import Choices
from csam.laws import LAWS
from csam.nn import convert, fold, masked_layers
from csam.processes import Team
from csam.sampling import check_finite
from csam.search import MaskSearch
from csam.settings import OF_STOPPING, CertifySettings, Settings, TrainSettings
from csam.smoothing import Smooth, certified_radius
from csam.training import Feed, Optimizer, derive_seed
from csam_kernels import checks


class Advance(Protocol):
    """Moves a progress bar on: by steps, and by noise samples drawn, of which it shows the speed."""

    def __call__(self, steps: int, samples: int = 0) -> None: ...


class Progress(Protocol):
    """Begins a progress bar of `total` steps, each of so many noise samples if that is known."""

    def __call__(self, title: str, total: int, each: int | None = None) -> AbstractContextManager[Advance]: ...


CERTIFICATES = ("smoothing", "cc-cert", "both")
CALIBRATION = 64  # training images that int8 is calibrated on
# settings that decide a certificate of smoothing, and of CC-Cert, alone; and those that decide none
OF_SMOOTHING = [
    *(f"settings.train.{name}" for name in ("sigma", "noise")),
    *(f"settings.certify.{name}" for name in ("n0", "n", "alpha", "adaptive", *OF_STOPPING, "sound_float")),
]
OF_CC_CERT = ["settings.transform", *(f"settings.certify.{name}" for name in ("cc_n", "cc_k", "delta"))]
OF_NONE = [
    *(f"settings.{name}" for name in ("certify.images", "certify.radii", "certify.eps")),
    *(f"settings.{name}" for name in ("methods", "sparsities", "search")),
    *(key for field in fields(TrainSettings) if (key := f"settings.train.{field.name}") not in OF_SMOOTHING),
]


def silent(title: str, total: int, each: int | None = None) -> AbstractContextManager[Advance]:
    """A progress bar that shows nothing."""
    return nullcontext(lambda steps, samples=0: None)


def build(settings: Settings, dataset: data.Dataset) -> nn.Module:
    """The untrained network of these settings, normalisation included."""
    return models.build(
        settings.model,
        num_classes=dataset.num_classes,
        in_channels=dataset.in_channels,
        seed=derive_seed(settings.seed, "init"),
        **models.NORMALIZATION[settings.normalization]._asdict() if settings.normalization else {},
    )


class Job:
    """One run of the pipeline on an open run folder."""

    def __init__(self, settings: Settings, dataset: data.Dataset, run: runs.Run, progress: Progress = silent) -> None:
        self.settings = settings
        self.dataset = dataset
        self.run = run
        self.progress = progress
        self.transform = transforms.parse(settings.transform)

    def build(self) -> nn.Module:
        return build(self.settings, self.dataset)

    def start_model(self) -> nn.Module:
        """The network before any training here: as built, or with the given weights."""
        model = self.build()
        if self.settings.weights is not None:
            models.load_weights(model, self.settings.weights)
        return model

    def searcher(self, model: nn.Module, sparsity: float, **changes: Any) -> MaskSearch:
        """The mask search of these settings on a converted model."""
        return MaskSearch(
            model.train(),
            sparsity,
            transform=training.shared(self.transform),
            dtype=torch.bfloat16 if self.settings.train.precision == "bfloat16" else None,
            seed=derive_seed(self.settings.seed, "search"),
            **asdict(replace(self.settings.search, **changes)),
        )

    def feed(self, phase: str, epochs: int, start: int = 0) -> Feed:
        """How a phase ("dense" or "prune") meets its images; the same batches for every method."""
        train = self.settings.train
        return Feed(
            epochs=epochs,
            start=start,
            batch_size=train.batch_size,
            sigma=train.sigma,
            noise=train.noise,
            padding=train.padding,
            flip=train.flip,
            transform=self.transform if train.augment else None,
            threads=train.threads,
            seed=derive_seed(self.settings.seed, phase),
        )

    def optimizer(self, lr: float) -> Optimizer:
        train = self.settings.train
        return Optimizer(
            lr=lr,
            momentum=train.momentum,
            weight_decay=train.weight_decay,
            label_smoothing=train.label_smoothing,
            precision=train.precision,
        )

    def fit(self, model: nn.Module, feed: Feed, lr: float, stage: str, title: str) -> float:
        """Train and re-estimate the batch-norm statistics; returns seconds."""
        x, y = self.dataset.train_x, self.dataset.train_y
        with self.progress(title, feed.epochs * feed.steps_per_epoch(len(x))) as advance:
            seconds = training.fit(model, x, y, feed, self.optimizer(lr), stage=self.run.stage(stage), on_step=advance)
        started = time.monotonic()
        training.reestimate_batchnorm(model, x, y, feed)
        return seconds + time.monotonic() - started

    def save(self, name: str, model: nn.Module, description: Mapping[str, Any]) -> None:
        common = {
            "model": self.settings.model,
            "num_classes": self.dataset.num_classes,
            "in_channels": self.dataset.in_channels,
            "normalization": self.settings.normalization,
            "sigma": self.settings.train.sigma,
            "noise": self.settings.train.noise,
        }
        if self.run.team.first:
            runs.save_model(self.model_path(name), model, {**common, **description})

    def model_path(self, name: str) -> Path:
        return self.run.folder / "models" / f"{name}.safetensors"

    def certificates(self, name: str) -> Path:
        return self.run.folder / "certificates" / f"{name}.tsv"

    def bounds(self, name: str) -> Path:
        return self.run.folder / "certificates" / f"{name}.jsonl"

    def load(self, name: str) -> nn.Module:
        model = self.build()
        if self.run.team.first:
            models.load_weights(model, self.model_path(name))
        model.load_state_dict(self.run.team.told(model.state_dict()))
        return model.eval()


@dataclass(frozen=True)
class Method:
    """A row of the comparison.

    prunes : one row for each sparsity; otherwise one row
    mask   : sets the hard masks of a converted model at a sparsity, using the first epochs of the "prune"
             phase; returns (epochs it used, seconds)
    """

    title: str
    prunes: bool
    mask: Callable[[Job, nn.Module, float, str], tuple[int, float]]


def _keep_all(job: Job, model: nn.Module, sparsity: float, name: str) -> tuple[int, float]:
    return 0, 0.0


def _magnitude(job: Job, model: nn.Module, sparsity: float, name: str) -> tuple[int, float]:
    started = time.monotonic()
    masks.global_magnitude(model, sparsity, job.settings.train.magnitude_scope)
    return 0, time.monotonic() - started


def _search(job: Job, model: nn.Module, sparsity: float, name: str, **changes: Any) -> tuple[int, float]:
    search = job.searcher(model, sparsity, **changes)
    epochs = job.settings.train.search_epochs
    feed = job.feed("prune", epochs)
    x, y = job.dataset.train_x, job.dataset.train_y
    with job.progress(f"{name}: mask search", epochs * feed.steps_per_epoch(len(x))) as advance:
        seconds = training.run_epochs(search, x, y, feed, stage=job.run.stage(f"{name}-search"), on_step=advance)
    search.apply()
    return epochs, seconds


METHODS: dict[str, Method] = {
    "dense": Method("dense", False, _keep_all),
    "magnitude": Method("magnitude", True, _magnitude),
    "csam": Method("C-SAM", True, _search),
    "csam-uniform": Method("C-SAM, uniform noise", True, partial(_search, perturbation="uniform")),
}


def train_dense(job: Job) -> nn.Module:
    """The dense network that all methods start from: trained, or loaded from `weights` and trained on."""
    stage = job.run.stage("start")
    if stage.result() is None:
        model = job.start_model()
        feed = job.feed("dense", job.settings.train.epochs)
        seconds = job.fit(model, feed, job.settings.train.lr, "start", "dense training") if feed.epochs else 0.0
        steps = feed.epochs * feed.steps_per_epoch(len(job.dataset.train_x))
        accuracy = training.accuracy(model, job.dataset.test_x, job.dataset.test_y)
        job.save("start", model, {"method": "dense", "sparsity": 0.0})
        stage.finish({"steps": steps, "seconds": seconds, "clean_accuracy": accuracy})
        job.run.log(f"dense training: {steps} steps, clean accuracy {accuracy:.4f}, {seconds:.1f} s")
    return job.load("start")


def masked_copy(model: nn.Module, granularity: str) -> nn.Module:
    """`csam.convert`; with masks over groups the first and the last layer stay whole.

    Removing a whole filter of the last layer would remove a class, a whole channel of the first one a colour.
    """
    everything = convert(model, granularity=granularity)
    if granularity == "weight":
        return everything
    names = list(masked_layers(everything))
    return convert(model, granularity=granularity, exclude=(names[0], names[-1]))


def variant_name(method: str, sparsity: float) -> str:
    return f"{method}-{sparsity:.15g}" if METHODS[method].prunes else method


def train_variant(job: Job, method: str, sparsity: float) -> dict[str, Any]:
    """Mask, fine-tune and save one network (`models/<name>.safetensors`, masks folded in).

    Returns the stage's result: exact sparsity, kept and prunable weights, steps, clean accuracy, seconds.
    """
    name = variant_name(method, sparsity)
    stage = job.run.stage(name)
    found = stage.result()
    if found is not None:
        return found
    train, x = job.settings.train, job.dataset.train_x
    model = masked_copy(train_dense(job), train.granularity)
    used, mask_seconds = METHODS[method].mask(job, model, sparsity, name)
    feed = job.feed("prune", train.search_epochs + train.finetune_epochs - used, start=used)
    seconds = job.fit(model, feed, train.finetune_lr, f"{name}-finetune", f"{name}: fine-tuning")
    kept, total = masks.count(model)
    per_epoch = feed.steps_per_epoch(len(x))
    result = {
        "sparsity": 1 - kept / total,
        "kept_weights": kept,
        "prunable_weights": total,
        "mask_steps": used * per_epoch,
        "finetune_steps": feed.epochs * per_epoch,
        "clean_accuracy": training.accuracy(model, job.dataset.test_x, job.dataset.test_y),
        "mask_seconds": mask_seconds,
        "finetune_seconds": seconds,
    }
    job.save(name, fold(model), {"method": method, "sparsity": result["sparsity"]})
    stage.finish(result)
    for part in ("search", "finetune"):
        job.run.stage(f"{name}-{part}").discard()
    job.run.log(f"{name}: sparsity {result['sparsity']:.6f}, clean accuracy {result['clean_accuracy']:.4f}")
    return result


def certify_variant(job: Job, name: str) -> dict[str, Any]:
    """Smoothing and CC-Cert certificates of one saved network; returns the stage's result."""
    stage = job.run.stage(f"{name}-certify")
    found = stage.result()
    if found is not None:
        return found
    certify = job.settings.certify
    model = job.load(name)
    chosen = data.evenly_spaced(len(job.dataset.test_x), certify.images)
    path = job.certificates(name)
    smooth = begun_smooth(job.run.team, model, job.dataset, job.settings, path)
    rows = smooth_images(smooth, job.dataset, chosen, certify, path, job.progress, f"{name}: smoothing")
    path = job.bounds(name)
    cert = begun_cc_cert(job.run.team, model, job.dataset, job.settings, path)
    bounds = bound_images(cert, job.dataset, chosen, path, job.progress, f"{name}: CC-Cert")
    correct = [bound["correct"] for bound in bounds]
    result = {
        "pca": {f"{e:.15g}": records.pca([b["bound"] for b in bounds], correct, e) for e in certify.eps},
        "certified_accuracy": {f"{r:.15g}": records.certified_accuracy(rows, r) for r in certify.radii},
        "smoothing_seconds": sum(row.time for row in rows),
        "cc_cert_seconds": sum(bound["time"] for bound in bounds),
    }
    stage.finish(result)
    return result


def make_smooth(model: Classifier, dataset: data.Dataset, settings: Settings, choices: Choices = "auto") -> Smooth:
    """The smoothed classifier; its noise has the same seed for every model of a run."""
    return Smooth(
        model,
        dataset.num_classes,
        settings.train.sigma,
        noise=settings.train.noise,
        dtype=settings.certify.dtype,
        seed=derive_seed(settings.seed, "smoothing"),
        choices="module" if settings.certify.dtype is None else choices,
        calibration=calibration(dataset, settings),
        sound_float=settings.certify.sound_float,
    )


def begun_smooth(team: Team, model: Classifier, dataset: data.Dataset, settings: Settings, path: Path) -> Smooth:
    """The smoothed classifier that goes on with the record at `path`, its layers running alike in all processes."""
    make = partial(make_smooth, model, dataset, settings)
    return _begun(team, dataset, make, lambda: begun_choices(records.read_votes, path))


def begun_cc_cert(team: Team, model: Classifier, dataset: data.Dataset, settings: Settings, path: Path) -> CCCert:
    """CC-Cert that goes on with the journal at `path`, its layers running alike in all processes."""
    make = partial(make_cc_cert, model, dataset, settings)
    return _begun(team, dataset, make, lambda: begun_choices(records.read_bounds, path))


Certifier = TypeVar("Certifier", Smooth, CCCert)


def _begun(
    team: Team, dataset: data.Dataset, make: Callable[[Choices], Certifier], choices: Callable[[], Choices]
) -> Certifier:
    """Process 0's, with the choices of its record; in the others with those that process 0 ended up with."""
    if not team.first:
        return make(team.told("auto"))
    begun = choices()
    made = make(begun)
    team.told(made.recipe(data.to_unit(dataset.test_x[0]))["choices"])
    if made.prepared and (reason := made.prepared.steps[-1]).startswith("run by torch: ") and begun == "auto":
        warnings.warn(f"the network is not for the sampling engine, but {reason}", stacklevel=2)
    return made


def calibration(dataset: data.Dataset, settings: Settings) -> Tensor | None:
    """What int8 is calibrated on, None for other dtypes: 64 training images, evenly spaced; all if there are fewer.

    Test images, which are certified, are not among them. Raises ValueError if there are no training images.
    """
    if settings.certify.dtype != "int8":
        return None
    total = len(dataset.train_x)
    if not total:
        raise ValueError(f"certify.dtype int8 needs training images to calibrate on, {dataset.name} has none")
    return data.to_unit(dataset.train_x[data.evenly_spaced(total, min(CALIBRATION, total))])


def begun_choices(read: Callable[[Path], tuple[dict[str, Any], Any]], path: Path) -> Choices:
    """How the layers ran in the record at `path`, to go on in the same way; "auto" if there is none."""
    choices: Choices = read(path)[0].get("choices", "auto")
    return choices


def make_cc_cert(model: Classifier, dataset: data.Dataset, settings: Settings, choices: Choices = "auto") -> CCCert:
    """CC-Cert on the base network; its transforms have the same seed for every model of a run."""
    certify = settings.certify
    return CCCert(
        model,
        transforms.parse(settings.transform),
        n=certify.cc_n,
        k=certify.cc_k,
        delta=certify.delta,
        seed=derive_seed(settings.seed, "cc-cert"),
        dtype=certify.dtype,
        choices="module" if certify.dtype is None else choices,
        calibration=calibration(dataset, settings),
    )


def smooth_images(
    smooth: Smooth,
    dataset: data.Dataset,
    chosen: Sequence[int],
    certify: CertifySettings,
    path: Path,
    progress: Progress = silent,
    title: str = "smoothing",
) -> list[records.Row]:
    """Certify the chosen test images into the TSV at `path`, which may hold some of them already."""
    with progress(title, len(chosen), None if certify.adaptive else certify.n0 + certify.n) as advance:
        with suppress(FileNotFoundError, ValueError):  # none yet, or of another process; or to be mended or refused
            advance(len({row.idx for row in records.read_tsv(path)}.intersection(chosen)))
        return evaluation.certify_dataset(
            smooth,
            dataset.test_x,
            dataset.test_y,
            path,
            indices=chosen,
            n0=certify.n0,
            n=certify.n,
            alpha=certify.alpha,
            on_result=lambda row: advance(1),
            on_samples=lambda drawn: advance(0, drawn),
            **_stops(certify),
        )


def _stops(certify: CertifySettings) -> dict[str, Any]:
    return {name: getattr(certify, name) for name in ("adaptive", *OF_STOPPING)}


def bound_images(
    cert: CCCert,
    dataset: data.Dataset,
    chosen: Sequence[int],
    path: Path,
    progress: Progress = silent,
    title: str = "CC-Cert",
) -> list[dict[str, Any]]:
    """CC-Cert of the chosen test images into the journal at `path`, which may hold some of them already.

    The journal begins with what decides a bound (`CCCert.recipe`, and a digest of logits where that has no
    fingerprint); a record has `records.BOUND_COLUMNS`, and nan, their number, where probabilities were NaN, which is
    warned of at the end. Image i uses stream i. Where torch.distributed is initialised, its processes take an image
    each at a time, all have the same result, and `path` is process 0's.

    Raises ValueError if the network runs another way in one process than in another, RunError for a journal that was
    begun with other settings or another plan.
    """

    def bounded(i: int) -> dict[str, Any]:
        started = time.perf_counter()
        with evaluation.naming(i):
            result = cert.measure(data.to_unit(dataset.test_x[i]), stream=i)
        label = int(dataset.test_y[i])
        record = {
            "idx": i,
            "label": label,
            "predict": result.prediction,
            "bound": result.bound,
            "correct": result.prediction == label,
            "margin": result.margin,
            "flips": result.flips,
            "time": round(time.perf_counter() - started, 4),
        }
        return record | ({"nan": result.nan} if result.nan else {})

    draws = cert.n * cert.k
    with Team() as team, progress(title, len(chosen), draws) as advance:
        recipe = cert.recipe(data.to_unit(dataset.test_x[0]))
        if cert.prepared and recipe["fingerprint"] is None:
            recipe["logits"] = evaluation.logits_digest(cert.prepared, dataset.test_x)
        runs.agree(team, "network and settings", recipe)
        journal, known = records.open_bounds(path, recipe) if team.first else (None, {})
        done: dict[int, dict[str, Any]] = team.told(known)
        advance(sum(i in done for i in chosen))
        todo = [i for i in chosen if i not in done]
        for k in range(0, len(todo), team.size):
            mine = [bounded(i) for i in todo[k + team.rank : k + team.rank + 1]]
            for record in chain.from_iterable(team.gathered(mine)):
                done[record["idx"]] = record
                if journal is not None:
                    journal.append(record)
                advance(1, draws)
    broken = [done[i]["nan"] for i in chosen if "nan" in done[i]]
    if broken and team.first:
        warnings.warn(
            f"{sum(broken)} draws of {len(broken)} of {len(chosen)} images had NaN probabilities, and the bounds of "
            f"these images are 1; {path.name} has their numbers",
            RuntimeWarning,
            stacklevel=2,
        )
    return [done[i] for i in chosen]


def variants(settings: Settings) -> list[tuple[str, float]]:
    """(method, sparsity) of every row: what prunes nothing first, then the methods side by side at each sparsity.

    Raises ValueError for an unknown method.
    """
    for method in settings.methods:
        if method not in METHODS:
            raise ValueError(f"methods must be among {', '.join(METHODS)}, got {method!r}")
    pruned = [(m, s) for s in settings.sparsities for m in settings.methods if METHODS[m].prunes]
    return [(m, 0.0) for m in settings.methods if not METHODS[m].prunes] + pruned


def identity(command: str, settings: Settings, dataset: data.Dataset, **more: Any) -> dict[str, Any]:
    """What a run folder belongs to: the settings, and the contents (not the places) of the data and weights.

    Raises OSError if the weights cannot be read.
    """
    asked = asdict(settings)
    del asked["data_dir"]
    newer: dict[str, Any] = {"certify.sound_float": False, "train.noise": "gaussian", "resize": None, "crop": None}
    for place, before in newer.items():
        *groups, name = place.split(".")
        values = asked[groups[0]] if groups else asked
        if values[name] == before:  # as in folders that were begun before there was such a setting
            del values[name]
    if settings.weights is not None:
        asked["weights"] = _digest(Path(settings.weights).read_bytes())
    contents = map(runs.raw_bytes, (dataset.train_x, dataset.train_y, dataset.test_x, dataset.test_y))
    return {"command": command, **more, "settings": asked, "data": _digest(*contents)}


def _digest(*parts: bytes | memoryview) -> str:
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        total.update(part)
    return total.hexdigest()


def load_data(settings: Settings, certify: bool = False) -> data.Dataset:
    """The data set the settings name; of CIFAR-10-C test images alone, whatever a network was trained on.

    To certify class folders of images those for training are left alone, but for what int8 is calibrated on.
    """
    train_images = None
    if settings.data == "images" and certify:
        train_images = CALIBRATION if settings.certify.dtype == "int8" else 0
    return data.load(
        settings.data,
        settings.data_dir,
        train_subset=None if settings.data == "cifar10c" else settings.train_subset,
        train_images=train_images,
        test_subset=settings.test_subset,
        seed=settings.seed,
        corruption=settings.corruption,
        severity=settings.severity,
        resize=settings.resize,
        crop=settings.crop,
    )


def check_training(settings: Settings, dataset: data.Dataset, todo: Sequence[tuple[str, float]]) -> None:
    """Make everything that training will need once, on nothing, so that bad input ends it before any work.

    Raises ValueError, TypeError or OSError, as the parts do.
    """
    if not len(dataset.train_x):
        raise ValueError(f"data must have images for training, {dataset.name} has none")
    job = Job(settings, dataset, runs.Run("", {}))
    train = settings.train
    model = job.start_model()
    for epochs, lr in ((train.epochs, train.lr), (train.finetune_epochs, train.finetune_lr)):
        training.Sgd(model, job.optimizer(lr), job.feed("check", epochs).epochs)
    job.feed("check", train.search_epochs)
    masked = masked_copy(model, train.granularity)
    for method, sparsity in todo:
        if METHODS[method].prunes:
            masks.global_magnitude(masked, sparsity, train.magnitude_scope)
            job.searcher(masked, sparsity)


def check_certificates(
    settings: Settings,
    dataset: data.Dataset,
    model: Classifier | None = None,
    name: str | None = None,
    certificate: str = "both",
) -> None:
    """The same for a certificate, one of CERTIFICATES, of the settings' network unless a model and its name are given.

    Layers run dense, which need not be measured.
    """
    model, name = build(settings, dataset) if model is None else model, name or settings.model
    if isinstance(model, nn.Module):
        check_finite(model, buffers=False)
    data.evenly_spaced(len(dataset.test_x), settings.certify.images)
    x, certify = data.to_unit(dataset.test_x[0]), settings.certify
    try:
        if certificate != "cc-cert":
            smooth = make_smooth(model, dataset, settings, "dense")
            smooth.rule(x, certify.n0, certify.n, certify.alpha, **_stops(certify))
        if certificate != "smoothing":
            cert = make_cc_cert(model, dataset, settings, "dense")
            cert.recipe(x)
            if cert.prepared and cert.prepared.num_classes != dataset.num_classes:
                raise ValueError(f"model must give {dataset.num_classes} logits, got {cert.prepared.num_classes}")
    except ValueError as error:
        raise ValueError(f"{name} on {dataset.name} ({dataset.num_classes} classes): {error}") from error


def demo(
    settings: Settings, folder: str | Path, progress: Progress = silent, dataset: data.Dataset | None = None
) -> dict[str, Any]:
    """Run (or continue) the whole comparison in `folder`; returns the summary {"rows": [...], "settings": {...}}.

    Writes summary.json, summary.csv and certified_accuracy.png there. Raises ValueError for settings or data that
    will not do, and RunError for a folder that cannot be used.
    """
    todo = variants(settings)
    dataset = dataset or load_data(settings)
    check_training(settings, dataset, todo)
    check_certificates(settings, dataset)
    with runs.Run(folder, identity("demo", settings, dataset)) as run:
        job = Job(settings, dataset, run, progress)
        train_dense(job)
        trained = {variant_name(*variant): train_variant(job, *variant) for variant in todo}
        certified = {name: certify_variant(job, name) for name in trained}
        norm = LAWS[settings.train.noise].norm
        rows = [_row(m, norm, trained[variant_name(m, s)], certified[variant_name(m, s)]) for m, s in todo]
        details = {name: {**trained[name], **_seconds(certified[name])} for name in trained}
        described = describe(job, details)
        if run.team.first:
            report.write_summary(run.folder, rows, described)
            draw(run.folder, settings)
        run.log("finished")
    return {"rows": rows, "settings": described}


def _row(title: str, norm: str, trained: Mapping[str, Any], certified: Mapping[str, Any]) -> dict[str, Any]:
    parts = [*_seconds(trained).values(), *_seconds(certified).values()]
    return {
        "method": title,
        "sparsity": trained["sparsity"],
        "clean_accuracy": trained["clean_accuracy"],
        "pca": certified["pca"],
        "norm": norm,
        "certified_accuracy": certified["certified_accuracy"],
        "seconds": round(sum(parts), 2),
    }


def _seconds(result: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in result.items() if key.endswith("_seconds")}


def describe(job: Job, details: Mapping[str, Any]) -> dict[str, Any]:
    """All that is needed to make the numbers again, and what each row cost."""
    settings, dataset = job.settings, job.dataset
    model = job.build()
    return {
        **asdict(settings),
        "dataset": {
            "name": dataset.name,
            "classes": dataset.classes,
            "train_images": len(dataset.train_x),
            "test_images": len(dataset.test_x),
            "image_shape": list(dataset.test_x.shape[1:]),
            "blake2b": job.run.config["data"],
        },
        "certified_images": data.evenly_spaced(len(dataset.test_x), settings.certify.images),
        "smoothing": make_smooth(model, dataset, settings).settings,
        "cc_cert": make_cc_cert(model, dataset, settings).settings,
        "dense_training": job.run.stage("start").result(),
        "variants": dict(details),
        "environment": runs.environment(),
        "notes": NOTES,
    }


NOTES = {
    "clean_accuracy": "fraction of all test images that the base network classifies correctly, without noise",
    "pca": "fraction of the certified images with a CC-Cert bound < eps and a correct clean prediction, "
    "both of the base network",
    "certified_accuracy": "fraction of the certified images that the smoothed network classifies correctly with a "
    "certified radius >= r in the row's norm, pixels in [0, 1]",
    "steps": "after the dense training every row has the same number of optimisation steps on the same batches: "
    "mask_steps + finetune_steps; a step of the mask search makes several passes over its batch",
    "seconds": "mask, fine-tuning and certification of the row; the dense training, shared by all rows, is apart",
}


def draw(folder: Path, settings: Settings) -> None:
    """certified_accuracy.png from the certificates in a demo's folder, one panel for each sparsity."""
    curves = []
    for method, sparsity in variants(settings):
        rows = records.read_tsv(folder / "certificates" / f"{variant_name(method, sparsity)}.tsv")
        panel = f"{100 * sparsity:.10g} % of the weights removed" if METHODS[method].prunes else ""
        radii = [row.radius for row in rows if row.correct]
        norm = LAWS[settings.train.noise].norm
        curves.append(report.Curve(METHODS[method].title, radii, len(rows), panel, norm=norm))
    certify, train = settings.certify, settings.train
    place = ", ".join(dict.fromkeys((settings.data, settings.model)))
    report.plot_curves(
        curves,
        folder / "certified_accuracy.png",
        title=f"{place}, {curves[0].total} test images: smoothing with {train.noise} noise, σ = {train.sigma:g}, "
        f"n = {certify.n}, α = {certify.alpha:g}",
        limit=certified_radius(certify.n, certify.n, train.sigma, certify.alpha, train.noise),
        limit_label="largest radius that n allows",
    )


def train(settings: Settings, folder: str | Path, progress: Progress = silent) -> tuple[Path, dict[str, Any]]:
    """Train the one network that `settings.methods` and `settings.sparsities` name; returns its file and its result."""
    ((method, sparsity),) = todo = variants(settings)
    dataset = load_data(settings)
    check_training(settings, dataset, todo)
    with runs.Run(folder, identity("train", settings, dataset)) as run:
        job = Job(settings, dataset, run, progress)
        train_dense(job)
        if METHODS[method].prunes:
            result = train_variant(job, method, sparsity)
            return job.model_path(variant_name(method, sparsity)), result
        return job.model_path("start"), {"sparsity": 0.0, **(run.stage("start").result() or {})}


def _free(folder: str | Path, certificate: str) -> tuple[list[str], list[str]]:
    """Keys of the config of a folder of `certify`: what may differ, for it decided no certificate there; and what stays
    as it is, for it decided those there that are not asked for.
    """
    begun = Path(folder) / "certificates"
    free, kept = ["smoothing", "cc_cert", *OF_NONE], []
    for names, record, other in (
        (OF_SMOOTHING, records.votes_path(begun / "smoothing.tsv"), "cc-cert"),
        (OF_CC_CERT, begun / "cc-cert.jsonl", "smoothing"),
    ):
        if not record.exists():
            free += names
        elif certificate == other:
            kept += names
    return free, kept


def _given(
    settings: Settings, dataset: data.Dataset, model: str | Path, found: Classifier | None
) -> tuple[Classifier, str]:
    """What `certify` is to certify, that of a factory or of a file, and a digest of its weights."""
    if found is not None:
        tensors = chain(found.named_parameters(), found.named_buffers()) if isinstance(found, nn.Module) else ()
        parts: list[bytes | memoryview] = [str(model).encode()]
        for key, tensor in tensors:
            parts += [f"{key} {tensor.dtype} {tensor.shape}".encode(), runs.raw_bytes(tensor)]
        return found, _digest(*parts)
    network = build(settings, dataset)
    try:
        models.load_weights(network, model)
    except ValueError as error:
        raise ValueError(f"{error}; certified is {settings.model} on {dataset.name}") from error
    return network, _digest(Path(model).read_bytes())


def certify(
    settings: Settings,
    model: str | Path,
    folder: str | Path,
    progress: Progress = silent,
    *,
    certificate: str = "smoothing",
) -> tuple[list[records.Row], list[dict[str, Any]]]:
    """Certify a safetensors file of `settings.model` in `folder`, or go on there; or what a factory gives
    ("package.module:factory", see `csam.models.imported`), which is known again by that name, its weights and buffers,
    and the name of a `csam.Opaque`.

    Returns the rows of smoothing and the records of CC-Cert, of the images asked for; `certificate`, one of
    CERTIFICATES, says which to make. The folder keeps all that it has: asked for more images or fewer, other radii or
    eps of the tables, or another certificate, it goes on, and makes only what is missing. Raises RunError where what
    decides its certificates differs.
    """
    checks.choice("certificate", certificate, CERTIFICATES)
    smoothed, bounded = certificate != "cc-cert", certificate != "smoothing"
    found = models.imported(str(model)) if models.names_factory(model) else None  # before images are decoded
    dataset = load_data(settings, certify=True)
    network, digest = _given(settings, dataset, model, found)
    check_certificates(settings, dataset, network, str(model), certificate)
    chosen = data.evenly_spaced(len(dataset.test_x), settings.certify.images)
    asked = {"cc_cert": bounded} | ({} if smoothed else {"smoothing": False})  # the first as in older folders
    config = identity("certify", settings, dataset, model=digest, **asked)
    with runs.Run(folder, config, *_free(folder, certificate)) as run:
        job = Job(settings, dataset, run, progress)
        rows, bounds = [], []
        if smoothed:
            path = job.certificates("smoothing")
            smooth = begun_smooth(run.team, network, dataset, settings, path)
            rows = smooth_images(smooth, dataset, chosen, settings.certify, path, progress)
        if bounded:
            path = job.bounds("cc-cert")
            cert = begun_cc_cert(run.team, network, dataset, settings, path)
            bounds = bound_images(cert, dataset, chosen, path, progress)
            if run.team.first:
                known = records.read_bounds(path)[1]
                runs.write_atomic(job.certificates("cc-cert"), records.bounds_tsv([known[i] for i in sorted(known)]))
        run.log(f"{len(chosen)} images certified")
    return rows, bounds
