"""The state of a training run on disk: one file, replaced atomically, loaded without running code."""

from __future__ import annotations

import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddops.files import atomic_path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointFile:
    """Where a run keeps its state. ``fingerprint`` stands for everything the run's result depends on:
    a checkpoint of another fingerprint belongs to another run and is not resumed."""

    path: Path
    fingerprint: str

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint; a crash leaves the previous one."""
        self._remove_halves()
        with atomic_path(self.path) as temporary:
            torch.save({"fingerprint": self.fingerprint, **state}, temporary)

    def load(self) -> dict[str, Any] | None:
        """The saved state; None (and a line in the log that says why) when there is none of this run."""
        if not self.path.exists():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("%s is damaged (%s): starting this stage anew", self.path, reason)
            return None
        if not isinstance(state, dict) or state.pop("fingerprint", None) != self.fingerprint:
            log.info("%s belongs to a run with other settings or inputs: starting anew", self.path)
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
