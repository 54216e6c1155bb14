"""The command line ``ddops``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from ddops import __version__
from ddops.commands import (
    compose,
    export,
    fetch,
    init,
    migrate,
    override,
    plan,
    presets,
    promote,
    run,
    sample,
    serve,
    stale,
    table,
    trajectories,
)
from ddops.commands.arguments import CommandError
from ddops.config.load import ConfigError
from ddops.evaluation.errors import MetricError
from ddops.export.errors import BundleError, ExportError
from ddops.extras import MissingExtra, explained
from ddops.lock import HeldError
from ddops.models.errors import CheckpointError
from ddops.production import RegistryError
from ddops.reports import ReportError
from ddops.stages.common import EXIT_REFUSED, EXIT_TRY_AGAIN, ModelRefusedError
from ddops.workspace.files import WorkspaceError
from ddops.workspace.recipes import RecipeError

MODULES = (
    init,
    migrate,
    presets,
    compose,
    run,
    plan,
    fetch,
    sample,
    trajectories,
    table,
    export,
    override,
    stale,
    promote,
    serve,
)
"""Of the commands, in the order that ``ddops --help`` shows."""
EXPLAINED = (
    *(ConfigError, CheckpointError, MetricError, RegistryError, ReportError, BundleError, ExportError),
    *(WorkspaceError, RecipeError, MissingExtra),
)
"""Errors whose message says what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 3 where a model is refused, 75 where somebody else is at it, or 1 after
    another error that was explained."""
    parser = argparse.ArgumentParser(prog="ddops", description="Distil image AR models into one-step generators.")
    parser.add_argument("--version", action="version", version=f"ddops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in MODULES:
        module.register(commands)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        arguments.run(arguments)
    except ModelRefusedError as error:
        print(error, file=sys.stderr)
        return EXIT_REFUSED
    except HeldError as error:
        print(error, file=sys.stderr)
        return EXIT_TRY_AGAIN
    except BrokenPipeError:  # whoever reads, as head does, has enough
        sys.stderr.close()
        return 0
    except (*EXPLAINED, CommandError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (said := explained(error, f"ddops {arguments.command}")) is error:
            raise
        print(said, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
