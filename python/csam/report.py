"""Tables, summary files and curves of certified accuracy, from a run's rows and from anyone's certificate TSVs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from csam import records, runs

NORMS = {"l1": "ℓ1", "l2": "ℓ2", "": "norm not recorded"}
FORMATS = (".png", ".pdf", ".svg")
# Colour by method, dash by place within a method: still told apart without colour. Colours: Okabe & Ito 2008.
PALETTE = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 2)))


@dataclass(frozen=True)
class Curve:
    """Certified accuracy over radius of one classifier.

    radii : radius of each image that is both certified and correct, in any order
    total : all images, the abstained and the wrong ones included
    panel : curves of one panel are drawn together; those with panel "" in every panel
    samples : (mean noise samples an image, the most it may take), None if that is not known
    norm    : of the radii, "l1" or "l2"; "" where the record does not say
    made    : sigma, n, alpha and so on in words; "" likewise
    """

    label: str
    radii: Sequence[float]
    total: int
    panel: str = ""
    samples: tuple[float, int] | None = None
    norm: str = ""
    made: str = ""

    def __post_init__(self) -> None:
        if self.total < 1 or len(self.radii) > self.total:
            raise ValueError(
                f"total must be >= 1 and >= the number of radii, got {self.total} for {len(self.radii)} radii"
            )

    def at(self, radius: float) -> float:
        """Fraction of all images that are correct with a certified radius >= `radius` (>= 0, else ValueError)."""
        if not radius >= 0:
            raise ValueError(f"radius must be >= 0, got {radius}")
        return sum(r >= radius for r in self.radii) / self.total

    def steps(self, right: float) -> tuple[list[float], list[float]]:
        """Corners (x, y) of the step curve from 0 to `right`: y[i] holds on (x[i-1], x[i]]."""
        ordered = sorted(self.radii)
        x = [0.0, *ordered]
        y = [(len(ordered) - max(0, i - 1)) / self.total for i in range(len(x))]
        return [*x, x[-1], max(right, x[-1])], [*y, 0.0, 0.0]


@dataclass(frozen=True)
class Bounds:
    """CC-Cert of one classifier.

    bounds, correct : of each image: on P(the prediction changes), and whether the clean prediction is right
    recipe          : what decided the bounds (`csam.CCCert.recipe`); {} if that is not known
    """

    label: str
    bounds: Sequence[float]
    correct: Sequence[bool]
    recipe: Mapping[str, Any]

    def at(self, eps: float) -> float:
        """Probabilistically certified accuracy; errors as in `csam.records.pca`."""
        return records.pca(self.bounds, self.correct, eps)


SAMPLING_ERROR = (
    "A CC-Cert bound is a random estimate from n × k draws, not a confidence bound of a stated level: it lies below "
    "the Chernoff bound only where all k blocks fall short of it by more than the factor δ, how rarely depends on a "
    "spread that nobody knows, and below 1/(nδ) it says that no draw moved the probabilities by the margin."
)


def bounds_table(bounds: Sequence[Bounds], eps: Sequence[float]) -> Table:
    """One line a classifier: the transform, n, k, δ, the t grid, images, clean accuracy, and PCA at each eps."""
    table = _compact_table()
    for head in ("CC-Cert", "PCA under"):
        table.add_column(head, no_wrap=True)
    for head in ("n", "k", "δ", "t", "images", "clean", *(f"ε={e:g}" for e in eps)):
        table.add_column(head, justify="right", no_wrap=True)
    for one in bounds:
        made = [str(one.recipe.get(name, "?")) for name in ("transform", "n", "k", "delta")]
        accuracies = [sum(one.correct) / len(one.correct), *map(one.at, eps)]
        cells = [grid_text(one.recipe["t"]) if "t" in one.recipe else "?", str(len(one.bounds))]
        table.add_row(one.label, *made, *cells, *(f"{100 * value:.1f} %" for value in accuracies))
    return table


def grid_text(t: Sequence[float]) -> str:
    """A grid of Chernoff parameters (first, last, number) in words."""
    first, last, number = t
    return f"{first:g}..{last:g} ({number})"


def summary_table(rows: Sequence[Mapping[str, Any]], titles: Mapping[str, str] | None = None) -> Table:
    """The rows of a summary as a rich table, 80 columns wide: fractions in per cent, time in seconds.

    `titles` maps a row's method to the name shown.
    """
    table = _compact_table()
    table.add_column("method", no_wrap=True)
    eps = list(rows[0]["pca"]) if rows else []
    radii = list(rows[0]["certified_accuracy"]) if rows else []
    certified = [f"{'cert.' if i == 0 else ''}\nr={_short(r)}" for i, r in enumerate(radii)]
    bounded = [f"{'PCA' if i == 0 else ''}\nε={_short(e)}" for i, e in enumerate(eps)]
    for head in ("cut\n%", "clean\n%", *bounded, *certified, "\nsec."):
        table.add_column(head, justify="right", no_wrap=True)
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before["sparsity"] != row["sparsity"]:
            table.add_section()
        accuracies = [row["clean_accuracy"], *row["pca"].values(), *row["certified_accuracy"].values()]
        cells = [f"{100 * value:.1f}" for value in (row["sparsity"], *accuracies)]
        table.add_row((titles or {}).get(row["method"], row["method"]), *cells, f"{row['seconds']:.1f}")
    return table


def _short(number: str) -> str:
    return number[1:] if number.startswith("0.") else number


def _compact_table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, collapse_padding=True)


def summary_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV; columns method, sparsity, clean_accuracy, pca@ε…, norm, certified_accuracy@r…, seconds."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    flat = [
        {
            "method": row["method"],
            "sparsity": row["sparsity"],
            "clean_accuracy": row["clean_accuracy"],
            **{f"pca@{e}": value for e, value in row["pca"].items()},
            "norm": row["norm"],
            **{f"certified_accuracy@{r}": value for r, value in row["certified_accuracy"].items()},
            "seconds": row["seconds"],
        }
        for row in rows
    ]
    if flat:
        writer.writerow(flat[0])
        writer.writerows(row.values() for row in flat)
    return out.getvalue()


def write_summary(folder: Path, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """Write summary.json ({"rows": […], "settings": …}) and summary.csv into `folder`, each in one step."""
    runs.write_json(folder / "summary.json", {"rows": [dict(row) for row in rows], "settings": dict(settings)})
    runs.write_atomic(folder / "summary.csv", summary_csv(rows))


def read_summary(folder: Path) -> dict[str, Any]:
    """What `write_summary` wrote. Raises RunError naming a damaged or foreign file."""
    path = folder / "summary.json"
    found = runs.read_json(path)
    if not isinstance(found, dict) or found.keys() != {"rows", "settings"}:
        raise runs.RunError(f"{path} was not written by csam demo: it must hold 'rows' and 'settings'")
    return found


def certificates_table(curves: Sequence[Curve], radii: Sequence[float]) -> Table:
    """One line a curve: how it was made, norm of the radii, images, certified accuracy at each radius, average radius
    (ACR, Zhai et al. 2020).

    Where samples are known: their mean an image, and how many times fewer that is than the most.
    """
    table = _compact_table()
    table.add_column("certificates", no_wrap=True)
    counted = ("samples", "saving") if any(curve.samples for curve in curves) else ()
    said = any(curve.made for curve in curves)
    if said:
        table.add_column("of", no_wrap=True)
    for head in ("norm", "images", *(f"r={r:g}" for r in radii), "ACR", *counted):
        table.add_column(head, justify="right", no_wrap=True)
    for curve in curves:
        cells = [f"{100 * curve.at(r):.1f} %" for r in radii] + [f"{sum(curve.radii) / curve.total:.3f}"]
        if curve.samples:
            mean, most = curve.samples
            cells += [f"{mean:.0f}", f"{most / mean:.1f}×"]
        how = [curve.made or "?"] if said else []
        table.add_row(curve.label, *how, NORMS[curve.norm] if curve.norm else "?", str(curve.total), *cells)
    return table


def made_text(recipe: Mapping[str, Any]) -> str:
    """What a certificate of smoothing depends on besides the network and the image, in words; "" if nobody knows."""
    if not {"sigma", "n", "alpha"} <= recipe.keys():
        return ""
    most = "" if recipe.get("method") == "fixed" else "<"
    parts = [f"σ={recipe['sigma']:g}", f"n{most}={recipe['n']}", f"α={recipe['alpha']:g}", recipe.get("dtype")]
    if recipe.get("noise", "gaussian") != "gaussian":
        parts.insert(0, recipe["noise"])
    return " ".join([*filter(None, parts), *(["sound"] if "sound_float" in recipe else [])])


def check_picture(path: Path) -> None:
    """Raise ValueError for a picture that `plot_curves` could not write: another format, no such folder."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"path must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"path must lie in a folder that exists, got {str(path)!r}")


