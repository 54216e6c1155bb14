"""Does the flow map change the teacher? FID of ordinary sampling and of sampling through the flow map, over many seeds.

    python benchmarks/flow_fid.py --seeds 10 --output benchmarks/results/digits_flow_fid.json

Run it where `dvc repro` has run. Both rows are judged by the protocol of params.yaml, at seeds that are not its own.
Run it again to go on: finished seeds are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ddops.captions.conditions import Conditions
from ddops.config.load import load_config
from ddops.evaluation.drawing import Request, draw_batches
from ddops.evaluation.images import to_uint8
from ddops.evaluation.judge import DigitsJudge, load_classifier
from ddops.evaluation.metrics import frechet_distance, look
from ddops.evaluation.protocols import open_protocol
from ddops.evaluation.rows import Models, build_row
from ddops.files import sha256_file, write_json
from ddops.models.weights import load_teacher
from ddops.stages import paths

FIRST_SEED = 1000
ROWS = ("teacher", "teacher_flow")


def measure(seed: int) -> dict[str, float]:
    """FID of both rows for one seed."""
    config = load_config(paths.PARAMS)
    protocol = open_protocol(config.evaluate)
    real = protocol.real_images()
    if config.evaluate.protocol != "digits" or real is None:
        raise SystemExit(f"{paths.PARAMS}: evaluate.protocol is {config.evaluate.protocol}; this judges digits only")
    judge = DigitsJudge(load_classifier(paths.CLASSIFIER))
    batch_size = config.evaluate.batch_size
    reference = look(judge, to_uint8(real.images_NIHW).split(batch_size)).statistics
    teacher = load_teacher(paths.TOKENIZER, paths.TRANSFORMER)
    models = Models(teacher, None, config.sampling, config.trajectories, config.dd1, paths.TRAJECTORIES)
    request = Request(protocol.labels(seed, Conditions(teacher.num_conditions)), batch_size)
    result: dict[str, float] = {"seed": seed, "samples": len(request.labels_N)}
    for name in ROWS:
        batches = draw_batches(build_row(name, models).draw, request, seed, name)
        result[name] = frechet_distance(look(judge, batches).statistics, reference)
    return result


def summary(runs: list[dict[str, float]]) -> str:
    """Means with their standard errors, and the ratio with its own."""
    texts, means, errors = [], {}, {}
    for row in ROWS:
        fids = [run[row] for run in runs]
        means[row], errors[row] = statistics.mean(fids), statistics.stdev(fids) / math.sqrt(len(fids))
        texts.append(f"{row} {means[row]:.3f} +- {errors[row]:.3f} (spread of a seed {statistics.stdev(fids):.3f})")
    ratio = means["teacher_flow"] / means["teacher"]
    error = ratio * math.hypot(*(errors[row] / means[row] for row in means))
    return "\n".join([*texts, f"teacher_flow / teacher {ratio:.3f} +- {error:.3f}, {len(runs)} seeds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"command": " ".join(sys.argv), "runs": []}
    if arguments.output.exists():
        result["runs"] = json.loads(arguments.output.read_text())["runs"]
    result["date"] = datetime.now(UTC).date().isoformat()
    result["machine"] = f"{platform.system()} {platform.machine()}, CPU"
    result["teacher_sha256"] = sha256_file(paths.TRANSFORMER)
    for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds):
        if seed not in [run["seed"] for run in result["runs"]]:
            result["runs"].append(measure(seed))
            write_json(arguments.output, result)
    print(summary(result["runs"]))


if __name__ == "__main__":
    main()
