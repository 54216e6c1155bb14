"""The state of a training run on disk: one file, replaced atomically, sealed by a hash, loaded without running code."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from ddops.files import atomic_path, sha256_file

log = logging.getLogger(__name__)

_NO_COMMENT: Final = b"\0\0"
"""What a zip archive without a comment ends with: the comment's length."""
_HASH_LENGTH: Final = 64


@dataclass(frozen=True)
class CheckpointFile:
    """Where a run keeps its state. ``fingerprint`` stands for everything the run's result depends on:
    a checkpoint of another fingerprint belongs to another run and is not resumed."""

    path: Path
    fingerprint: str

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint; a crash or a full disk leaves the previous one.

        Raises:
            OSError: it cannot be written; naming the file.
        """
        self._remove_halves()
        with atomic_path(self.path) as temporary:
            # To a file of Python's, whose errors say why; torch's own says where in the file it was.
            with temporary.open("wb") as file:
                torch.save({"fingerprint": self.fingerprint, **state}, file)
            _seal(temporary)

    def load(self, keys: Collection[str], steps: range) -> dict[str, Any] | None:
        """The saved state; None (and a line in the log that says why) when there is none of this run, or it is damaged.

        Args:
            keys: what it must hold.
            steps: the values that its ``step`` can have.
        """
        if not self.path.exists():
            return None
        try:
            if not _is_sealed(self.path):
                raise ValueError("its contents are not those that were sealed")
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise ValueError(f"it holds a {type(state).__name__}")
            if state.pop("fingerprint", None) != self.fingerprint:
                log.info("%s belongs to a run with other settings or inputs: starting anew", self.path)
                return None
            _require(state, keys, steps)
        except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("%s is damaged (%s): starting this stage anew", self.path, reason)
            return None
        return state

    def remove(self) -> None:
        """Forget the run; called once its result is in place."""
        self.path.unlink(missing_ok=True)
        self._remove_halves()

    def _remove_halves(self) -> None:
        """Delete what a run that was killed while saving left: as large as a checkpoint each."""
        for half in self.path.parent.glob(f".{self.path.name}.*.tmp"):
            half.unlink(missing_ok=True)


def _require(state: dict[str, Any], keys: Collection[str], steps: range) -> None:
    if missing := sorted(set(keys) - state.keys()):
        raise ValueError(f"it lacks {', '.join(missing)}")
    if type(state["step"]) is not int or state["step"] not in steps:
        raise ValueError(f"its step is {state['step']}, not of {steps.start} to {steps.stop - 1}")


def _seal(path: Path) -> None:
    """Append the hash of a file that torch wrote, as the comment that a zip archive may end with.

    Raises:
        ValueError: it is no archive without a comment.
    """
    with path.open("r+b") as file:
        file.seek(-len(_NO_COMMENT), os.SEEK_END)
        if file.read() != _NO_COMMENT:
            raise ValueError(f"{path}: not the archive that torch.save writes")
        file.seek(-len(_NO_COMMENT), os.SEEK_END)
        file.write(_HASH_LENGTH.to_bytes(2, "little"))
    digest = sha256_file(path)
    with path.open("ab") as file:
        file.write(digest.encode())


def _is_sealed(path: Path) -> bool:
    digest, left = hashlib.sha256(), path.stat().st_size - _HASH_LENGTH
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            digest.update(chunk)
            left -= len(chunk)
        return file.read() == digest.hexdigest().encode()
