"""The workspace of a run: one run at a time, and the parameters it asked for."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ddops.config.load import ConfigError, compose, write_params
from ddops.lock import HeldError, held
from ddops.stages import paths

LOCK = Path(".ddops/run.lock")
WORKER_PID = "DDOPS_WORKER_PID"
"""Names the process that must be the parent of a run (set by ``ddops.flows.worker``)."""


class WorkspaceBusyError(RuntimeError):
    """Another run works in this workspace. The message says which."""


@contextmanager
def locked(workspace: Path, holder: str, patience: float, tell: Callable[[str], None]) -> Iterator[int]:
    """Hold the workspace's lock; gives its descriptor, for whoever works on after this process (see ``Leash``).

    The lock is the operating system's (flock): it is free as soon as nobody who has the descriptor lives.

    Args:
        holder: who we are, for those who wait.
        patience: seconds to wait for another run.
        tell: called once, with who holds the lock, if we wait.

    Raises:
        WorkspaceBusyError: still held after ``patience`` seconds.
    """
    with ExitStack() as stack:
        yield _acquire(stack, workspace / LOCK, holder, patience, tell)


def _acquire(stack: ExitStack, path: Path, holder: str, patience: float, tell: Callable[[str], None]) -> int:
    deadline = time.monotonic() + patience
    told = False
    while True:
        try:
            return stack.enter_context(held(path, holder))
        except HeldError as error:
            busy = str(error)
        if time.monotonic() >= deadline:
            raise WorkspaceBusyError(f"{busy}; waited {patience:g} s. Wait for it, or cancel it")
        if not told:
            tell(f"{busy}; waiting up to {patience:g} s")
            told = True
        time.sleep(0.5)


def compose_parameters(
    workspace: Path, preset: str, seed: int | None, trajectories: int | None, overrides: Sequence[str]
) -> dict[str, Any]:
    """The configuration that a run asks for; nothing is written.

    Raises:
        ConfigError: it is not a valid one; the message names the key and what would be valid.
    """
    named = [f"preset={preset}"]
    if seed is not None:
        named.append(f"seed={seed}")
    if trajectories is not None:
        named.append(f"trajectories.count={trajectories}")
    for override in overrides:
        if re.match(r"[+~]*preset\b(?!/)", override):
            raise ConfigError(f"overrides: {override}: the preset is a parameter of its own")
    return compose(workspace / "params", [*named, *overrides])


def write_parameters(workspace: Path, values: dict[str, Any]) -> None:
    """Make them the workspace's ``params.yaml``."""
    write_params(values, workspace / paths.PARAMS)


def end_with_the_worker() -> None:
    """End this process, as if by SIGTERM, when the worker that started it is gone (killed, say).

    Prefect's worker starts each run in a session of its own, so nothing else would.
    """
    worker = int(os.environ.get(WORKER_PID, os.getppid()))

    def watch() -> None:
        while os.getppid() == worker:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch-worker", daemon=True).start()
