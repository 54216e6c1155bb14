"""Stage ``distill_dd1``: train the DD1 student on the trajectories, or fetch a released one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
from torch import nn

from ddops.captions.conditions import Conditions, open_conditions
from ddops.config.evaluation import DigitsFeaturesConfig, FeaturesConfig
from ddops.config.models import ModelConfig
from ddops.config.stages import DD1Config, ReleasedDD1Config, TrainedDD1Config
from ddops.distill.dd1 import dd1_objective
from ddops.evaluation.drawing import dd1_draw
from ddops.evaluation.judge import load_classifier
from ddops.hub.acquire import acquire_student, write_origin
from ddops.losses.perceptual import PerceptualDistance, classifier_distance, lpips_distance
from ddops.models.interface import Student, Teacher
from ddops.models.registry import build_student
from ddops.models.weights import STUDENT, load_metadata, load_teacher, save_weights
from ddops.models.weights import TRANSFORMER as TRANSFORMER_KIND
from ddops.stages import paths
from ddops.stages.checkpoints import checkpoint_file
from ddops.stages.common import require, run_stage
from ddops.stages.fid_curve import CURVE_SEED, FIDCurve
from ddops.training.device import training_device
from ddops.training.loop import seeded, train
from ddops.training.replicas import own_share
from ddops.training.schedule import batch_indices
from ddops.trajectories.dataset import TrajectoryDataset
from ddops.trajectories.reader import batch_source
from ddops.trajectories.shards import MANIFEST


def distill_dd1(seed: int, features: FeaturesConfig, dd1: DD1Config) -> None:
    """Train the student, initialised from the teacher; its EMA weights are the result. Or fetch a released one."""
    model_config, _ = load_metadata(require(paths.TRANSFORMER, "teacher"), TRANSFORMER_KIND)
    if isinstance(dd1, ReleasedDD1Config):
        paths.DD1_STUDENT.unlink(
            missing_ok=True
        )  # converted by another recipe perhaps, and fetching keeps what it finds
        write_origin([paths.CURVES / "dd1"], acquire_student(dd1, model_config, paths.DD1_STUDENT))
        return
    _train(seed, features, dd1, model_config)


def _train(seed: int, features: FeaturesConfig, dd1: TrainedDD1Config, model_config: ModelConfig) -> None:
    tokenizer_file, transformer_file = require(paths.TOKENIZER, "teacher"), paths.TRANSFORMER
    judged = isinstance(features, DigitsFeaturesConfig)
    judge_files = [require(paths.CLASSIFIER, "features")] if judged else []
    require(paths.TRAJECTORIES / MANIFEST, "trajectories")
    device = training_device(dd1.training.processes)
    teacher = load_teacher(tokenizer_file, transformer_file).requires_grad_(False)
    teacher.tokenizer.to(memory_format=memory_format(dd1))  # type: ignore[call-overload]
    dataset = TrajectoryDataset(paths.TRAJECTORIES, teacher.codebook_VC.shape[1])

    student = seeded(seed, lambda: build_student(model_config))
    student.init_from_teacher(teacher)
    teacher.to(device)
    student.to(device)
    conditions = open_conditions(paths.TRAIN_CAPTIONS, teacher, student)
    inputs = [tokenizer_file, transformer_file, *judge_files, paths.TRAJECTORIES / MANIFEST, *conditions.files]
    checkpoint = checkpoint_file("distill_dd1", "dd1", [seed, dd1], inputs)
    batches = batch_source(
        dataset, lambda step: own_share(batch_indices(seed, step, dd1.training.batch_size, len(dataset))), device
    )
    state = train(
        student,
        dd1_objective(teacher, batches, dd1, _perceptual_distance(dd1, device)),
        config=dd1.training,
        seed=seed,
        dataset_size=len(dataset),
        checkpoint=checkpoint,
        curves_dir=paths.CURVES / "dd1",
        description="dd1 student",
        # Inception costs as much an image as a student's pass: published presets train without a curve of FIDs.
        evaluate=_fid_curve(teacher, conditions, dd1) if judged else None,
        evaluate_every=dd1.evaluate_every,
    )
    save_weights(paths.DD1_STUDENT, state, model_config, STUDENT)
    checkpoint.remove()


def memory_format(config: TrainedDD1Config) -> torch.memory_format:
    """How the weights of the networks of convolutions lie in memory."""
    return torch.channels_last if config.perceptual.channels_last else torch.contiguous_format


def _perceptual_distance(config: TrainedDD1Config, device: torch.device) -> PerceptualDistance:
    if config.perceptual.network == "lpips_vgg":
        return lpips_distance(device, memory_format(config))
    return classifier_distance(load_classifier(paths.CLASSIFIER).to(device))


def _fid_curve(
    teacher: Teacher, conditions: Conditions, config: TrainedDD1Config
) -> Callable[[nn.Module], Mapping[str, float]]:
    """FID of the EMA student in one step and in all steps."""
    fid = FIDCurve(config.evaluate_count, conditions)

    def curve(model: nn.Module) -> Mapping[str, float]:
        draws = {
            steps: dd1_draw(cast(Student, model), teacher, config, steps)
            for steps in range(1, len(config.start_positions) + 1)
        }
        return {f"fid_{steps}step": fid(partial(draw, CURVE_SEED)) for steps, draw in draws.items()}

    return curve


if __name__ == "__main__":
    run_stage(distill_dd1, trains="dd1")
