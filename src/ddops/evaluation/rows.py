"""What the evaluation compares: the rows of the papers' tables, each with its own way to draw images.

A further kind of row is a pattern in ``config/evaluation.py`` and a line in ``_BUILDERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ddops.config.dd2 import (
    ARDiffusionConfig,
    DD2Config,
    NotTrainedConfig,
    TrainedARDiffusionConfig,
    TrainedDD2Config,
)
from ddops.config.evaluation import parse_row
from ddops.config.models import SamplingConfig
from ddops.config.stages import DD1Config, FlowMapConfig
from ddops.evaluation.device import accelerator
from ddops.evaluation.drawing import Draw, Generator, Indices, dd1_generator, decode, from_noise, sample_noise
from ddops.evaluation.images import to_uint8
from ddops.models.ar_diffusion import ARDiffusion
from ddops.models.interface import Student, Teacher
from ddops.models.lean import join_doublings
from ddops.models.weights import load_student, load_teacher
from ddops.models.weights_dd2 import load_ar_diffusion, load_generator
from ddops.sampling.ar_diffusion import refine, sample_ar_diffusion
from ddops.sampling.few_step import sample_student
from ddops.sampling.independent import TokenPools
from ddops.sampling.mixed import sample_skipping, sample_teacher_involved
from ddops.sampling.noise import Stream, normals, uniforms
from ddops.sampling.teacher import Picker, categorical_picker, flow_picker, sample_teacher
from ddops.trajectories.dataset import TrajectoryDataset

RECONSTRUCTION: Final = "reconstruction"
NOT_TRAINED: Final = NotTrainedConfig(source="none")


@dataclass(frozen=True)
class Row:
    """A line of the table: how its images are drawn, and what one costs."""

    name: str
    draw: Draw
    passes: int
    """Passes through a transformer, one after the other, from noise to tokens (guidance's second half not counted)."""
    parameters: int
    """Of the transformers that take part, without the tokenizer."""
    generator: Generator | None = None
    """Of a row whose images are a function of label and noise alone."""


@dataclass(frozen=True)
class Models:
    """All that rows draw with."""

    teacher: Teacher
    student: Student | None
    """None where no row asks for it."""
    sampling: SamplingConfig
    solver: FlowMapConfig
    dd1: DD1Config
    trajectories: Path
    dd2: DD2Config = NOT_TRAINED
    generator: Student | None = None
    """DD2's; None where no row asks for it."""
    ar_diffusion: ARDiffusion | None = None
    evaluations: int = 0
    """Of the AR-diffusion model's head, a token."""

    @cached_property
    def drawn_tokens(self) -> tuple[Tensor, Tensor]:
        """Ids (N, L) and labels (N,) of the trajectories; read when a row asks for them."""
        dataset = TrajectoryDataset(self.trajectories, self.teacher.codebook_VC.shape[1])
        return dataset.ids_NL, dataset.labels_N

    @property
    def dd1_student(self) -> Student:
        if self.student is None:
            raise ValueError("this row needs a DD1 student, and none was loaded")
        return self.student

    @property
    def students(self) -> list[torch.nn.Module]:
        """Whatever was loaded beside the teacher."""
        return [each for each in (self.student, self.generator, self.ar_diffusion) if each is not None]

    @property
    def device(self) -> torch.device:
        return self.teacher.codebook_VC.device


def open_models(
    files: Mapping[str, Path],
    sampling: SamplingConfig,
    solver: FlowMapConfig,
    dd1: DD1Config,
    ar_diffusion: ARDiffusionConfig,
    dd2: DD2Config,
    trajectories: Path,
) -> Models:
    """The models in ``files``, by name (``dd1``, ``dd2`` and ``ar_diffusion`` as far as they are there), on the
    accelerator; raises :class:`CheckpointError`."""
    tokenizer, device = files["tokenizer"], accelerator()
    return Models(
        open_teacher(tokenizer, files["teacher"]),
        load_student(files["dd1"]).to(device) if "dd1" in files else None,
        sampling,
        solver,
        dd1,
        trajectories,
        dd2,
        load_generator(tokenizer, files["dd2"]).to(device) if "dd2" in files else None,
        load_ar_diffusion(tokenizer, files["ar_diffusion"]).to(device) if "ar_diffusion" in files else None,
        ar_diffusion.evaluations if isinstance(ar_diffusion, TrainedARDiffusionConfig) else 0,
    )


def open_teacher(tokenizer: Path, transformer: Path) -> Teacher:
    """A teacher to draw with, on the accelerator; raises :class:`CheckpointError`."""
    teacher = load_teacher(tokenizer, transformer)
    join_doublings(teacher.tokenizer)
    return teacher.to(accelerator())


def build_row(name: str, models: Models) -> Row:
    """The row of that name; raises ValueError for one that is none."""
    kind, numbers = parse_row(name)
    built = _BUILDERS[kind](models, *numbers)
    parameters = sum(parameter.numel() for part in built.transformers for parameter in part.parameters())
    return Row(name, built.draw, built.passes, parameters, built.generator)


def reconstruct(teacher: Teacher, images_NIHW: Tensor, batch_size: int) -> Iterator[Tensor]:
    """The real images through the tokenizer and back, uint8, batch by batch: the floor of every row."""
    for images_BIHW in images_NIHW.split(batch_size):
        with torch.inference_mode():
            ids_BL = teacher.tokenizer.encode(images_BIHW.to(teacher.codebook_VC.device))
            decoded_BIHW = to_uint8(_decode_ids(teacher, ids_BL)).cpu()
        yield decoded_BIHW


class _Built(NamedTuple):
    """How images are drawn, in how many passes, and by which transformers."""

    draw: Draw
    passes: int
    transformers: tuple[torch.nn.Module, ...]
    generator: Generator | None = None


def _teacher(models: Models) -> _Built:
    """Ordinary autoregressive sampling."""

    def draw(seed: int, indices_B: Indices, labels_B: Tensor) -> Tensor:
        ids_BL = sample_teacher(
            models.teacher, labels_B.to(models.device), models.sampling, _categorical(models, seed, indices_B)
        )
        return _decode_ids(models.teacher, ids_BL)

    return _Built(draw, models.teacher.layout.num_levels, (_transformer(models),))


def _teacher_flow(models: Models) -> _Built:
    """The teacher through the flow map, what the trajectories are made of."""
    teacher, solver = models.teacher, models.solver

    def draw(seed: int, indices_B: Indices, labels_B: Tensor) -> Tensor:
        noise_BLC = sample_noise(seed, indices_B, teacher, teacher.codebook_VC.shape[1]).to(models.device)
        pick = flow_picker(teacher.layout, teacher.codebook_VC, noise_BLC, solver)
        return _decode_ids(teacher, sample_teacher(teacher, labels_B.to(models.device), models.sampling, pick))

    return _Built(draw, teacher.layout.num_levels, (_transformer(models),))


def _dd1(models: Models, steps: int) -> _Built:
    student, code_dim = models.dd1_student, models.teacher.codebook_VC.shape[1]
    generator = dd1_generator(student, models.teacher, models.dd1, steps)
    return _Built(from_noise(generator, student, code_dim), steps, (student,), generator)


def _dd2(models: Models, steps: int) -> _Built:
    """DD2's generator, sampled as a DD1 student is."""
    if models.generator is None or isinstance(models.dd2, NotTrainedConfig):
        raise ValueError("this row needs a DD2 generator, and none was loaded")
    teacher = models.teacher
    sampled = replace(models.dd1, logit_prefix=models.dd2.logit_prefix(teacher.layout.num_levels))
    generator = dd1_generator(models.generator, teacher, sampled, steps)
    draw = from_noise(generator, models.generator, teacher.codebook_VC.shape[1])
    return _Built(draw, steps, (models.generator,), generator)


def _dd2_refine(models: Models, count: int) -> _Built:
    """DD2's few steps: what the generator made in one is returned to noise and denoised again, ``count`` times."""
    one_step, model = _dd2(models, 1), _ar_model(models)
    assert isinstance(models.dd2, TrainedDD2Config)
    assert models.generator is not None
    generator, config, teacher = models.generator, models.dd2, models.teacher
    prefix = config.logit_prefix(teacher.layout.num_levels)

    def draw(seed: int, indices_B: Indices, labels_B: Tensor) -> Tensor:
        labels_B, codebook_VC = labels_B.to(models.device), teacher.codebook_VC
        shape = (teacher.layout.length, codebook_VC.shape[1])
        noise_BLC = sample_noise(seed, indices_B, teacher, shape[1]).to(models.device)
        q_BLC = sample_student(generator, codebook_VC, noise_BLC, labels_B, (0,), prefix)
        noise_BNLC = normals(seed, Stream.REFINEMENT, indices_B, (count, *shape)).to(models.device)
        for fresh_BLC in noise_BNLC.unbind(1):
            q_BLC = refine(model, q_BLC, fresh_BLC, labels_B, start=config.refine_start, evaluations=models.evaluations)
        return decode(teacher, q_BLC)

    return _Built(draw, 1 + count, (*one_step.transformers, *_ar_parts(model)))


def _ar_diffusion(models: Models) -> _Built:
    """DD2's AR-diffusion model by its own sampler, level by level: what its training reached."""
    model, teacher = _ar_model(models), models.teacher

    def draw(seed: int, indices_B: Indices, labels_B: Tensor) -> Tensor:
        noise_BLC = sample_noise(seed, indices_B, teacher, teacher.codebook_VC.shape[1]).to(models.device)
        ids_BL = sample_ar_diffusion(model, labels_B.to(models.device), noise_BLC, models.evaluations)
        return _decode_ids(teacher, ids_BL)

    return _Built(draw, teacher.layout.num_levels, _ar_parts(model))


def _ar_parts(model: ARDiffusion) -> tuple[torch.nn.Module, ...]:
    transformer = model.backbone.get_submodule("transformer")
    return (transformer,) if model.head is None else (transformer, model.head)


def _ar_model(models: Models) -> ARDiffusion:
    if models.ar_diffusion is None:
        raise ValueError("this row needs an AR-diffusion model, and none was loaded")
    return models.ar_diffusion


def _teacher_involved(models: Models, first: int, last: int) -> _Built:
    """DD1's Table 2, ``n-m`` counted from 1: the teacher draws levels n to m - 1, the student goes on from there."""
    teacher, dd1 = models.teacher, models.dd1
    prefix = dd1.teacher_involved_logit_prefix.get(f"teacher_involved_{first}_{last}", dd1.logit_prefix)

    def draw(seed: int, indices_B: Indices, labels_B: Tensor) -> Tensor:
        q_BLC = sample_teacher_involved(
            models.dd1_student,
            teacher,
            sample_noise(seed, indices_B, teacher, teacher.codebook_VC.shape[1]).to(models.device),
            labels_B.to(models.device),
            (first - 1, last - 1),
            prefix,
            models.sampling,
            _categorical(models, seed, indices_B),
        )
        return decode(teacher, q_BLC)

    return _Built(draw, (last - first) + (1 if first == 1 else 2), (_transformer(models), models.dd1_student))


def _skip(models: Models, skipped: int) -> _Built:
    def draw(seed: int, indices_B: Indices, labels_B: Tensor) -> Tensor:
        pick = _categorical(models, seed, indices_B)
        ids_BL = sample_skipping(models.teacher, labels_B.to(models.device), skipped, models.sampling, pick)
        return _decode_ids(models.teacher, ids_BL)

    return _Built(draw, models.teacher.layout.num_levels - skipped, (_transformer(models),))


def _onestep_class(models: Models) -> _Built:
    """Every token independently from its class-conditional marginal."""
    ids_NL, labels_N = models.drawn_tokens
    pools = TokenPools.of(ids_NL, labels_N, models.teacher.num_conditions)
    return _Built(_independent(models, pools, lambda labels_B: labels_B), 1, ())


def _onestep_star(models: Models) -> _Built:
    """DD1's baseline: every token independently from its marginal over all classes."""
    ids_NL, labels_N = models.drawn_tokens
    pool = TokenPools.of(ids_NL, torch.zeros_like(labels_N), 1)
    return _Built(_independent(models, pool, torch.zeros_like), 1, ())


def _independent(models: Models, pools: TokenPools, which: Callable[[Tensor], Tensor]) -> Draw:
    def draw(seed: int, indices_B: Indices, labels_B: Tensor) -> Tensor:
        uniforms_BL = torch.from_numpy(uniforms(seed, Stream.CATEGORICAL, indices_B, models.teacher.layout.length))
        return _decode_ids(models.teacher, pools.draw(which(labels_B), uniforms_BL).to(models.device))

    return draw


_BUILDERS: Final[dict[str, Callable[..., _Built]]] = {
    "teacher": _teacher,
    "teacher_flow": _teacher_flow,
    "dd1": _dd1,
    "dd2": _dd2,
    "dd2_refine": _dd2_refine,
    "ar_diffusion": _ar_diffusion,
    "teacher_involved": _teacher_involved,
    "skip": _skip,
    "onestep_class": _onestep_class,
    "onestep_star": _onestep_star,
}


def _categorical(models: Models, seed: int, indices_B: Indices) -> Picker:
    layout = models.teacher.layout
    uniforms_BL = torch.from_numpy(uniforms(seed, Stream.CATEGORICAL, indices_B, layout.length))
    return categorical_picker(layout, uniforms_BL.to(models.device))


def _transformer(models: Models) -> torch.nn.Module:
    return models.teacher.get_submodule("transformer")


def _decode_ids(teacher: Teacher, ids_BL: Tensor) -> Tensor:
    return decode(teacher, F.embedding(ids_BL, teacher.codebook_VC))
