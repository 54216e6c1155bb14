"""Errors of captions, apart from what encodes them so that a stage's command line need not load it."""

from __future__ import annotations


class CaptionError(ValueError):
    """Prompts or caption features that cannot be used. The message names the file and the way out."""
