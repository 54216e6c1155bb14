"""Share of the flow map in making trajectories, on the published shapes with random weights, in one run.

    python benchmarks/map_share.py --output benchmarks/results/map_share.json

With random weights the distributions are nearly flat, which is the map's expensive case. Of a teacher with one token a
level only the first levels are timed; later ones attend to more and so make the map's share smaller.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddops.config.load import compose, validate
from ddops.files import write_json
from ddops.flow.solvers import solve_flow
from ddops.models.registry import build_teacher
from ddops.trajectories.generate import trajectory_noise

CASES = {"var_d16": 10, "llamagen_l": 32}
"""Presets, and how many of their levels are timed."""


def measure(preset: str, levels: int, batch: int, params: Path) -> dict[str, Any]:
    """Seconds in the teacher, in the map and in the noise, over the first ``levels`` levels."""
    config = validate(compose(params, [f"preset={preset}"]), preset)
    torch.manual_seed(0)
    with torch.inference_mode():
        teacher = build_teacher(config.teacher.model).eval()
        layout, codebook_VC, flow = teacher.layout, teacher.codebook_VC, config.trajectories
        clock = time.perf_counter
        begun = clock()
        noise_BLC = trajectory_noise(0, np.arange(batch, dtype=np.int64), (layout.length, codebook_VC.shape[1]))
        seconds = {"noise": clock() - begun, "teacher": 0.0, "flow_map": 0.0}
        evaluations: list[Tensor] = []
        session = teacher.open(torch.arange(batch), config.sampling)
        for level in range(levels):
            begun = clock()
            log_p_BlV = session.next_log_probs()
            seconds["teacher"] += clock() - begun
            begun = clock()
            found = solve_flow(
                noise_BLC[:, layout.positions(level)].flatten(0, 1),
                log_p_BlV.flatten(0, 1),
                codebook_VC,
                solver=flow.solver,
                evaluations=flow.evaluations,
                tolerance=flow.tolerance,
            )
            seconds["flow_map"] += clock() - begun
            evaluations.append(found.evaluations_N)
            begun = clock()
            session.append(found.ids_N.view(batch, -1))
            seconds["teacher"] += clock() - begun
    entropy = -torch.special.xlogy(log_p_BlV.exp(), log_p_BlV.exp()).sum(-1)
    return {
        "batch": batch,
        "levels_timed": levels,
        "levels": layout.num_levels,
        "perplexity_of_the_last": float(entropy.exp().mean()),
        "mean_evaluations": float(torch.cat(evaluations).double().mean()),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "map_over_teacher": seconds["flow_map"] / seconds["teacher"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--params", type=Path, default=Path("params"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, 1 thread",
        "seed": 0,
    }
    for preset, levels in CASES.items():
        result[preset] = measure(preset, levels, arguments.batch, arguments.params)
        print(preset, json.dumps(result[preset]), flush=True)
        write_json(arguments.output, result)


if __name__ == "__main__":
    main()
