"""What Git says of a directory: its commit, or why it names none; a file of another commit. Reads only."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

PATIENCE: Final = 10.0
"""Seconds."""
REFUSAL: Final = "detected dubious ownership"
NO_REPOSITORY: Final = "not a git repository"
NO_REVISION: Final = "Needed a single revision"
"""Git's words, in the C locale."""


class GitError(RuntimeError):
    """Git could not do what it was asked; the message is its own, or says why there is none."""


class NoCommitError(GitError):
    """Git names no commit; the message says why, and the way out where there is one. For people and for records."""


def head(directory: Path) -> str:
    """The commit that is checked out around ``directory``, 40 or 64 hex digits.

    Raises:
        NoCommitError: not a repository, one without a commit, Git is not installed, or it refuses to read this one (as
            it does in a container whose user does not own the files).
    """
    try:
        return ask(directory, "rev-parse", "--verify", "HEAD").strip()
    except GitError as error:
        raise NoCommitError(_reason(str(error))) from None


def ask(directory: Path, *arguments: str) -> str:
    """What a Git command prints, run in ``directory``; raises :class:`GitError`."""
    command = ["git", "-C", str(directory), *arguments]
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except FileNotFoundError:
        raise GitError("git is not installed") from None
    except subprocess.TimeoutExpired:
        raise GitError(f"git gave no answer within {PATIENCE:g} s") from None
    if result.returncode:
        raise GitError(result.stderr.strip() or f"git {' '.join(arguments)} exited with {result.returncode}")
    return result.stdout


def file_at(directory: Path, revision: str, path: Path) -> str | None:
    """The text of a file, its path relative to ``directory``, as a revision has it; None where that has none.

    Raises:
        GitError: there is no such revision.
    """
    if not ask(directory, "ls-tree", "--name-only", revision, "--", str(path)):
        return None
    return ask(directory, "show", f"{revision}:./{path}")


def _reason(said: str) -> str:
    if REFUSAL in said:
        # Git ends with the command that lets it read the directory, by the path that it means.
        cure = said.splitlines()[-1].strip()
        return f"unknown: git refuses to read a repository that another user owns; to allow it: {cure}"
    if NO_REPOSITORY in said:
        return "not in a Git repository"
    if NO_REVISION in said:
        return "no commit yet"
    return f"unknown: {' '.join(said.split())}"
