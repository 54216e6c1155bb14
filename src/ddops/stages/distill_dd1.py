"""Stage ``distill_dd1``: train the DD1 student on the trajectories, or fetch a released one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

from torch import nn

from ddops.config.models import ModelConfig
from ddops.config.stages import (
    DD1Config,
    DigitsFeaturesConfig,
    FeaturesConfig,
    ReleasedDD1Config,
    TrainedDD1Config,
)
from ddops.data import digits
from ddops.distill.dd1 import dd1_objective
from ddops.evaluation.fid import make_fid
from ddops.evaluation.images import to_uint8
from ddops.evaluation.judge import load_classifier
from ddops.evaluation.rows import Protocol, sample_dd1
from ddops.hub.acquire import acquire_student, write_origin
from ddops.losses.perceptual import PerceptualDistance, classifier_distance, lpips_distance
from ddops.models.interface import Student, Teacher
from ddops.models.registry import build_student
from ddops.models.weights import STUDENT, load_metadata, load_teacher, save_weights
from ddops.models.weights import TRANSFORMER as TRANSFORMER_KIND
from ddops.stages import paths
from ddops.stages.checkpoints import checkpoint_file
from ddops.stages.common import require, run_stage
from ddops.training.loop import seeded, train
from ddops.trajectories.dataset import TrajectoryDataset
from ddops.trajectories.shards import MANIFEST

CURVE_BATCH = 1000
CURVE_SEED = 2**31
"""Seed of the samples behind the FID curve: none of the seeds that the evaluation uses."""


def distill_dd1(seed: int, features: FeaturesConfig, dd1: DD1Config) -> None:
    """Train the student, initialised from the teacher; its EMA weights are the result. Or fetch a released one."""
    model_config, _ = load_metadata(require(paths.TRANSFORMER, "teacher"), TRANSFORMER_KIND)
    if isinstance(dd1, ReleasedDD1Config):
        write_origin([paths.CURVES / "dd1"], acquire_student(dd1, model_config, paths.DD1_STUDENT))
        return
    _train(seed, features, dd1, model_config)


def _train(seed: int, features: FeaturesConfig, dd1: TrainedDD1Config, model_config: ModelConfig) -> None:
    tokenizer_file, transformer_file = require(paths.TOKENIZER, "teacher"), paths.TRANSFORMER
    judged = isinstance(features, DigitsFeaturesConfig)
    judge_files = [require(paths.CLASSIFIER, "features")] if judged else []
    require(paths.TRAJECTORIES / MANIFEST, "trajectories")
    teacher = load_teacher(tokenizer_file, transformer_file).requires_grad_(False)
    dataset = TrajectoryDataset(paths.TRAJECTORIES, teacher.codebook_VC.shape[1])

    student = seeded(seed, lambda: build_student(model_config))
    student.init_from_teacher(teacher)
    inputs = [tokenizer_file, transformer_file, *judge_files, paths.TRAJECTORIES / MANIFEST]
    checkpoint = checkpoint_file("dd1", [seed, dd1], inputs)
    state = train(
        student,
        dd1_objective(teacher, dataset, dd1, _perceptual_distance(dd1)),
        config=dd1.training,
        seed=seed,
        dataset_size=len(dataset),
        checkpoint=checkpoint,
        curves_dir=paths.CURVES / "dd1",
        description="dd1 student",
        # Other features are not built yet: training goes on without a curve of FIDs.
        evaluate=_fid_curve(teacher, dd1) if judged else None,
        evaluate_every=dd1.evaluate_every,
    )
    save_weights(paths.DD1_STUDENT, state, model_config, STUDENT)
    checkpoint.remove()


def _perceptual_distance(config: TrainedDD1Config) -> PerceptualDistance:
    if config.perceptual.network == "lpips_vgg":
        return lpips_distance()
    return classifier_distance(load_classifier(paths.CLASSIFIER))


def _fid_curve(teacher: Teacher, config: TrainedDD1Config) -> Callable[[nn.Module], Mapping[str, float]]:
    """FID of the EMA student in one step and in all steps, on fewer samples than the evaluation's."""
    data = digits.load()
    protocol = Protocol(data.labels_N, config.evaluate_count, CURVE_BATCH)
    fid = make_fid(load_classifier(paths.CLASSIFIER), to_uint8(data.images_NIHW))

    def curve(model: nn.Module) -> Mapping[str, float]:
        steps = range(1, len(config.start_positions) + 1)
        student = cast(Student, model)
        return {
            f"fid_{count}step": fid(sample_dd1(student, teacher, config, count, protocol, CURVE_SEED))
            for count in steps
        }

    return curve


if __name__ == "__main__":
    run_stage(distill_dd1)
