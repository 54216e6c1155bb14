"""Errors about data from outside."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint does not hold what the model needs; the message names the key."""


class MayPassError(Exception):
    """Trouble that may be over later, such as a server that is away: the same command may then succeed."""
