"""Training curves through DVCLive, in files whose bytes depend on the run alone (no clock, no host name)."""

from __future__ import annotations

from pathlib import Path

from dvclive.live import Live

Row = dict[str, float]


class Curves:
    """A history of (step, values) mirrored to DVCLive's TSV files below ``directory``.

    The history travels in the checkpoint; a resumed run writes it out again, so that the files never
    hold a point twice or one that the resumed run has yet to compute.
    """

    def __init__(self, directory: Path, history: list[tuple[int, Row]] | None = None) -> None:
        self.history: list[tuple[int, Row]] = []
        # Live() empties the directory: what a killed run left there is rewritten from the history.
        self._live = Live(
            str(directory), resume=False, report=None, save_dvc_exp=False, dvcyaml=None, monitor_system=False
        )
        for step, row in history or []:
            self.log(step, row)

    def log(self, step: int, row: Row) -> None:
        """Add one point to every curve named in ``row``."""
        self.history.append((step, row))
        self._live.step = step
        for name, value in row.items():
            self._live.log_metric(name, value)
        self._live.make_summary()

    def close(self) -> None:
        """Write the summary of the last values."""
        self._live.end()
