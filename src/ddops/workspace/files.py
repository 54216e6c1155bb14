"""The files of a workspace that ddops writes, and whether those that are there are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ddops.files import atomic_path

TEMPLATE: Final = Path(__file__).with_name("template")
PIPELINE: Final = ("dvc.yaml", "recipes.yaml", "stage.sh", "params/config.yaml")
"""What an update of ddops replaces. The rest of a workspace is its owner's once it is written."""
_DOT: Final = "dot_"
"""In place of a leading dot: Git and DVC would take such a file of the template for one of this checkout."""


class WorkspaceError(ValueError):
    """A directory that cannot become a workspace, or be brought up to date. The message says what to do."""


def template_files() -> dict[Path, Path]:
    """Every file of a workspace, relative to it, with the file of ddops that it is a copy of."""
    files = sorted(file for file in TEMPLATE.rglob("*") if file.is_file())
    return {_undotted(file.relative_to(TEMPLATE)): file for file in files}


def write_files(workspace: Path) -> None:
    """Write every file of a workspace. Again is fine: a file that is there with these bytes stays.

    Raises:
        WorkspaceError: a file is there with others. Nothing has been written then.
    """
    files = template_files()
    strangers = [name for name, file in files.items() if _differs(workspace / name, file)]
    if strangers:
        said = ", ".join(map(str, strangers))
        raise WorkspaceError(
            f"{workspace}: holds files that ddops would write ({said}). Choose another directory; a workspace of an "
            "earlier ddops is brought up to date by ddops migrate"
        )
    for name, file in files.items():
        _copy(file, workspace / name)


def outdated(workspace: Path) -> list[Path]:
    """The files of the pipeline that are missing, or not as this ddops writes them."""
    files = template_files()
    names = [Path(name) for name in PIPELINE]
    return [name for name in names if not _is_copy(workspace / name, files[name])]


def replace_pipeline(workspace: Path) -> None:
    """Write the files of the pipeline as this ddops has them, whatever is there."""
    files = template_files()
    for name in map(Path, PIPELINE):
        _copy(files[name], workspace / name)


def _undotted(name: Path) -> Path:
    return Path(*(f".{part.removeprefix(_DOT)}" if part.startswith(_DOT) else part for part in name.parts))


def _is_copy(path: Path, file: Path) -> bool:
    return path.is_file() and path.read_bytes() == file.read_bytes()


def _differs(path: Path, file: Path) -> bool:
    return path.exists() and not _is_copy(path, file)


def _copy(file: Path, target: Path) -> None:
    if _is_copy(target, file):
        return
    with atomic_path(target) as temporary:
        temporary.write_bytes(file.read_bytes())
