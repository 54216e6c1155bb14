"""PyTorch to ONNX, and the proof that both compute the same images."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddops.export.graph import INPUT_NAMES, OUTPUT_NAME
from ddops.files import atomic_path


class ExportError(RuntimeError):
    """An export that does not compute what the PyTorch model computes."""


def export_onnx(
    graph: nn.Module, noise_BLC: Tensor, labels_B: Tensor, path: Path, *, opset: int, metadata: Mapping[str, str]
) -> None:
    """Write ``graph`` as a checked ONNX model whose only dynamic dimension is the batch. Atomic.

    ``noise_BLC`` and ``labels_B`` are an example input of at least two samples (a batch of one would be traced as
    a constant). The same model gives the same bytes.
    """
    batch = torch.export.Dim("batch", min=1, max=4096)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            graph.eval(),
            (noise_BLC, labels_B),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=list(INPUT_NAMES),
            output_names=[OUTPUT_NAME],
            dynamic_shapes=({0: batch}, {0: batch}),
        )
    assert program is not None  # dynamo=True always returns a program
    model = program.model_proto
    _strip_traces(model)
    _share_equal_weights(model.graph)
    for key, value in sorted(metadata.items()):
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model, full_check=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))


def _strip_traces(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes on where each node came from: they hold paths of this machine."""
    del model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
        del value.metadata_props[:]
    del model.graph.metadata_props[:]
    model.graph.doc_string = ""


def _share_equal_weights(graph: onnx.GraphProto) -> None:
    """Keep one of each constant. The exporter transposes a weight anew at each use, so that a graph of several steps
    would hold as many copies of the student."""
    kept: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    renamed: dict[str, str] = {}
    for place in reversed(range(len(graph.initializer))):
        tensor = graph.initializer[place]
        content = tensor.data_type, tuple(tensor.dims), hashlib.sha256(tensor.raw_data).digest()
        first = kept.setdefault(content, tensor.name)
        if first != tensor.name and tensor.raw_data:
            renamed[tensor.name] = first
            del graph.initializer[place]
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    described = [value for value in graph.value_info if value.name not in renamed]
    del graph.value_info[:]
    graph.value_info.extend(described)


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU."""
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run_session(session: onnxruntime.InferenceSession, noise_BLC: Tensor, labels_B: Tensor) -> NDArray[np.float32]:
    """Images (B, I, H, W) in [-1, 1]."""
    feed = dict(zip(INPUT_NAMES, (noise_BLC.numpy(), labels_B.numpy()), strict=True))
    images: NDArray[np.float32] = session.run([OUTPUT_NAME], feed)[0]
    return images


@dataclass(frozen=True)
class Parity:
    """Differences of pixels in [-1, 1] between PyTorch and ONNX Runtime, over the same noise and labels."""

    largest: float
    mean: float
    images: int


@torch.inference_mode()
def measure_parity(graph: nn.Module, path: Path, noise_BLC: Tensor, labels_B: Tensor) -> Parity:
    """Run both on the same inputs."""
    expected = graph(noise_BLC, labels_B).numpy()
    difference = np.abs(run_session(open_session(path), noise_BLC, labels_B) - expected)
    return Parity(float(difference.max()), float(difference.mean()), len(labels_B))


def require_parity(parity: Parity, tolerance: float, path: Path) -> None:
    """Raises:
    ExportError: a pixel differs by more than ``tolerance``.
    """
    if not parity.largest <= tolerance:
        raise ExportError(
            f"{path}: ONNX Runtime differs from PyTorch by up to {parity.largest:.3g} a pixel on {parity.images} "
            f"images; export.tolerance allows {tolerance:g}"
        )
