"""The mean over several trainings of what ``training_cost.py`` found, and where it comes to the whole DD1's mean end.

    python benchmarks/training_cost_mean.py benchmarks/results/training_cost_digits_var*.json \\
        --output benchmarks/results/training_cost_mean_digits_var.json

One training's FID wavers by more than the ways differ; the mean of three says whether a way comes there as a rule. The
trainings must be of one preset and the same short way, and their curves have the same points.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from training_cost import Points, draw, stays_at

from ddops.files import write_json

WAYS: Final = {
    "dd1": "whole DD1",
    "dd1_small_batches": "DD1, small batches",
    "dd1_then_dd2": "a short DD1 of those, then DD2",
}
"""Keys of a result, and how the chart calls them."""


def mean_points(curves: Sequence[Points]) -> list[tuple[float, float, float]]:
    """(passes, mean FID, standard deviation between the trainings) for each point; raises SystemExit where the curves
    have not the same points."""
    passes = [spent for spent, _ in curves[0]]
    if any([spent for spent, _ in curve] != passes for curve in curves):
        raise SystemExit("the trainings' curves have different points: were they run with the same settings?")
    found = [[fid for _, fid in point] for point in zip(*curves, strict=True)]
    return [(spent, statistics.mean(fids), statistics.stdev(fids)) for spent, fids in zip(passes, found, strict=True)]


def mean_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean curves, the mean end of the whole DD1 (``aim``), and the passes after which each way stays there.

    Raises:
        SystemExit: two trainings are of one seed, or of other settings.
    """
    seeds = [run["seed"] for run in runs]
    settings = [[word for word in run["short"] if not word.startswith("seed=")] for run in runs]
    if len(set(seeds)) < len(runs) or any(other != settings[0] for other in settings):
        raise SystemExit(f"not trainings of different seeds by the same settings: seeds {seeds}")
    curves = {way: mean_points([[(spent, fid) for spent, fid in run[way]] for run in runs]) for way in WAYS}
    aim = curves["dd1"][-1][1]
    passes = {way: stays_at([point[:2] for point in curve], aim) for way, curve in curves.items()}
    whole = curves["dd1"][-1][0]
    return {
        "preset": runs[0]["preset"],
        "seeds": seeds,
        "short": settings[0],
        "curves": curves,
        "aim": aim,
        "passes": passes | {"dd1": whole},
        "share": {way: None if spent is None else spent / whole for way, spent in passes.items() if way != "dd1"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if len(arguments.results) < 2:
        parser.error("a mean needs the results of two trainings or more")
    result = mean_of([json.loads(path.read_text()) for path in arguments.results])
    result = {"results": [path.name for path in arguments.results], **result}
    write_json(arguments.output, result)
    ways = {name: [point[:2] for point in result["curves"][way]] for way, name in WAYS.items()}
    draw(ways, None, arguments.output.with_suffix(".svg"))
    print(f"whole DD1 ends at {result['aim']:.2f}; there for good after a share of its passes of: {result['share']}")


if __name__ == "__main__":
    main()
