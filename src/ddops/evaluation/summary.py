"""The run in a line: the few figures that DVC tracks, of all that the metrics file holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

ROWS: Final = {
    "fid_teacher": "teacher",
    "fid_dd1_1": "dd1_1step",
    "fid_dd1_2": "dd1_2step",
    "fid_dd2_1": "dd2_1step",
}
"""Rows whose FID is shown. What has no row in its name is of the student that is exported."""


def summary(metrics: Mapping[str, Any], student: str) -> dict[str, float]:
    """The figures by short names, so that ``dvc metrics show`` fits into a terminal: FID, recall, class accuracy and
    steps of the row ``student``, its FID over the teacher's, and

    * ``gap_closed``: by how much of DD1's distance from its teacher in one step DD2 is nearer, in percent. There is
      none where DD1 has reached its teacher.
    * ``steps``, ``steps_teacher``: passes through a transformer, one after the other. They are the speed that does not
      depend on the machine.

    A figure that was not measured or is no finite number is left out: DVC shows a dash.
    """
    values = {name: _figure(metrics, row, "fid") for name, row in ROWS.items()}
    fid, teacher = _figure(metrics, student, "fid"), values["fid_teacher"]
    found = {
        "fid": fid,
        **values,
        "fid_ratio": fid / teacher if fid is not None and teacher else None,
        "gap_closed": gap_closed(teacher, values["fid_dd1_1"], values["fid_dd2_1"]),
        "recall": _figure(metrics, student, "recall"),
        "accuracy": _figure(metrics, student, "accuracy"),
        "steps": _figure(metrics, student, "passes"),
        "steps_teacher": _figure(metrics, "teacher", "passes"),
    }
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def gap_closed(teacher: float | None, dd1: float | None, dd2: float | None) -> float | None:
    """The share of the way from DD1's FID to the teacher's that DD2 has gone, in percent: above 100 where it has passed
    the teacher, below 0 where it fell behind DD1. None where there is no way to go, or a figure is missing."""
    if teacher is None or dd1 is None or dd2 is None or dd1 <= teacher:
        return None
    return 100 * (dd1 - dd2) / (dd1 - teacher)


def _figure(metrics: Mapping[str, Any], row: str, name: str) -> float | None:
    """None where it is missing or no finite number."""
    value: float | None = metrics.get(row, {}).get(name)
    return value if value is not None and math.isfinite(value) else None
