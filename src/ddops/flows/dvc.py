"""DVC as a child process: the graph of stages, and one stage after another, with what became of it.

Nothing here knows of Prefect.
"""

from __future__ import annotations

import graphlib
import json
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from ddops.flows.leash import Leash
from ddops.flows.progress import parse_bar, unglued
from ddops.stages.common import EXIT_REFUSED, EXIT_TRY_AGAIN

DASK = "DDOPS_DASK"
"""Address of a Dask scheduler, or ``local``."""
DEFAULT_TIMEOUT = 24 * 3600.0
TAIL_LINES = 12
EDGE = re.compile(r'^"([^"]+)" -> "([^"]+)";$', re.MULTILINE)
NODE = re.compile(r'^"([^"]+)";$', re.MULTILINE)
EXITED = re.compile(r"failed to run: .*, exited with (-?\d+)$")
DVC_IS_BUSY = re.compile(r"Unable to acquire lock|is busy, it is being blocked by")
CHATTER = re.compile(
    r"^(To track the changes|\s+git add|To enable auto|\s+dvc config|Use `dvc push`|Having any troubles)"
)
"""What DVC says to people at a terminal after every stage."""


class DvcError(RuntimeError):
    """DVC could not do what it was asked; the message is its own."""


@dataclass(frozen=True)
class Stage:
    """A stage of ``dvc.yaml``. ``timeout`` (seconds) and ``device`` are from its ``meta``."""

    name: str
    needs: tuple[str, ...]
    timeout: float = DEFAULT_TIMEOUT
    device: str = "gpu"


class Outcome(Enum):
    """What became of a command."""

    RAN = "ran"
    UP_TO_DATE = "up to date"
    RESTORED = "restored from the run cache"
    FAILED = "failed"
    REFUSED = "refused"
    TRY_AGAIN = "failed, may pass"
    TIMED_OUT = "timed out"
    KILLED = "killed"


@dataclass(frozen=True)
class Result:
    """A command's outcome, and for people: how long it took, and its last lines if it did not end well."""

    outcome: Outcome
    seconds: float
    message: str


def stages(workspace: Path, target: str | None = None) -> list[Stage]:
    """The stages that lead to ``target`` (all of them if None), each after those it needs.

    Raises:
        DvcError: ``dvc.yaml`` is not valid, or has no such target.
    """
    graph = ask(["dag", "--dot", *([target] if target else [])], workspace)
    declared = yaml.safe_load((workspace / "dvc.yaml").read_text())["stages"]
    # What is tracked by a file of its own, as a production model is, is a node too.
    needs: dict[str, list[str]] = {name: [] for name in NODE.findall(graph) if name in declared}
    for before, after in EDGE.findall(graph):
        if before in needs and after in needs:
            needs[after].append(before)
    # The order of the file where the graph leaves it open.
    ordered = graphlib.TopologicalSorter({name: needs[name] for name in sorted(needs, key=list(declared).index)})
    return [_stage(name, needs[name], declared[name].get("meta") or {}) for name in ordered.static_order()]


def _stage(name: str, needs: Sequence[str], meta: Mapping[str, Any]) -> Stage:
    timeout = meta.get("timeout", DEFAULT_TIMEOUT)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout <= 0:
        raise DvcError(f"dvc.yaml: {name}.meta.timeout: seconds, above 0, got {timeout!r}")
    device = meta.get("device", "gpu")
    if device not in ("cpu", "gpu"):
        raise DvcError(f"dvc.yaml: {name}.meta.device: no device named {device!r}; valid: cpu, gpu")
    return Stage(name, tuple(needs), float(timeout), device)


def reproduce(
    stage: Stage, workspace: Path, forward: Callable[[str], None], *, force: bool = False, lock: int | None = None
) -> Result:
    """Run one stage if DVC finds it out of date, passing on its output in pieces (see :meth:`Leash.lines`)."""
    arguments = ["repro", "--single-item", *(["--force"] if force else []), stage.name]
    return run(arguments, workspace, forward, timeout=stage.timeout, lock=lock)


