"""Errors of evaluation, apart from the figures so that what only reports them need not load torch."""

from __future__ import annotations


class MetricError(ValueError):
    """A metric that cannot be computed from what was given."""
