"""The whole pipeline once a seed, each in a directory of its own: the spread between trainings.

    python benchmarks/seeds.py --preset digits --seeds 0 1 2 --output benchmarks/results/digits.json

Run it again to go on: finished seeds are kept, and with ``--workspaces`` the finished stages of an unfinished one. The
stages run without DVC, in the order of dvc.yaml, with the gate left out (a refused model is a result too).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stage_runs import run_stages

from ddops.config.load import compose
from ddops.files import write_json

STAGES = (
    *("captions", "features", "teacher", "trajectories", "distill_dd1", "ar_diffusion", "distill_dd2"),
    *("sample", "evaluate"),
)


def run_seed(workspace: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Metrics of one run of the pipeline in ``workspace``, and the seconds each stage took."""
    seconds = run_stages(workspace, values, STAGES, time.monotonic)
    metrics = json.loads((workspace / "reports/metrics.json").read_text())
    return {"seed": values["seed"], "seconds": seconds, "metrics": metrics}


def summary(runs: list[dict[str, Any]]) -> list[str]:
    """A Markdown table: mean and standard deviation of the FID over the trainings."""
    rows = [name for name in runs[0]["metrics"] if name not in ("protocol", "models")]
    lines = ["| row | FID, mean of the trainings | spread | FID / teacher |", "|---|---|---|---|"]
    teacher = statistics.mean(run["metrics"]["teacher"]["fid"] for run in runs)
    for name in sorted(rows, key=lambda row: float(runs[0]["metrics"][row]["fid"])):
        fids = [run["metrics"][name]["fid"] for run in runs]
        spread = statistics.stdev(fids) if len(fids) > 1 else float("nan")
        lines.append(f"| {name} | {statistics.mean(fids):.2f} | {spread:.2f} | {statistics.mean(fids) / teacher:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--params", type=Path, default=Path("params"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workspaces", type=Path, default=Path(".ddops/seeds"), help="where each seed's stages run")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    command = " ".join("WORKSPACES" if word == str(arguments.workspaces) else word for word in sys.argv)
    result: dict[str, Any] = {"command": command, "preset": arguments.preset, "runs": []}
    if arguments.output.exists():
        result["runs"] = json.loads(arguments.output.read_text())["runs"]
    result["date"] = datetime.now(UTC).date().isoformat()
    result["machine"] = f"{platform.system()} {platform.machine()}, {platform.processor() or 'CPU'}"
    for seed in arguments.seeds:
        if seed not in [run["seed"] for run in result["runs"]]:
            values = compose(arguments.params, [f"preset={arguments.preset}", f"seed={seed}", *arguments.overrides])
            result["runs"].append(run_seed(arguments.workspaces / f"{arguments.preset}_seed{seed}", values))
            write_json(arguments.output, result)
    print("\n".join(summary(result["runs"])))


if __name__ == "__main__":
    main()