def run(
    arguments: Sequence[str],
    workspace: Path,
    forward: Callable[[str], None],
    *,
    timeout: float = DEFAULT_TIMEOUT,
    lock: int | None = None,
) -> Result:
    """One DVC command on a leash, with all its output passed on."""
    return run_command(_command(arguments), workspace, environment(), forward, timeout=timeout, lock=lock)


def run_command(
    command: Sequence[str],
    workspace: Path,
    env: Mapping[str, str],
    forward: Callable[[str], None],
    *,
    timeout: float = DEFAULT_TIMEOUT,
    lock: int | None = None,
) -> Result:
    """Any command on a leash; what DVC prints is understood."""
    began = time.monotonic()
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    code: int | None = None
    skipped = restored = busy = timed_out = False
    keep_open = () if lock is None else (lock,)
    with Leash(command, cwd=workspace, env=env, keep_open=keep_open) as leash:
        try:
            for piece in (part for output in leash.lines(timeout) for part in unglued(output)):
                line = piece.rstrip()
                if not line or CHATTER.match(piece):
                    continue
                forward(piece)
                if parse_bar(piece):
                    continue
                tail.append(line)
                skipped |= line.startswith("Stage '") and line.endswith("didn't change, skipping")
                restored |= line.startswith("Stage '") and "is cached - skipping run" in line
                busy |= bool(DVC_IS_BUSY.search(line))
                if found := EXITED.search(line):
                    code = int(found[1])
        except TimeoutError:
            timed_out = True
        else:
            exit_code = leash.wait()
    seconds = time.monotonic() - began
    if timed_out:
        return Result(Outcome.TIMED_OUT, seconds, _told(f"not done after {timeout:g} s, so it was ended", tail))
    if exit_code == 0:
        outcome = Outcome.RESTORED if restored else Outcome.UP_TO_DATE if skipped else Outcome.RAN
        return Result(outcome, seconds, outcome.value)
    outcome = Outcome.TRY_AGAIN if busy else outcome_of(exit_code if code is None else code)
    return Result(outcome, seconds, _told(_ending(exit_code if code is None else code), tail))


def is_up_to_date(stage: Stage, workspace: Path) -> bool:
    """Whether DVC would skip the stage.

    Raises:
        DvcError: see :func:`ask`.
    """
    return not json.loads(ask(["status", "--json", stage.name], workspace))


def outcome_of(code: int) -> Outcome:
    """What an exit code other than 0 means; negative, or above 128, if a signal ended the process."""
    if code < 0 or 128 < code < 192:
        return Outcome.KILLED
    return {EXIT_REFUSED: Outcome.REFUSED, EXIT_TRY_AGAIN: Outcome.TRY_AGAIN}.get(code, Outcome.FAILED)


def _ending(code: int) -> str:
    if outcome_of(code) is Outcome.REFUSED:
        return "the model is refused"
    if outcome_of(code) is not Outcome.KILLED:
        return f"exited with {code}"
    number = -code if code < 0 else code - 128
    return f"killed by signal {number}" + (" (out of memory, or by hand)" if number == 9 else "")


def _told(ending: str, tail: Sequence[str]) -> str:
    return "\n".join([ending, *(line for line in tail if not line.startswith((">", "Running stage '")))])


def ask(arguments: Sequence[str], workspace: Path) -> str:
    """The output of a DVC command that ends at once.

    Raises:
        DvcError: it failed.
    """
    result = subprocess.run(
        _command(arguments), cwd=workspace, env=environment(), capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise DvcError(result.stderr.strip() or f"dvc {' '.join(arguments)} exited with {result.returncode}")
    return result.stdout


def environment() -> dict[str, str]:
    """For DVC and the stages: this interpreter first on the path, and nothing of Prefect's (keys, run ids). Nor the
    cluster: what is to be made there is mapped by the flow (``ddops.flows.shards``)."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_") and name != DASK}
    here = str(Path(sys.executable).parent)
    return {
        **kept,
        "PATH": f"{here}{os.pathsep}{kept.get('PATH', os.defpath)}",
        "DVC_NO_ANALYTICS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "dvc", *arguments]
