"""``ddops run``: the pipeline as a Prefect flow, without a server. Called as a process of its own."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ddops.commands.arguments import CommandError, Subparsers
from ddops.extras import require


def register(commands: Subparsers) -> None:
    """Declare the command; its arguments are the flow's own business."""
    running = commands.add_parser(
        "run",
        help="run the pipeline stage by stage as a Prefect flow, no server needed",
        add_help=False,
        prefix_chars="\0",
    )
    running.add_argument("arguments", nargs=argparse.REMAINDER)
    running.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Become the flow's process.

    Raises:
        CommandError: this is no workspace. MissingExtra: Prefect is not installed.
    """
    if not Path("dvc.yaml").is_file():
        raise CommandError("no dvc.yaml here: run from a workspace (ddops init DIR writes one)")
    require("prefect", "ddops run")
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "ddops.flows", *arguments.arguments])
