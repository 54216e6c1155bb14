"""The whole pipeline once a seed, each in a directory of its own: the spread between trainings.

    python benchmarks/seeds.py --preset digits --seeds 0 1 2 --output benchmarks/results/digits.json

Run it again to go on: finished seeds are kept. The stages run without DVC, in the order of dvc.yaml, with the gate left
out (a refused model is a result too).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ddops.config.load import compose, write_params
from ddops.files import write_json

STAGES = ("features", "teacher", "trajectories", "distill_dd1", "sample", "evaluate")


def run_seed(preset: str, seed: int, params_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """Metrics of one run of the pipeline, and the seconds each stage took."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as workspace:
        values = compose(params_dir, [f"preset={preset}", f"seed={seed}", *overrides])
        write_params(values, Path(workspace) / "params.yaml")
        for stage in STAGES:
            started = time.monotonic()
            subprocess.run([sys.executable, "-m", f"ddops.stages.{stage}"], cwd=workspace, check=True)
            seconds[stage] = round(time.monotonic() - started, 1)
        metrics = json.loads((Path(workspace) / "reports/metrics.json").read_text())
    return {"seed": seed, "seconds": seconds, "metrics": metrics}


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
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"command": " ".join(sys.argv), "preset": arguments.preset, "runs": []}
    if arguments.output.exists():
        result["runs"] = json.loads(arguments.output.read_text())["runs"]
    result["date"] = datetime.now(UTC).date().isoformat()
    result["machine"] = f"{platform.system()} {platform.machine()}, {platform.processor() or 'CPU'}"
    for seed in arguments.seeds:
        if seed not in [run["seed"] for run in result["runs"]]:
            result["runs"].append(run_seed(arguments.preset, seed, arguments.params, arguments.overrides))
            write_json(arguments.output, result)
    print("\n".join(summary(result["runs"])))


if __name__ == "__main__":
    main()
