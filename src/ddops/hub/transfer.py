"""One file from a server to this disk: continued where it broke off, verified before it takes its place."""

from __future__ import annotations

import errno
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import httpx2
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get

from ddops.files import mistaken_for, sha256_file
from ddops.hub.content import require_content
from ddops.hub.records import DownloadError, FileRecord, HubAwayError
from ddops.lock import NoLocksError, held

log = logging.getLogger(__name__)
T = TypeVar("T")

BACKOFF_SECONDS: Final = (1, 2, 4, 8, 16)
"""Waits before trying again after an error that may pass."""
SPARE_BYTES: Final = 1 << 28
"""Disk space to leave free beside a large file; beside a smaller one as much as it takes."""
TRANSIENT_STATUS: Final = frozenset({408, 429, 500, 502, 503, 504})
_RANGE_NOT_SATISFIABLE: Final = 416


@dataclass(frozen=True)
class Wanted:
    """A file on a server, and what it must be."""

    url: str
    name: str
    """Its own name, which says what its content must look like."""
    what: str
    """The file, for people."""
    expected: FileRecord
    source: str
    """Who says what it must be, for people."""
    vouched: bool
    """The hash is known from the records; else the content is looked at before it is trusted."""
    versioned: bool
    """The place it gets stands for one content alone, so that what an earlier run left may be continued."""
    headers: Mapping[str, str] = field(default_factory=dict)


def download(wanted: Wanted, target: Path) -> None:
    """Write a file to ``target``, unless it is there by now.

    Raises:
        DownloadError: it cannot be had, or is another; nothing takes ``target``'s place.
    """
    partial = target.with_name(f"{target.name}.ddops-partial")
    with _explained_errors(wanted.what):
        target.parent.mkdir(parents=True, exist_ok=True)
        with held(partial.with_name(f"{partial.name}.lock"), f"the download of {wanted.what}", wait=True):
            if target.exists():
                return
            if not (wanted.versioned or wanted.expected.sha256):
                partial.unlink(missing_ok=True)
            _complete(wanted, partial)
            partial.replace(target)


def _complete(wanted: Wanted, partial: Path) -> None:
    """Make ``partial`` the whole file, verified; what is no part of it is started over."""
    continued = partial.exists()
    if not (continued and _is_whole(partial, wanted.expected)):
        with_retries(wanted.what, lambda: _continue(wanted, partial))
    try:
        verify(partial, wanted.expected, wanted.what, wanted.source)
        if not wanted.vouched:
            require_content(partial, wanted.name, wanted.what)
    except DownloadError as error:
        partial.unlink()
        if not continued:
            raise
        log.warning("%s\nStarting over, without the part that an earlier run left", error)
        _complete(wanted, partial)


def _is_whole(partial: Path, expected: FileRecord) -> bool:
    """Whether an earlier run was killed when only the last step was missing."""
    if expected.sha256 is None or expected.size not in (None, partial.stat().st_size):
        return False
    return sha256_file(partial) == expected.sha256


def _continue(wanted: Wanted, partial: Path) -> None:
    """Download what ``partial`` lacks, with a progress bar."""
    size = wanted.expected.size
    if size is not None and partial.exists() and partial.stat().st_size > size:
        partial.unlink()

    def get(resume_size: int) -> None:
        headers = dict(wanted.headers)
        http_get(
            wanted.url,
            file,
            resume_size=resume_size,
            headers=headers,
            expected_size=size,
            displayed_filename=wanted.name,
        )

    with partial.open("ab") as file:
        try:
            get(file.tell())
        except HfHubHTTPError as error:
            # Nothing is left to send: all of it is here or none of it can be used, and the server won't say which.
            if error.response is None or error.response.status_code != _RANGE_NOT_SATISFIABLE:
                raise
            file.truncate(0)
            get(0)


