"""Tables, summary files and curves, against hand-made rows and the published CIFAR-10 certificates."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from conftest import shared_data
from csam import records, report
from csam.report import Bounds, Curve


def row(method: str, sparsity: float, accuracy: float) -> dict[str, Any]:
    return {
        "method": method,
        "sparsity": sparsity,
        "clean_accuracy": accuracy,
        "pca": {"0.01": 0.5, "0.1": 1.0},
        "norm": "l1",
        "certified_accuracy": {"0": accuracy, "0.25": accuracy / 2},
        "seconds": 12.34,
    }


ROWS = [row("dense", 0.0, 0.9), row("magnitude", 0.5, 0.8), row("csam", 0.5, 0.85)]


def printed(renderable: Any, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_table_shows_every_number_in_80_columns() -> None:
    text = printed(report.summary_table(ROWS, {"csam": "C-SAM"}))
    assert "…" not in text
    line = next(line for line in text.splitlines() if line.strip().startswith("C-SAM"))
    assert line.split() == ["C-SAM", "50.0", "85.0", "50.0", "100.0", "85.0", "42.5", "12.3"]
    assert "ε=.01" in text
    assert "r=.25" in text


def test_table_of_certificates_shows_samples_where_they_are_known() -> None:
    curves = [Curve("a", [0.5], 2, samples=(250.0, 1000), norm="l1"), Curve("b", [], 1)]
    lines = [line.split() for line in printed(report.certificates_table(curves, [0.25])).splitlines()]
    assert ["a", "ℓ1", "2", "50.0", "%", "0.250", "250", "4.0×"] in lines
    assert ["b", "?", "1", "0.0", "%", "0.000"] in lines
    assert "samples" not in printed(report.certificates_table(curves[1:], [0.25]))


def axis_and_labels(curves: list[Curve], monkeypatch: pytest.MonkeyPatch, path: Path) -> tuple[str, list[str]]:
    """What a picture says of its horizontal axis and of its curves."""
    from matplotlib.figure import Figure

    seen: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: seen.append(figure))
    report.plot_curves(curves, path)
    (axis,) = seen[0].axes
    return axis.get_xlabel(), axis.get_legend_handles_labels()[1]


def test_radii_of_different_norms_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, foreign = Curve("a", [0.1], 1, norm="l1"), Curve("b", [0.1], 1, norm="l2"), Curve("c", [], 1)
    for curves, axis, labels in (
        ([first], "certified ℓ1 radius (pixels in [0, 1])", ["a"]),
        ([second, second], "certified ℓ2 radius (pixels in [0, 1])", ["b", "b"]),
        ([first, second], "certified radius, norm as labelled (pixels in [0, 1])", ["a, ℓ1", "b, ℓ2"]),
        ([second, foreign], "certified radius, norm as labelled (pixels in [0, 1])", ["b, ℓ2", "c, norm not recorded"]),
        ([foreign], "certified radius, norm not recorded (pixels in [0, 1])", ["c"]),
    ):
        assert axis_and_labels(curves, monkeypatch, tmp_path / "a.png") == (axis, labels)


def test_labels_are_shown_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = [Curve("_a", [0.1], 1), Curve(r"$b_{$", [0.1], 1)]
    report.plot_curves(curves[:1], tmp_path / "a.png")
    report.plot_curves(curves, tmp_path / "b.png")
    assert axis_and_labels(curves, monkeypatch, tmp_path / "c.png")[1] == [" _a", r"\$b_{\$"]


def test_table_of_bounds_has_what_they_were_computed_with() -> None:
    recipe = {"transform": "blur:1", "n": 100, "k": 10, "delta": 0.9, "t": [1e-4, 1e4, 500]}
    known = Bounds("a", [0.02, 1e-9, 0.5, 1e-9], [True, True, True, False], recipe)
    older = Bounds("b", [1.0], [True], {})
    lines = [line.split() for line in printed(report.bounds_table([known, older], [0.01, 0.1]), 120).splitlines()]
    grid = ["0.0001..10000", "(500)"]
    assert ["a", "blur:1", "100", "10", "0.9", *grid, "4", "75.0", "%", "25.0", "%", "50.0", "%"] in lines
    assert ["b", *"?????", "1", "100.0", "%", "0.0", "%", "0.0", "%"] in lines


def test_summary_files_hold_the_rows_exactly(tmp_path: Path) -> None:
    report.write_summary(tmp_path, ROWS, {"seed": 0})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"rows": ROWS, "settings": {"seed": 0}}
    with open(tmp_path / "summary.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [float(r["certified_accuracy@0.25"]) for r in read] == [0.45, 0.4, 0.425]
    assert read[0].keys() == {
        *("method", "sparsity", "clean_accuracy", "pca@0.01", "pca@0.1", "norm"),
        *("certified_accuracy@0", "certified_accuracy@0.25", "seconds"),
    }


def test_steps_go_through_every_radius() -> None:
    curve = Curve("a", [0.5, 0.2, 0.2], 4)
    x, y = curve.steps(1.0)
    assert x == [0.0, 0.2, 0.2, 0.5, 0.5, 1.0]
    assert y == [0.75, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [curve.at(r) for r in (0, 0.2, 0.21, 0.5, 0.51)] == [0.75, 0.75, 0.25, 0.25, 0.0]


def test_curve_without_any_certificate() -> None:
    assert Curve("a", [], 5).steps(1.0) == ([0.0, 0.0, 1.0], [0.0, 0.0, 0.0])


@pytest.mark.parametrize("radius", [-0.1, float("nan")])
def test_curve_refuses_what_is_no_radius(radius: float) -> None:
    with pytest.raises(ValueError, match="radius must be >= 0"):
        Curve("a", [0.5], 1).at(radius)


@pytest.mark.parametrize(("radii", "total"), [([], 0), ([0.1, 0.2], 1)])
def test_curve_refuses_wrong_totals(radii: list[float], total: int) -> None:
    with pytest.raises(ValueError, match="total must be >= 1"):
        Curve("a", radii, total)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".PDF"])
def test_picture_is_written_whole(tmp_path: Path, suffix: str) -> None:
    curves = [Curve("dense", [0.1, 0.3], 4), Curve("csam", [0.2], 4, "50 %"), Curve("csam", [], 4, "90 %")]
    path = tmp_path / f"curves{suffix}"
    report.plot_curves(curves, path, title="t", limit=0.5, limit_label="limit")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if suffix == ".png":
        width, height = Image.open(path).size
        assert width > height > 400


def test_picture_has_room_for_its_legend(tmp_path: Path) -> None:
    def size(labels: list[str]) -> tuple[int, int]:
        report.plot_curves([Curve(label, [0.1], 2) for label in labels], tmp_path / "a.png")
        return Image.open(tmp_path / "a.png").size

    (width, height), long, many = (size(labels) for labels in (["a"], ["a" * 200], [str(i) for i in range(40)]))
    assert long[0] > 1.5 * width
    assert many[1] > 1.5 * height


def test_picture_needs_a_curve_and_a_known_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one curve"):
        report.plot_curves([], tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"must end in .png, .pdf or .svg, got .*a.txt"):
        report.plot_curves([Curve("a", [], 1)], tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("sigma", "published"),
    [
        ("0.25", {0.25: 0.60, 0.5: 0.43, 0.75: 0.27}),
        ("0.50", {0.25: 0.55, 0.5: 0.41, 0.75: 0.32, 1.0: 0.23}),
    ],
    ids=["sigma-0.25", "sigma-0.50"],
)
def test_published_certificates_give_the_published_accuracies(sigma: str, published: dict[float, float]) -> None:
    rows = records.read_tsv(shared_data(f"cohen-cifar10-sigma_{sigma}.tsv"))
    curve = Curve("cohen", [r.radius for r in rows if r.correct], len(rows))
    assert curve.total == 500
    for radius, value in published.items():
        assert round(curve.at(radius), 2) == value
    text = printed(report.certificates_table([curve], list(published)))
    assert f"{100 * curve.at(0.25):.1f} %" in text
