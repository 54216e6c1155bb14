"""Published checkpoint files into ours: read without running code, mapped name by name, stored as safetensors."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddops.config.models import ModelConfig
from ddops.files import looks_like_html
from ddops.models.errors import CheckpointError
from ddops.models.registry import NameMap, name_maps
from ddops.models.weights import STUDENT, TOKENIZER, TRANSFORMER, load_metadata, save_weights


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


def convert_published(
    source: Path, layout: str, config: ModelConfig, kind: str, target: Path, extra: Mapping[str, str]
) -> None:
    """Write a published file's weights as a ``kind`` of ours to ``target``; ``extra`` is kept in its metadata.

    Raises:
        CheckpointError: see :func:`read_published`; or a tensor is missing, unexpected or of another shape.
    """
    state = read_published(source, layout)
    try:
        mapped = _name_map(config, kind)(state, config)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    save_weights(target, {key: _own(value) for key, value in mapped.items()}, config, kind, extra)


def converted_from(target: Path, config: ModelConfig, kind: str) -> str | None:
    """The sha256 of the published file that ``target`` was made of, if it is there and of this configuration."""
    if not target.exists():
        return None
    try:
        found, extra = load_metadata(target, kind)
    except CheckpointError:
        return None
    return extra.get("source_sha256") if found == config else None


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


def _name_map(config: ModelConfig, kind: str) -> NameMap:
    maps = name_maps(config)
    return {TOKENIZER: maps.tokenizer, TRANSFORMER: maps.transformer, STUDENT: maps.student}[kind]


def _own(value: Tensor) -> Tensor:
    """The tensor, copied where it is a window on a larger storage, which safetensors does not write."""
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
