"""``ddops migrate``: a workspace is brought up to date with the ddops that is installed."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from ddops.commands.arguments import CommandError, Subparsers
from ddops.commands.repository import git
from ddops.files import write_json
from ddops.stages import paths
from ddops.workspace.code import accepted
from ddops.workspace.files import outdated, replace_pipeline
from ddops.workspace.recipes import RECIPES, RecipeError, known_recipes, read_recipes

PIPELINE: Final = Path("dvc.yaml")
LOCK: Final = Path("dvc.lock")
OLD_DEPENDENCY: Final = "src/"
"""Before there were recipes, stages depended on source files."""


def register(commands: Subparsers) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "migrate",
        help="bring a workspace up to date with this ddops",
        description="Write the pipeline's files (dvc.yaml, recipes.yaml, stage.sh, params/config.yaml) as this ddops "
        "has them, and say which stages will run again. Outputs, parameters and your own presets stay.",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Replace what is not as this ddops writes it.

    Raises:
        CommandError: this is no workspace, or a file to be replaced is not committed.
        RecipeError: the workspace is of a newer ddops.
    """
    if not PIPELINE.is_file():
        raise CommandError(f"no {PIPELINE} here: migrate a workspace from inside it; ddops init DIR makes a new one")
    before = _recipes_before()
    if changed := outdated(Path()):
        _require_committed([name for name in changed if name.exists()])
        replace_pipeline(Path())
        print(f"written: {', '.join(map(str, changed))}; git diff shows what changed")
    else:
        print("the pipeline's files are those of this ddops: nothing to migrate")
    raised = [
        f"{stage} {before[stage]} -> {now}" for stage, now in known_recipes().items() if before.get(stage, now) < now
    ]
    if raised:
        print(f"recipes: {', '.join(raised)}: dvc repro makes these stages and what follows from them anew")
    if kept := _accept(_locked()):
        print(
            f"{LOCK} is of before there were recipes, so dvc repro would make everything anew. If what lies here was "
            f"made as this ddops would make it, keep it:\n  dvc commit --force {' '.join(kept)}"
        )


def _recipes_before() -> dict[str, int]:
    """The workspace's, as far as they can be read."""
    try:
        before = read_recipes()
    except RecipeError:
        return {}
    known = known_recipes()
    if newer := [stage for stage, number in before.items() if number > known.get(stage, 0)]:
        raise RecipeError(f"{RECIPES}: {newer[0]} is {before[newer[0]]}, of a newer ddops than this: update ddops")
    return before


def _require_committed(files: list[Path]) -> None:
    if files and (dirty := git("status", "--porcelain", "--", *map(str, files))):
        raise CommandError(f"to be replaced, and not committed:\n{dirty}\ncommit these files, or put them away")


def _locked() -> dict[str, Any]:
    """By stage: its entry in the lock file."""
    return (yaml.safe_load(LOCK.read_text()) or {}).get("stages", {}) if LOCK.is_file() else {}


def _accept(locked: Mapping[str, Any]) -> list[str]:
    """The stages whose entries are of before there were recipes and whose outputs are all here. In place of a note on
    the code that made them, one that says that there is none: DVC wants every output to be there."""
    declared = yaml.safe_load(PIPELINE.read_text())["stages"]
    kept = []
    for stage, entry in locked.items():
        is_old = any(dependency["path"].startswith(OLD_DEPENDENCY) for dependency in entry.get("deps", []))
        note = paths.code_record(stage)
        if is_old and stage in declared and all(out.exists() for out in _outputs(declared[stage]) if out != note):
            write_json(note, accepted(stage))
            kept.append(stage)
    return kept


def _outputs(stage: Mapping[str, Any]) -> list[Path]:
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])]
    return [Path(next(iter(entry)) if isinstance(entry, dict) else entry) for entry in entries]
