"""Weight files: safetensors with the model's configuration inside, written atomically.

The bytes are a function of the contents, so that equal weights have equal hashes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ddops.config.models import ModelConfig
from ddops.files import atomic_path
from ddops.models.errors import CheckpointError
from ddops.models.interface import Student, Teacher, Tokenizer
from ddops.models.registry import build_student, build_teacher, build_tokenizer

TOKENIZER: Final = "tokenizer"
TRANSFORMER: Final = "transformer"
STUDENT: Final = "student"

FORMAT_VERSION: Final = "1"
_PREFIX: Final = "ddops."
_KIND: Final = "ddops.kind"
_CONFIG: Final = "ddops.config"
_VERSION: Final = "ddops.format_version"
_CONFIGS: Final[TypeAdapter[ModelConfig]] = TypeAdapter(ModelConfig)


def save_weights(
    path: Path, module_state: Mapping[str, Tensor], config: ModelConfig, kind: str, extra: Mapping[str, str] = {}
) -> None:
    """Write a state dict with its configuration; at no time does ``path`` hold half a file.

    ``kind`` says what the weights are of and is asked for again on loading. ``extra`` is metadata of the caller's;
    raises ``ValueError`` if one of its keys starts with ``ddops.``, which is taken.
    """
    if taken := [key for key in extra if key.startswith(_PREFIX)]:
        raise ValueError(f"extra metadata may not use the prefix {_PREFIX!r}: {taken}")
    metadata = {
        _KIND: kind,
        _CONFIG: _CONFIGS.dump_json(config, exclude_none=True).decode(),
        _VERSION: FORMAT_VERSION,
        **extra,
    }
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in module_state.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata)
        _sort_metadata(temporary)


def load_weights(path: Path, kind: str) -> tuple[dict[str, Tensor], ModelConfig, dict[str, str]]:
    """The state dict (on the CPU), the configuration and the extra metadata of a file of this ``kind``.

    Raises :class:`CheckpointError` if the file is damaged, of another kind or not one of ours.
    """
    with _opened(path) as file:
        metadata: dict[str, str] = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    return state, *_parse_metadata(path, metadata, kind)


def load_metadata(path: Path, kind: str) -> tuple[ModelConfig, dict[str, str]]:
    """As :func:`load_weights`, without the weights."""
    with _opened(path) as file:
        metadata: dict[str, str] = file.metadata() or {}
    return _parse_metadata(path, metadata, kind)


def kind_of(path: Path) -> str | None:
    """What the weights in a file are of; None where it does not say. Raises :class:`CheckpointError`."""
    with _opened(path) as file:
        kind: str | None = (file.metadata() or {}).get(_KIND)
    return kind


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file, in evaluation mode; raises :class:`CheckpointError`."""
    state, config, _ = load_weights(path, TOKENIZER)
    tokenizer = build_tokenizer(config)
    load_strictly(tokenizer, state, path)
    return tokenizer.eval()


def load_teacher(path_tokenizer: Path, path_transformer: Path) -> Teacher:
    """A teacher from its two files, in evaluation mode, with the transformer's configuration.

    One tokenizer serves transformers of several sizes, so the two configurations need not be equal.
    Raises :class:`CheckpointError` also where the tokenizer does not fit the transformer's configuration.
    """
    transformer_state, config, _ = load_weights(path_transformer, TRANSFORMER)
    tokenizer_state, tokenizer_config, _ = load_weights(path_tokenizer, TOKENIZER)
    if tokenizer_config.family != config.family:
        raise CheckpointError(
            f"{path_tokenizer} holds a {tokenizer_config.family} tokenizer and {path_transformer} a {config.family} "
            "transformer; pass the two files of one model"
        )
    teacher = build_teacher(config)
    load_strictly(teacher.tokenizer, tokenizer_state, path_tokenizer)
    load_strictly(teacher.get_submodule("transformer"), transformer_state, path_transformer)
    return teacher.eval()


def load_student(path: Path) -> Student:
    """The DD1 student in a file, in evaluation mode; raises :class:`CheckpointError`."""
    state, config, _ = load_weights(path, STUDENT)
    student = build_student(config)
    load_strictly(student, state, path)
    return student.eval()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}); if its writing or download was cut short, "
            "delete it and produce it again"
        ) from error


def _parse_metadata(path: Path, metadata: Mapping[str, str], kind: str) -> tuple[ModelConfig, dict[str, str]]:
    _check_metadata(path, metadata, kind)
    try:
        config = _CONFIGS.validate_json(metadata[_CONFIG])
    except ValidationError as error:
        raise CheckpointError(
            f"the configuration in {path} is not one that this version of ddops reads: {error}"
        ) from error
    return config, {key: value for key, value in metadata.items() if not key.startswith(_PREFIX)}


def _check_metadata(path: Path, metadata: Mapping[str, str], kind: str) -> None:
    if missing := [key for key in (_KIND, _CONFIG, _VERSION) if key not in metadata]:
        raise CheckpointError(
            f"{path} lacks the metadata {', '.join(missing)}: it was not written by ddops; import published "
            "weights through the checkpoint name maps and save_weights"
        )
    if metadata[_VERSION] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is of format version {metadata[_VERSION]}, this ddops reads version {FORMAT_VERSION}; "
            "use the ddops that wrote it, or write it again"
        )
    if metadata[_KIND] != kind:
        raise CheckpointError(f"{path} holds a {metadata[_KIND]}, but a {kind} was asked for; pass that file instead")


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load a state dict of exactly the module's names and shapes; raises :class:`CheckpointError`."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:  # torch's message lists every missing, unexpected and misshapen key
        raise CheckpointError(f"the weights in {path} do not fit their configuration: {error}") from error


def _sort_metadata(path: Path) -> None:
    """Rewrite the header with sorted metadata (safetensors writes it in a random order).

    The format is an 8-byte little-endian header length, the header as JSON, then the data.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) != length:
            raise AssertionError(f"the sorted safetensors header has {len(text)} bytes instead of {length}")
        file.seek(8)
        file.write(text)
