"""A student and its image decoder as a bundle: weights, one ONNX graph, and the manifest that vouches for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ddops.captions.conditions import open_conditions
from ddops.class_names import class_names
from ddops.config.dd2 import DD2Config, NotTrainedConfig
from ddops.config.stages import DD1Config, ExportConfig
from ddops.export.copying import place_file
from ddops.export.errors import ExportError
from ddops.export.graph import load_graph
from ddops.export.manifest import (
    CAPTION_FACTS,
    ENCODER,
    ENCODER_FACTS,
    EXTERNAL_SUFFIX,
    MANIFEST,
    MODEL,
    STUDENT_FILE,
    TOKENIZER_FILE,
    CaptionFacts,
    Manifest,
    ModelFacts,
    OnnxFacts,
    write_manifest,
)
from ddops.export.onnx import export_onnx
from ddops.export.parity import Parity, ParityBounds, measure_parity, onnx_drawer, require_parity
from ddops.files import sha256_file
from ddops.models.conditions import Condition, take
from ddops.models.interface import Student
from ddops.models.weights import TOKENIZER, load_metadata
from ddops.sampling.noise import NOISE_VERSION, Stream, normals


class Sources(NamedTuple):
    """The weights a bundle is made of, and how they are sampled."""

    student: Path
    tokenizer: Path
    start_positions: tuple[int, ...]
    logit_prefix: int
    captions: Path | None = None
    """What the stage captions wrote; read for a model that draws for captions."""


def write_bundle(
    directory: Path,
    sources: Sources,
    export: ExportConfig,
    facts: Mapping[str, str],
) -> Parity:
    """Write a verified bundle; a bundle that was there is replaced. The manifest comes last.

    Raises:
        ExportError: ONNX Runtime does not draw PyTorch's images. No manifest is left then.
        CheckpointError: the weights cannot be read. CaptionError: so with the captions.
    """
    starts = sources.start_positions[: export.steps]
    graph = load_graph(sources.student, sources.tokenizer, starts, sources.logit_prefix)
    student = graph.student
    code_dim = graph.codebook_VC.shape[1]
    indices_N = np.arange(max(export.parity_count, 2), dtype=np.int64)
    noise_NLC = normals(export.parity_seed, Stream.SAMPLE_NOISE, indices_N, (student.layout.length, code_dim))
    labels_N, captions = _examples(student, sources.captions, indices_N)

    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    trace = export_onnx(
        graph,
        noise_NLC[:2],
        take(labels_N, slice(2)),
        directory / MODEL,
        opset=export.opset,
        precision=export.precision,
        metadata=facts,
    )
    parity = measure_parity(graph, onnx_drawer(directory / MODEL, export.precision), noise_NLC, labels_N)
    bounds = ParityBounds(export.tolerance, export.min_psnr, export.min_equal_tokens)
    require_parity(parity, bounds, directory / MODEL, trace, noise_NLC[:2], take(labels_N, slice(2)))
    for source, name in ((sources.student, STUDENT_FILE), (sources.tokenizer, TOKENIZER_FILE)):
        place_file(source, directory / name)
    if captions is not None and captions.encoder.name == "seeded" and sources.captions is not None:
        for name in captions.encoder.files:
            place_file(sources.captions / ENCODER / name, directory / ENCODER / name)
    images_1IHW, _ = graph.draw(noise_NLC[:1], take(labels_N, slice(1)))
    external = directory / (MODEL + EXTERNAL_SUFFIX)
    manifest = Manifest(
        format=1,
        facts=dict(facts),
        model=ModelFacts(
            num_classes=student.num_conditions if captions is None else 0,
            class_names=tuple(class_names(student.num_conditions)) or None if captions is None else None,
            length=student.layout.length,
            code_dim=code_dim,
            image_size=images_1IHW.shape[-1],
            image_channels=images_1IHW.shape[1],
            steps=len(starts),
            start_positions=sources.start_positions,
            logit_prefix=sources.logit_prefix,
            noise=NOISE_VERSION,
            captions=captions,
        ),
        onnx=OnnxFacts(
            opset=export.opset,
            precision=export.precision,
            sha256=sha256_file(directory / MODEL),
            external_sha256=sha256_file(external) if external.exists() else None,
        ),
        engines=(),
        files={name: sha256_file(directory / name) for name in (STUDENT_FILE, TOKENIZER_FILE)}
        | _encoder_files(captions),
    )
    write_manifest(directory, manifest)
    return parity


def _examples(
    student: Student, directory: Path | None, indices_N: NDArray[np.int64]
) -> tuple[Condition, CaptionFacts | None]:
    """Conditions for a comparison: class after class, or caption after caption of the evaluation's prompts."""
    if student.num_conditions:
        return torch.from_numpy(indices_N % student.num_conditions), None
    if directory is None:
        raise ExportError("this student draws for captions: its export needs what the stage captions wrote")
    conditions = open_conditions(directory / "evaluate", student)
    facts = CAPTION_FACTS.validate_json((directory / ENCODER / ENCODER_FACTS).read_bytes())
    return conditions.given(torch.from_numpy(indices_N % conditions.count)), facts


def _encoder_files(captions: CaptionFacts | None) -> dict[str, str]:
    if captions is None or captions.encoder.name != "seeded":
        return {}
    return {f"{ENCODER}/{name}": digest for name, digest in captions.encoder.files.items()}


def find_sources(
    student: Path, tokenizer: Path, captions: Path, dd1: DD1Config, dd2: DD2Config, export: ExportConfig
) -> Sources:
    """The files with what the configuration says of sampling that student; raises :class:`CheckpointError`."""
    levels = len(load_metadata(tokenizer, TOKENIZER)[0].level_sizes)
    return Sources(student, tokenizer, dd1.start_positions, logit_prefix(dd1, dd2, export, levels), captions)


def logit_prefix(dd1: DD1Config, dd2: DD2Config, export: ExportConfig, levels: int) -> int:
    """Of the student that is exported, where its teacher has so many levels."""
    if export.student == "dd1" or isinstance(dd2, NotTrainedConfig):
        return dd1.logit_prefix
    return dd2.logit_prefix(levels)
