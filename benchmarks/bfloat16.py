"""What bfloat16 does to the images: the same samples of the trained digits students in both precisions.

    python benchmarks/bfloat16.py --output benchmarks/results/digits_bfloat16.json

Run it where `dvc repro` has run. Noise and labels are those of the protocol at one seed, for both precisions.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddops.captions.conditions import Conditions
from ddops.config.load import load_config
from ddops.evaluation.drawing import Request, sample_noise
from ddops.evaluation.images import to_uint8
from ddops.evaluation.judge import DigitsJudge, load_classifier
from ddops.evaluation.metrics import frechet_distance, look
from ddops.evaluation.protocols import open_protocol
from ddops.export.graph import OneStepGraph, load_graph
from ddops.export.parity import compare
from ddops.files import sha256_file, write_json
from ddops.models.reduced import to_bfloat16
from ddops.stages import paths


def draw(graph: OneStepGraph, request: Request, seed: int, half: bool) -> tuple[Tensor, Tensor]:
    """Images (N, I, H, W) and tokens."""
    batches = []
    for indices_B, labels_B in request.batches("bfloat16" if half else "float32"):
        noise_BLC = sample_noise(seed, indices_B, graph.student, graph.codebook_VC.shape[1])
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            batches.append(graph.draw(noise_BLC, labels_B))
    images, tokens = zip(*batches, strict=True)
    return torch.cat(images).float(), torch.cat(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1000, help="not one of the protocol's own")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    config = load_config(paths.PARAMS)
    protocol = open_protocol(config.evaluate)
    real = protocol.real_images()
    if config.evaluate.protocol != "digits" or real is None:
        raise SystemExit(f"{paths.PARAMS}: evaluate.protocol is {config.evaluate.protocol}; this judges digits only")
    judge, size = DigitsJudge(load_classifier(paths.CLASSIFIER)), config.evaluate.batch_size
    reference = look(judge, to_uint8(real.images_NIHW).split(size)).statistics
    levels = len(config.teacher.model.level_sizes)
    rows: dict[str, Any] = {}
    for name, file, prefix in (
        ("dd1", paths.DD1_STUDENT, config.dd1.logit_prefix),
        ("dd2", paths.DD2_GENERATOR, config.dd2.logit_prefix(levels)),
    ):
        for steps in arguments.steps:
            graph = load_graph(file, paths.TOKENIZER, config.dd1.start_positions[:steps], prefix)
            request = Request(protocol.labels(arguments.seed, Conditions(graph.student.num_conditions)), size)
            whole = draw(graph, request, arguments.seed, half=False)
            rounded = to_bfloat16(copy.deepcopy(graph), graph.whole_modules)
            half = draw(rounded, request, arguments.seed, half=True)
            parity = compare(*((images.numpy(), tokens.numpy()) for images, tokens in (whole, half)))
            fids = [
                frechet_distance(look(judge, to_uint8(images).split(size)).statistics, reference)
                for images, _ in (whole, half)
            ]
            rows[f"{name}_{steps}step"] = {
                "samples": parity.images,
                "fid_float32": round(fids[0], 4),
                "fid_bfloat16": round(fids[1], 4),
                "psnr": round(parity.psnr, 2),
                "equal_tokens": round(parity.equal_tokens, 5),
                "sha256": sha256_file(file),
            }
            print(f"{name}_{steps}step", rows[f"{name}_{steps}step"])
    facts = {"command": " ".join(sys.argv), "date": datetime.now(UTC).date().isoformat(), "seed": arguments.seed}
    facts |= {"machine": f"{platform.system()} {platform.machine()}, CPU", "numpy": np.__version__}
    write_json(arguments.output, {**facts, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
