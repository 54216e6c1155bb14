"""A command on a leash: it ends, with everything it started, when the holder of the leash lets go.

    holder's process  --- a pipe --->  this file as a program  --->  the command  --->  whatever that starts

The pipe closes when the holder says so (timeout, cancellation) and also when the holder dies, be it by SIGKILL:
the operating system closes it. So there is one way to end a stage, and no way to leave it running alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

GRACE_SECONDS = 10.0
"""From asking a command to end (SIGTERM) to making it (SIGKILL)."""
POLL_SECONDS = 0.1
PR_SET_CHILD_SUBREAPER = 36
LINE_ENDS = "\n", "\r"


class Leash:
    """A running command, its two output streams as one. A context manager: leaving it ends the command.

    Args:
        output: where they go: to :meth:`lines` (a pipe), or a file, or None for where this process' own go.
        keep_open: descriptors that stay open in the program that holds the command, such as a lock: it is then held
            until the last of the command's processes is gone, however the holder ended.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        grace: float = GRACE_SECONDS,
        output: int | IO[bytes] | None = subprocess.PIPE,
        keep_open: Sequence[int] = (),
    ) -> None:
        self._grace = grace
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(grace), *command],
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            pass_fds=keep_open,
            start_new_session=True,
        )

    def __enter__(self) -> Leash:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def lines(self, timeout: float) -> Iterator[str]:
        """The output as it comes, in pieces that keep their end: a newline, or the carriage return of a progress bar.

        Raises:
            TimeoutError: it has not ended within ``timeout`` seconds.
        """
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout
        rest = ""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while True:
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"not done after {timeout:g} s")
                if not selector.select(timeout=min(1.0, max(0.0, deadline - time.monotonic()))):
                    continue
                chunk = os.read(self.process.stdout.fileno(), 1 << 16)
                if not chunk:
                    break
                *complete, rest = _split(rest + chunk.decode(errors="replace"))
                yield from complete
        if rest:
            yield rest

    def wait(self) -> int:
        """The command's exit code, 128 + n if signal n ended it; call it after the last line."""
        code = self.process.wait()
        return 128 - code if code < 0 else code

    def end(self) -> None:
        """End the command and everything it started; does nothing if that is done already."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(self._grace + 5)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Where the program itself was killed, its session is still there.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            if self.process.stdout is not None:
                self.process.stdout.close()


def _split(text: str) -> list[str]:
    pieces, start = [], 0
    for position, character in enumerate(text):
        if character in LINE_ENDS:
            pieces.append(text[start : position + 1])
            start = position + 1
    return [*pieces, text[start:]]


def main(arguments: Sequence[str]) -> int:
    """Run a command until it ends, or until standard input does."""
    grace, command = float(arguments[0]), list(arguments[1:])
    _adopt_orphans()
    told_to_end = False

    def on_signal(number: int, frame: object) -> None:
        nonlocal told_to_end
        told_to_end = True

    # Handlers, not SIG_IGN: the command would inherit that.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, on_signal)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        while child.poll() is None and not told_to_end:
            told_to_end = bool(selector.select(timeout=POLL_SECONDS)) and not os.read(0, 1)
    code = child.poll()
    end_descendants(grace)
    if code is None:
        return 128 + signal.SIGTERM
    return 128 - code if code < 0 else code


def end_descendants(grace: float) -> None:
    """SIGTERM to every descendant, SIGKILL to those that are there ``grace`` seconds later."""
    family = psutil.Process().children(recursive=True)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(family, timeout=grace)
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=1)


def _adopt_orphans() -> None:
    """Linux: a process whose parent ends becomes a child of this one, not of init, and so stays a descendant."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
