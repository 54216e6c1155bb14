"""Published teachers and students: fetched, verified and written as our weight files."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from ddops.config.captions import PublishedEncoderConfig
from ddops.config.models import ModelConfig
from ddops.config.stages import DownloadedTeacherConfig, DownloadSource, PublishedFile, ReleasedDD1Config
from ddops.files import write_json
from ddops.hub.download import FetchedFile, HubFile, fetch, local
from ddops.hub.records import LOCK, DownloadError
from ddops.hub.transfer import require_space
from ddops.models.published import convert_published, converted_from
from ddops.models.weights import STUDENT, TOKENIZER, TRANSFORMER

log = logging.getLogger(__name__)


def acquire_teacher(
    config: DownloadedTeacherConfig, tokenizer: Path, transformer: Path, lock: Path = LOCK
) -> list[FetchedFile]:
    """Write a published teacher's two files; what they were made of.

    Raises:
        CheckpointError: see :mod:`ddops.hub.download` and :mod:`ddops.models.published`.
    """
    source = config.download
    files = _obtain(source, [source.tokenizer, source.transformer], lock)
    _convert(files[0], source.tokenizer, config.model, TOKENIZER, tokenizer)
    _convert(files[1], source.transformer, config.model, TRANSFORMER, transformer)
    return files


def acquire_student(
    config: ReleasedDD1Config, model: ModelConfig, student: Path, lock: Path = LOCK
) -> list[FetchedFile]:
    """Write a released student of the teacher ``model``; what it was made of. Raises as :func:`acquire_teacher`."""
    files = _obtain(config.download, [config.download.student], lock)
    _convert(files[0], config.download.student, model, STUDENT, student)
    return files


def obtain_directory(config: PublishedEncoderConfig, lock: Path = LOCK) -> tuple[Path, list[FetchedFile]]:
    """A published encoder's files, side by side in one directory. Raises as :func:`acquire_teacher`."""
    if config.path is not None:
        directory = Path(config.path).expanduser()
        return directory, [local(directory, name, config.repo) for name in config.files]
    files = fetch([HubFile(config.repo, config.revision, name) for name in config.files], lock)
    # In the hub's cache, files of a commit lie in a directory of its own.
    return files[0].path.parents[len(Path(config.files[0]).parts) - 1], files


def write_origin(directories: Iterable[Path], files: Iterable[FetchedFile]) -> None:
    """In place of the curves of what was not trained here: where it came from."""
    origin = [{"origin": file.origin, "sha256": file.sha256} for file in files]
    for directory in directories:
        write_json(directory / "origin.json", {"trained": False, "files": origin})


def _obtain(source: DownloadSource, files: Sequence[PublishedFile], lock: Path) -> list[FetchedFile]:
    if source.path is None:
        return fetch([HubFile(source.repo, source.revision, file.name) for file in files], lock)
    path = Path(source.path).expanduser()
    if not path.is_dir() and len(files) > 1:
        raise DownloadError(f"{path}: download.path must be a directory that holds {', '.join(f.name for f in files)}")
    return [local(path, file.name, source.repo) for file in files]


def _convert(fetched: FetchedFile, file: PublishedFile, config: ModelConfig, kind: str, target: Path) -> None:
    if converted_from(target, config, kind) == fetched.sha256:
        log.info("%s: is there already, from %s", target, fetched.origin)
        return
    require_space(target.parent, fetched.path.stat().st_size)
    extra = {"source": fetched.origin, "source_sha256": fetched.sha256}
    convert_published(fetched.path, file.layout, config, kind, target, extra)
    log.info("%s: the %s from %s", target, kind, fetched.origin)
