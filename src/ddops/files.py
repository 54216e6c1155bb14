"""Atomic writes, readers that say what is damaged, and content hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

_OS_ERROR: Final = re.compile(r"\(os error (\d+)\)")
_DISK_ERRORS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_MARKUP: Final = re.compile(rb"<(!doctype|!--|\?xml|(html|head|body|script|meta|title|error)\b)")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary neighbour of ``path`` to write to; it takes ``path``'s place only when the block succeeds.

    Raises:
        OSError: it cannot be written; naming the file. So does another library's error where that is the cause.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        # A full disk does not say which file it had no room for.
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        if number := _disk_error(error):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _disk_error(error: BaseException | None) -> int | None:
    """The number of the disk's error that made a library fail with one of its own: raised in the course of handling it
    (as torch does), or only quoting it (as safetensors does)."""
    while error is not None:
        quoted = _OS_ERROR.search(str(error))
        number = error.errno if isinstance(error, OSError) else int(quoted[1]) if quoted else None
        if number in _DISK_ERRORS:
            return number
        error = error.__cause__ or error.__context__
    return None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, with a stable layout (no NaN: it is not JSON)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


class DamagedError(ValueError):
    """A file that is not what was written there. The message names the file, what is wrong and the way out."""


def read_json(path: Path, shape: TypeAdapter[T], way_out: str, error: Callable[[str], Exception] = DamagedError) -> T:
    """What :func:`write_json` wrote, if it has the ``shape`` that its reader goes by; keys beside that are kept.

    Args:
        way_out: what to do where it has not, for people.
        error: made of the message and raised.

    Raises:
        FileNotFoundError: there is no such file.
    """
    try:
        value: T = json.loads(path.read_bytes())
        shape.validate_python(value, strict=True)
    except ValidationError as wrong:
        first = wrong.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its contents"
        raise error(f"{path}: damaged ({where}: {first['msg']}); {way_out}") from wrong
    except (ValueError, RecursionError) as wrong:
        raise error(f"{path}: damaged ({wrong}); {way_out}") from wrong
    return value


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def mistaken_for(path: Path) -> str | None:
    """What a file is that a server or a clone left in the place of another; None where nothing says so."""
    with path.open("rb") as file:
        start = file.read(512)
    # Without byte order marks and the zeros of UTF-16.
    text = start.removeprefix(b"\xef\xbb\xbf").removeprefix(b"\xff\xfe").replace(b"\0", b"").lstrip().lower()
    if not start:
        return "empty"
    if _MARKUP.match(text):
        return "an XML message" if text.startswith(b"<?xml") or text.startswith(b"<error") else "an HTML page"
    if text.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer, not the file it points to (git lfs pull fetches that)"
    return None
