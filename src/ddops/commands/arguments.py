"""What several commands take: a preset with overrides."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ddops.config.load import compose, validate
from ddops.config.stages import Config

Subparsers = Any  # argparse's own name for it is private


class CommandError(ValueError):
    """A command that cannot do what it was asked. The message says what to ask instead."""


class Preset(NamedTuple):
    """A composed preset: plain values to be written, and the same validated."""

    values: dict[str, Any]
    config: Config


def add_preset(parser: argparse.ArgumentParser) -> None:
    """The arguments ``preset`` and ``overrides``, and ``--params``."""
    parser.add_argument("preset", help="a preset: ddops presets lists them")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    add_params(parser)


def add_params(parser: argparse.ArgumentParser) -> None:
    """The argument ``--params``."""
    parser.add_argument(
        "--params", type=Path, default=Path("params"), metavar="DIR", help="your own groups; default: params"
    )


def load_preset(name: str, params: Path, overrides: Sequence[str] = ()) -> Preset:
    """Compose and validate a preset; raises ConfigError."""
    values = compose(params, [f"preset={name}", *overrides])
    return Preset(values, validate(values, name))
