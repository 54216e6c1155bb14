"""Time, memory and arithmetic of every stage of a preset on a device, predicted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from torch import nn

from ddops.config.dd2 import TrainedARDiffusionConfig, TrainedDD2Config
from ddops.config.evaluation import (
    ADM50kEvaluateConfig,
    DigitsEvaluateConfig,
    InceptionFeaturesConfig,
    parse_row,
)
from ddops.config.stages import Config, TrainedDD1Config, TrainedTeacherConfig
from ddops.config.training import TrainingConfig
from ddops.costs.devices import Device
from ddops.costs.ledger import Operator, shapes_only
from ddops.costs.passes import (
    Step,
    Work,
    ar_diffusion_step,
    dd1_step,
    dd2_steps,
    decode_work,
    map_work,
    noise_seconds,
    student_work,
    teacher_and_student,
    teacher_steps,
    teacher_work,
    trajectory_work,
)
from ddops.models.interface import Student, Teacher
from ddops.trajectories.generate import NOISE_THREADS
from ddops.trajectories.memory import fitting_batch, sample_bytes

DIGITS_IMAGES: Final = 1797
INCEPTION_FLOPS: Final = 11.4e9
"""Of an image, resized to 299 x 299."""
INCEPTION_OPERATORS: Final = 300
INCEPTION_IMAGE_BYTES: Final = 30e6
"""Of the first layers' activations."""


@dataclass(frozen=True)
class StageCost:
    """What a stage takes."""

    flops: float
    seconds: float
    memory: float
    """Bytes at the same time."""
    batch: int


def predict(config: Config, device: Device) -> dict[str, StageCost]:
    """Every stage that computes for long; the others take seconds to minutes."""
    with shapes_only():
        teacher, student = teacher_and_student(config.teacher.model)
        costs = {}
        if isinstance(config.teacher, TrainedTeacherConfig):
            costs["teacher"] = _teacher(config.teacher, teacher, device)
        if config.trajectories.count:
            costs["trajectories"] = _trajectories(config, teacher, device)
        if isinstance(config.dd1, TrainedDD1Config):
            step = dd1_step(teacher, student, config.dd1, config.features)
            costs["distill_dd1"] = _training([(step, config.dd1.training.steps)], config.dd1.training, teacher, device)
        if isinstance(config.ar_diffusion, TrainedARDiffusionConfig):
            training = config.ar_diffusion.training
            step = ar_diffusion_step(teacher, config.ar_diffusion, config.sampling)
            costs["ar_diffusion"] = _training([(step, training.steps)], training, teacher, device)
        if isinstance(config.dd2, TrainedDD2Config):
            guidance, generator = dd2_steps(teacher, student, config)
            steps, network = config.dd2.training.steps, config.dd2.guidance
            updates = network.alignment_steps + steps * network.updates
            costs["distill_dd2"] = _training(
                [(guidance, updates), (generator, steps)], config.dd2.training, teacher, device
            )
        costs["sample"] = _sample(config, teacher, student, device)
        if isinstance(config.features, InceptionFeaturesConfig):
            costs["evaluate"] = _evaluate(config, device)
    return costs


def trajectory_batch(config: Config, weights: float, device: Device) -> int:
    """What ``trajectories.batch_size`` comes to on a device of which nothing else is used."""
    size = config.trajectories.batch_size
    if size != "auto":
        return size
    return fitting_batch(config.teacher.model, int(weights), int(device.memory), config.trajectories.precision)


def samples(config: Config) -> int:
    """Images a row and a seed."""
    evaluate = config.evaluate
    if isinstance(evaluate, DigitsEvaluateConfig):
        return evaluate.samples_per_image * DIGITS_IMAGES
    if isinstance(evaluate, ADM50kEvaluateConfig):
        return evaluate.samples_per_class * config.teacher.model.num_classes
    return evaluate.samples


