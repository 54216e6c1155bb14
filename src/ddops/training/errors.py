"""Errors of training, apart from the loop so that what only reports them need not load torch."""

from __future__ import annotations


class TrainingDiverged(RuntimeError):
    """The loss stopped being a number. The last checkpoint is kept."""


class ReplicaLost(RuntimeError):
    """A process of a data-parallel training ended before the others. The last checkpoint is kept."""


class LaunchError(RuntimeError):
    """torchrun started what the configuration does not ask for. The message says what to change."""


class Collapsed(RuntimeError):
    """A generator whose samples lose their variety. The last checkpoint is kept."""
