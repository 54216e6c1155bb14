"""The one place that knows which model families exist.

A further family is a configuration in the ``ModelConfig`` union, a file with its three classes and a line below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from torch import Tensor

from ddops.config.models import ModelConfig
from ddops.models.checkpoints_llamagen import llamagen_student_state, llamagen_teacher_state
from ddops.models.checkpoints_tokenizers import llamagen_tokenizer_state, var_tokenizer_state
from ddops.models.checkpoints_var import var_student_state, var_teacher_state
from ddops.models.interface import Student, Teacher, Tokenizer
from ddops.models.llamagen import LlamaGenTeacher
from ddops.models.llamagen_student import LlamaGenStudent
from ddops.models.llamagen_tokenizer import LlamaGenTokenizer
from ddops.models.var import VARTeacher
from ddops.models.var_student import VARStudent
from ddops.models.var_tokenizer import VARTokenizer

NameMap = Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]
"""Published state dict and configuration -> our module's state dict, or a CheckpointError that names the key."""


class NameMaps(NamedTuple):
    """How a family's published weights become ours."""

    tokenizer: NameMap
    transformer: NameMap
    student: NameMap


class Family(NamedTuple):
    """Constructors of a family's models, each from the family's own configuration."""

    tokenizer: Callable[[Any], Tokenizer]
    teacher: Callable[[Any], Teacher]
    student: Callable[[Any], Student]
    published: NameMaps | None = None
    """None for a family that nobody published weights of."""


_LLAMAGEN: Final = NameMaps(llamagen_tokenizer_state, llamagen_teacher_state, llamagen_student_state)
_VAR: Final = NameMaps(var_tokenizer_state, var_teacher_state, var_student_state)

FAMILIES: Final[dict[str, Family]] = {
    "llamagen": Family(LlamaGenTokenizer, LlamaGenTeacher, LlamaGenStudent, _LLAMAGEN),
    "var": Family(VARTokenizer, VARTeacher, VARStudent, _VAR),
}


def build_tokenizer(config: ModelConfig) -> Tokenizer:
    """A newly initialised tokenizer; raises ``ValueError`` for an unknown family."""
    return _family(config).tokenizer(config)


def build_teacher(config: ModelConfig) -> Teacher:
    """A newly initialised teacher, with its tokenizer; raises ``ValueError`` for an unknown family."""
    return _family(config).teacher(config)


def build_student(config: ModelConfig) -> Student:
    """A newly initialised DD1 student; raises ``ValueError`` for an unknown family."""
    return _family(config).student(config)


def name_maps(config: ModelConfig) -> NameMaps:
    """The name maps of a family; raises ``ValueError`` where it has none."""
    maps = _family(config).published
    if maps is None:
        raise ValueError(f"no published weights of the family {config.family!r} are known")
    return maps


def _family(config: ModelConfig) -> Family:
    if config.family not in FAMILIES:
        raise ValueError(f"unknown model family {config.family!r}; known are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[config.family]
