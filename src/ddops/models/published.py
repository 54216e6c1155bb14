"""Published checkpoint files into ours: read without running code, mapped name by name, stored as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ddops.config.models import ModelConfig
from ddops.models.errors import CheckpointError
from ddops.models.published_files import read_published
from ddops.models.registry import NameMap, name_maps
from ddops.models.weights import STUDENT, TOKENIZER, TRANSFORMER, load_metadata, save_weights


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


def _name_map(config: ModelConfig, kind: str) -> NameMap:
    maps = name_maps(config)
    return {TOKENIZER: maps.tokenizer, TRANSFORMER: maps.transformer, STUDENT: maps.student}[kind]


def _own(value: Tensor) -> Tensor:
    """The tensor, copied where it is a window on a larger storage, which safetensors does not write."""
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
