"""What a stage prints, told apart: lines of its log, and the states of its progress bars."""

from __future__ import annotations

import re
from dataclasses import dataclass

BAR = re.compile(r"^(?P<title>.*?):?\s*(?P<percent>\d{1,3})%\|.*?\|\s*(?P<rest>.*)$")
"""A line that tqdm drew: ``dd1 student:  45%|####      | 27/60 [00:03<00:03,  9.00step/s, loss=0.1]``."""

GLUED = re.compile(r"^(?P<bar>[^|]*\d{1,3}%\|[^|]*\|[^\[]*\[[^\]]*\])(?P<line>.*\S.*)$", re.DOTALL)
"""A bar with a line after it: what is printed when a process is killed between two states of its bar."""


@dataclass(frozen=True)
class Progress:
    """A progress bar's state."""

    title: str
    percent: int
    text: str
    """What is beside the bar: how many of how many, time, rate."""


def unglued(piece: str) -> list[str]:
    """A piece of output as the bar and the line that it may be made of."""
    match = GLUED.match(piece)
    return [piece] if match is None else [match["bar"] + "\r", match["line"]]


def parse_bar(piece: str) -> Progress | None:
    """The progress bar in a piece of output; None if it is a line like any other."""
    match = BAR.match(piece.strip("\r\n").lstrip())
    if match is None:
        return None
    return Progress(match["title"], min(100, int(match["percent"])), match["rest"].strip())
