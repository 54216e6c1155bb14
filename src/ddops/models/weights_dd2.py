"""Weight files of DD2's models. What they share with the teacher, the tokenizer, stays in the teacher's file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar

from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from ddops.config.models import HeadConfig, ModelConfig
from ddops.models.ar_diffusion import ARDiffusion, ARDiffusionGenerator, new_ar_diffusion
from ddops.models.errors import CheckpointError
from ddops.models.interface import BackboneTeacher, Student
from ddops.models.registry import build_teacher
from ddops.models.weights import (
    STUDENT,
    kind_of,
    load_strictly,
    load_student,
    load_tokenizer,
    load_weights,
    save_weights,
)

AR_DIFFUSION: Final = "ar_diffusion"
AR_GENERATOR: Final = "ar_diffusion_generator"

_HEAD: Final = "head"
_HEADS: Final[TypeAdapter[HeadConfig]] = TypeAdapter(HeadConfig)
Model = TypeVar("Model", bound=nn.Module)


def save_ar_diffusion(path: Path, state: Mapping[str, Tensor], config: ModelConfig, head: HeadConfig) -> None:
    """Write an AR-diffusion model's state dict and its head's configuration."""
    save_weights(path, _without_tokenizer(state), config, AR_DIFFUSION, _head_metadata(head))


def load_ar_diffusion(path_tokenizer: Path, path: Path) -> ARDiffusion:
    """The AR-diffusion model in a file, in evaluation mode; raises :class:`CheckpointError`."""
    return _load(path_tokenizer, path, AR_DIFFUSION, lambda model: model)


def save_generator(path: Path, state: Mapping[str, Tensor], config: ModelConfig, head: HeadConfig | None) -> None:
    """Write a DD2 generator's state dict: a DD1 student's network, or with ``head`` an AR-diffusion model's."""
    if head is None:
        save_weights(path, state, config, STUDENT)
    else:
        save_weights(path, _without_tokenizer(state), config, AR_GENERATOR, _head_metadata(head))


def load_generator(path_tokenizer: Path, path: Path) -> Student:
    """The DD2 generator in a file, in evaluation mode; raises :class:`CheckpointError`."""
    if kind_of(path) == AR_GENERATOR:
        return _load(path_tokenizer, path, AR_GENERATOR, ARDiffusionGenerator)
    return load_student(path)


def as_backbone(teacher: nn.Module) -> BackboneTeacher:
    """The teacher itself; raises TypeError for a family that does not offer its parts."""
    if not isinstance(teacher, BackboneTeacher):
        raise TypeError(f"DD2 needs a BackboneTeacher, and {type(teacher).__name__} is none (docs/ADD_A_TEACHER.md)")
    return teacher


def _load(path_tokenizer: Path, path: Path, kind: str, wrap: Callable[[ARDiffusion], Model]) -> Model:
    state, config, extra = load_weights(path, kind)
    try:
        head = _HEADS.validate_json(extra.get(_HEAD, ""))
    except ValidationError as error:
        raise CheckpointError(f"{path}: the configuration of its head is missing or damaged: {error}") from error
    teacher = as_backbone(build_teacher(config))
    teacher.tokenizer.load_state_dict(load_tokenizer(path_tokenizer).state_dict())
    model = wrap(new_ar_diffusion(teacher, head))
    tokenizer_state = {name: value for name, value in model.state_dict().items() if _is_tokenizer(name)}
    load_strictly(model, {**state, **tokenizer_state}, path)
    return model.eval()


def _head_metadata(head: HeadConfig) -> dict[str, str]:
    return {_HEAD: _HEADS.dump_json(head).decode()}


def _without_tokenizer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not _is_tokenizer(name)}


def _is_tokenizer(name: str) -> bool:
    return ".tokenizer." in name
