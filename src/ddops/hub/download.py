"""Published weights from the Hugging Face hub: found in its cache or downloaded, and verified before they are read.

What a file must be is known from two places. ``manifest.json``, part of ddops, lists the published files with
their licences and, where we know them, sizes and hashes. ``hub.lock.json``, in the workspace and to be committed,
records the rest at the first download: the commit that a branch stood for, and each file's size and sha256 as the hub
states them. That first time they are taken on trust, and it is said so; ever after they are checked.

The bytes go through the hub's own client, into the hub's own cache (``HF_ENDPOINT``, ``HF_HOME`` and
``HF_HUB_OFFLINE`` hold). Only the partial file is ours: the client deletes its own when a process dies, and begins
again at the first byte.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import httpx2
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]

from ddops.files import looks_like_html, sha256_file
from ddops.hub.records import DownloadError, FileRecord, HubAwayError, HubRecords

log = logging.getLogger(__name__)
T = TypeVar("T")

BACKOFF_SECONDS: Final = (1, 2, 4, 8, 16)
"""Waits before trying again after an error that may pass."""
SPARE_BYTES: Final = 1 << 28
"""Disk space to leave free."""
TRANSIENT_STATUS: Final = frozenset({408, 429, 500, 502, 503, 504})
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at a revision (branch, tag or commit)."""

    repo: str
    revision: str
    name: str

    def __str__(self) -> str:
        return f"{self.repo}/{self.name} ({self.revision})"


@dataclass(frozen=True)
class FetchedFile:
    """A verified file on this machine."""

    path: Path
    sha256: str
    origin: str
    """Where it came from, for people."""


@dataclass(frozen=True)
class _Located:
    """A file about to be fetched: its commit, what it must be, and where it is already or will be."""

    file: HubFile
    commit: str
    expected: FileRecord
    cached: Path | None
    etag: str = ""


def fetch(files: Sequence[HubFile], lock: Path) -> list[FetchedFile]:
    """The files, from the cache where they are there, each of the right size and hash.

    Raises:
        DownloadError: naming the file, what is wrong and what to do about it.
    """
    records = HubRecords.load(lock)
    located = [_locate(file, records) for file in files]
    require_space(_cache(), sum(item.expected.size or 0 for item in located if item.cached is None))
    fetched = []
    for item in located:
        path = item.cached or _download(item)
        record = verify(path, item.expected, str(item.file))
        records.trust(item.file.repo, item.file.revision, item.commit, item.file.name, record)
        origin = f"{item.file.repo}@{item.commit}/{item.file.name}"
        fetched.append(FetchedFile(path, record.sha256 or "", origin))
        records.save()
    return fetched


def local(path: Path, name: str, repo: str) -> FetchedFile:
    """A published file that is on this machine already: ``path`` itself, or in the directory ``path``.

    A hash that differs from the one known for ``name`` is said and not refused: the path was chosen on purpose.

    Raises:
        DownloadError: it is not there.
    """
    candidates = [path / name, path / Path(name).name] if path.is_dir() else [path]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise DownloadError(f"{path}: holds no {name}; download.path is a directory with that file, or the file itself")
    sha256 = sha256_file(file)
    known = HubRecords.load(None).expected(repo, name).sha256
    if known not in (None, sha256):
        log.warning("%s: is not the published %s (sha256 %s, published %s)", file, name, sha256, known)
    return FetchedFile(file, sha256, f"local file {file.name}")


