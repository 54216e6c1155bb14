"""The report: one self-contained HTML page from the metrics, curves and grids. No network is needed to open it."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from matplotlib.figure import Figure

from ddops.reports import FACTS

TITLES = {
    "data": "Real images",
    "reconstruction": "Tokenizer reconstruction (the floor)",
    "teacher": "Teacher, ordinary sampling",
    "teacher_flow": "Teacher through the flow map",
    "teacher_involved": "Teacher-involved",
    "dd2": "DD2 generator",
    "dd2_refine": "DD2 generator, refined",
    "ar_diffusion": "DD2's AR-diffusion model",
    "dd1": "DD1 student",
    "skip": "Teacher, last steps skipped",
    "onestep_class": "independent tokens, marginals of the class",
    "onestep_star": "onestep*: independent tokens",
}
"""Kinds of rows in the order of the page. A row of another kind is shown under its own name, after these."""
INTERPOLATION = "interpolation_"
"""What the file of a row's interpolations begins with."""
FIGURES = {
    "fid": ("FID", "{:.2f}", "lower is better"),
    "kid": ("KID", "{:.4g}", "lower is better"),
    "inception_score": ("Inception score", "{:.2f}", "higher is better"),
    "precision": ("precision", "{:.3f}", "higher is better"),
    "recall": ("recall", "{:.3f}", "higher is better"),
    "accuracy": ("class accuracy", "{:.1%}", "higher is better"),
    "clip_score": ("CLIP score", "{:.2f}", "higher is better"),
}
"""Figures in the order of the page: heading, format, which way is better."""


@dataclass(frozen=True)
class Row:
    """One line of the table, ready to be shown; cells in the order of the headings."""

    name: str
    title: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Headings, each with what it means, and rows."""

    headings: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]


def table(metrics: Mapping[str, Any]) -> Table:
    """The rows of the metrics file in the page's order, with the figures that it holds."""
    names = sorted((name for name in metrics if name not in FACTS), key=_order)
    figures = [figure for figure in FIGURES if any(figure in metrics[name] for name in names)]
    base = metrics["teacher"]["fid"] if "teacher" in metrics else None
    headings = [("steps", "passes through a transformer, one after the other")]
    for figure in figures:
        headings.append((FIGURES[figure][0], FIGURES[figure][2]))
        if figure == "fid" and base is not None:
            headings.append(("FID / teacher", "lower is better"))
    return Table(tuple(headings), tuple(_row(name, metrics[name], figures, base) for name in names))


def _row(name: str, values: Mapping[str, Any], figures: Sequence[str], base: float | None) -> Row:
    cells = [str(values.get("passes", "-"))]
    for figure in figures:
        cells.append(_shown(figure, values))
        if figure == "fid" and base is not None:
            cells.append(f"{values['fid'] / base:.2f}")
    return Row(name, title(name), tuple(cells))


def _shown(figure: str, values: Mapping[str, Any]) -> str:
    """A figure with its spread over the seeds, where there were several."""
    if figure not in values:
        return "-"
    text = FIGURES[figure][1].format(values[figure])
    if values.get("runs", 1) < 2:
        return text
    return f"{text} \u00b1 {FIGURES[figure][1].format(values[f'{figure}_spread'])}"


def title(name: str) -> str:
    """A row's name for people."""
    if name in TITLES:
        return TITLES[name]
    kind = _kind(name)
    numbers = [int(number) for number in re.findall(r"\d+", name.removeprefix(kind))]
    if kind in ("dd1", "dd2") and len(numbers) == 1:
        return f"{TITLES[kind]}, {numbers[0]} step{'s' if numbers[0] > 1 else ''}"
    if kind == "dd2_refine":
        return f"{TITLES[kind]} {'once' if numbers == [1] else f'{numbers[0]} times'}"
    if kind in ("teacher_involved", "skip"):
        return f"{TITLES[kind]}, {'-'.join(map(str, numbers))}"
    return name


def _kind(name: str) -> str:
    """The longest kind of row that the name begins with; the name itself where there is none."""
    return max((kind for kind in TITLES if name == kind or name.startswith(f"{kind}_")), key=len, default=name)


def _order(name: str) -> tuple[int, str]:
    kinds = list(TITLES)
    return (kinds.index(_kind(name)) if _kind(name) in kinds else len(kinds), name)


def grids(directory: Path, *, interpolations: bool = False) -> list[tuple[str, str]]:
    """Title and picture of every grid of samples, or of every interpolation, in the page's order."""
    files = sorted(directory.glob("*.png"), key=lambda file: _order(file.stem.removeprefix(INTERPOLATION)))
    return [
        (title(file.stem.removeprefix(INTERPOLATION)), embed_png(file))
        for file in files
        if file.stem.startswith(INTERPOLATION) == interpolations
    ]


def read_curve(path: Path) -> tuple[list[int], list[float]]:
    """Steps and values of a DVCLive TSV file."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [int(row["step"]) for row in rows], [float(row[path.stem]) for row in rows]


def chart(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], ylabel: str, *, log: bool = False) -> str:
    """An SVG line chart that takes its text colour from the page; the same data gives the same bytes."""
    with mpl.rc_context({"svg.hashsalt": "ddops", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(4.6, 2.8), layout="constrained")
        axes = figure.add_subplot()
        for name, (steps, values) in curves.items():
            axes.plot(steps, values, label=name, linewidth=1.5, marker="." if len(steps) < 20 else None)
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if log:
            axes.set_yscale("log")
        if len(curves) > 1:
            axes.legend(frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    # Matplotlib leaves text and some strokes at the default black, which a dark page would swallow.
    return svg.replace("<svg ", '<svg fill="currentColor" ', 1)


def embed_png(path: Path) -> str:
    """A picture as a data URI."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def render(template: str, **values: Any) -> str:
    """The page or the model card; a value that the template asks for and does not get is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ddops.evaluation", "."),
        autoescape=template.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)
