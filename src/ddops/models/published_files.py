"""Reading the files that weights are published in, without running code in them."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddops.files import looks_like_html
from ddops.models.errors import CheckpointError


def read_published(path: Path, layout: str) -> dict[str, Tensor]:
    """The state dict in a ``.pt`` or ``.pth`` file; ``layout`` is ``flat`` or the keys that lead to it, dotted.

    Raises:
        CheckpointError: not such a file, cut short, asking to run code, or without that entry.
    """
    entry: Any = _load(path)
    for key in [] if layout == "flat" else layout.split("."):
        if not isinstance(entry, Mapping) or key not in entry:
            found = ", ".join(map(str, list(entry)[:8])) if isinstance(entry, Mapping) else type(entry).__name__
            raise CheckpointError(f"{path}: holds no entry {key!r} (layout {layout}); found {found}")
        entry = entry[key]
    if not isinstance(entry, Mapping) or not entry:
        raise CheckpointError(f"{path}: layout {layout} leads to no state dict but to a {type(entry).__name__}")
    if foreign := [str(key) for key, value in entry.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(f"{path}: no tensors at {', '.join(foreign[:5])}; is the layout {layout} the right one?")
    return dict(entry)


def _load(path: Path) -> Any:
    is_zip = zipfile.is_zipfile(path)
    try:
        # Training scripts keep their command line beside the weights: a Namespace holds values and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_why_not(path, error)}") from error
    except (RuntimeError, EOFError, ValueError, LookupError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable PyTorch file, or cut short ({error}). Fetch it again") from error


def _why_not(path: Path, error: Exception) -> str:
    if looks_like_html(path):
        return "this is an HTML page, not a checkpoint; delete it and download the file itself"
    # What torch wraps this in advises to load the file all the same.
    reason = (str(error.__context__ or error).splitlines() or [type(error).__name__])[0]
    if "global" in reason.lower():
        return f"refused: the file asks for more than tensors, which could run code. Nothing of it was run ({reason})"
    return f"not a readable PyTorch file, or cut short ({reason}). Fetch it again"
