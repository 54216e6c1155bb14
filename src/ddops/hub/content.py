"""Whether a file may be what its name says: looked at before a hash that nobody vouched for is trusted."""

from __future__ import annotations

import gzip
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from ddops.files import mistaken_for
from ddops.hub.records import DownloadError

_ERROR_KEYS: Final = frozenset({"error", "errors", "message", "detail", "status", "code", "documentation_url"})
"""What servers answer with instead of a file holds little else."""
_LONGEST_MESSAGE: Final = 1 << 16


def require_content(path: Path, name: str, what: str) -> None:
    """Look at the bytes in ``path``, which are to be the file ``name``.

    Raises:
        DownloadError: they are something else (a page, a pointer, a message), or not all of it. ``what`` names the
            file in it.
    """
    if problem := content_problem(path, name):
        raise DownloadError(
            f"{what}: what was received is {problem}. It is not trusted; look at the address, the proxy and the "
            f"login, and fetch again ({path})"
        )


def content_problem(path: Path, name: str) -> str | None:
    """Why the bytes in ``path`` cannot be a file called ``name``; None where they may be."""
    kind = Path(name).suffix.lower()
    found = mistaken_for(path)
    if found is not None and kind not in (".html", ".xml", ".svg"):
        return found
    if _is_message(path):
        return "a server's message in JSON"
    check = _CHECKS.get(kind)
    try:
        return check(path) if check else None
    except (OSError, ValueError, EOFError, LookupError, zlib.error, struct.error, zipfile.BadZipFile) as error:
        return f"no {kind} file, or cut short ({str(error) or type(error).__name__})"


def _is_message(path: Path) -> bool:
    if path.stat().st_size > _LONGEST_MESSAGE:
        return False
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "error" in {key.rstrip("s") for key in value} | (
        {"error"} if value and value.keys() <= _ERROR_KEYS else set()
    )


def _json(path: Path) -> None:
    json.loads(path.read_bytes())


def _safetensors(path: Path) -> str | None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            return "no .safetensors file, or cut short in its header"
        header: dict[str, Any] = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    whole = 8 + length + max(ends, default=0)
    return None if whole == size else f"a .safetensors file of {whole} bytes, of which {size} are here"


def _zip(path: Path) -> None:
    # The directory is at the end and names where each member begins, so opening them all finds what is cut or shifted.
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            archive.open(member).close()


def _pickled(path: Path) -> str | None:
    """PyTorch's files: a zip archive; before version 1.6 a row of pickles, and long ago a tar archive."""
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK":
        _zip(path)
    elif not (start[:1] == b"\x80" and start[1] <= 5) and not tarfile.is_tarfile(path):
        return "no PyTorch file"
    return None


def _npy(path: Path) -> None:
    np.load(path, mmap_mode="r", allow_pickle=False)


def _gzip(path: Path) -> None:
    with gzip.open(path) as file:
        while file.read(1 << 20):
            pass


def _parquet(path: Path) -> str | None:
    content = path.read_bytes()
    return None if content[:4] == content[-4:] == b"PAR1" else "no .parquet file, or cut short"


_CHECKS: Final[Mapping[str, Callable[[Path], str | None]]] = {
    ".json": _json,
    ".safetensors": _safetensors,
    **dict.fromkeys((".npz", ".zip"), _zip),
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), _pickled),
    ".npy": _npy,
    **dict.fromkeys((".gz", ".tgz"), _gzip),
    ".parquet": _parquet,
}
