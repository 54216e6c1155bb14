"""``ddops compose`` and ``ddops check``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ddops.commands.arguments import Subparsers, add_params
from ddops.config.load import compose, load_config, write_params


def register(commands: Subparsers) -> None:
    """Declare the arguments."""
    composing = commands.add_parser(
        "compose",
        help="write params.yaml from the groups in params/, for `dvc repro`",
        description="Compose the configuration: `ddops compose preset=digits_var dd1.training.steps=8000`.",
    )
    composing.add_argument("overrides", nargs="*", metavar="group=choice | section.key=value")
    add_params(composing)
    composing.add_argument("--output", type=Path, default=Path("params.yaml"), metavar="FILE")
    composing.set_defaults(run=run_compose)

    checking = commands.add_parser("check", help="validate a composed configuration without running anything")
    checking.add_argument("file", type=Path, nargs="?", default=Path("params.yaml"))
    checking.set_defaults(run=run_check)


def run_compose(arguments: argparse.Namespace) -> None:
    """Write ``params.yaml``."""
    values = compose(arguments.params, arguments.overrides)
    write_params(values, arguments.output)
    print(f"{arguments.output}: preset {values['preset']}. Next: dvc repro")


def run_check(arguments: argparse.Namespace) -> None:
    """Validate a file."""
    print(f"{arguments.file}: preset {load_config(arguments.file).preset}, valid")
