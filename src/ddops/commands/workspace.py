"""Where a model's weights are: a workspace that made them, or a directory that ``ddops fetch`` filled."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ddops.commands.arguments import CommandError, load_preset
from ddops.commands.fetch import FETCHED, converted_by_this, fetch_preset
from ddops.config.load import load_config
from ddops.config.stages import Config, DownloadedTeacherConfig
from ddops.stages import paths


class Workspace(NamedTuple):
    """A directory with ``params.yaml`` and ``artifacts/``."""

    root: Path
    config: Config

    @property
    def tokenizer(self) -> Path:
        return self.root / paths.TOKENIZER

    @property
    def transformer(self) -> Path:
        return self.root / paths.TRANSFORMER

    @property
    def student(self) -> Path:
        """The one that the configuration exports."""
        return self.student_of(self.config.export.student)

    def student_of(self, name: str) -> Path:
        """``dd1`` or ``dd2``."""
        return self.root / paths.STUDENTS[name]


def find_workspace(target: str, params: Path) -> Workspace:
    """The workspace that ``target``, a directory or a preset, means; a published preset is fetched if need be.

    Raises:
        CommandError: no weights of it are here, and it is not one to fetch.
        CheckpointError: fetching failed.
    """
    if (Path(target) / paths.PARAMS).is_file():
        return _existing(Path(target))
    if Path(target).is_dir():
        raise CommandError(f"{target}: holds no {paths.PARAMS}; give a workspace, what ddops fetch wrote, or a preset")
    preset = load_preset(target, params)
    if paths.PARAMS.is_file() and paths.TRANSFORMER.is_file() and load_config(paths.PARAMS).preset == target:
        return _existing(Path())
    if not isinstance(preset.config.teacher, DownloadedTeacherConfig):
        raise CommandError(f"preset {target}: not trained here yet: ddops compose preset={target} && dvc repro")
    directory = FETCHED / target
    found = load_config(directory / paths.PARAMS) if (directory / paths.PARAMS).is_file() else None
    if found != preset.config or not converted_by_this(directory):
        fetch_preset(preset, directory)
    return _existing(directory)


def _existing(root: Path) -> Workspace:
    workspace = Workspace(root, load_config(root / paths.PARAMS))
    for path in (workspace.tokenizer, workspace.transformer):
        if not path.is_file():
            raise CommandError(f"{path}: missing; run dvc repro teacher in {root.absolute()}")
    return workspace
