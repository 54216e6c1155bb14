"""The papers' ablations as DVC experiments: a grid is queued, run by DVC, and plotted from what DVC recorded.

    python benchmarks/ablations.py start_positions --queue     # dvc exp run --queue, one experiment a point
    dvc exp run --run-all                                      # or: dvc queue start --jobs 1
    python benchmarks/ablations.py start_positions --plot      # benchmarks/results/ablation_start_positions.{json,svg}

``--set section.key=value`` goes into every experiment, e.g. ``--set preset=smoke``; given with ``--plot`` again, it is
written down with the figures. What points share (judge, teacher, trajectories) comes from DVC's run cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from ddops import git
from ddops.evaluation.gate import comparable
from ddops.files import write_json

RESULTS = Path("benchmarks/results")
METRICS, PARAMS = Path("reports/metrics.json"), "params.yaml"
MetricsOf = Callable[[str], dict[str, Any] | None]
"""The figures that a Git revision holds."""
DONE = "success"
"""DVC's word for an experiment that ended well; it has none for one that is older than its queue."""
ABSENT = object()
"""Unlike every value, None too: a setting that earlier code did not have."""


@dataclass(frozen=True)
class Grid:
    """Settings a point, and which rows its plot shows."""

    title: str
    points: Mapping[str, tuple[str, ...]]
    rows: tuple[str, ...] = ("dd1_1step", "dd1_2step", "teacher")

    @property
    def varied(self) -> set[str]:
        """The settings in which its points may differ, dotted."""
        return {setting.partition("=")[0] for settings in self.points.values() for setting in settings}


@dataclass(frozen=True)
class Experiment:
    """What DVC recorded of one that ended well: when, with which settings (dotted), and its figures."""

    at: datetime
    settings: Mapping[str, Any]
    metrics: Mapping[str, Any]


GRIDS = {
    "start_positions": Grid(
        "Second start position k1 (DD1, Fig. 7)",
        {str(k): (f"dd1.start_positions=[0,{k}]",) for k in (2, 4, 7, 10, 13)},
    ),
    "dataset_size": Grid(
        "Trajectories (DD1, Fig. 8)",
        {str(count): (f"trajectories.count={count}",) for count in (2000, 4000, 8000, 16000, 32000)},
    ),
    "loss_terms": Grid(
        "Terms of DD1's loss",
        {
            "all": (),
            "no perceptual": ("dd1.perceptual.weight=0.0",),
            "no embedding": ("dd1.embedding_weight=0.0",),
            # Without cross-entropy no logit means anything: the tokens are those of the regressing head.
            "regressed": ("dd1.logit_prefix=0",),
            "regressed without cross-entropy": ("dd1.logit_prefix=0", "dd1.cross_entropy_weight=0.0"),
        },
    ),
    "guidance_rate": Grid(
        "Updates of DD2's guidance network a generator update",
        {str(rate): (f"dd2.guidance.updates={rate}",) for rate in (1, 2, 5, 10)},
        ("dd2_1step", "dd1_1step", "teacher"),
    ),
}
"""Sizes are the digits'. The gate is asked for nothing here: a refused point is a result too."""
NO_GATE = ("gate=smoke",)


def name_of(grid: str, point: str) -> str:
    """The experiment's name, which DVC makes a Git reference of."""
    return f"ablation-{grid}-{point}".replace("_", "-").replace(" ", "-")


def queue(grid: str, settings: list[str]) -> None:
    """Queue every point."""
    for point, own in GRIDS[grid].points.items():
        overrides = [part for setting in (*NO_GATE, *settings, *own) for part in ("-S", setting)]
        run(["exp", "run", "--queue", "--name", name_of(grid, point), *overrides, "evaluate"])
    print("queued; next: dvc exp run --run-all")


def recorded(revision: str) -> dict[str, Any] | None:
    """The metrics file as an experiment's commit has it; None where it has none."""
    text = git.file_at(Path(), revision, METRICS)
    return None if text is None else json.loads(text)


def collect(grid: str, shown: list[dict[str, Any]], metrics_of: MetricsOf = recorded) -> dict[str, Experiment]:
    """Point -> its experiment, the newest of those that have run; ``shown`` is what ``dvc exp show --json`` says."""
    names = {point: name_of(grid, point) for point in GRIDS[grid].points}
    newest: dict[str, Experiment] = {}
    for name, experiment in ended(shown, set(names.values()), metrics_of):
        if name not in newest or experiment.at > newest[name].at:
            newest[name] = experiment
    return {point: newest[name] for point, name in names.items() if name in newest}