def require_space(directory: Path, needed: int) -> None:
    """Raises:
    DownloadError: the file system that ``directory`` is on, or will be, has not so many bytes to spare.
    """
    existing = next(parent for parent in (directory.absolute(), *directory.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    spare = min(SPARE_BYTES, needed)
    if needed and free < needed + spare:
        raise DownloadError(
            f"{directory}: {needed / 1e6:.1f} MB are needed and {spare / 1e6:.1f} MB to spare, {free / 1e6:.1f} MB "
            "are free; make room, or set HF_HOME to a directory on a larger disk"
        )


def verify(path: Path, expected: FileRecord, name: str, source: str) -> FileRecord:
    """Size and hash of a file.

    Raises:
        DownloadError: they are not the expected ones, which ``source`` states.
    """
    size = path.stat().st_size
    if expected.size is not None and size != expected.size:
        raise DownloadError(f"{name}: has {size} bytes instead of {expected.size} ({source}): {path}. {_way_out(path)}")
    sha256 = sha256_file(path)
    if expected.sha256 is not None and sha256 != expected.sha256:
        raise DownloadError(
            f"{name}: has sha256 {sha256}, expected {expected.sha256} ({source}): {path}. {_way_out(path)}"
        )
    return FileRecord(size, sha256)


def _way_out(path: Path) -> str:
    if found := mistaken_for(path):
        return f"It is {found}; delete it, look at HF_ENDPOINT, and fetch again"
    return "Delete it and fetch again"


@contextmanager
def _explained_errors(what: str) -> Iterator[None]:
    """The file system's errors in plain words, as :func:`with_retries` gives the network's."""
    try:
        yield
    except NoLocksError as error:
        raise DownloadError(f"{what}: {error}") from error
    except OSError as error:
        raise DownloadError(f"{what}: {explained(error)}") from error


def with_retries(what: str, action: Callable[[], T]) -> T:
    """``action()``, again after errors that may pass, later and later.

    Raises:
        DownloadError: an error that stays, in plain words; a HubAwayError if it may still pass.
    """
    for attempt in range(len(BACKOFF_SECONDS) + 1):
        try:
            return action()
        except (HfHubHTTPError, httpx2.HTTPError, OfflineModeIsEnabled, OSError) as error:
            if not _may_pass(error):
                raise DownloadError(f"{what}: {explained(error)}") from error
            if attempt == len(BACKOFF_SECONDS):
                raise HubAwayError(f"{what}: {explained(error)}") from error
            delay = BACKOFF_SECONDS[attempt]
            log.warning("%s: %s; trying again in %d s", what, explained(error), delay)
            time.sleep(delay)
    raise AssertionError("unreachable")


def _may_pass(error: Exception) -> bool:
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, LocalEntryNotFoundError):  # the client's wrapping of what it met on the way to the hub
        return isinstance(error.__cause__, Exception) and _may_pass(error.__cause__)
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in TRANSIENT_STATUS
    if isinstance(error, httpx2.HTTPError):
        return True
    # What the client raises for a body that ended early is a plain OSError without a number.
    return isinstance(error, OSError) and error.errno is None


def explained(error: Exception) -> str:
    """What an error on the way means, and what to do about it."""
    if isinstance(error, OfflineModeIsEnabled):
        return "not in the cache, and HF_HUB_OFFLINE forbids asking; unset it, or set download.path to a local copy"
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision in the repository; look at download.revision and hub.lock.json"
    if isinstance(error, EntryNotFoundError):
        return "there is no such file in the repository at this revision; look at the name under download"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository, or not without logging in (hf auth login, or HF_TOKEN)"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        login = ": log in (hf auth login, or HF_TOKEN)" if error.response.status_code in (401, 403) else ""
        return f"the hub answered {error.response.status_code}{login}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; make room or set HF_HOME elsewhere, then fetch again: it goes on from here"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{error.filename}: cannot be written or read ({error.strerror}); set HF_HOME to a directory of your own"
    if isinstance(error, httpx2.TransportError):
        return f"the connection failed ({type(error).__name__}: {error}); fetch again: it goes on from here"
    if "Consistency check failed" in str(error):
        return "the download ended early; fetch again: it goes on from here"
    return f"{type(error).__name__}: {error}"
