"""Git, DVC and GTO as a user would call them: commands, so that what they do can be seen and repeated by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ddops.commands.arguments import CommandError
from ddops.extras import require

STAGE: Final = "production"
"""GTO's name for where a version is in use."""
_PUT_AWAY: Final = ("deleted", "not in cache")
"""DVC's words."""


def git(*arguments: str) -> str:
    """Output of a Git command; raises CommandError with what Git said."""
    return _run(["git", *arguments])


def dvc(*arguments: str) -> str:
    """Output of a DVC command; raises CommandError, or MissingExtra."""
    require("dvc", "DVC's side of this")
    return _run([sys.executable, "-m", "dvc", *arguments])


def user() -> str:
    """Git's user.name; raises CommandError where it is not set."""
    try:
        return git("config", "user.name")
    except CommandError:
        raise CommandError("who is doing this? Set git config user.name, or pass --by NAME") from None


def require_tools() -> None:
    """Raises CommandError or MissingExtra where Git, DVC or GTO is missing: before anything is written."""
    git("rev-parse", "--show-toplevel")
    dvc("root")
    _gto("--version")


def require_committed(paths: Sequence[Path]) -> None:
    """Raises:
    CommandError: no Git repository, or something that says where the model is from is not committed.
    """
    # Without a path, Git would speak of all there are.
    if paths and (changed := git("status", "--porcelain", "--", *map(str, paths))):
        raise CommandError(
            f"not committed:\n{changed}\nA version names the commit it is from: git add, git commit, then promote again"
        )


def is_recorded(registry: Path, preset: str, version: str, steps: int) -> bool:
    """Whether the registry is committed as it is, and its last step tagged.

    Args:
        version: of the preset, the one that the last step led to.
        steps: the registry's that led to a version of this preset. GTO numbers the preset's tags, not the project's: a
            return to the version that was its last one looks as before, but for the number.
    """
    if git("status", "--porcelain", "--", str(registry)):
        return False
    registered = git("tag", "--list", f"{preset}@{version}")
    numbers = [int(tag.rpartition("#")[2]) for tag in git("tag", "--list", f"{preset}#{STAGE}#*").split()]
    if not registered or not numbers or max(numbers) < steps:
        return False
    # GTO puts both tags on the version's own commit.
    return git("rev-list", "-1", f"{preset}#{STAGE}#{max(numbers)}") == git("rev-list", "-1", registered)


def stale_stages(target: str) -> dict[str, list[str]]:
    """By stage of those that lead to ``target``, it included: what is not as in its last run. A result that was put
    away, here or in DVC's cache, is none of that.

    Raises:
        CommandError: there is no such stage.
    """
    stale: dict[str, list[str]] = {}
    for stage, entries in json.loads(dvc("status", "--json", "--with-deps", target)).items():
        for entry in entries:
            # {"changed deps": {path: state}}, or the bare words "changed command".
            changed = entry if isinstance(entry, dict) else {entry: {entry: "modified"}}
            names = [name for states in changed.values() for name, state in states.items() if state not in _PUT_AWAY]
            if names:
                stale.setdefault(stage, []).extend(names)
    return stale


def commit_changed(files: Sequence[Path], message: str) -> None:
    """Commit those of these files that changed, and nothing else.

    Raises:
        CommandError: Git refused.
    """
    git("add", "--", *map(str, files))
    if git("status", "--porcelain", "--", *map(str, files)):
        git("commit", "--quiet", "--message", message, "--", *map(str, files))


def commit_and_tag(files: Sequence[Path], message: str, preset: str, version: str, *, new: bool) -> None:
    """Commit these files and nothing else, and tag the commit: a new version, and its being in production. What an
    earlier call did of it stays as it is.

    Raises:
        CommandError: Git or GTO refused.
    """
    git("add", "--", *map(str, files))
    if git("status", "--porcelain", "--", *map(str, files)):
        git("commit", "--quiet", "--message", message, "--", *map(str, files))
    if new and not git("tag", "--list", f"{preset}@{version}"):
        _gto("register", preset, "--version", version, "--message", message)
    # --force: a version that was in production before is assigned once more.
    _gto("assign", preset, "--version", version, "--stage", STAGE, "--message", message, "--force")


def _gto(*arguments: str) -> str:
    require("gto", "a version's tag")
    return _run([sys.executable, "-m", "gto.cli", *arguments])


def _run(command: Sequence[str]) -> str:
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise CommandError(f"{command[0]}: not installed") from None
    if result.returncode:
        said = (result.stderr or result.stdout).strip()
        raise CommandError(f"{' '.join(command[-6:])}: {said or f'exit code {result.returncode}'}")
    return result.stdout.strip()
