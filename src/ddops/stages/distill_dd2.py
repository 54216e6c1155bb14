"""Stage ``distill_dd2``: conditional score distillation of the one-step generator."""

from __future__ import annotations

from ddops.captions.conditions import open_conditions
from ddops.config.dd2 import DD2Config, NotTrainedConfig, TrainedDD2Config
from ddops.config.evaluation import DigitsFeaturesConfig, FeaturesConfig
from ddops.config.models import SamplingConfig
from ddops.config.stages import DD1Config
from ddops.distill.dd2 import DD2Objectives
from ddops.models.ar_diffusion import ARDiffusion, ARDiffusionGenerator, new_ar_diffusion
from ddops.models.interface import BackboneTeacher, Student
from ddops.models.registry import build_student
from ddops.models.weights import load_student, load_teacher
from ddops.models.weights_dd2 import as_backbone, load_ar_diffusion, save_generator
from ddops.stages import paths
from ddops.stages.checkpoints import checkpoint_file
from ddops.stages.common import require, run_stage, write_not_trained
from ddops.stages.dd2_watch import DD2Watch
from ddops.training.alternating import train_alternating
from ddops.training.device import training_device
from ddops.training.loop import seeded
from ddops.training.replicas import own_share
from ddops.training.schedule import batch_indices
from ddops.trajectories.dataset import TrajectoryDataset
from ddops.trajectories.reader import batch_source
from ddops.trajectories.shards import MANIFEST


def distill_dd2(seed: int, features: FeaturesConfig, sampling: SamplingConfig, dd1: DD1Config, dd2: DD2Config) -> None:
    """Train the generator against the guidance network; its EMA weights are the result."""
    if isinstance(dd2, NotTrainedConfig):
        write_not_trained("dd2", [paths.DD2_GENERATOR.parent, paths.CURVES / "dd2"])
        return
    inputs = [require(paths.TOKENIZER, "teacher"), require(paths.TRANSFORMER, "teacher")]
    judged = isinstance(features, DigitsFeaturesConfig)
    inputs += [require(paths.CLASSIFIER, "features")] if judged else []
    inputs += [require(paths.TRAJECTORIES / MANIFEST, "trajectories")]
    starts = {dd2.start, dd2.guidance.start}
    inputs += [require(paths.AR_DIFFUSION, "ar_diffusion")] if "ar_diffusion" in starts else []
    inputs += [require(paths.DD1_STUDENT, "distill_dd1")] if "dd1" in starts else []

    device = training_device(dd2.training.processes)
    teacher = as_backbone(load_teacher(paths.TOKENIZER, paths.TRANSFORMER).requires_grad_(False))
    dataset = TrajectoryDataset(paths.TRAJECTORIES, teacher.codebook_VC.shape[1])
    generator = seeded(seed, lambda: _generator(dd2, teacher)).train()
    guidance = _guidance(dd2, teacher).train()
    for model in (teacher, generator, guidance):
        model.to(device)
    conditions = open_conditions(paths.TRAIN_CAPTIONS, teacher, generator, guidance)
    inputs += conditions.files
    checkpoint = checkpoint_file("distill_dd2", "dd2", [seed, sampling, dd1.start_positions, dd2], inputs)
    batches = batch_source(
        dataset, lambda step: own_share(batch_indices(seed, step, dd2.training.batch_size, len(dataset))), device
    )
    watch = DD2Watch(teacher, dataset, dd1, dd2, conditions, judged=judged, fingerprint=checkpoint.fingerprint)
    watch.begin(generator)
    state = train_alternating(
        generator,
        guidance,
        DD2Objectives(teacher, batches, dd2, sampling, dd1.start_positions),
        config=dd2.training,
        guidance_config=dd2.guidance,
        seed=seed,
        dataset_size=len(dataset),
        checkpoint=checkpoint,
        curves_dir=paths.CURVES / "dd2",
        description="dd2 generator",
        evaluate=watch,
        evaluate_every=dd2.evaluate_every,
    )
    watch.keep_pictures(paths.CURVES / "dd2")
    head = generator.model.head_config if isinstance(generator, ARDiffusionGenerator) else None
    save_generator(paths.DD2_GENERATOR, state, teacher.config, head)
    checkpoint.remove()
    watch.forget_pictures()


def _generator(config: TrainedDD2Config, teacher: BackboneTeacher) -> Student:
    if config.start == "dd1":
        return load_student(paths.DD1_STUDENT)
    if config.start == "ar_diffusion":
        return ARDiffusionGenerator(load_ar_diffusion(paths.TOKENIZER, paths.AR_DIFFUSION))
    student = build_student(teacher.config)
    student.init_from_teacher(teacher)
    return student


def _guidance(config: TrainedDD2Config, teacher: BackboneTeacher) -> ARDiffusion:
    if config.guidance.start == "teacher":
        return new_ar_diffusion(teacher, None)
    return load_ar_diffusion(paths.TOKENIZER, paths.AR_DIFFUSION)


if __name__ == "__main__":
    run_stage(distill_dd2, trains="dd2")
