"""A stage called as its command line calls it, and variants of such calls by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ddops.config.stages import Config
from ddops.stages.common import Stage, sections
from helpers.recipes.digest import Digest

Variants = dict[str, dict[str, Callable[[], Digest]]]
"""By stage and name: runs the stage in the working directory, which is empty, and sums up what it wrote."""


def run(stage: Stage, config: Config) -> None:
    """With its sections of a configuration."""
    stage(**{name: getattr(config, name) for name in sections(stage)})


def variants(of: Callable[..., Digest], **cases: tuple[Any, ...]) -> dict[str, Callable[[], Digest]]:
    """By name: ``of`` with a case's arguments, the last of which may be a mapping of keyword arguments."""
    found = {}
    for name, case in cases.items():
        arguments = case[:-1] if isinstance(case[-1], dict) else case
        keywords = case[-1] if isinstance(case[-1], dict) else {}
        found[name] = partial(of, *arguments, **keywords)
    return found
