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

import glob
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from ddops.files import mistaken_for, sha256_file, write_text
from ddops.hub.content import require_content
from ddops.hub.records import DownloadError, FileRecord, HubRecords
from ddops.hub.transfer import Wanted, download, require_space, verify, with_retries

log = logging.getLogger(__name__)

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
        path = item.cached or _download(item, records)
        repo, name = item.file.repo, item.file.name
        record = verify(path, item.expected, str(item.file), records.source(repo, name))
        if records.expected(repo, name).sha256 is None:
            require_content(path, name, str(item.file))
        records.trust(repo, item.file.revision, item.commit, name, record)
        fetched.append(FetchedFile(path, record.sha256 or "", f"{repo}@{item.commit}/{name}"))
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
    if found := mistaken_for(file):
        raise DownloadError(f"{file}: is {found}; put the file itself there")
    sha256 = sha256_file(file)
    known = HubRecords.load(None).expected(repo, name).sha256
    if known not in (None, sha256):
        log.warning("%s: is not the published %s (sha256 %s, published %s)", file, name, sha256, known)
    return FetchedFile(file, sha256, f"local file {file.name}")


def _locate(file: HubFile, records: HubRecords) -> _Located:
    """Where a file is, asking the hub only if the cache cannot say. Nothing is downloaded."""
    expected = records.expected(file.repo, file.name)
    pinned = file.revision if _COMMIT.fullmatch(file.revision) else records.commit(file.repo, file.revision)
    cached = _cached(file, pinned or file.revision)
    if cached is None and constants.is_offline_mode() and not pinned:
        cached = _only_one(file)
    if cached and (constants.is_offline_mode() or (pinned and expected.sha256)):
        # In a cache, the directory of a file's snapshot is its commit.
        return _Located(file, pinned or _snapshot_commit(cached, file.name), expected, cached)
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
    # Whoever shares the cache may have it by that commit.
    return _Located(file, metadata.commit_hash, known, _cached(file, metadata.commit_hash), metadata.etag)


def _cached(file: HubFile, revision: str) -> Path | None:
    """The file at a revision in the hub's cache."""
    found = try_to_load_from_cache(file.repo, file.name, cache_dir=_cache(), revision=revision)
    return Path(found) if isinstance(found, str) else None


def _only_one(file: HubFile) -> Path | None:
    """The file in the cache when nobody can say which commit the revision is, if there is no choice.

    Raises:
        DownloadError: it is there, and which of them is meant cannot be known.
    """
    found = sorted((_storage(file) / "snapshots").glob(f"*/{glob.escape(file.name)}"))
    if not found:
        return None
    commits = [_snapshot_commit(path, file.name) for path in found]
    if len(found) > 1 or file.revision != constants.DEFAULT_REVISION:
        raise DownloadError(
            f"{file}: the cache has it at {', '.join(commits)}, and does not say which of them {file.revision} is; "
            "set download.revision to the commit that is meant, or unset HF_HUB_OFFLINE once"
        )
    log.warning(
        "%s: HF_HUB_OFFLINE forbids asking which commit that is; taking the cache's only one, %s", file, *commits
    )
    return found[0]


def _refuse_other(file: HubFile, expected: FileRecord, stated: FileRecord, records: HubRecords) -> None:
    """Before any byte is downloaded: what the hub says it has must be what is known."""
    for what in ("size", "sha256"):
        known, now = getattr(expected, what), getattr(stated, what)
        if known is not None and now is not None and known != now:
            raise DownloadError(
                f"{file}: the file on the hub changed: its {what} is {now}, expected {known} "
                f"({records.source(file.repo, file.name)}). Nothing was downloaded"
            )


def _download(item: _Located, records: HubRecords) -> Path:
    """Into the hub's cache; a partial file of an earlier run is continued. Verified before the cache takes it."""
    file = item.file
    known = records.expected(file.repo, file.name).sha256 is not None
    wanted = Wanted(
        hf_hub_url(file.repo, file.name, revision=item.commit, endpoint=_endpoint()),
        file.name,
        str(file),
        item.expected,
        records.source(file.repo, file.name) if known else "the hub says so",
        vouched=known,
        versioned=True,
        headers=build_hf_headers(),
    )
    blob = _storage(file) / "blobs" / item.etag
    if not blob.exists():
        download(wanted, blob)
    path = Path(with_retries(str(file), lambda: _link(item)))
    if file.revision != item.commit:
        # For whoever shares the cache and may not ask.
        write_text(_storage(file) / "refs" / file.revision, item.commit)
    return path


def _link(item: _Located) -> str:
    """The file's path in the cache's snapshot of its commit; its blob is there already."""
    return hf_hub_download(
        item.file.repo, item.file.name, revision=item.commit, cache_dir=_cache(), endpoint=_endpoint()
    )


def _storage(file: HubFile) -> Path:
    """The repository's directory in the cache."""
    return _cache() / repo_folder_name(repo_id=file.repo, repo_type="model")


def _snapshot_commit(path: Path, name: str) -> str:
    return path.parents[len(Path(name).parts) - 1].name


def _endpoint() -> str:
    # Not the client's constant alone, which is read once when it is imported.
    return os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")


def _cache() -> Path:
    return Path(constants.HF_HUB_CACHE)
