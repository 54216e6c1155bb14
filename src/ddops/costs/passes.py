"""The operators of the parts that stages are made of: sampling a teacher, the flow map, a student, the decoder, and the
training steps. The functions here run under :func:`ddops.costs.ledger.shapes_only`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, cast

import torch
from torch import Tensor, nn

from ddops.config.dd2 import TrainedARDiffusionConfig, TrainedDD2Config
from ddops.config.evaluation import DigitsFeaturesConfig
from ddops.config.models import ModelConfig
from ddops.config.stages import Config, FlowMapConfig, TrainedDD1Config, TrainedTeacherConfig
from ddops.config.training import TrainingConfig
from ddops.costs.ledger import Ledger, Operator, kept_bytes, without_values
from ddops.distill.ar_diffusion import ar_diffusion_objective
from ddops.distill.dd1 import dd1_objective
from ddops.distill.dd2 import DD2Objectives
from ddops.flow.solvers import CHUNK_ELEMENTS, OTHER_CHUNK_ELEMENTS
from ddops.losses.perceptual import PerceptualDistance
from ddops.models.ar_diffusion import ARDiffusionGenerator, new_ar_diffusion
from ddops.models.conditions import Captions, attach_captions
from ddops.models.interface import Student, Teacher
from ddops.models.reduced import sampled_in_bfloat16
from ddops.models.registry import build_student, build_teacher
from ddops.models.weights_dd2 import as_backbone
from ddops.pretrain.teacher import teacher_objective, tokenizer_objective
from ddops.sampling.few_step import sample_student
from ddops.training.loop import build_optimizers, frozen_copy, update, update_ema
from ddops.training.replicas import Replicas
from ddops.trajectories.dataset import TrajectoryBatch, TrajectoryDataset
from ddops.trajectories.reader import BatchSource

ADAPTIVE_EVALUATIONS: Final = 16
"""Posterior means a token that the solver `adaptive` takes at the published tolerance; see benchmarks/."""
SLOWEST: Final = 1.5
"""Steps that the slowest token of a chunk takes, over the mean."""
STEP_LAUNCHES: Final = 40
"""Operators on arrays without the codes' axis, in each step of the solver."""
VGG_WIDTHS: Final = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
"""VGG-16's convolutions; 0 halves the image."""
NOISE_RATE: Final = 15e6
"""Normals that one thread of a processor draws in a second, at 70 GFLOP/s (benchmarks/plan_check.py)."""
ALONE: Final = Replicas(0, 1)


@dataclass(frozen=True)
class Work:
    """Operators that run one after the other, ``times`` times."""

    operators: list[Operator]
    times: float = 1.0

    @property
    def flops(self) -> float:
        return self.times * sum(operator.flops for operator in self.operators)


@dataclass(frozen=True)
class Step:
    """A training step."""

    operators: list[Operator]
    kept: float
    """Bytes that the forward pass keeps for the backward pass."""
    state: float
    """Bytes of what is trained: weights, gradients, the optimiser's moments, the EMA where there is one."""

    @property
    def flops(self) -> float:
        return sum(operator.flops for operator in self.operators)


@dataclass
class FullCaptions:
    """A prompt set whose captions fill their tokens."""

    length: int
    width: int

    def __len__(self) -> int:
        return 1

    def captions(self, numbers_B: Tensor) -> Captions:
        """See :class:`CaptionTable`."""
        shape = len(numbers_B), self.length
        return Captions(torch.empty(*shape, self.width), torch.ones(shape, dtype=torch.bool))


