"""The command line ``ddops``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ddops import __version__
from ddops.config.load import ConfigError, compose, load_config, write_params


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, or 1 after an error that was explained."""
    parser = argparse.ArgumentParser(prog="ddops", description="Distil image AR models into one-step generators.")
    parser.add_argument("--version", action="version", version=f"ddops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    composing = commands.add_parser(
        "compose",
        help="write params.yaml from the groups in params/, for `dvc repro`",
        description="Compose the configuration: `ddops compose preset=digits_var dd1.training.steps=8000`.",
    )
    composing.add_argument("overrides", nargs="*", metavar="group=choice | section.key=value")
    composing.add_argument("--params", type=Path, default=Path("params"), metavar="DIR", help="default: params")
    composing.add_argument("--output", type=Path, default=Path("params.yaml"), metavar="FILE")

    checking = commands.add_parser("check", help="validate a composed configuration without running anything")
    checking.add_argument("file", type=Path, nargs="?", default=Path("params.yaml"))

    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "compose":
            values = compose(arguments.params, arguments.overrides)
            write_params(values, arguments.output)
            print(f"{arguments.output}: preset {values['preset']}. Next: dvc repro")
        else:
            print(f"{arguments.file}: preset {load_config(arguments.file).preset}, valid")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
