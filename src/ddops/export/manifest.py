"""``manifest.json``: what a bundle holds, in types. It is written last, so that a directory with one is complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from ddops.config.base import NonNegativeInt, PositiveInt, config
from ddops.config.stages import GraphPrecision, ProfileConfig
from ddops.export.errors import BundleError
from ddops.files import sha256_file, write_json

MANIFEST: Final = "manifest.json"
MODEL: Final = "model.onnx"
EXTERNAL_SUFFIX: Final = ".data"
"""Of a large model's weights, in a file beside it."""
STUDENT_FILE: Final = "student.safetensors"
TOKENIZER_FILE: Final = "tokenizer.safetensors"

ENCODER: Final = "encoder"
"""Folder of the text encoder's files, where the bundle holds them."""
ENCODER_FACTS: Final = "encoder.json"
"""Beside the encoder's files in a workspace: a :class:`CaptionFacts`."""
OUTPUT_NAME: Final = "images"

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Input(NamedTuple):
    """An input of the graph."""

    shape: tuple[int, ...]
    """Without the batch."""
    dtype: Literal["float32", "int64", "uint64", "bool"]


@config
class TextEncoderFacts:
    """What encodes prompts: a T5 that transformers runs."""

    name: Literal["seeded", "t5"]
    """``seeded``: in the bundle's folder ``encoder``. ``t5``: in a repository of the Hugging Face hub."""
    repo: str | None
    revision: str | None
    files: dict[str, Digest]


@config
class CaptionFacts:
    """How prompts are handed to the model."""

    length: PositiveInt
    """Tokens; a longer prompt is cut, a shorter one padded on the left."""
    width: PositiveInt
    encoder: TextEncoderFacts


@config
class ModelFacts:
    """What a caller must know of the model in order to ask it for images."""

    num_classes: NonNegativeInt
    """0 where it is asked by prompts."""
    class_names: tuple[str, ...] | None
    length: PositiveInt
    code_dim: PositiveInt
    image_size: PositiveInt
    image_channels: PositiveInt
    steps: PositiveInt
    """Passes of the exported graph."""
    start_positions: tuple[NonNegativeInt, ...]
    """Where steps start. The graph goes through the first ``steps`` of them, the PyTorch weights through as many as
    they are asked to."""
    logit_prefix: NonNegativeInt
    noise: str
    """The construction of the noise, see :mod:`ddops.sampling.noise`: another one would draw other images."""
    captions: CaptionFacts | None = None

    @property
    def inputs(self) -> dict[str, Input]:
        """Of the graph, in order."""
        noise = {"noise": Input((self.length, self.code_dim), "float32")}
        if self.captions is None:
            return noise | {"class_label": Input((), "int64")}
        tokens, width = self.captions.length, self.captions.width
        features, mask = Input((tokens, width), "float32"), Input((tokens,), "bool")
        return noise | {"caption_features": features, "caption_mask": mask}


@config
class OnnxFacts:
    """How the graph was made."""

    opset: PositiveInt
    precision: GraphPrecision
    sha256: Digest
    external_sha256: Digest | None
    """Of the weights beside the model, where it has some."""


@config
class EngineFacts:
    """A TensorRT engine, and what it must find where it runs."""

    file: str
    sha256: Digest
    flavour: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    target: str
    """Compute capability without its dot ("89"), or "portable"."""
    precision: GraphPrecision
    profile: ProfileConfig
    onnx_sha256: Digest


@config
class Manifest:
    """Everything about a bundle."""

    format: Literal[1]
    facts: dict[str, str]
    """Where it comes from: preset, git commit, hashes, protocol and FID, licence. Also in the model's metadata."""
    model: ModelFacts
    onnx: OnnxFacts
    engines: tuple[EngineFacts, ...]
    files: dict[str, Digest]
    """Every other file of the bundle, by its path in it."""

    @property
    def identity(self) -> str:
        """Names the model in logs, answers and metrics: the first digits of its graph's hash."""
        return self.onnx.sha256[:12]


CAPTION_FACTS: Final[TypeAdapter[CaptionFacts]] = TypeAdapter(CaptionFacts)
_MANIFESTS: Final[TypeAdapter[Manifest]] = TypeAdapter(Manifest)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Atomic."""
    write_json(directory / MANIFEST, _MANIFESTS.dump_python(manifest, mode="json"))


def read_manifest(directory: Path) -> Manifest:
    """Raises:
    BundleError: there is none, or it is not one of ours.
    """
    path = directory / MANIFEST
    try:
        return _MANIFESTS.validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{path}: missing; a bundle is written by ddops export or by dvc repro export_onnx") from None
    except (ValidationError, json.JSONDecodeError) as error:
        raise BundleError(f"{path}: not a bundle's manifest that this ddops reads: {error}") from error


def verify_files(directory: Path, digests: dict[str, str]) -> None:
    """Raises:
    BundleError: a file is missing, or is not the one that the manifest means.
    """
    for name, digest in digests.items():
        path = directory / name
        if not path.is_file():
            raise BundleError(f"{path}: missing, though the manifest lists it; export the bundle again")
        if (found := sha256_file(path)) != digest:
            raise BundleError(
                f"{path}: damaged or changed (sha256 {found[:12]}..., the manifest says {digest[:12]}...); "
                "export the bundle again"
            )


def model_digests(manifest: Manifest) -> dict[str, str]:
    """The files of the ONNX model and their hashes."""
    external = manifest.onnx.external_sha256
    return {MODEL: manifest.onnx.sha256} | ({MODEL + EXTERNAL_SUFFIX: external} if external else {})
