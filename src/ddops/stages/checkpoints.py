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


def checkpoint_file(name: str, settings: Iterable[Any], inputs: Iterable[Path] = ()) -> CheckpointFile:
    """The checkpoint of a training run that depends on ``settings`` (plain values, configs) and input files."""
    described = [plain(value) for value in settings]
    hashes = [sha256_file(path) for path in inputs]
    versions = {"torch": torch.__version__}
    return CheckpointFile(paths.STATE / f"{name}.pt", sha256_json([name, described, hashes, versions]))
