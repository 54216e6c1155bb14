"""The exported graph: one pass through the student a step, the images of PyTorch, the same bytes each time."""

import math
import socket
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from ddops.export.graph import OneStepGraph
from ddops.export.onnx import (
    ExportError,
    Parity,
    export_onnx,
    measure_parity,
    open_session,
    require_parity,
    run_session,
)
from ddops.models.autoencoder import Attention
from tiny import untrained

METADATA = {"ddops.preset": "test", "ddops.steps": "1"}
CASES = {"llamagen-1": ("llamagen", (0,)), "llamagen-2": ("llamagen", (0, 5)), "var-1": ("var", (0,))}


def inputs(layout, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, layout.length, 8, generator=generator), torch.arange(batch) % 10


def export(family, starts, path):
    """Both heads have a say: logits for the first half of the levels, embeddings for the rest."""
    teacher, student = untrained(family)
    graph = OneStepGraph(student, teacher, starts, student.layout.num_levels // 2).eval()
    export_onnx(graph, *inputs(student.layout, 2), path, opset=18, metadata=METADATA)
    return graph


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    family, starts = CASES[request.param]
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    graph = export(family, starts, path)
    return SimpleNamespace(graph=graph, path=path, model=onnx.load(path), steps=len(starts), case=request.param)


def uses_of_weights(model):
    """How many nodes read each matrix or convolution, by its values; a matrix is found as it is and transposed."""
    readers = Counter(name for node in model.graph.node for name in node.input)
    uses = Counter()
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        for variant in {values.tobytes(), values.T.tobytes()}:
            uses[variant] += readers[tensor.name]
    return uses


def test_each_weight_is_used_once_a_step(exported):
    """The one-step claim, read off the graph: every linear layer of the student is applied once in a one-step graph
    and twice in a two-step one, and every convolution of the decoder once."""
    uses = uses_of_weights(exported.model)
    # Only two rows ever enter the noise/data layers of VAR's student, so that the exporter folds them away.
    student = {
        name: module.weight
        for name, module in exported.graph.student.named_modules()
        if isinstance(module, nn.Linear) and "noise_data" not in name
    }
    tokenizer = exported.graph.tokenizer
    decoder = {
        name: module.weight
        for name, module in tokenizer.named_modules()
        if isinstance(module, nn.Conv2d) and not name.startswith(("encoder", "quant_conv", "phis"))
    }
    assert len(student) >= 6
    assert len(decoder) >= 15
    used = {name: uses[weight.numpy().tobytes()] for name, weight in student.items()}
    assert used == dict.fromkeys(student, exported.steps)
    used = {name: uses[weight.numpy().tobytes()] for name, weight in decoder.items()}
    assert used == dict.fromkeys(decoder, 1)


def test_the_graph_has_as_many_attentions_as_one_pass_a_step(exported):
    depth = exported.graph.student.config.depth
    decoder = [module for module in exported.graph.tokenizer.decoder.modules() if isinstance(module, Attention)]
    kinds = Counter(node.op_type for node in exported.model.graph.node)
    assert kinds["Softmax"] == depth * exported.steps + len(decoder)
    assert kinds["ArgMax"] == exported.steps


def test_nothing_in_the_graph_loops_branches_or_draws_random_numbers(exported):
    """A loop could hide further passes, and a random number would make the images other than the noise's."""
    kinds = {node.op_type for node in exported.model.graph.node}
    assert not kinds & {"Loop", "If", "Scan", "SequenceMap"}
    assert not {kind for kind in kinds if "Random" in kind or kind in ("Bernoulli", "Multinomial", "Dropout")}
    assert not exported.model.functions
    assert {node.domain for node in exported.model.graph.node} == {""}


def test_a_second_step_adds_no_weights(exported):
    """The steps share the student; the file holds it once."""
    sizes = [len(tensor.raw_data) for tensor in exported.model.graph.initializer]
    contents = {(tuple(t.dims), t.data_type, t.raw_data) for t in exported.model.graph.initializer}
    assert len(contents) == len(sizes)
    modules = exported.graph.student, exported.graph.tokenizer.decoder
    parameters = sum(4 * parameter.numel() for module in modules for parameter in module.parameters())
    assert sum(sizes) < 1.25 * parameters


def test_only_the_batch_is_dynamic(exported):
    graph = exported.model.graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    length = exported.graph.student.layout.length
    assert shapes == {"noise": ["batch", length, 8], "class_label": ["batch"], "images": ["batch", 1, 8, 8]}
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert kinds == {"noise": onnx.TensorProto.FLOAT, "class_label": onnx.TensorProto.INT64, "images": 1}


def test_the_model_is_valid_at_the_opset_asked_for(exported):
    """TensorRT refuses the Attention operator that newer opsets bring."""
    onnx.checker.check_model(exported.model, full_check=True)
    assert [(opset.domain, opset.version) for opset in exported.model.opset_import] == [("", 18)]
    assert {entry.key: entry.value for entry in exported.model.metadata_props} == METADATA


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_onnx_runtime_draws_pytorchs_images(exported, batch):
    """From the same noise, within 1e-4 of a pixel in [-1, 1]."""
    noise, labels = inputs(exported.graph.student.layout, batch, seed=batch)
    parity = measure_parity(exported.graph, exported.path, noise, labels)
    assert parity.images == batch
    assert parity.largest <= 1e-4
    images = run_session(open_session(exported.path), noise, labels)
    assert images.shape == (batch, 1, 8, 8)
    assert images.dtype == np.float32
    assert np.abs(images).max() <= 1
    assert images.std() > 0.05


def test_noise_and_label_both_reach_the_image(exported):
    session, layout = open_session(exported.path), exported.graph.student.layout
    noise, labels = inputs(layout, 4)
    images = run_session(session, noise, labels)
    assert not np.allclose(run_session(session, noise.flip(0), labels), images, atol=1e-2)
    assert not np.allclose(run_session(session, noise, (labels + 1) % 10), images, atol=1e-2)


def test_the_file_knows_nothing_of_this_machine(exported):
    content = exported.path.read_bytes()
    here = [str(Path.home()), str(Path(__file__).parents[1]), sys.prefix, socket.gethostname(), "site-packages", ".py"]
    assert not [word for word in here if len(word) > 2 and word.encode() in content]


@pytest.mark.parametrize("exported", ["var-1"], indirect=True)
def test_exporting_again_gives_the_same_bytes(exported, tmp_path):
    export(*CASES[exported.case], tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == exported.path.read_bytes()


# the proof of parity can fail


def test_a_graph_of_another_student_is_told_apart(exported):
    """Against a student with one weight moved, the comparison that guards the export must fail."""
    noise, labels = inputs(exported.graph.student.layout, 4)
    *_, last = (module for module in exported.graph.student.modules() if isinstance(module, nn.Linear))
    weight = last.weight
    original = weight.data.clone()
    try:
        weight.data *= 1.1
        parity = measure_parity(exported.graph, exported.path, noise, labels)
    finally:
        weight.data.copy_(original)
    with pytest.raises(ExportError, match=r"differs from PyTorch by up to .* on 4 images; export\.tolerance allows"):
        require_parity(parity, 1e-4, exported.path)


@pytest.mark.parametrize(
    ("largest", "accepted"), [(1e-4, True), (1.01e-4, False), (math.nan, False), (math.inf, False)]
)
def test_parity_is_required_to_the_tolerance(largest, accepted):
    parity = Parity(largest=largest, mean=0.0, images=3)
    if accepted:
        assert require_parity(parity, 1e-4, Path("model.onnx")) is None
    else:
        with pytest.raises(ExportError, match=r"model\.onnx: ONNX Runtime differs"):
            require_parity(parity, 1e-4, Path("model.onnx"))