def plot_curves(
    curves: Sequence[Curve], path: Path, *, title: str = "", limit: float | None = None, limit_label: str = ""
) -> None:
    """Draw certified accuracy over radius as step curves and write `path` (.png, .pdf or .svg) in one step.

    One panel for each distinct `Curve.panel`; curves with the same label share a colour. Where norms differ, labels say
    each curve's. `limit` marks the largest radius that the number of samples allows.
    """
    if not curves:
        raise ValueError("curves must hold at least one curve, got none")
    check_picture(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = [replace(curve, label=_plain(curve.label)) for curve in curves]
    norms = sorted({curve.norm for curve in curves})
    if len(norms) > 1:
        curves = [replace(curve, label=f"{curve.label}, {NORMS[curve.norm]}") for curve in curves]
        radius = "radius, norm as labelled"
    else:
        radius = f"{NORMS[norms[0]]} radius" if norms[0] else f"radius, {NORMS['']}"
    panels = list(dict.fromkeys(curve.panel for curve in curves if curve.panel)) or [""]
    labels = list(dict.fromkeys(curve.label for curve in curves))
    longest = max((max(curve.radii, default=0.0) for curve in curves), default=0.0)
    right = 1.03 * max(longest, limit or 0.0) or 1.0
    figure, axes = pyplot.subplots(
        1,
        len(panels),
        figsize=(max(6.4, 4.2 * len(panels)), max(4.6, 3.6 + 0.2 * len(labels) / (1 + len(panels)))),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        for curve in (c for c in curves if c.panel in ("", panel)):
            style = labels.index(curve.label)
            x, y = curve.steps(right)
            axis.step(
                x,
                [100 * value for value in y],
                where="pre",
                label=curve.label,
                color=PALETTE[style % len(PALETTE)],
                linestyle=DASHES[(style + style // len(PALETTE)) % len(DASHES)],
                linewidth=1.8,
            )
        if limit is not None:
            axis.axvline(limit, color="0.6", linewidth=1, zorder=0, label=limit_label or None)
        axis.set(title=panel, xlabel=f"certified {radius} (pixels in [0, 1])", xlim=(0, right), ylim=(0, 102))
        axis.grid(alpha=0.3)
    handles, names = axes[0][0].get_legend_handles_labels()
    for axis in axes[0][1:]:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            if name not in names:
                handles, names = [*handles, handle], [*names, name]
    figure.legend(handles, names, loc="outside lower center", ncol=min(1 + len(panels), len(names)), fontsize="small")
    axes[0][0].set_ylabel("certified accuracy (% of the images)")
    if title:
        figure.suptitle(title, fontsize="medium")
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:].lower(), dpi=140, bbox_inches="tight")  # a wide legend is not cut
    pyplot.close(figure)
    runs.write_atomic(path, picture.getvalue())


def _plain(label: str) -> str:
    """What matplotlib shows as this label: two $ begin mathematics there, and a first _ hides it from the legend."""
    return " " * label.startswith("_") + label.replace("$", r"\$")


def standard_error(images: int) -> float:
    """The largest standard error of a fraction measured on so many images, 0.5/√images."""
    return 0.5 / math.sqrt(images)
