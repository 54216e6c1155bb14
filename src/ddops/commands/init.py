"""``ddops init``: a workspace is made."""

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
from ddops.workspace.files import write_files


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
