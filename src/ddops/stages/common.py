"""What every stage's command line does: read its sections of the configuration, run, and fail in plain words.

Loads no torch, so that the stages which only read figures start at once.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from ddops.captions.errors import CaptionError
from ddops.config.base import plain
from ddops.config.dd2 import ARDiffusionConfig, DD2Config
from ddops.config.load import ConfigError, load_config
from ddops.config.models import SamplingConfig
from ddops.config.stages import Config, DD1Config, TrajectoriesConfig
from ddops.evaluation.errors import MetricError
from ddops.extras import MissingExtra
from ddops.files import sha256_json, write_json
from ddops.models.errors import CheckpointError, MayPassError
from ddops.production import RegistryError
from ddops.reports import ReportError
from ddops.stages import launch, paths
from ddops.training.errors import Collapsed, LaunchError, ReplicaLost, TrainingDiverged
from ddops.trajectories.errors import DatasetError

Stage = Callable[..., object]


class StageError(RuntimeError):
    """A stage that cannot go on. The message says what to do; no traceback is shown."""


class ModelRefusedError(StageError):
    """The gate said no. The pipeline worked; the model is not good enough."""


EXIT_REFUSED = 3
EXIT_TRY_AGAIN = 75
"""Exit codes of a stage, for whoever runs the pipeline: refused by the gate; trouble that may pass (as EX_TEMPFAIL in
sysexits.h). Any other failure that was explained is 1."""

EXPECTED_ERRORS = (
    *(ConfigError, CaptionError, CheckpointError, MetricError, RegistryError, DatasetError),
    *(ReportError, StageError, TrainingDiverged, Collapsed, LaunchError, ReplicaLost, MissingExtra, OSError),
)


def sections(stage: Stage) -> tuple[str, ...]:
    """The sections of ``params.yaml`` a stage reads: the names of its parameters. ``dvc.yaml`` must list the same."""
    return tuple(inspect.signature(stage).parameters)


def run_stage(stage: Stage, *, trains: str | None = None) -> None:
    """Call ``stage`` with its sections of ``params.yaml``; on a known error print it and exit with its code.

    ``trains`` names the section whose trainings the stage runs: their processes may be torchrun's, see
    :mod:`ddops.stages.launch`.
    """
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s", stream=sys.stderr)
    for noisy in ("dvc", "dvclive", "httpx", "onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        config = load_config(paths.PARAMS)
        processes = launch.processes_wanted(getattr(config, trains) if trains else None)
        if processes:
            raise SystemExit(launch.torchrun(f"ddops.stages.{Path(inspect.getfile(stage)).stem}", processes))
        recipe = _recipe(stage)
        stage(**{name: getattr(config, name) for name in sections(stage)})
        require_unchanged(stage, config, recipe)
    except EXPECTED_ERRORS as error:
        # The file's name: run with `python -m`, the module's own is "__main__".
        print(f"\n{Path(inspect.getfile(stage)).stem}: {error}", file=sys.stderr)
        raise SystemExit(exit_code(error)) from None


def require_unchanged(stage: Stage, config: Config, recipe: Any) -> None:
    """What the stage has read must still be there when it ends: DVC records what is there by then.

    Raises:
        StageError: sections of ``params.yaml``, or the stage's recipe, are others than when it began.
        ConfigError: ``params.yaml`` is not valid any more.
    """
    now = load_config(paths.PARAMS)
    changed = [f"{paths.PARAMS}: {name}" for name in sections(stage) if getattr(now, name) != getattr(config, name)]
    if _recipe(stage) != recipe:
        changed.append(f"{paths.RECIPES}: {_name(stage)}")
    if changed:
        raise StageError(
            f"changed while the stage ran, so that its results are those of other settings: {', '.join(changed)}. "
            f"Nothing was recorded; run dvc repro {_name(stage)} again"
        )


def _recipe(stage: Stage) -> Any:
    """What ``recipes.yaml`` says of a stage; None where it says nothing, as outside a pipeline."""
    if not paths.RECIPES.exists():
        return None
    try:
        return yaml.safe_load(paths.RECIPES.read_text(encoding="utf-8")).get(_name(stage))
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise StageError(f"{paths.RECIPES}: not readable ({error}); restore it from Git") from error


def _name(stage: Stage) -> str:
    return Path(inspect.getfile(stage)).stem


def exit_code(error: Exception) -> int:
    """What kind of failure an expected error is."""
    if isinstance(error, ModelRefusedError):
        return EXIT_REFUSED
    return EXIT_TRY_AGAIN if isinstance(error, MayPassError | ReplicaLost) else 1


def drawing_sha256(
    sampling: SamplingConfig,
    trajectories: TrajectoriesConfig,
    dd1: DD1Config,
    ar_diffusion: ARDiffusionConfig,
    dd2: DD2Config,
) -> str:
    """Hash of all that a row's images follow from besides the weights: figures of other settings are stale."""
    return sha256_json([plain(section) for section in (sampling, trajectories, dd1, ar_diffusion, dd2)])


def drawing_of(config: Config) -> str:
    """The same of a whole configuration."""
    return drawing_sha256(**{name: getattr(config, name) for name in sections(drawing_sha256)})


def write_not_trained(stage: str, directories: Iterable[Path]) -> None:
    """The outputs of a stage that the preset leaves out: directories that say so."""
    for directory in directories:
        write_json(directory / "origin.json", {"trained": False, "reason": f"{stage}.source is none"})


def require(path: Path, stage: str) -> Path:
    """``path``, which an earlier stage makes.

    Raises:
        StageError: it is not there.
    """
    if not path.exists():
        raise StageError(f"{path} is missing: it is made by the stage {stage} (dvc repro {stage})")
    return path
