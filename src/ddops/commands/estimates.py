"""The numbers behind ``ddops plan``. Parameters, tensors and passes are counted on torch's meta device, which holds
shapes and no values; the rest is arithmetic on the configuration. Memory and work are estimates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddops.commands.arguments import CommandError
from ddops.config.captions import EncodedCaptionsConfig
from ddops.config.evaluation import ADM50kEvaluateConfig, DigitsEvaluateConfig, parse_row
from ddops.config.models import ModelConfig
from ddops.config.stages import Config, TrainedDD1Config
from ddops.models.conditions import Captions, Condition
from ddops.models.registry import build_student, build_teacher
from ddops.trajectories.memory import fitting_batch, sample_bytes

FLOAT: Final = 4
"""Bytes of a float32, which everything is computed and stored in."""
VGG16_FLOPS_PER_PIXEL: Final = 2 * 15.35e9 / 224**2
ACTIVATION_BYTES: Final = 68
"""Of a transformer layer, a token and a channel, kept for the backward pass in float32 (arXiv 2205.05198, eq. 1)."""
ADAPTIVE_EVALUATIONS: Final = 20
"""Posterior means a token of the solver `adaptive`, rounded up; trajectories.evaluations is only its limit."""
DIGITS_IMAGES: Final = 1797


@dataclass(frozen=True)
class Device:
    """What a device computes and holds."""

    flops: float
    """Dense bf16 operations a second."""
    memory: float
    """Bytes."""
    source: str


DEVICES: Final = {
    "H200": Device(788e12, 139 * 2**30, "measured on such a card"),
    "H100": Device(989e12, 80e9, "the vendor's peak"),
    "A100": Device(312e12, 80e9, "the vendor's peak"),
}


def find_device(name: str) -> Device:
    """A device of the table; raises CommandError for one that is not there."""
    if name not in DEVICES:
        raise CommandError(f"--device: no device {name!r} in the table; valid: {', '.join(DEVICES)}")
    return DEVICES[name]


@dataclass(frozen=True)
class ModelSize:
    """What a model holds."""

    parameters: int
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Passes:
    """Operations (multiplications and additions) an image."""

    teacher: float
    """All levels, both halves of guidance. Counted as one full pass: a KV-cached run has less attention."""
    flow_map: float
    student: float
    decode: float


@dataclass(frozen=True)
class Measured:
    """The models of a preset, counted."""

    transformer: ModelSize
    tokenizer: ModelSize
    student: ModelSize
    passes: Passes
    guided: bool
    length: int
    largest_level: int


def measure(config: Config) -> Measured:
    """Build the models without allocating them, and count."""
    model, sampling = config.teacher.model, config.sampling
    with torch.device("meta"), torch.no_grad():
        teacher, student = build_teacher(model), build_student(model)
        layout = teacher.layout
        start_B = torch.zeros(1, dtype=torch.long)
        ids_BL = torch.zeros(1, layout.length, dtype=torch.long)
        x_BLC = torch.zeros(1, layout.length, model.code_dim)
        condition = _condition(model)
        one_pass = _flops(lambda: teacher.logits(condition, ids_BL))
        student_pass = _flops(lambda: student(x_BLC, condition, start_B).logits_BLV)
        decode = _flops(lambda: teacher.decode(x_BLC))
    guided = any(teacher.guidance_scale(sampling.guidance, level) != 1 for level in range(layout.num_levels))
    codes = model.codebook_size
    adaptive = config.trajectories.solver == "adaptive"
    evaluations = ADAPTIVE_EVALUATIONS if adaptive else config.trajectories.evaluations
    flow_map = evaluations * layout.length * (4.0 * codes * model.code_dim + 8 * codes)
    return Measured(
        transformer=_size(teacher.get_submodule("transformer")),
        tokenizer=_size(teacher.tokenizer),
        student=_size(student),
        passes=Passes(one_pass * (2 if guided else 1), flow_map, student_pass, decode),
        guided=guided,
        length=layout.length,
        largest_level=max(layout.sizes),
    )


def _condition(model: ModelConfig) -> Condition:
    """One, on the device in use: a class, or a caption that fills its tokens."""
    captions = getattr(model, "captions", None)
    if captions is None:
        return torch.zeros(1, dtype=torch.long)
    mask_BT = torch.ones(1, captions.length, dtype=torch.bool)
    return Captions(torch.zeros(1, captions.length, captions.width), mask_BT)


def caption_bytes(config: EncodedCaptionsConfig, width: int, prompts: int) -> int:
    """Stored bytes of captions that fill their tokens: the most that they take."""
    return prompts * config.length * width * (FLOAT if config.dtype == "float32" else 2)


def trajectory_bytes(measured: Measured) -> int:
    """Stored bytes a trajectory: the class and the token ids, two each. The noise is computed, not stored."""
    return 2 * (measured.length + 1)


def noise_bytes(config: Config, measured: Measured) -> int:
    """What storing the noise would add."""
    return FLOAT * measured.length * config.teacher.model.code_dim


def samples(config: Config) -> int:
    """Images a row and a seed."""
    evaluate = config.evaluate
    if isinstance(evaluate, DigitsEvaluateConfig):
        return evaluate.samples_per_image * DIGITS_IMAGES
    if isinstance(evaluate, ADM50kEvaluateConfig):
        return evaluate.samples_per_class * config.teacher.model.num_classes
    return evaluate.samples


def image_bytes(config: Config) -> int:
    """Bytes of all rows' images."""
    model = config.teacher.model
    image = model.image_channels * model.image_size**2
    return image * samples(config) * len(config.evaluate.seeds) * len(config.evaluate.rows)


