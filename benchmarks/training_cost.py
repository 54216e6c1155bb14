"""What a one-step generator costs: DD1 alone beside a short DD1 that DD2 takes over, FID against teacher passes.

The short DD1 has small batches, which learn more from a pass; so DD1 alone with the short one's settings is run as
well, for a third of the whole one's passes.

    python benchmarks/training_cost.py WORKSPACE --preset digits --output benchmarks/results/training_cost_digits.json

WORKSPACE is where the preset's stages up to ``distill_dd1`` ran (those of the recorded results with
``dd1.training.steps=2000``); nothing there is changed. The short way takes its
judge and teacher, and trains anew from fewer trajectories. FIDs are those of the stages' own curves (one seed of
noise); passes are of the teacher over a whole sequence, trajectories included, as
:func:`dd2_variants.training_passes` counts them. Run it again to go on: finished stages are kept.
"""

from __future__ import annotations

import argparse
import platform
import resource
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import yaml
from dd2_variants import training_passes
from matplotlib.ticker import ScalarFormatter
from stage_runs import run_stages

from ddops.config.load import compose, validate
from ddops.config.stages import Config
from ddops.evaluation.report import read_curve
from ddops.files import atomic_path, write_json

SHORT: Final = (
    *("trajectories.count=16000", "dd1.training.batch_size=16", "dd1.training.steps=2400"),
    *("dd1.training.learning_rate=1.5e-3", "dd1.training.processes=1", "dd1.evaluate_every=400"),
    *("dd2.guidance.alignment_steps=30", "dd2.guidance.batch_size=128", "dd2.guidance.learning_rate=1.0e-3"),
    *("dd2.training.steps=45", "dd2.training.batch_size=128", "dd2.training.learning_rate=4.0e-4"),
    *("dd2.training.ema_decay=0.95", "dd2.training.processes=1", "dd2.anchor_weight=0.0", "dd2.evaluate_every=5"),
    "ar_diffusion=none",
)
"""Settings of the short way; ``--override`` adds to them."""
STAGES: Final = ("captions", "trajectories", "distill_dd1", "distill_dd2")
GIVEN: Final = ("artifacts/features", "artifacts/teacher")
SHARE: Final = 1 / 3
"""Of the whole DD1's passes: what the short one's settings are given for DD1 alone."""
Points = list[tuple[float, float]]
"""Passes so far, and the FID of one step there."""


def points(place: Path, config: Config) -> Points:
    """DD1's curve, and DD2's behind it where it ran."""
    assert config.dd1.source == "train"
    passes = training_passes(config)
    spent, a_step = passes["trajectories"], passes["distill_dd1"] / config.dd1.training.steps
    found = [(spent + a_step * step, fid) for step, fid in curve(place, "dd1")]
    spent += passes["distill_dd1"] + passes.get("dd2_alignment", 0.0)
    return found + [(spent + passes.get("dd2_update", 0.0) * step, fid) for step, fid in curve(place, "dd2")]


def curve(place: Path, name: str, key: str = "fid_1step") -> list[tuple[int, float]]:
    file = place / "reports/curves" / name / f"plots/metrics/{key}.tsv"
    return list(zip(*read_curve(file), strict=True)) if file.exists() else []


def run_way(given: dict[str, Path], place: Path, values: dict[str, Any], stages: Sequence[str]) -> dict[str, float]:
    """The stages of one way, those that are not finished: CPU seconds of each; raises SystemExit where one fails."""
    for name, target in given.items():
        link = place / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(target.resolve(), target_is_directory=True)
    return run_stages(place, values, stages, cpu_seconds)


def cpu_seconds() -> float:
    """Of the processes that have ended."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


def steps_alone(short: Config, passes: float) -> int:
    """Of DD1 with the short way's settings, for so many passes in all; in hundreds."""
    assert short.dd1.source == "train"
    spent = training_passes(short)
    a_step = spent["distill_dd1"] / short.dd1.training.steps
    return int((passes - spent["trajectories"]) / a_step) // 100 * 100


