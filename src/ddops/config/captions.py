"""What the stage ``captions`` is told: which prompts there are, and what encodes them. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ddops.config.base import NonNegativeInt, PositiveInt, config

SHA256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@config
class NoCaptionsConfig:
    """A model that draws for classes."""

    source: Literal["none"]


@config
class PromptFileConfig:
    """Prompts from a file."""

    source: Literal["file"]
    path: Annotated[str, Field(min_length=1)]
    """A ``.txt`` file with a prompt a line, or a ``.csv`` or ``.parquet`` file."""
    column: str
    """Of a CSV or Parquet file."""
    max_characters: PositiveInt
    """A longer prompt is left out. (One of more tokens than the model takes is cut, as in its training.)"""
    limit: PositiveInt | None = None
    """Take the first ones only."""
    sha256: SHA256 | None = None
    """What the file must be, where that is known. The stage runs again when this changes."""


@config
class DigitsPromptsConfig:
    """The captions of the embedded digits."""

    source: Literal["digits"]


PromptsConfig = Annotated[PromptFileConfig | DigitsPromptsConfig, Field(discriminator="source")]


@config
class PromptSets:
    """The prompt sets of a pipeline."""

    train: PromptsConfig
    """What the teacher (where it is trained) and its students learn from."""
    evaluate: PromptsConfig
    """What the evaluation asks for."""


@config
class SeededEncoderConfig:
    """A small T5 with random weights, for tests and the embedded digits: its features tell the prompts' words apart."""

    name: Literal["seeded"]
    seed: NonNegativeInt
    width: PositiveInt
    layers: PositiveInt
    heads: PositiveInt

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")


@config
class PublishedEncoderConfig:
    """A published network of transformers', fetched and verified as all weights are."""

    name: Literal["t5", "clip"]
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Annotated[str, Field(min_length=1)]
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """What of the repository is needed: configuration, tokenizer and weights (safetensors)."""
    path: str | None = None
    """A local directory that holds them: nothing is downloaded then."""


EncoderConfig = Annotated[SeededEncoderConfig | PublishedEncoderConfig, Field(discriminator="name")]


@config
class EncodedCaptionsConfig:
    """Captions, encoded once for all that follows."""

    source: Literal["encode"]
    sets: PromptSets
    encoder: EncoderConfig
    length: PositiveInt
    """Tokens a caption; longer ones are cut."""
    dtype: Literal["float32", "bfloat16"]
    """What the features are stored in."""
    batch_size: PositiveInt
    shard_size: PositiveInt
    """Prompts a shard."""


CaptionsConfig = Annotated[NoCaptionsConfig | EncodedCaptionsConfig, Field(discriminator="source")]