def trajectory_flops(config: Config, measured: Measured) -> float:
    """Work of the stage ``trajectories``."""
    return config.trajectories.count * (measured.passes.teacher + measured.passes.flow_map)


def distill_flops(config: Config, measured: Measured) -> float:
    """Work of the stage ``distill_dd1``: a backward pass counts twice a forward one, or once where only the input's
    gradient is asked for, as through the decoder and LPIPS."""
    if not isinstance(config.dd1, TrainedDD1Config):
        return 0.0
    training, perceptual = config.dd1.training, config.dd1.perceptual
    lpips = 3 * VGG16_FLOPS_PER_PIXEL * config.teacher.model.image_size**2 if perceptual.network == "lpips_vgg" else 0
    decoded = min(perceptual.batch_size, training.batch_size) * (3 * measured.passes.decode + lpips)
    return training.steps * (3 * training.batch_size * measured.passes.student + decoded)


def sample_flops(config: Config, measured: Measured) -> float:
    """Work of the stage ``sample``."""
    images = samples(config) * len(config.evaluate.seeds)
    return images * sum(_row_flops(name, measured.passes) for name in config.evaluate.rows)


def _row_flops(name: str, passes: Passes) -> float:
    """Of one image. A teacher that shares the work with a student, or skips some, counts as a whole one."""
    kind, numbers = parse_row(name)
    work = {
        "teacher_flow": passes.teacher + passes.flow_map,
        "dd1": passes.student * (numbers[0] if kind == "dd1" else 0),
        "teacher_involved": passes.teacher + 2 * passes.student,
        "onestep_star": 0.0,
    }
    return work.get(kind, passes.teacher) + passes.decode


def trajectory_batch(config: Config, measured: Measured, device: Device) -> int:
    """What ``trajectories.batch_size`` comes to on a device of which nothing else is used."""
    size = config.trajectories.batch_size
    if size != "auto":
        return size
    weights = measured.transformer.bytes + measured.tokenizer.bytes
    return fitting_batch(config.teacher.model, weights, int(device.memory))


def sampling_memory(config: Config, measured: Measured, batch: int) -> float:
    """Bytes while a teacher is sampled: weights, and what :func:`sample_bytes` counts."""
    return measured.transformer.bytes + measured.tokenizer.bytes + batch * sample_bytes(config.teacher.model)


def training_memory(config: Config, measured: Measured) -> float:
    """Bytes while a student is trained: five copies of it (weights, gradients, AdamW's two, EMA), the teacher, the
    activations and the logits with their gradient."""
    if not isinstance(config.dd1, TrainedDD1Config):
        return 0.0
    model, tokens = config.teacher.model, config.dd1.training.batch_size * measured.length
    activations = ACTIVATION_BYTES * tokens * model.depth * model.width
    logits = 3 * FLOAT * tokens * model.codebook_size
    return 5 * measured.student.bytes + measured.transformer.bytes + measured.tokenizer.bytes + activations + logits


def _flops(run: Callable[[], Tensor]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def _size(module: nn.Module) -> ModelSize:
    state = module.state_dict()
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        tensors=len(state),
        bytes=sum(tensor.nbytes for tensor in state.values()),
    )
