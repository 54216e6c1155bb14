"""``ddops fetch``: a preset's published weights, verified and converted, without running the pipeline."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Final

from ddops.commands.arguments import CommandError, Preset, Subparsers, add_preset, load_preset
from ddops.config.load import write_params
from ddops.config.stages import DownloadedTeacherConfig, ReleasedDD1Config
from ddops.files import write_json
from ddops.workspace.recipes import recipe

FETCHED: Final = Path(".ddops/fetched")
"""A directory a preset. Each is laid out as a workspace is: params.yaml, artifacts/teacher, artifacts/dd1."""
CONVERTED_BY: Final = "fetched.json"
"""There beside params.yaml: the recipes that the published files were converted by."""


def register(commands: Subparsers) -> None:
    """Declare the arguments."""
    parser = commands.add_parser(
        "fetch",
        help="download, verify and convert a preset's published weights",
        description="Fetch the weights of a published preset: `ddops fetch var_d16`. HF_ENDPOINT, HF_HOME, HF_TOKEN "
        "and HF_HUB_OFFLINE are respected; teacher.download.path=DIR takes files that are here already.",
    )
    add_preset(parser)
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"default: {FETCHED}/<preset>")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Fetch and say where it is."""
    preset = load_preset(arguments.preset, arguments.params, arguments.overrides)
    directory = fetch_preset(preset, arguments.output or FETCHED / arguments.preset)
    print(f"{directory}: {arguments.preset}. To look at it: ddops sample {directory} --classes 207 --grid out.png")


def fetch_preset(preset: Preset, directory: Path) -> Path:
    """Write the weights and the configuration under ``directory``.

    Raises:
        CommandError: the preset trains its teacher.
        CheckpointError: see :mod:`ddops.hub.acquire`.
    """
    from ddops.hub.acquire import acquire_student, acquire_teacher
    from ddops.stages import paths

    teacher, dd1 = preset.config.teacher, preset.config.dd1
    if not isinstance(teacher, DownloadedTeacherConfig):
        raise CommandError(
            f"preset {preset.config.preset} has nothing to fetch, its teacher is trained: "
            f"ddops compose preset={preset.config.preset} && dvc repro"
        )
    if not converted_by_this(directory):
        for path in (paths.TOKENIZER, paths.TRANSFORMER, paths.DD1_STUDENT):
            (directory / path).unlink(missing_ok=True)
    acquire_teacher(teacher, directory / paths.TOKENIZER, directory / paths.TRANSFORMER)
    if isinstance(dd1, ReleasedDD1Config):
        acquire_student(dd1, teacher.model, directory / paths.DD1_STUDENT)
    write_params(preset.values, directory / paths.PARAMS)
    write_json(directory / CONVERTED_BY, conversion())
    return directory


def converted_by_this(directory: Path) -> bool:
    """Whether what lies in ``directory`` was converted as this ddops does it."""
    record = directory / CONVERTED_BY
    return record.is_file() and json.loads(record.read_text()) == conversion()


def conversion() -> dict[str, int]:
    """The recipes that this ddops converts published files by: those of the stages that do so in a pipeline."""
    return {stage: recipe(stage) for stage in ("teacher", "distill_dd1")}
