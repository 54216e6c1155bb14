"""``ddops fetch``: a preset's published weights, verified and converted, without running the pipeline."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from ddops.commands.arguments import CommandError, Preset, Subparsers, add_preset, load_preset
from ddops.config.load import write_params
from ddops.config.stages import DownloadedTeacherConfig, ReleasedDD1Config

FETCHED: Final = Path(".ddops/fetched")
"""A directory a preset. Each is laid out as a workspace is: params.yaml, artifacts/teacher, artifacts/dd1."""


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
    acquire_teacher(teacher, directory / paths.TOKENIZER, directory / paths.TRANSFORMER)
    if isinstance(dd1, ReleasedDD1Config):
        acquire_student(dd1, teacher.model, directory / paths.DD1_STUDENT)
    write_params(preset.values, directory / paths.PARAMS)
    return directory
