"""Single files that an evaluation needs: a network's weights, a reference's statistics. From the hub or any other URL.

Verified as :mod:`ddops.hub.download` verifies weights: size and sha256 by ddops' manifest, or trusted on first use and
recorded in ``hub.lock.json``, where a URL's directory stands for the repository.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from huggingface_hub import constants
from huggingface_hub.file_download import http_get

from ddops.config.evaluation import RemoteFile
from ddops.hub.download import FetchedFile, HubFile, fetch, local, require_space, verify, with_retries
from ddops.hub.records import LOCK, DownloadError, HubRecords

_HUB_URL: Final = re.compile(r"hf://([\w.-]+/[\w.-]+)@([^/]+)/(.+)")
PINNED: Final = "-"
"""Stands for the revision of a URL, which has none."""


def obtain_file(config: RemoteFile, key: str, lock: Path = LOCK) -> FetchedFile:
    """The file, verified; ``key`` is where in the configuration it is named, for errors.

    Raises:
        DownloadError: it cannot be had or is another; the message says what to put where.
    """
    hub = _HUB_URL.fullmatch(config.url)
    directory, _, name = config.url.rpartition("/")
    if config.path is not None:
        repo, name = (hub[1], hub[3]) if hub else (directory, name)
        file, known = local(Path(config.path).expanduser(), name, repo), HubRecords.load(None).expected(repo, name)
        if known.sha256 not in (None, file.sha256):
            raise DownloadError(
                f"{config.path}: has sha256 {file.sha256}, the published {name} has {known.sha256}. With another "
                f"file the figures are not the protocol's: set {key}.path to a copy of {config.url}"
            )
        return file
    try:
        return fetch([HubFile(*hub.groups())], lock)[0] if hub else _fetch_url(directory, name, lock)
    except DownloadError as error:
        page = f"https://huggingface.co/{hub[1]}/resolve/{hub[2]}/{hub[3]}" if hub else config.url
        # The same class: a hub that is away may be back later.
        raise type(error)(
            f"{error}\nWithout a network: download {page} elsewhere, copy it to this machine and set {key}.path=FILE"
        ) from error


def _fetch_url(directory: str, name: str, lock: Path) -> FetchedFile:
    """From the cache, or downloaded into it; what is there of a broken download is continued."""
    records = HubRecords.load(lock)
    expected = records.expected(directory, name)
    target = Path(constants.HF_HOME) / "ddops" / re.sub(r"\W+", "-", directory) / name
    partial = target.with_name(f"{name}.ddops-partial")
    if not target.exists():
        require_space(target.parent, expected.size or 0)
        target.parent.mkdir(parents=True, exist_ok=True)
        with_retries(f"{directory}/{name}", lambda: _continue(f"{directory}/{name}", partial, expected.size))
        try:
            verify(partial, expected, f"{directory}/{name}")
        except DownloadError:
            partial.unlink()
            raise
        partial.replace(target)
    record = verify(target, expected, f"{directory}/{name}")
    records.trust(directory, PINNED, PINNED, name, record)
    records.save()
    return FetchedFile(target, record.sha256 or "", f"{directory}/{name}")


def _continue(url: str, partial: Path, size: int | None) -> None:
    if size is not None and partial.exists() and partial.stat().st_size > size:
        partial.unlink()
    with partial.open("ab") as file:
        http_get(url, file, resume_size=file.tell(), expected_size=size, displayed_filename=partial.stem)
