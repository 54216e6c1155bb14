"""PyTorch to ONNX: one checked file, or two where the weights exceed what one protobuf can hold."""

from __future__ import annotations

import ast
import hashlib
import logging
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx
import torch
from onnxscript import ir
from onnxscript.optimizer import fold_constants_ir
from torch import Tensor

from ddops.config.stages import GraphPrecision
from ddops.export.graph import OneStepGraph
from ddops.export.manifest import EXTERNAL_SUFFIX, OUTPUT_NAME
from ddops.export.precision import to_mixed_precision
from ddops.files import atomic_path
from ddops.models.conditions import Condition, flat

EXTERNAL_DATA_ABOVE: Final = 1_900_000_000
"""Bytes of weights above which they are kept beside the model: a protobuf holds at most 2 GiB."""

_SCOPES: Final = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class ExportTrace:
    """What ties the values of an ONNX file to the PyTorch model it was made of."""

    program: torch.export.ExportedProgram
    """Its nodes have the names of the file's values, where both have the value."""
    scopes: Mapping[str, str]
    """Name of a value -> dotted path of the module that makes it."""


def export_onnx(
    graph: OneStepGraph,
    noise_BLC: Tensor,
    labels_B: Condition,
    path: Path,
    *,
    opset: int,
    precision: GraphPrecision,
    metadata: Mapping[str, str],
    external_data_above: int = EXTERNAL_DATA_ABOVE,
) -> ExportTrace:
    """Write ``graph`` as a checked ONNX model whose only dynamic dimension is the batch. Atomic.

    ``noise_BLC`` and ``labels_B`` are an example input of at least two samples (a batch of one would be traced as
    a constant). The same model gives the same bytes. Weights of more than ``external_data_above`` bytes go to a file
    beside it, of the same name with ``.data``. Raises :class:`~ddops.export.errors.ExportError` where the weights do
    not fit the precision.
    """
    batch = torch.export.Dim("batch", min=1, max=4096)
    inputs = (noise_BLC, *flat(labels_B))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in ("torch.onnx", "onnxscript"):
            logging.getLogger(library).setLevel(logging.ERROR)
        program = torch.onnx.export(
            graph.eval(),
            inputs,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=list(graph.input_names),
            output_names=[OUTPUT_NAME],
            dynamic_shapes=tuple({0: batch} for _ in inputs),
        )
    assert program is not None  # dynamo=True always returns a program
    assert program.exported_program is not None
    fold_constants_ir(program.model, should_fold=_is_product)
    model = program.model_proto
    trace = ExportTrace(program.exported_program, _scopes(model))
    _strip_traces(model)
    _share_equal_weights(model.graph)
    _drop_nan_guards(model.graph)
    if precision != "float32":
        to_mixed_precision(model, trace.scopes, graph.whole_modules, precision)
    _drop_unused_weights(model.graph)
    for key, value in sorted(metadata.items()):
        model.metadata_props.add(key=key, value=value)
    _write(model, path, external_data_above)
    return trace


def _write(model: onnx.ModelProto, path: Path, external_data_above: int) -> None:
    weights = path.with_name(path.name + EXTERNAL_SUFFIX)
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) <= external_data_above:
        onnx.checker.check_model(model, full_check=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(model.SerializeToString(deterministic=True))
        weights.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".onnx-") as directory:
        draft = Path(directory) / path.name
        onnx.save_model(model, draft, save_as_external_data=True, location=weights.name, size_threshold=1024)
        onnx.checker.check_model(draft, full_check=True)
        for target in (weights, path):  # the model last: it is what a reader looks for
            with atomic_path(target) as temporary:
                shutil.move(Path(directory) / target.name, temporary)


def _is_product(node: ir.Node) -> bool | None:
    """Whether to fold a node of constants: products whatever their size, all else (None) as the library does anyway.

    The exporter has folded by the library's rules, which leave a layer as wide as a full-size student's noise/data
    layers in the graph, though only two rows ever enter it.
    """
    return True if node.op_type in ("Gemm", "MatMul") else None


def _scopes(model: onnx.ModelProto) -> dict[str, str]:
    """The exporter notes the modules around each node as a list, outermost first, then the operation's own name."""
    scopes = {}
    for node in model.graph.node:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        modules = ast.literal_eval(notes[_SCOPES])[:-1] if _SCOPES in notes else [""]
        scopes.update(dict.fromkeys(node.output, modules[-1] if modules else ""))
    return scopes


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


def _drop_unused_weights(graph: onnx.GraphProto) -> None:
    """Leave out the constants that no node reads."""
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _drop_nan_guards(graph: onnx.GraphProto) -> None:
    """Take out ``where(isnan(softmax), 0, softmax)``, which the exporter adds for rows of attention that see nothing.

    Here every position sees itself. TensorRT-RTX 1.7 fails on the guard when it fuses attention in half precision.
    """
    makers = {name: node for node in graph.node for name in node.output}
    softmax_of: dict[str, str] = {}
    for node in graph.node:
        guard = makers.get(node.input[0]) if node.op_type == "Where" else None
        if guard is not None and guard.op_type == "IsNaN" and makers[guard.input[0]].op_type == "Softmax":
            softmax_of[node.output[0]] = guard.input[0]
    guards = {makers[name].input[0] for name in softmax_of}
    kept = [node for node in graph.node if not {*softmax_of, *guards}.intersection(node.output)]
    for node in kept:
        node.input[:] = [softmax_of.get(name, name) for name in node.input]
    del graph.node[:]
    graph.node.extend(kept)


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
