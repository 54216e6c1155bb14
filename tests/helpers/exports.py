"""Graphs of the tiny models, exported to ONNX."""

import atexit
import copy
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import onnx
import torch

from ddops.export.graph import OneStepGraph
from ddops.export.onnx import ExportTrace, _drop_unused_weights, export_onnx
from ddops.export.precision import to_mixed_precision
from helpers.tiny import untrained

METADATA = {"ddops.preset": "test", "ddops.steps": "1"}
CASES = {
    "llamagen-1": ("llamagen", (0,)),
    "llamagen-2": ("llamagen", (0, 5)),
    "var-1": ("var", (0,)),
    "var-2": ("var", (0, 2)),
}


def inputs(layout, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, layout.length, 8, generator=generator), torch.arange(batch) % 10


def export(family, starts, path, precision="float32", **options):
    """Both heads have a say: logits for the first half of the levels, embeddings for the rest."""
    teacher, student = copy.deepcopy(untrained(family))
    graph = OneStepGraph(student, teacher.tokenizer, starts, student.layout.num_levels // 2).eval()
    example = inputs(student.layout, 2)
    options = {"opset": 18, "precision": precision, **options}
    trace = export_onnx(graph, *example, path, metadata=METADATA, **options)
    return graph, trace


class Exported(NamedTuple):
    """An export of one of the cases. Not to be changed."""

    case: str
    precision: str
    graph: OneStepGraph
    trace: ExportTrace
    path: Path

    @property
    def steps(self) -> int:
        return len(CASES[self.case][1])

    @property
    def model(self) -> onnx.ModelProto:
        """Read anew: a test may change it."""
        return onnx.load(self.path)


@cache
def exported_case(case: str, precision: str = "float32") -> Exported:
    """Made once for this process. What PyTorch's exporter makes of a case is the same in all precisions, and takes
    nearly all of the time: half precision begins with it."""
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory)
    path = directory / "model.onnx"
    if precision == "float32":
        return Exported(case, precision, *export(*CASES[case], path), path)
    whole = exported_case(case)
    model = whole.model
    to_mixed_precision(model, whole.trace.scopes, whole.graph.whole_modules, precision)
    _drop_unused_weights(model.graph)
    onnx.save(model, path)
    return whole._replace(precision=precision, path=path)