def _trajectories(config: Config, teacher: Teacher, device: Device) -> StageCost:
    weights = _bytes(teacher)
    batch = trajectory_batch(config, weights, device)
    work = trajectory_work(teacher, config, batch)
    work += map_work(config.teacher.model, config.trajectories, batch, device.kind)
    batches = config.trajectories.count / batch
    seconds, noise = _seconds(work, device), batch * noise_seconds(config.teacher.model)
    # Threads draw it meanwhile: a GPU waits for it only where it is faster, processors have it to do as well.
    seconds = seconds + noise if device.kind == "cpu" else max(seconds, noise / NOISE_THREADS[device.kind])
    memory = weights + batch * sample_bytes(config.teacher.model, config.trajectories.precision)
    return StageCost(batches * _flops(work), batches * seconds, memory, batch)


def _training(steps: list[tuple[Step, float]], config: TrainingConfig, teacher: Teacher, device: Device) -> StageCost:
    """Steps of one or more networks, each with how often; activations of one at a time, the state of all."""
    memory = (
        sum(step.state for step, _ in steps)
        + _bytes(teacher)
        + max(step.kept + _transient(step.operators) for step, _ in steps)
    )
    return StageCost(
        sum(times * step.flops for step, times in steps),
        sum(times * device.seconds(step.operators) for step, times in steps),
        memory,
        config.batch_size,
    )


def _teacher(config: TrainedTeacherConfig, teacher: Teacher, device: Device) -> StageCost:
    tokenizer, transformer = teacher_steps(teacher, config)
    first = _training([(tokenizer, config.tokenizer_training.steps)], config.tokenizer_training, teacher, device)
    second = _training([(transformer, config.training.steps)], config.training, teacher, device)
    return StageCost(
        first.flops + second.flops, first.seconds + second.seconds, max(first.memory, second.memory), second.batch
    )


def _sample(config: Config, teacher: Teacher, student: Student, device: Device) -> StageCost:
    """A teacher that shares the work with a student, or skips some, counts as a whole one."""
    batch = config.evaluate.batch_size
    batches = samples(config) * len(config.evaluate.seeds) / batch
    decode = [decode_work(teacher, batch)]
    by_teacher = teacher_work(teacher, config, batch)
    by_student = [student_work(teacher, student, config, 1, batch)]
    by_map = map_work(config.teacher.model, config.trajectories, batch, device.kind)
    flops = seconds = 0.0
    for row in config.evaluate.rows:
        kind, numbers = parse_row(row)
        if kind in ("dd1", "dd2"):
            work = [student_work(teacher, student, config, numbers[0], batch)]
        elif kind == "teacher_flow":
            work = by_teacher + by_map
        elif kind == "teacher_involved":
            work = by_teacher + 2 * by_student
        else:
            work = [] if kind.startswith("onestep") else by_teacher
        flops += batches * _flops(work + decode)
        seconds += batches * _seconds(work + decode, device)
    at_once = max(batch * sample_bytes(config.teacher.model, "float32"), _transient(decode[0].operators))
    return StageCost(flops, seconds, _bytes(teacher) + _bytes(student) + at_once, batch)


def _evaluate(config: Config, device: Device) -> StageCost:
    batch = config.evaluate.batch_size
    share = batch / INCEPTION_OPERATORS
    # Its activations move about a byte for every fifty operations.
    work = [Work([Operator(INCEPTION_FLOPS * share, INCEPTION_FLOPS * share / 50)], INCEPTION_OPERATORS)]
    batches = samples(config) * len(config.evaluate.seeds) * len(config.evaluate.rows) / batch
    return StageCost(batches * _flops(work), batches * _seconds(work, device), batch * INCEPTION_IMAGE_BYTES, batch)


def _flops(work: Iterable[Work]) -> float:
    return sum(part.flops for part in work)


def _seconds(work: Iterable[Work], device: Device) -> float:
    return sum(part.times * device.seconds(part.operators) for part in work)


def _transient(operators: Iterable[Operator]) -> float:
    """What lives for an operator or two: the largest operator's arrays."""
    return max(operator.bytes for operator in operators)


def _bytes(module: nn.Module) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values()))