def ended(shown: list[dict[str, Any]], names: set[str], metrics_of: MetricsOf) -> Iterator[tuple[str, Experiment]]:
    """Name and record of every experiment of those names that has run: each commit may have one of the same name.

    One that is queued, running or failed is shown with the figures of the commit it starts from, and is left out.
    """
    for baseline in shown:
        for branch in baseline.get("experiments") or []:
            if (branch.get("executor") or {"state": DONE})["state"] != DONE:
                continue
            for revision in branch["revs"]:
                data = revision.get("data")
                if data and revision.get("name") in names and (metrics := metrics_of(revision["rev"])):
                    settings = dict(dotted(data["params"][PARAMS]["data"]))
                    yield revision["name"], Experiment(datetime.fromisoformat(data["timestamp"]), settings, metrics)


def dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by the names that ``--set`` takes."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def protocol_of(found: Mapping[str, Experiment]) -> dict[str, Any]:
    """What all points were judged by; ends with the facts in which they differ."""
    first, *others = found
    protocol: dict[str, Any] = found[first].metrics["protocol"]
    for point in others:
        if facts := comparable(protocol, found[point].metrics["protocol"]):
            raise SystemExit(f"{first} and {point} were judged differently, no chart shows both: {', '.join(facts)}")
    # What they were drawn with is what the grid varies; the settings tell the rest.
    return {fact: value for fact, value in protocol.items() if fact != "drawing_sha256"}


def settings_of(grid: str, found: Mapping[str, Experiment]) -> dict[str, Any]:
    """The settings that all points share: all but those that the grid varies, and the gate's, which makes no figure;
    ends with the others in which they differ."""
    shared = {
        point: {
            name: value
            for name, value in experiment.settings.items()
            if name not in GRIDS[grid].varied and not name.startswith("gate.")
        }
        for point, experiment in found.items()
    }
    first, *others = shared
    for point in others:
        names = sorted(shared[first].keys() | shared[point].keys())
        if differ := [name for name in names if shared[first].get(name, ABSENT) != shared[point].get(name, ABSENT)]:
            raise SystemExit(f"{first} and {point} have other settings, no chart shows both: {', '.join(differ)}")
    return shared[first]


def plot(grid: str, settings: list[str]) -> None:
    """Write the figures, and what they came from, and a chart; says which points are missing."""
    found, spec = collect(grid, json.loads(run(["exp", "show", "--json", "--all-commits"]))), GRIDS[grid]
    if missing := [point for point in spec.points if point not in found]:
        print(f"not run yet: {', '.join(missing)}", file=sys.stderr)
    if not found:
        raise SystemExit(f"no experiment of {grid} has run: --queue, then dvc exp run --run-all")
    rows = [row for row in spec.rows if all(row in experiment.metrics for experiment in found.values())]
    figures = {point: {row: experiment.metrics[row] for row in rows} for point, experiment in found.items()}
    command = ["python", "benchmarks/ablations.py", grid, "--queue", *(f"--set {setting}" for setting in settings)]
    record = {
        "title": spec.title,
        "command": " ".join(command),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "protocol": protocol_of(found),
        "settings": settings_of(grid, found),
        "models": {point: experiment.metrics["models"] for point, experiment in found.items()},
        "points": figures,
    }
    write_json(RESULTS / f"ablation_{grid}.json", record)
    draw(record, RESULTS / f"ablation_{grid}.svg")
    print(RESULTS / f"ablation_{grid}.svg")


def draw(record: Mapping[str, Any], path: Path) -> None:
    """The chart of a record; the same record gives the same bytes."""
    figures = record["points"]
    labels = [textwrap.fill(point, 12) for point in figures]
    # A line only between points that have an order.
    line = "-" if all(point.isdecimal() for point in figures) else ""
    with mpl.rc_context({"svg.hashsalt": "ddops"}):
        figure = Figure(figsize=(5, 3.7), layout="constrained")
        axes = figure.add_subplot()
        for row in next(iter(figures.values())):
            fids, spreads = ([figures[point][row][name] for point in figures] for name in ("fid", "fid_spread"))
            axes.errorbar(labels, fids, spreads, marker="o", ls=line, capsize=3, label=row)
        axes.set(title=textwrap.fill(record["title"], 40), ylabel="FID")
        axes.tick_params("x", labelsize=8)
        axes.grid(alpha=0.25)
        figure.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=8)  # beside the points, not on them
        figure.savefig(path, metadata={"Date": None})


def run(arguments: list[str]) -> str:
    """Output of a DVC command; ends with what DVC said where it fails."""
    result = subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"dvc {' '.join(arguments[:3])}: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", choices=GRIDS)
    parser.add_argument("--queue", action="store_true")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="section.key=value")
    arguments = parser.parse_args()
    if arguments.queue == arguments.plot:
        parser.error("one of --queue and --plot")
    if arguments.queue:
        queue(arguments.grid, arguments.settings)
    else:
        plot(arguments.grid, arguments.settings)


if __name__ == "__main__":
    main()
