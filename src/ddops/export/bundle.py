"""A student and its image decoder as a bundle: weights, one ONNX graph, and the manifest that vouches for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ddops.class_names import class_names
from ddops.config.dd2 import DD2Config, NotTrainedConfig
from ddops.config.stages import DD1Config, ExportConfig
from ddops.export.copying import place_file
from ddops.export.graph import OneStepGraph
from ddops.export.manifest import (
    MANIFEST,
    MODEL,
    STUDENT_FILE,
    TOKENIZER_FILE,
    Manifest,
    ModelFacts,
    OnnxFacts,
    write_manifest,
)
from ddops.export.onnx import EXTERNAL_SUFFIX, export_onnx
from ddops.export.parity import Parity, ParityBounds, measure_parity, onnx_drawer, require_parity
from ddops.files import sha256_file
from ddops.models.weights import TOKENIZER, load_metadata, load_tokenizer
from ddops.models.weights_dd2 import load_generator
from ddops.sampling.noise import NOISE_VERSION, Stream, normals


class Sources(NamedTuple):
    """The weights a bundle is made of, and how they are sampled."""

    student: Path
    tokenizer: Path
    start_positions: tuple[int, ...]
    logit_prefix: int


def write_bundle(
    directory: Path,
    sources: Sources,
    export: ExportConfig,
    facts: Mapping[str, str],
) -> Parity:
    """Write a verified bundle; a bundle that was there is replaced. The manifest comes last.

    Raises:
        ExportError: ONNX Runtime does not draw PyTorch's images. No manifest is left then.
        CheckpointError: the weights cannot be read.
    """
    starts = sources.start_positions[: export.steps]
    graph = load_graph(sources.student, sources.tokenizer, starts, sources.logit_prefix)
    student = graph.student
    code_dim = graph.codebook_VC.shape[1]
    indices_N = np.arange(max(export.parity_count, 2), dtype=np.int64)
    noise_NLC = normals(export.parity_seed, Stream.SAMPLE_NOISE, indices_N, (student.layout.length, code_dim))
    labels_N = torch.from_numpy(indices_N % student.num_conditions)

    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    trace = export_onnx(
        graph,
        noise_NLC[:2],
        labels_N[:2],
        directory / MODEL,
        opset=export.opset,
        precision=export.precision,
        metadata=facts,
    )
    parity = measure_parity(graph, onnx_drawer(directory / MODEL), noise_NLC, labels_N)
    bounds = ParityBounds(export.tolerance, export.min_psnr, export.min_equal_tokens)
    require_parity(parity, bounds, directory / MODEL, trace, noise_NLC[:2], labels_N[:2])
    for source, name in ((sources.student, STUDENT_FILE), (sources.tokenizer, TOKENIZER_FILE)):
        place_file(source, directory / name)
    images_1IHW = graph(noise_NLC[:1], labels_N[:1])
    external = directory / (MODEL + EXTERNAL_SUFFIX)
    manifest = Manifest(
        format=1,
        facts=dict(facts),
        model=ModelFacts(
            num_classes=student.num_conditions,
            class_names=tuple(class_names(student.num_conditions)) or None,
            length=student.layout.length,
            code_dim=code_dim,
            image_size=images_1IHW.shape[-1],
            image_channels=images_1IHW.shape[1],
            steps=len(starts),
            start_positions=sources.start_positions,
            logit_prefix=sources.logit_prefix,
            noise=NOISE_VERSION,
        ),
        onnx=OnnxFacts(
            opset=export.opset,
            precision=export.precision,
            sha256=sha256_file(directory / MODEL),
            external_sha256=sha256_file(external) if external.exists() else None,
        ),
        engines=(),
        files={name: sha256_file(directory / name) for name in (STUDENT_FILE, TOKENIZER_FILE)},
    )
    write_manifest(directory, manifest)
    return parity


def find_sources(student: Path, tokenizer: Path, dd1: DD1Config, dd2: DD2Config, export: ExportConfig) -> Sources:
    """The files with what the configuration says of sampling that student; raises :class:`CheckpointError`."""
    if export.student == "dd1" or isinstance(dd2, NotTrainedConfig):
        return Sources(student, tokenizer, dd1.start_positions, dd1.logit_prefix)
    config, _ = load_metadata(tokenizer, TOKENIZER)
    return Sources(student, tokenizer, dd1.start_positions, dd2.logit_prefix(len(config.level_sizes)))


def load_graph(student: Path, tokenizer: Path, start_positions: tuple[int, ...], logit_prefix: int) -> OneStepGraph:
    """The model in PyTorch, in evaluation mode and without gradients; raises CheckpointError."""
    graph = OneStepGraph(load_generator(tokenizer, student), load_tokenizer(tokenizer), start_positions, logit_prefix)
    return graph.eval().requires_grad_(False)
