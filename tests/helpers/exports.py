"""Graphs of the tiny models, exported to ONNX."""

import copy

import torch

from ddops.export.graph import OneStepGraph
from ddops.export.onnx import export_onnx
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
