"""``ddops run`` and ``ddops prefect``: the pipeline as a Prefect flow, without a server and with one."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ddops.commands.arguments import CommandError, Subparsers
from ddops.extras import require
from ddops.workspace.recipes import require_recipes


def register(commands: Subparsers) -> None:
    """Declare the commands; their arguments are the flow's own business."""
    for name, what, call in (
        ("run", "run the pipeline stage by stage as a Prefect flow, no server needed", run),
        (
            "prefect",
            "a Prefect server with the deployments of prefect.yaml, and a worker; Ctrl-C ends both",
            run_prefect,
        ),
    ):
        parser = commands.add_parser(name, help=what, add_help=False, prefix_chars="\0")
        parser.add_argument("arguments", nargs=argparse.REMAINDER)
        parser.set_defaults(run=call)


def run(arguments: argparse.Namespace) -> None:
    """Become the flow's process; raises CommandError or MissingExtra."""
    _become("run", "ddops.flows", arguments.arguments)


def run_prefect(arguments: argparse.Namespace) -> None:
    """Become the process that starts server and worker; raises CommandError or MissingExtra."""
    _become("prefect", "ddops.flows.up", arguments.arguments)


def _become(command: str, module: str, arguments: Sequence[str]) -> None:
    """
    Raises:
        CommandError: this is no workspace. MissingExtra: Prefect is not installed.
        RecipeError: the workspace is of another ddops: said now, not by a stage in the middle of the run.
    """
    if not Path("dvc.yaml").is_file():
        raise CommandError("no dvc.yaml here: run from a workspace (ddops init DIR writes one)")
    require("prefect", f"ddops {command}")
    require_recipes()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
