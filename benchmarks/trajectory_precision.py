"""What sampling a trained teacher in bfloat16 does to its trajectories: the same noise in both precisions.

    python benchmarks/trajectory_precision.py WORKSPACE --output benchmarks/results/trajectory_precision.json

Run it once a workspace (where `dvc repro` has run); the figures of the others in the file are kept. Each precision
draws on its own, as data sets are made, and once more with float32's tokens before each level, which tells a token that
moved from what follows it. ``all_rounded`` is bfloat16 with the head rounded too, which ddops does not do.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddops.config.load import load_config
from ddops.files import write_json
from ddops.models.interface import Teacher
from ddops.models.reduced import sampled_in_bfloat16, to_bfloat16
from ddops.models.weights import load_teacher
from ddops.sampling.teacher import flow_picker, sample_teacher
from ddops.stages import paths
from ddops.trajectories.generate import trajectory_labels, trajectory_noise


def measure(workspace: Path, samples: int) -> dict[str, Any]:
    """Shares of equal tokens and total variation, both precisions against float32."""
    config = load_config(workspace / paths.PARAMS)
    teacher = load_teacher(workspace / paths.TOKENIZER, workspace / paths.TRANSFORMER)
    layout, codebook_VC = teacher.layout, teacher.codebook_VC
    indices_N = np.arange(samples, dtype=np.int64)
    labels_N = torch.from_numpy(trajectory_labels(config.seed, indices_N, teacher.num_conditions))
    noise_NLC = trajectory_noise(config.seed, indices_N, (layout.length, codebook_VC.shape[1]))
    pick = flow_picker(layout, codebook_VC, noise_NLC, config.trajectories)

    def draw(network: Teacher, half: bool, given_NL: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Ids (N, L) and probabilities (N, L, V); every level follows ``given_NL`` where that is set."""
        ids: list[Tensor] = []
        probabilities: list[Tensor] = []

        def follow(level: int, log_p_NlV: Tensor) -> Tensor:
            ids.append(pick(level, log_p_NlV))
            probabilities.append(log_p_NlV.exp())
            return ids[-1] if given_NL is None else given_NL[:, layout.positions(level)]

        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            sample_teacher(network, labels_N, config.sampling, follow)
        return torch.cat(ids, 1), torch.cat(probabilities, 1)

    ids_NL, p_NLV = draw(teacher, half=False)
    all_rounded = copy.deepcopy(teacher)
    to_bfloat16(all_rounded.get_submodule("transformer"), ())
    networks = {"bfloat16": sampled_in_bfloat16(copy.deepcopy(teacher)), "all_rounded": all_rounded}
    result: dict[str, Any] = {"samples": samples, "levels": layout.num_levels, "guidance": config.sampling.guidance}
    for name, network in networks.items():
        own_NL, _ = draw(network, half=True)
        after_NL, half_p_NLV = draw(network, half=True, given_NL=ids_NL)
        distance_NL = 0.5 * (p_NLV - half_p_NLV).abs().sum(-1)
        result[name] = {
            "equal_tokens": _share(own_NL == ids_NL),
            "equal_samples": _share((own_NL == ids_NL).all(1)),
            "equal_tokens_after_the_same_levels": _share(after_NL == ids_NL),
            "mean_total_variation": round(float(distance_NL.mean()), 5),
            "largest_total_variation": round(float(distance_NL.max()), 5),
        }
    return result


def _share(equal: Tensor) -> float:
    return round(float(equal.double().mean()), 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    config = load_config(arguments.workspace / paths.PARAMS)
    result["command"] = f"python {sys.argv[0]} WORKSPACE --samples {arguments.samples}"
    result["date"] = datetime.now(UTC).date().isoformat()
    result["machine"] = f"{platform.system()} {platform.machine()}, 1 thread, no GPU"
    result["torch"] = torch.__version__
    result[config.preset] = {"seed": config.seed, **measure(arguments.workspace, arguments.samples)}
    write_json(arguments.output, result)
    print(json.dumps(result[config.preset], indent=2))


if __name__ == "__main__":
    main()
