"""The one place that knows which model families exist.

A further family is a configuration in the ``ModelConfig`` union, a file with its three classes and a line below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from ddops.config.models import ModelConfig
from ddops.models.interface import Student, Teacher, Tokenizer
from ddops.models.llamagen import LlamaGenTeacher
from ddops.models.llamagen_student import LlamaGenStudent
from ddops.models.llamagen_tokenizer import LlamaGenTokenizer
from ddops.models.var import VARTeacher
from ddops.models.var_student import VARStudent
from ddops.models.var_tokenizer import VARTokenizer


class Family(NamedTuple):
    """Constructors of a family's models, each from the family's own configuration."""

    tokenizer: Callable[[Any], Tokenizer]
    teacher: Callable[[Any], Teacher]
    student: Callable[[Any], Student]


FAMILIES: Final[dict[str, Family]] = {
    "llamagen": Family(LlamaGenTokenizer, LlamaGenTeacher, LlamaGenStudent),
    "var": Family(VARTokenizer, VARTeacher, VARStudent),
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


def _family(config: ModelConfig) -> Family:
    if config.family not in FAMILIES:
        raise ValueError(f"unknown model family {config.family!r}; known are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[config.family]
