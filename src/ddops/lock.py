"""A lock that dies with its holder, and says who that is: the operating system's (flock), on a file of its own."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path


class HeldError(RuntimeError):
    """Somebody else holds the lock. The message says who, since when."""


@contextmanager
def held(path: Path, holder: str) -> Iterator[int]:
    """Hold the lock, without waiting; gives its descriptor, which holds it too in whoever else has it open.

    Args:
        holder: who we are, for those who come in vain.

    Raises:
        HeldError: somebody else has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HeldError(f"{path} is held by {_holder(path)}") from None
        file.truncate(0)
        json.dump({"holder": holder, "pid": os.getpid(), "since": datetime.now(UTC).isoformat("T", "seconds")}, file)
        file.flush()
        yield file.fileno()


def _holder(path: Path) -> str:
    try:
        entry = json.loads(path.read_text())
        return f"{entry['holder']} (process {entry['pid']}, since {entry['since']})"
    except ValueError:
        return "somebody who is starting or ending"
