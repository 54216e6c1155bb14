"""``ddops init`` and ``ddops migrate``: a workspace is made, and brought up to date with this ddops."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from ddops.commands.arguments import CommandError, Subparsers
from ddops.commands.repository import dvc, git
from ddops.config.load import WORKSPACE_PARAMS, compose, write_params
from ddops.extras import require
from ddops.stages import paths
from ddops.workspace.files import outdated, replace_pipeline, write_files

LOCK = Path("dvc.lock")
OLD_DEPENDENCY = "src/"
"""Before there were recipes, stages depended on source files."""


def register(commands: Subparsers) -> None:
    """Declare the arguments."""
    making = commands.add_parser(
        "init",
        help="write a workspace: the pipeline, its parameters, Git and DVC",
        description="Write a workspace in which dvc repro, dvc exp run and ddops run work: dvc.yaml, params.yaml, "
        "recipes.yaml, a folder for your own presets, Git and DVC.",
    )
    making.add_argument("directory", type=Path, metavar="DIR")
    making.add_argument("--preset", default="digits", help="ddops presets lists them; default: digits")
    making.set_defaults(run=run_init)
    migrating = commands.add_parser(
        "migrate",
        help="bring a workspace up to date with this ddops",
        description="Write the pipeline's files (dvc.yaml, recipes.yaml, stage.sh, params/config.yaml) as this ddops "
        "has them, and say which stages will run again. Outputs, parameters and your own presets stay.",
    )
    migrating.set_defaults(run=run_migrate)


def run_init(arguments: argparse.Namespace) -> None:
    """Make the workspace. A command that was killed goes on when it is given again.

    Raises:
        WorkspaceError: files are in the way.
        ConfigError: no such preset; nothing is written.
        CommandError: Git is missing, or Git or DVC refused. MissingExtra: DVC is not installed.
    """
    directory: Path = arguments.directory
    own = directory / "params"
    values = compose(own if (own / "config.yaml").is_file() else WORKSPACE_PARAMS, [f"preset={arguments.preset}"])
    git("--version")
    require("dvc", "ddops init")
    if (directory / paths.PARAMS).exists() and not _is_preset(directory, values):
        raise CommandError(f"{directory / paths.PARAMS}: is there already; ddops compose changes a workspace's preset")
    write_files(directory)
    with _inside(directory):
        new = not _in_repository()
        if new:
            git("init", "--quiet")
        if not Path(".dvc/tmp").is_dir():
            _init_dvc()
        write_params(values, paths.PARAMS)
        committed = new and _commit()
    print(f"{directory}: a workspace of preset {arguments.preset}. Next: cd {directory} && dvc repro")
    if not committed:
        print("Commit it first: git add --all && git commit (dvc exp run needs a commit)")


def run_migrate(arguments: argparse.Namespace) -> None:
    """Replace what is not as this ddops writes it.

    Raises:
        CommandError: this is no workspace, or a file to be replaced is not committed.
        RecipeError: the workspace is of a newer ddops.
    """
    if not Path("dvc.yaml").is_file():
        raise CommandError("no dvc.yaml here: migrate a workspace from inside it; ddops init DIR makes a new one")
    before = _recipes()
    changed = outdated(Path())
    if not changed:
        print("the pipeline's files are those of this ddops: nothing to migrate")
    else:
        present = [str(name) for name in changed if name.exists()]
        if present and (dirty := git("status", "--porcelain", "--", *present)):
            raise CommandError(
                f"these would be replaced and are not committed:\n{dirty}\ncommit them, or put them away"
            )
        replace_pipeline(Path())
        print(f"written: {', '.join(map(str, changed))}; git diff shows what changed")
    raised = [f"{stage} {before[stage]} -> {now}" for stage, now in _recipes().items() if before.get(stage, now) != now]
    if raised:
        print(f"recipes: {', '.join(raised)}: dvc repro makes these stages and what follows from them anew")
    if _is_old(LOCK):
        print(
            f"{LOCK} is of before there were recipes. dvc repro would make everything anew. To keep what is here as "
            "made by the recipes of now, if no code that computes changed since: dvc commit --force"
        )


def _recipes() -> dict[str, int]:
    """The workspace's, as far as it has any; raises RecipeError where they are of a newer ddops."""
    path = Path("recipes.yaml")
    return (yaml.safe_load(path.read_text()) or {}) if path.is_file() else {}


def _is_old(lock: Path) -> bool:
    if not lock.is_file():
        return False
    stages = (yaml.safe_load(lock.read_text()) or {}).get("stages", {})
    dependencies = [entry["path"] for stage in stages.values() for entry in stage.get("deps", [])]
    return any(path.startswith(OLD_DEPENDENCY) for path in dependencies)


def _is_preset(directory: Path, values: dict[str, object]) -> bool:
    """Whether the parameters are what a command that was killed had written."""
    return bool(yaml.safe_load((directory / paths.PARAMS).read_text()) == values)


def _in_repository() -> bool:
    try:
        return bool(git("rev-parse", "--show-toplevel"))
    except CommandError:
        return False


def _init_dvc() -> None:
    """DVC's directory around the files that lie there already, which DVC would delete."""
    kept = {path: path.read_bytes() for path in Path(".dvc").rglob("*") if path.is_file()}
    at_the_top = Path(git("rev-parse", "--show-toplevel")).resolve() == Path.cwd().resolve()
    dvc("init", "--quiet", "--force", *([] if at_the_top else ["--subdir"]))
    for path, content in kept.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _commit() -> bool:
    """Whether all that is new could be committed: Git may not know who is doing it."""
    git("add", "--all")
    try:
        git("commit", "--quiet", "--message", "A ddops workspace")
    except CommandError:
        return False
    return True


@contextmanager
def _inside(directory: Path) -> Iterator[None]:
    here = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(here)
