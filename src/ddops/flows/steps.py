"""What the tasks of every flow share: what becomes of a command as a state, which of them to try again, whom its
output is passed to."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Completed, Crashed, Failed

from ddops.flows import artifacts
from ddops.flows.dvc import Outcome, Result
from ddops.flows.progress import parse_bar

LOG_PROGRESS_SECONDS = 10.0
RETRIES = 3
"""Of what may pass."""


def delays(first: float) -> list[float]:
    """Seconds to wait before each retry."""
    return [first * 2**attempt for attempt in range(RETRIES)]


def may_pass(task: Any, task_run: Any, state: State[Any]) -> bool:
    """Whether trying again may help."""
    return state.name == "TryAgain"


def as_state(result: Result) -> State[Any]:
    """Prefect's state for what became of a command."""
    match result.outcome:
        case Outcome.RAN:
            return Completed(message=f"ran in {result.seconds:.1f} s")
        case Outcome.UP_TO_DATE | Outcome.RESTORED:
            return Completed(name="Cached", message=result.message)
        case Outcome.REFUSED:
            return Failed(name="Refused", message=result.message)
        case Outcome.TRY_AGAIN:
            return Failed(name="TryAgain", message=result.message)
        case Outcome.TIMED_OUT:
            return Failed(name="TimedOut", message=result.message)
        case Outcome.KILLED:
            return Crashed(message=result.message)
        case Outcome.FAILED:
            return Failed(message=result.message)


def forward_to(
    log: logging.Logger | logging.LoggerAdapter[Any], progress: artifacts.ProgressArtifact | None
) -> Callable[[str], None]:
    """Lines go to the run's log, progress bars to the artifact if there is one, and now and then to the log too."""
    last = 0.0

    def forward(piece: str) -> None:
        nonlocal last
        if (bar := parse_bar(piece)) is None:
            log.info("%s", piece.rstrip())
            return
        if progress is not None:
            progress.show(bar)
        if bar.percent == 100 or time.monotonic() - last > LOG_PROGRESS_SECONDS:
            last = time.monotonic()
            log.info("%s %d %%, %s", bar.title, bar.percent, bar.text)

    return forward
