"""The report: one self-contained HTML page from the metrics, curves and grids. No network is needed to open it."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from matplotlib.figure import Figure

TITLES = {
    "data": "Real images",
    "reconstruction": "Tokenizer reconstruction (the floor)",
    "teacher": "Teacher, ordinary sampling",
    "teacher_flow": "Teacher through the flow map",
    "dd1_1step": "DD1 student, 1 step",
    "dd1_2step": "DD1 student, 2 steps",
    "onestep_class": "independent tokens, marginals of the class",
    "onestep_star": "onestep*: independent tokens",
}
"""Rows in the order of the page. A row that is not here is shown under its own name, after these."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    title: str
    steps: str
    fid: float
    fid_spread: float
    accuracy: float
    ratio: float
    """FID over the teacher's."""


def table(metrics: Mapping[str, Any], teacher_steps: int) -> list[Row]:
    """The rows of the metrics file in the page's order."""
    names = [name for name in metrics if name != "protocol"]
    order = list(TITLES)
    names.sort(key=lambda name: (order.index(name) if name in order else len(order), name))
    base = metrics["teacher"]["fid"]
    return [
        Row(
            name=name,
            title=TITLES.get(name, name),
            steps=_steps(name, teacher_steps),
            fid=metrics[name]["fid"],
            fid_spread=metrics[name]["fid_spread"],
            accuracy=metrics[name]["accuracy"],
            ratio=metrics[name]["fid"] / base,
        )
        for name in names
    ]


def _steps(name: str, teacher_steps: int) -> str:
    if name.endswith("step") and "_" in name:
        return name.rpartition("_")[2].removesuffix("step")
    return {"reconstruction": "-", "onestep_class": "1", "onestep_star": "1"}.get(name, str(teacher_steps))


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


def render(**values: Any) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ddops.evaluation", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html").render(**values)
