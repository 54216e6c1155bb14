"""Errors that a model raises about data from outside."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint does not hold what the model needs; the message names the key."""
