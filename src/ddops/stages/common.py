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

import ddops
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
from ddops.workspace.code import record
from ddops.workspace.recipes import RecipeError, require_recipe

Stage = Callable[..., object]


class StageError(RuntimeError):
    """A stage that cannot go on. The message says what to do; no traceback is shown."""


class ModelRefusedError(StageError):
    """The gate said no. The pipeline worked; the model is not good enough."""


EXIT_REFUSED = 3
EXIT_TRY_AGAIN = 75
"""Exit codes of a stage, for whoever runs the pipeline: refused by the gate; trouble that may pass (as EX_TEMPFAIL in
sysexits.h). Any other failure that was explained is 1."""

OWN_CODE = Path("src/ddops/__init__.py")
"""There in a workspace that is a checkout of ddops."""

EXPECTED_ERRORS = (
    *(ConfigError, CaptionError, CheckpointError, MetricError, RegistryError, DatasetError, ReportError, RecipeError),
    *(StageError, TrainingDiverged, Collapsed, LaunchError, ReplicaLost, MissingExtra, OSError),
)


def sections(stage: Stage) -> tuple[str, ...]:
    """The sections of ``params.yaml`` a stage reads: the names of its parameters. ``dvc.yaml`` must list the same."""
    return tuple(inspect.signature(stage).parameters)


def stage_name(stage: Stage) -> str:
    """Its file's name: run with `python -m`, the module's own is ``__main__``."""
    return Path(inspect.getfile(stage)).stem


def run_stage(stage: Stage, *, trains: str | None = None) -> None:
    """Call ``stage`` with its sections of ``params.yaml``; on a known error print it and exit with its code.

    ``trains`` names the section whose trainings the stage runs: their processes may be torchrun's, see
    :mod:`ddops.stages.launch`.
    """
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s", stream=sys.stderr)
    for noisy in ("dvc", "dvclive", "httpx", "onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    name = stage_name(stage)
    try:
        require_recipe(name)
        require_own_code(name)
        config = load_config(paths.PARAMS)
        processes = launch.processes_wanted(getattr(config, trains) if trains else None)
        if processes:
            raise SystemExit(launch.torchrun(f"ddops.stages.{name}", processes))
        if first:
            write_json(paths.code_record(name), record(name, ddops.__version__))
        stage(**{section: getattr(config, section) for section in sections(stage)})
        require_unchanged(stage, config)
        require_recipe(name)
    except EXPECTED_ERRORS as error:
        print(f"\n{name}: {error}", file=sys.stderr)
        raise SystemExit(exit_code(error)) from None


def require_unchanged(stage: Stage, config: Config) -> None:
    """What the stage has read must still be there when it ends: DVC records what is there by then.

    Raises:
        StageError: sections of ``params.yaml`` are others than when it began.
        ConfigError: ``params.yaml`` is not valid any more.
    """
    now = load_config(paths.PARAMS)
    changed = [name for name in sections(stage) if getattr(now, name) != getattr(config, name)]
    if changed:
        raise StageError(
            f"{paths.PARAMS}: {', '.join(changed)} changed while the stage ran, so its results are those of other "
            "settings. Nothing was recorded; run it again"
        )


def require_own_code(stage: str) -> None:
    """In a checkout of ddops, see to it that its own code runs: whoever reads the commit takes it for what ran.

    Raises:
        StageError: the ddops that runs is another.
    """
    own, running = OWN_CODE.resolve(), Path(ddops.__file__).resolve()
    if own.is_file() and own != running:
        raise StageError(
            f"this is a checkout of ddops, and the ddops that runs is another one, in {running.parent}: the output "
            f"would be recorded as made by code that did not make it. Run sh stage.sh {stage}, as dvc repro does"
        )


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
