"""How near a one-step generator is to its teacher, apart from how near either is to the data.

    python benchmarks/teacher_distance.py WORKSPACE SHORT --output benchmarks/results/teacher_distance_digits.json

WORKSPACE is where a whole DD1 was trained, SHORT the ``--work`` directory of ``training_cost.py`` for it; ``--another
NAME=DIRECTORY`` names one where a further DD2 ended. Each generator there is judged three ways, in one step, from the
same noise, by WORKSPACE's judge: its FID to the data; the Fréchet distance of its samples to samples of the teacher
(drawn the ordinary way; the teacher's own second set gives the floor); and the teacher's negative log-likelihood of
its tokens, in nats a token, which for the teacher's own tokens is its entropy.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from ddops.captions.conditions import open_conditions
from ddops.config.load import validate
from ddops.config.stages import Config
from ddops.data import digits
from ddops.evaluation.drawing import Indices, decode, sample_noise
from ddops.evaluation.images import to_uint8
from ddops.evaluation.judge import DigitsJudge, load_classifier
from ddops.evaluation.metrics import frechet_distance, look
from ddops.evaluation.moments import Statistics
from ddops.files import write_json
from ddops.models.interface import Student, Teacher
from ddops.models.weights import load_student, load_teacher
from ddops.models.weights_dd2 import load_generator
from ddops.sampling.few_step import sample_sequence
from ddops.sampling.noise import Stream, uniforms
from ddops.sampling.teacher import categorical_picker, conditional_log_probs, sample_teacher
from ddops.stages import paths
from ddops.stages.fid_curve import CURVE_SEED

BATCH: Final = 500
TEACHER_SEEDS: Final = (CURVE_SEED + 1, CURVE_SEED + 2)
"""Of the set that all others are compared with, and of the one that shows how near a second one comes."""
Ids = Callable[[Indices, Tensor], Tensor]
"""(sample indices (B,), labels (B,)) -> tokens (B, L)."""


class Ruler:
    """A judge, the data, and the teacher whose samples are the other reference."""

    def __init__(self, workspace: Path, count: int) -> None:
        self.config: Config = validate(yaml.safe_load((workspace / "params.yaml").read_text()), str(workspace))
        with contextlib.chdir(workspace):
            self.teacher: Teacher = load_teacher(paths.TOKENIZER, paths.TRANSFORMER)
            self.judge = DigitsJudge(load_classifier(paths.CLASSIFIER))
            conditions = open_conditions(paths.TRAIN_CAPTIONS, self.teacher)
        data = digits.load()
        self.labels_N = conditions.of_images(data.labels_N)[torch.arange(count) % len(data)]
        self.data = look(self.judge, to_uint8(data.images_NIHW).split(BATCH)).statistics
        self.teachers, _ = self.see(self.teacher_ids(TEACHER_SEEDS[0]))

    def teacher_ids(self, seed: int) -> Ids:
        """The teacher's tokens, each drawn from its distribution."""

        def draw(indices_B: Indices, labels_B: Tensor) -> Tensor:
            layout = self.teacher.layout
            numbers_BL = torch.from_numpy(uniforms(seed, Stream.CATEGORICAL, indices_B, layout.length))
            picker = categorical_picker(layout, numbers_BL)
            return sample_teacher(self.teacher, labels_B, self.config.sampling, picker)

        return draw

    def student_ids(self, student: Student) -> Ids:
        """The likeliest tokens in one step."""
        codebook_VC, levels = self.teacher.codebook_VC, student.layout.num_levels

        def draw(indices_B: Indices, labels_B: Tensor) -> Tensor:
            noise_BLC = sample_noise(CURVE_SEED, indices_B, student, codebook_VC.shape[1])
            return sample_sequence(student, codebook_VC, noise_BLC, labels_B, (0,), levels).ids_Bn

        return draw

    @torch.inference_mode()
    def see(self, draw: Ids) -> tuple[Statistics, float]:
        """What the judge sees of the images, and the teacher's negative log-likelihood in nats a token."""
        images, total = [], 0.0
        for first in range(0, len(self.labels_N), BATCH):
            labels_B = self.labels_N[first : first + BATCH]
            ids_BL = draw(torch.arange(first, first + len(labels_B)).numpy(), labels_B)
            log_p_BLV = conditional_log_probs(self.teacher, labels_B, ids_BL, self.config.sampling)
            total -= float(log_p_BLV.gather(-1, ids_BL[..., None]).mean()) * len(labels_B)
            images.append(to_uint8(decode(self.teacher, F.embedding(ids_BL, self.teacher.codebook_VC))))
        return look(self.judge, images).statistics, total / len(self.labels_N)

    def row(self, draw: Ids) -> dict[str, float]:
        statistics, nats = self.see(draw)
        figures = {
            "fid": frechet_distance(statistics, self.data),
            "distance_to_teacher": frechet_distance(statistics, self.teachers),
            "teacher_nats_a_token": nats,
        }
        return {name: float(f"{value:.5g}") for name, value in figures.items()}


def students(workspace: Path, short: Path, others: dict[str, Path]) -> dict[str, Student]:
    """Those that are there, by what they are."""
    tokenizer = workspace / paths.TOKENIZER
    found: dict[str, Student] = {
        "whole DD1": load_student(workspace / paths.DD1_STUDENT),
        "short DD1": load_student(short / paths.DD1_STUDENT),
        "short DD1, then DD2": load_generator(tokenizer, short / paths.DD2_GENERATOR),
    }
    for name, place in others.items():
        found[f"short DD1, then DD2, {name}"] = load_generator(tokenizer, place / paths.DD2_GENERATOR)
    if (alone := short / "alone" / paths.DD1_STUDENT).exists():
        found["DD1, small batches"] = load_student(alone)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("short", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--another", action="append", default=[], metavar="NAME=DIRECTORY")
    parser.add_argument("--count", type=int, default=14376, help="samples of each, eight of every image")
    arguments = parser.parse_args()
    ruler = Ruler(arguments.workspace, arguments.count)
    others = {name: Path(place) for name, _, place in (word.partition("=") for word in arguments.another)}
    places = {str(arguments.workspace): "WORKSPACE", str(arguments.short): "SHORT"}
    places |= {f"{name}={place}": f"{name}=DIRECTORY" for name, place in others.items()}
    rows: dict[str, Any] = {"teacher": ruler.row(ruler.teacher_ids(TEACHER_SEEDS[1]))}
    for name, student in students(arguments.workspace, arguments.short, others).items():
        rows[name] = ruler.row(ruler.student_ids(student))
        print(name, rows[name])
    result = {
        "command": " ".join(places.get(word, word) for word in sys.argv),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}",
        "preset": ruler.config.preset,
        "seed": ruler.config.seed,
        "samples": arguments.count,
        "rows": rows,
    }
    write_json(arguments.output, result)


if __name__ == "__main__":
    main()