def require_space(directory: Path, needed: int) -> None:
    """Raises:
    DownloadError: the file system that ``directory`` is on, or will be, has not so many bytes to spare.
    """
    existing = next(parent for parent in (directory.absolute(), *directory.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed and free < needed + SPARE_BYTES:
        raise DownloadError(
            f"{directory}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; make room, "
            "or set HF_HOME to a directory on a larger disk"
        )


def verify(path: Path, expected: FileRecord, name: str) -> FileRecord:
    """Size and hash of a file.

    Raises:
        DownloadError: they are not the expected ones.
    """
    size = path.stat().st_size
    if expected.size is not None and size != expected.size:
        raise DownloadError(f"{name}: has {size} bytes instead of {expected.size}: {path}. {_way_out(path)}")
    sha256 = sha256_file(path)
    if expected.sha256 is not None and sha256 != expected.sha256:
        raise DownloadError(f"{name}: has sha256 {sha256}, expected {expected.sha256}: {path}. {_way_out(path)}")
    return FileRecord(size, sha256)


def _way_out(path: Path) -> str:
    if looks_like_html(path):
        return "It is an HTML page (of a proxy or a login?); delete it, look at HF_ENDPOINT, and fetch again"
    return "Delete it and fetch again"


def _locate(file: HubFile, records: HubRecords) -> _Located:
    """Where a file is, asking the hub only if the cache cannot say. Nothing is downloaded."""
    expected = records.expected(file.repo, file.name)
    pinned = file.revision if _COMMIT.fullmatch(file.revision) else records.commit(file.repo, file.revision)
    cached = try_to_load_from_cache(file.repo, file.name, cache_dir=_cache(), revision=pinned or file.revision)
    if isinstance(cached, str) and (constants.is_offline_mode() or (pinned and expected.sha256)):
        # In a cache, the directory of a file's snapshot is its commit.
        return _Located(file, pinned or _snapshot_commit(Path(cached), file.name), expected, Path(cached))
    url = hf_hub_url(file.repo, file.name, revision=pinned or file.revision, endpoint=_endpoint())
    metadata = with_retries(str(file), lambda: get_hf_file_metadata(url, endpoint=_endpoint()))
    if metadata.commit_hash is None or metadata.etag is None:
        raise DownloadError(f"{file}: {url} was not answered by a Hugging Face hub; check HF_ENDPOINT and the proxy")
    if pinned and metadata.commit_hash != pinned:
        raise DownloadError(
            f"{file}: the revision changed: the hub answers with commit {metadata.commit_hash}, pinned is {pinned}; "
            f"if that is intended, delete the repository's entry in {records.path}"
        )
    stated = FileRecord(metadata.size, metadata.etag if _SHA256.fullmatch(metadata.etag) else None)
    _refuse_other(file, expected, stated, records)
    known = FileRecord(expected.size or stated.size, expected.sha256 or stated.sha256)
    return _Located(file, metadata.commit_hash, known, None, metadata.etag)


def _refuse_other(file: HubFile, expected: FileRecord, stated: FileRecord, records: HubRecords) -> None:
    """Before any byte is downloaded: what the hub says it has must be what is known."""
    for what in ("size", "sha256"):
        known, now = getattr(expected, what), getattr(stated, what)
        if known is not None and now is not None and known != now:
            raise DownloadError(
                f"{file}: the file on the hub changed: its {what} is {now}, expected {known} "
                f"({records.source(file.repo, file.name)}). Nothing was downloaded"
            )


def _download(item: _Located) -> Path:
    """Into the hub's cache; a partial file of an earlier run is continued. Verified before the cache takes it."""
    storage = _cache() / repo_folder_name(repo_id=item.file.repo, repo_type="model")
    blob = storage / "blobs" / item.etag
    partial = blob.with_name(f"{item.etag}.ddops-partial")
    blob.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(partial.with_name(f"{partial.name}.lock")):
        if not blob.exists():
            with_retries(str(item.file), lambda: _continue(item, partial))
            try:
                verify(partial, item.expected, str(item.file))
            except DownloadError:
                partial.unlink()
                raise
            partial.replace(blob)
    return Path(with_retries(str(item.file), lambda: _link(item)))


def _continue(item: _Located, partial: Path) -> None:
    """Download what ``partial`` lacks, with a progress bar."""
    if item.expected.size is not None and partial.exists() and partial.stat().st_size > item.expected.size:
        partial.unlink()
    url = hf_hub_url(item.file.repo, item.file.name, revision=item.commit, endpoint=_endpoint())
    with partial.open("ab") as file:
        http_get(
            url,
            file,
            resume_size=file.tell(),
            headers=build_hf_headers(),
            expected_size=item.expected.size,
            displayed_filename=item.file.name,
        )


def _link(item: _Located) -> str:
    """The file's path in the cache's snapshot of its commit; its blob is there already."""
    return hf_hub_download(
        item.file.repo, item.file.name, revision=item.commit, cache_dir=_cache(), endpoint=_endpoint()
    )


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
                raise DownloadError(f"{what}: {_explained(error)}") from error
            if attempt == len(BACKOFF_SECONDS):
                raise HubAwayError(f"{what}: {_explained(error)}") from error
            delay = BACKOFF_SECONDS[attempt]
            log.warning("%s: %s; trying again in %d s", what, _explained(error), delay)
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


def _explained(error: Exception) -> str:
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
    if isinstance(error, httpx2.TransportError):
        return f"the connection failed ({type(error).__name__}: {error}); fetch again: it goes on from here"
    if "Consistency check failed" in str(error):
        return "the download ended early; fetch again: it goes on from here"
    return f"{type(error).__name__}: {error}"


def _snapshot_commit(path: Path, name: str) -> str:
    return path.parents[len(Path(name).parts) - 1].name


def _endpoint() -> str:
    # Not the client's constant alone, which is read once when it is imported.
    return os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")


def _cache() -> Path:
    return Path(constants.HF_HUB_CACHE)
