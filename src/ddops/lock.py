"""A lock that dies with its holder, and says who that is: the operating system's (flock), on a file of its own."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

DIRECTORY: Final = "DDOPS_LOCK_DIR"
"""Environment variable: where the locks lie instead of beside what they guard, one directory for all who share that."""
_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class HeldError(RuntimeError):
    """Somebody else holds the lock. The message says who, since when."""


class NoLocksError(OSError):
    """The file system keeps no locks. The message names the file and what to set."""


@contextmanager
def held(path: Path, holder: str, *, wait: bool = False) -> Iterator[int]:
    """Hold the lock; gives its descriptor, which holds it too in whoever else has it open.

    Args:
        holder: who we are, for those who come in vain.
        wait: for whoever has it, however long.

    Raises:
        HeldError: somebody else has it, and we do not wait.
        NoLocksError: the file system keeps no locks (NFS without a lock daemon, Lustre without ``-o flock``).
    """
    path = _place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        _lock(file.fileno(), path, wait)
        file.truncate(0)
        json.dump({"holder": holder, "pid": os.getpid(), "since": datetime.now(UTC).isoformat("T", "seconds")}, file)
        file.flush()
        yield file.fileno()


def _place(path: Path) -> Path:
    """Where the lock lies: in ``DDOPS_LOCK_DIR``, if that is set, under a name that the path alone decides."""
    if not (directory := os.environ.get(DIRECTORY)):
        return path
    name = hashlib.sha256(str(path.absolute().resolve()).encode()).hexdigest()[:16]
    return Path(directory).expanduser() / f"{name}-{path.name}"


def _lock(descriptor: int, path: Path, wait: bool) -> None:
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise HeldError(f"{path} is held by {_holder(path)}") from None
            log.info("%s is held by %s; waiting", path, _holder(path))
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise NoLocksError(
            f"{path}: its file system keeps no locks ({os.strerror(error.errno)}); set {DIRECTORY} to a directory on a "
            "local disk, the same for all who work here, or mount it with locks (NFS: without nolock; Lustre: -o flock)"
        ) from error


def _holder(path: Path) -> str:
    try:
        entry = json.loads(path.read_text())
        return f"{entry['holder']} (process {entry['pid']}, since {entry['since']})"
    except (ValueError, KeyError, TypeError):
        return "somebody who is starting or ending"
