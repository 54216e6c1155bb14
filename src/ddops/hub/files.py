"""Single files that an evaluation needs: a network's weights, a reference's statistics. From the hub or any other URL.

Verified as :mod:`ddops.hub.download` verifies weights: size and sha256 by ddops' manifest, or trusted on first use and
recorded in ``hub.lock.json``, where a URL's directory stands for the repository.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Final

from huggingface_hub import constants

from ddops.config.evaluation import RemoteFile
from ddops.hub.content import require_content
from ddops.hub.download import FetchedFile, HubFile, fetch, local
from ddops.hub.records import LOCK, DownloadError, HubRecords
from ddops.hub.transfer import Wanted, download, require_space, verify

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
    expected, source = records.expected(directory, name), records.source(directory, name)
    url, known = f"{directory}/{name}", expected.sha256 is not None
    target = _place(directory) / name
    if not target.exists():
        require_space(target.parent, expected.size or 0)
        download(Wanted(url, name, url, expected, source, vouched=known, versioned=False), target)
    record = verify(target, expected, url, source)
    if not known:
        require_content(target, name, url)
    records.trust(directory, PINNED, PINNED, name, record)
    records.save()
    return FetchedFile(target, record.sha256 or "", url)


def _place(directory: str) -> Path:
    """A directory of the cache for a URL's: the readable name alone would be the same for ``a-b`` and ``a/b``."""
    digest = hashlib.sha256(directory.encode()).hexdigest()[:8]
    return Path(constants.HF_HOME) / "ddops" / "-".join([*re.findall(r"\w+", directory), digest])
