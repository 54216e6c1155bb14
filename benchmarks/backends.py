"""ONNX Runtime against PyTorch eager, and one step against the teacher, side by side on a CPU with random weights.

    python benchmarks/backends.py --preset digits --batches 1 8 64 --output benchmarks/results/backends_digits.json
    python benchmarks/backends.py --preset var_d16 --batches 1 --rounds 3 --output FILE

Rounds are interleaved and medians taken: on a shared machine only ratios mean something, best those of processor time,
which other work disturbs less (all run on as many threads, by default one a core).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from untrained import with_weights

from ddops.config.load import compose, validate
from ddops.export.bundle import Sources, write_bundle
from ddops.export.manifest import read_manifest
from ddops.files import write_json
from ddops.inference.backends import load_backend
from ddops.models.interface import Teacher
from ddops.models.registry import build_student, build_teacher
from ddops.models.weights import STUDENT, TOKENIZER, save_weights
from ddops.sampling.noise import Stream, normals_array, uniforms
from ddops.sampling.teacher import categorical_picker, sample_teacher


def contestants(config: Any, directory: Path, threads: int) -> tuple[Teacher, dict[str, Any]]:
    """The teacher in PyTorch, and its student as a bundle on both backends."""
    torch.manual_seed(0)
    teacher = with_weights(build_teacher(config.teacher.model))
    student = with_weights(build_student(config.teacher.model))
    files = {name: directory / f"{name}.safetensors" for name in (STUDENT, TOKENIZER)}
    save_weights(files[STUDENT], student.state_dict(), config.teacher.model, STUDENT)
    save_weights(files[TOKENIZER], teacher.tokenizer.state_dict(), config.teacher.model, TOKENIZER)
    sources = Sources(files[STUDENT], files[TOKENIZER], config.dd1.start_positions, config.dd1.logit_prefix)
    write_bundle(directory / "bundle", sources, replace(config.export, parity_count=2), {})
    manifest = read_manifest(directory / "bundle")
    backends = {name: load_backend(directory / "bundle", manifest, name, threads=threads) for name in ("onnx", "torch")}
    return teacher, backends


def measure(config: Any, batch: int, rounds: int, teacher: Teacher, backends: dict[str, Any]) -> dict[str, Any]:
    """Median seconds a batch of each, by the clock and of the processor, and the ratios by both."""
    length, code_dim = teacher.layout.length, teacher.codebook_VC.shape[1]
    indices_B, labels_B = np.arange(batch), np.arange(batch) % teacher.num_conditions
    noise_BLC = normals_array(0, Stream.SAMPLE_NOISE, indices_B, (length, code_dim))
    uniforms_BL = torch.from_numpy(uniforms(0, Stream.CATEGORICAL, indices_B, length))

    @torch.inference_mode()
    def draw_teacher() -> None:
        pick = categorical_picker(teacher.layout, uniforms_BL)
        ids_BL = sample_teacher(teacher, torch.from_numpy(labels_B), config.sampling, pick)
        teacher.decode(F.embedding(ids_BL, teacher.codebook_VC))

    runs: dict[str, Callable[[], Any]] = {
        "onnx": lambda: backends["onnx"].draw(noise_BLC, labels_B),
        "torch": lambda: backends["torch"].draw(noise_BLC, labels_B),
        "teacher": draw_teacher,
    }
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in runs} for clock in clocks}
    for number in range(rounds + 1):
        for name, run in runs.items():
            started = {clock: read() for clock, read in clocks.items()}
            run()
            if number:  # the first round warms up
                for clock, read in clocks.items():
                    seconds[clock][name].append(read() - started[clock])
        print(f"batch {batch}: round {number}/{rounds}", file=sys.stderr, flush=True)
    return {"rounds": rounds, **{clock: compared(values) for clock, values in seconds.items()}}


def compared(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians and their ratios."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": medians,
        "onnx_over_torch": medians["torch"] / medians["onnx"],
        "one_step_over_teacher": medians["teacher"] / medians["torch"],
        "one_step_onnx_over_teacher": medians["teacher"] / medians["onnx"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--params", type=Path, default=Path("params"))
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    config = validate(compose(arguments.params, [f"preset={arguments.preset}"]), arguments.preset)
    with tempfile.TemporaryDirectory() as directory:
        teacher, backends = contestants(config, Path(directory), torch.get_num_threads())
        result = {
            str(batch): measure(config, batch, arguments.rounds, teacher, backends) for batch in arguments.batches
        }
    facts = {"command": " ".join(sys.argv), "date": datetime.now(UTC).date().isoformat(), "cpus": os.cpu_count()}
    facts |= {"machine": f"{platform.system()} {platform.machine()}", "threads": torch.get_num_threads()}
    facts |= {"load_average": os.getloadavg()}
    write_json(arguments.output, {**facts, "preset": arguments.preset, "batches": result})
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
