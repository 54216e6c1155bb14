"""``ddops stale``: what changed in the stages' code since their outputs were made. For information: recipes decide."""

from __future__ import annotations

import argparse
from itertools import takewhile
from typing import Any

from ddops import __version__
from ddops.commands.arguments import CommandError, Subparsers
from ddops.stages import paths
from ddops.workspace.code import COMMENTS, changes, read_record, record
from ddops.workspace.recipes import known_recipes


def register(commands: Subparsers) -> None:
    """Declare the arguments."""
    parser = commands.add_parser(
        "stale",
        help="what changed in the stages' code since their outputs were made",
        description="For information: a stage runs again when its data, its parameters or its recipe changes. Files "
        "of which comments alone changed are told from those of which code did.",
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="default: all")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print it by stage.

    Raises:
        CommandError: there is no such stage.
        RecipeError: a record is damaged.
    """
    known = list(known_recipes())
    if strangers := [stage for stage in arguments.stages if stage not in known]:
        raise CommandError(f"no stage {strangers[0]}; valid: {', '.join(known)}")
    for stage in arguments.stages or known:
        print("\n".join(_lines(stage)))


def stale_summary(last: str) -> dict[str, Any]:
    """By stage up to ``last``: the recipe that its output was made by, and the files whose code is another by now; None
    for one without a record.

    Raises:
        RecipeError: a record is damaged.
    """
    stages = [*takewhile(lambda stage: stage != last, known_recipes()), last]
    return {stage: _summary(stage) for stage in stages}


def _summary(stage: str) -> dict[str, Any] | None:
    recorded = read_record(paths.code_record(stage))
    if recorded is None:
        return None
    changed = changes(recorded, record(stage, __version__))
    return {"recipe": recorded["recipe"], "changed": [name for name, how in changed.items() if how != COMMENTS]}


def _lines(stage: str) -> list[str]:
    recorded = read_record(paths.code_record(stage))
    if recorded is None:
        return [
            f"{stage}: no record of its code ({paths.code_record(stage)}): it has not run yet, or by an earlier ddops"
        ]
    now = record(stage, __version__)
    recipe = f"recipe {recorded['recipe']}"
    if recorded["recipe"] != now["recipe"]:
        recipe += f", now {now['recipe']}: it runs again"
    if not recorded["files"]:
        return [f"{stage}: {recipe}; made before there were notes, and accepted"]
    changed = changes(recorded, now)
    if not changed:
        return [f"{stage}: {recipe}; nothing changed"]
    return [
        f"{stage}: {recipe}; made by ddops {recorded['ddops']}",
        *(f"  {how:<15}{name}" for name, how in changed.items()),
    ]
