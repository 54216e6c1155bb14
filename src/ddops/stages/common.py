"""What every stage's command line does: read its sections of the configuration, run, and fail in plain words."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from ddops.config.load import ConfigError, load_config
from ddops.files import sha256_file, sha256_json
from ddops.models.errors import CheckpointError
from ddops.stages import paths
from ddops.training.checkpoint import CheckpointFile
from ddops.training.loop import TrainingDiverged
from ddops.trajectories.shards import DatasetError

Stage = Callable[..., None]


class StageError(RuntimeError):
    """A stage that cannot go on. The message says what to do; no traceback is shown."""


def inception_not_built(what: str) -> StageError:
    """The refusal of a stage that would need the published protocols' judge. Never the digits judge instead."""
    return StageError(
        f"{what}: the Inception features of the published protocols are not built yet, so no figure can be "
        "computed; only the digits presets are judged. To look at images: ddops sample <preset>"
    )


EXPECTED_ERRORS = (ConfigError, CheckpointError, DatasetError, StageError, TrainingDiverged, OSError)


def sections(stage: Stage) -> tuple[str, ...]:
    """The sections of ``params.yaml`` a stage reads: the names of its parameters. ``dvc.yaml`` must list the same."""
    return tuple(inspect.signature(stage).parameters)


def run_stage(stage: Stage) -> None:
    """Call ``stage`` with its sections of ``params.yaml``; on a known error print it and exit with 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("dvc", "dvclive", "httpx", "onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        config = load_config(paths.PARAMS)
        stage(**{name: getattr(config, name) for name in sections(stage)})
    except EXPECTED_ERRORS as error:
        # The file's name: run with `python -m`, the module's own is "__main__".
        print(f"\n{Path(inspect.getfile(stage)).stem}: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def require(path: Path, stage: str) -> Path:
    """``path``, which an earlier stage makes.

    Raises:
        StageError: it is not there.
    """
    if not path.exists():
        raise StageError(f"{path} is missing: it is made by the stage {stage} (dvc repro {stage})")
    return path


def checkpoint_file(name: str, settings: Iterable[Any], inputs: Iterable[Path] = ()) -> CheckpointFile:
    """The checkpoint of a training run that depends on ``settings`` (plain values, configs) and input files."""
    described = [_plain(value) for value in settings]
    hashes = [sha256_file(path) for path in inputs]
    versions = {"torch": torch.__version__}
    return CheckpointFile(paths.STATE / f"{name}.pt", sha256_json([name, described, hashes, versions]))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return TypeAdapter(type(value)).dump_python(value, mode="json")
    return value