def stays_at(found: Points, fid: float) -> float | None:
    """Passes from which on every point of the curve is that low, if there are any."""
    return next((found[index][0] for index in range(len(found)) if all(v <= fid for _, v in found[index:])), None)


def ends(place: Path, name: str) -> dict[str, float]:
    """What else the curves of a stage say at its end."""
    found = {key: curve(place, name, key) for key in ("fid_1step", "fid_2step", "recall")}
    return {key: points[-1][1] for key, points in found.items() if points}


def draw(ways: dict[str, Points], teacher_fid: float | None, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for name, found in ways.items():
        axis.plot(
            [passes / 1e3 for passes, _ in found], [fid for _, fid in found], marker="o", markersize=4, label=name
        )
    if teacher_fid is not None:
        axis.axhline(teacher_fid, color="0.5", linestyle="--", label="teacher")
    axis.set_xlabel("passes of the teacher, thousands, trajectories included")
    axis.set_ylabel("FID of one step")
    axis.set_yscale("log")
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks(ScalarFormatter())  # 6, not 6 x 10^0
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--params", type=Path, default=Path("params"))
    parser.add_argument("--work", type=Path, default=Path(".ddops/training_cost"), help="where the short way runs")
    parser.add_argument("--override", action="append", default=[], dest="overrides", metavar="section.key=value")
    parser.add_argument("--teacher-fid", type=float, help="by the same ruler, for the chart (see dd2_variants.py)")
    arguments = parser.parse_args()
    full = validate(yaml.safe_load((arguments.workspace / "params.yaml").read_text()), "WORKSPACE/params.yaml")
    choice = [f"preset={arguments.preset}", f"seed={full.seed}", *SHORT, *arguments.overrides]
    values = compose(arguments.params, choice)
    config = validate(values, "the short way")
    given = {name: arguments.workspace / name for name in GIVEN}
    seconds = {"dd1_then_dd2": run_way(given, arguments.work, values, STAGES)}
    whole = points(arguments.workspace, full)[: len(curve(arguments.workspace, "dd1"))]
    short = points(arguments.work, config)
    steps, place = steps_alone(config, SHARE * whole[-1][0]), arguments.work / "alone"
    values = compose(arguments.params, [*choice, f"dd1.training.steps={steps}", f"dd1.evaluate_every={steps // 6}"])
    given |= {name: arguments.work / name for name in ("data/captions", "data/trajectories")}
    seconds["dd1_small_batches"] = run_way(given, place, values, ["distill_dd1"])
    alone = points(place, validate(values, "DD1 alone"))
    aim = whole[-1][1]
    places = {str(arguments.workspace): "WORKSPACE", str(arguments.work): "WORK"}
    result = {
        "command": " ".join(places.get(word, word) for word in sys.argv),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}",
        "preset": arguments.preset,
        "seed": full.seed,
        "short": choice,
        "dd1": whole,
        "dd1_small_batches": alone,
        "dd1_then_dd2": short,
        "teacher_fid": arguments.teacher_fid,
        "aim": aim,
        "passes": {
            "dd1": whole[-1][0],
            "dd1_small_batches": stays_at(alone, aim),
            "dd1_then_dd2": stays_at(short, aim),
        },
        "ends": {
            "dd1": ends(arguments.workspace, "dd1"),
            "dd1_small_batches": ends(place, "dd1"),
            "short_dd1": ends(arguments.work, "dd1"),
            "dd1_then_dd2": ends(arguments.work, "dd2"),
        },
        "cpu_seconds": seconds,
    }
    write_json(arguments.output, result)
    ways = {"whole DD1": whole, "DD1, small batches": alone, "a short DD1 of those, then DD2": short}
    draw(ways, arguments.teacher_fid, arguments.output.with_suffix(".svg"))
    print(result["passes"])


if __name__ == "__main__":
    main()