class Shapes:
    """Batches of the right shapes."""

    def __init__(self, teacher: Teacher) -> None:
        self.length, self.code_dim = teacher.layout.length, teacher.codebook_VC.shape[1]

    def batch(self, indices_B: Tensor, step: int) -> TrajectoryBatch:
        """See :class:`BatchSource`."""
        labels_B, ids_BL = self.sequences(indices_B)
        return TrajectoryBatch(labels_B, torch.empty(*ids_BL.shape, self.code_dim), ids_BL)

    def sequences(self, indices_B: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`TrajectoryDataset.sequences`."""
        ids_BL = torch.zeros(len(indices_B), self.length, dtype=torch.long)
        return torch.zeros(len(indices_B), dtype=torch.long), ids_BL


def teacher_and_student(model: ModelConfig) -> tuple[Teacher, Student]:
    """Of shapes alone."""
    teacher = without_values(lambda: build_teacher(model)).requires_grad_(False).eval()
    student = without_values(lambda: build_student(model))
    for network in (teacher, student):
        _attach_full_captions(network, model)
    return teacher, student


def _attach_full_captions(network: nn.Module, model: ModelConfig) -> None:
    if (captions := getattr(model, "captions", None)) is not None:
        attach_captions(network, FullCaptions(captions.length, captions.width))


def trajectory_work(teacher: Teacher, config: Config, batch: int) -> list[Work]:
    """:func:`teacher_work` in the precision that trajectories are sampled in."""
    if config.trajectories.precision == "float32":
        return teacher_work(teacher, config, batch)
    model = config.teacher.model
    rounded = without_values(lambda: sampled_in_bfloat16(build_teacher(model))).requires_grad_(False).eval()
    _attach_full_captions(rounded, model)
    with torch.autocast("cpu", torch.bfloat16):
        return teacher_work(rounded, config, batch)


@torch.no_grad()
def teacher_work(teacher: Teacher, config: Config, batch: int) -> list[Work]:
    """A KV-cached sampling run with guidance, without picking the tokens: one list of operators a level.

    Where every token is a level, all levels but for their context are alike and the cost is linear in it: the middle
    one stands for all.
    """
    sizes = teacher.layout.sizes
    session = teacher.open(torch.zeros(batch, dtype=torch.long), config.sampling)

    def ask(level: int) -> list[Operator]:
        ledger = Ledger()
        with ledger:
            session.next_log_probs()
        session.append(torch.zeros(batch, sizes[level], dtype=torch.long))
        return ledger.operators

    if max(sizes) > 1:
        return [Work(ask(level)) for level in range(len(sizes))]
    middle = len(sizes) // 2
    for level in range(middle - 1):
        session.append(torch.zeros(batch, sizes[level], dtype=torch.long))
    ask(middle - 1)
    return [Work(ask(middle), len(sizes))]


def map_work(model: ModelConfig, config: FlowMapConfig, batch: int, device: str) -> list[Work]:
    """The flow map of all levels of a batch on a ``device`` as torch names its kind, in closed form: a step is two
    products, a softmax and a maximum."""
    evaluations = ADAPTIVE_EVALUATIONS if config.solver == "adaptive" else config.evaluations
    pairs = CHUNK_ELEMENTS.get(device, OTHER_CHUNK_ELEMENTS)
    codes, work = model.codebook_size, []
    for size in model.level_sizes:
        tokens = batch * size
        chunks = -(-tokens * codes // pairs)
        array = 4.0 * codes * tokens / chunks
        product = Operator(2.0 * codes * (model.code_dim + 1) * tokens / chunks, 2 * array)
        step = [product, Operator(0, 2 * array), Operator(0, array), product]
        work.append(Work(step, evaluations * chunks))
        work.append(Work([Operator(0, 4.0 * model.code_dim * tokens / chunks)] * STEP_LAUNCHES, SLOWEST * evaluations))
    return work


def noise_seconds(model: ModelConfig) -> float:
    """Of a processor's thread, for the noise of a sample."""
    return sum(model.level_sizes) * model.code_dim / NOISE_RATE


@torch.no_grad()
def student_work(teacher: Teacher, student: Student, config: Config, steps: int, batch: int) -> Work:
    """The lean passes of a sample in ``steps`` steps."""
    shape = batch, teacher.layout.length, teacher.codebook_VC.shape[1]
    labels_B, starts = torch.zeros(batch, dtype=torch.long), config.dd1.start_positions[:steps]
    with Ledger() as ledger:
        sample_student(student, teacher.codebook_VC, torch.empty(shape), labels_B, starts, config.dd1.logit_prefix)
    return Work(ledger.operators)


@torch.no_grad()
def full_pass(teacher: Teacher, student: Student, batch: int) -> Work:
    """The student's pass as training runs it, everything predicted."""
    shape = batch, teacher.layout.length, teacher.codebook_VC.shape[1]
    labels_B = torch.zeros(batch, dtype=torch.long)
    with Ledger() as ledger:
        student(torch.empty(shape), labels_B, labels_B)
    return Work(ledger.operators)


@torch.no_grad()
def decode_work(teacher: Teacher, batch: int) -> Work:
    """The tokenizer's decoder."""
    with Ledger() as ledger:
        teacher.decode(torch.empty(batch, teacher.layout.length, teacher.codebook_VC.shape[1]))
    return Work(ledger.operators)


def dd1_step(teacher: Teacher, student: Student, config: TrainedDD1Config, features: object) -> Step:
    """Student, decoder, perceptual network, their backward passes and the update."""
    distance = _classifier_distance(features) if config.perceptual.network == "digits_classifier" else vgg_distance()
    objective = dd1_objective(teacher, Shapes(teacher), config, distance)
    indices_B = torch.arange(config.training.batch_size)
    return _step(student, lambda: objective(student, indices_B, 0)["loss"], config.training, ema=True)


def ar_diffusion_step(teacher: Teacher, config: TrainedARDiffusionConfig, sampling: object) -> Step:
    """The AR-diffusion model's."""
    backbone = as_backbone(teacher)
    model = new_ar_diffusion(backbone, config.head)
    data = cast(TrajectoryDataset, _Sequences(Shapes(teacher)))
    objective = ar_diffusion_objective(backbone, data, config, sampling)  # type: ignore[arg-type]
    indices_B = torch.arange(config.training.batch_size)
    return _step(model, lambda: objective(model, indices_B, 0)["loss"], config.training, ema=True)


class _Sequences:
    def __init__(self, shapes: Shapes) -> None:
        self.sequences = shapes.sequences


def dd2_steps(teacher: Teacher, generator: Student, config: Config) -> tuple[Step, Step]:
    """One update of the guidance network, and one of the generator."""
    dd2, backbone = cast(TrainedDD2Config, config.dd2), as_backbone(teacher)
    head = config.ar_diffusion.head if isinstance(config.ar_diffusion, TrainedARDiffusionConfig) else None
    if dd2.start == "ar_diffusion":
        generator = ARDiffusionGenerator(new_ar_diffusion(backbone, head))
    guidance = new_ar_diffusion(backbone, head if dd2.guidance.start == "ar_diffusion" else None)
    batches: BatchSource = Shapes(teacher)
    objectives = DD2Objectives(teacher, batches, dd2, config.sampling, config.dd1.start_positions)
    indices_B = torch.arange(dd2.training.batch_size)
    count, averaged = dd2.guidance.batch_size, dd2.guidance.ema_decay > 0
    return (
        _step(guidance, lambda: objectives.guidance(generator, guidance, count)["loss"], dd2.training, ema=averaged),
        _step(
            generator,
            lambda: objectives.generator(generator, guidance, indices_B, 0)["loss"],
            dd2.training,
            ema=True,
        ),
    )


def teacher_steps(teacher: Teacher, config: TrainedTeacherConfig) -> tuple[Step, Step]:
    """Of the tokenizer, and of the transformer."""
    model = config.model
    tokenizer, transformer = config.tokenizer_training, config.training
    images = torch.empty(tokenizer.batch_size, model.image_channels, model.image_size, model.image_size)
    learn_tokens = tokenizer_objective(images, config.codebook_weight)
    ids_NL = torch.zeros(transformer.batch_size, teacher.layout.length, dtype=torch.long)
    labels_N = torch.zeros(transformer.batch_size, dtype=torch.long)
    dropouts = {"label_dropout": config.label_dropout, "token_dropout": config.token_dropout}
    learn_images = teacher_objective(ids_NL, labels_N, **dropouts)
    every, all_of = torch.arange(tokenizer.batch_size), torch.arange(transformer.batch_size)
    tokens = teacher.tokenizer.requires_grad_(True)
    first = _step(tokens, lambda: learn_tokens(tokens, every, 0)["loss"], tokenizer, ema=True)
    tokens.requires_grad_(False)
    teacher.get_submodule("transformer").requires_grad_(True)
    second = _step(teacher, lambda: learn_images(teacher, all_of, 0)["loss"], transformer, ema=True)
    teacher.requires_grad_(False)
    return first, second


def _step(model: nn.Module, loss: Callable[[], Tensor], config: TrainingConfig, *, ema: bool) -> Step:
    optimizers, average = build_optimizers(model, config), frozen_copy(model)
    trained = float(sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad))
    with Ledger() as ledger:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
            value, kept = kept_bytes(loss)
        update(model, optimizers, value, 0.0, config.gradient_clip, ALONE)
        if ema:
            update_ema(average, model, 0.9)
    return Step(ledger.operators, kept, (5 if ema else 4) * trained)


def _classifier_distance(features: object) -> PerceptualDistance:
    from ddops.losses.perceptual import classifier_distance
    from ddops.models.classifier import DigitsClassifier

    config = cast(DigitsFeaturesConfig, features)
    shape = {"channels": config.channels, "feature_dim": config.feature_dim, "dropout": config.dropout}
    return classifier_distance(without_values(lambda: DigitsClassifier(**shape)))  # type: ignore[arg-type]


def vgg_distance() -> PerceptualDistance:
    """Stands in for LPIPS, of which it has everything that costs: VGG-16's convolutions."""
    network = without_values(_vgg).requires_grad_(False)

    def distance(a_BIHW: Tensor, b_BIHW: Tensor) -> Tensor:
        result: Tensor = (network(a_BIHW) - network(b_BIHW)).square().mean((1, 2, 3))
        return result

    return distance


def _vgg() -> nn.Module:
    layers: list[nn.Module] = []
    inputs = 3
    for width in VGG_WIDTHS:
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        inputs = width or inputs
    return nn.Sequential(*layers)
