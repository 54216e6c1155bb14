"""What published files must be: ddops' manifest and the workspace's lock file (see :mod:`ddops.hub.download`)."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from ddops.files import read_json, write_json
from ddops.models.errors import CheckpointError, MayPassError

log = logging.getLogger(__name__)

MANIFEST: Final = Path(__file__).with_name("manifest.json")
LOCK: Final = Path("hub.lock.json")


class DownloadError(CheckpointError):
    """Published weights that cannot be had, or are not what they should be."""


class HubAwayError(DownloadError, MayPassError):
    """The hub does not answer, or not now."""


@dataclass(frozen=True)
class FileRecord:
    """What a file must be, as far as it is known."""

    size: int | None = None
    sha256: str | None = None


@with_config(ConfigDict(extra="forbid"))
class _File(TypedDict):
    size: Annotated[int, Field(ge=0)] | None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None


@with_config(ConfigDict(extra="forbid"))
class _Entry(TypedDict):
    commits: dict[str, Annotated[str, Field(pattern=r"^(-|[0-9a-f]{40})$")]]
    files: dict[str, _File]


_LOCK: Final[TypeAdapter[Any]] = TypeAdapter(dict[str, _Entry])


@dataclass
class HubRecords:
    """The manifest, and the lock file which adds to it and never contradicts it."""

    path: Path | None
    manifest: dict[str, Any]
    lock: dict[str, Any]

    @classmethod
    def load(cls, lock: Path | None) -> HubRecords:
        """The manifest with a lock file, which need not exist yet.

        Raises:
            DownloadError: the lock file is damaged.
        """
        values: dict[str, Any] = {}
        if lock is not None and lock.exists():
            values = read_json(lock, _LOCK, "restore it from Git, or delete it", DownloadError)
        return cls(lock, json.loads(MANIFEST.read_text()), values)

    def expected(self, repo: str, name: str) -> FileRecord:
        """What is known of a file."""
        ours, locked = self._file(self.manifest, repo, name), self._file(self.lock, repo, name)
        return FileRecord(**(locked | ours))

    def source(self, repo: str, name: str) -> str:
        """Which of the two says so."""
        if self._file(self.manifest, repo, name):
            return "ddops' own manifest"
        return f"{self.path}; if what it recorded was wrong, delete the file's entry there"

    def commit(self, repo: str, revision: str) -> str | None:
        """The commit that a branch or tag is pinned to, if it is."""
        commit: str | None = self.lock.get(repo, {}).get("commits", {}).get(revision)
        return commit

    def license(self, repo: str) -> str | None:
        """The licence that the repository states, if we know it."""
        text: str | None = self.manifest.get(repo, {}).get("license")
        return text

    def trust(self, repo: str, revision: str, commit: str, name: str, record: FileRecord) -> None:
        """Record what was downloaded. Says so where nothing was known to check it against."""
        entry = self.lock.setdefault(repo, {"commits": {}, "files": {}})
        if self.expected(repo, name).sha256 is None:
            log.warning(
                "%s/%s: no hash was known for it. Trusted on first use: sha256 %s is recorded in %s and checked "
                "from now on; commit that file",
                repo, name, record.sha256, self.path,
            )  # fmt: skip
        if commit != revision:
            entry["commits"][revision] = commit
        entry["files"][name] = {"size": record.size, "sha256": record.sha256}

    def save(self) -> None:
        """Write the lock file, if there is one and it changed."""
        if self.path is None:
            return
        text = {repo: self.lock[repo] for repo in sorted(self.lock)}
        if not self.path.exists() or json.loads(self.path.read_text()) != text:
            write_json(self.path, text)

    @staticmethod
    def _file(records: dict[str, Any], repo: str, name: str) -> dict[str, Any]:
        entry: dict[str, Any] = records.get(repo, {}).get("files", {}).get(name, {})
        return entry
