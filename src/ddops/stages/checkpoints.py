"""Where a stage that trains keeps its state, and what that state belongs to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ddops.config.base import plain
from ddops.files import sha256_file, sha256_json
from ddops.stages import paths
from ddops.training.checkpoint import CheckpointFile
from ddops.workspace.recipes import recipe


def checkpoint_file(stage: str, name: str, settings: Iterable[Any], inputs: Iterable[Path] = ()) -> CheckpointFile:
    """The checkpoint of a training run of ``stage``, whose recipe it depends on, on ``settings`` (plain values,
    configs) and on input files."""
    described = [plain(value) for value in settings]
    hashes = [sha256_file(path) for path in inputs]
    versions = {"torch": torch.__version__}
    return CheckpointFile(
        paths.STATE / f"{name}.pt", sha256_json([stage, recipe(stage), name, described, hashes, versions])
    )
