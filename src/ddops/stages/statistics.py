"""The file of statistics that a published protocol compares with."""

from __future__ import annotations

from pathlib import Path

from ddops.config.evaluation import EvaluateConfig, ImageNetEvaluateConfig
from ddops.hub.files import obtain_file


def statistics_file(evaluate: EvaluateConfig) -> Path | None:
    """The verified file, fetched if need be; None for a protocol that has its own images.

    Raises:
        CheckpointError: it cannot be had; the message says what to put where.
    """
    if isinstance(evaluate, ImageNetEvaluateConfig):
        return obtain_file(evaluate.statistics, "evaluate.statistics").path
    return None
