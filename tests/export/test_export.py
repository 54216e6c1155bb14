"""The exported graph: one pass through the student a step, the images of PyTorch, the same bytes each time."""

import math
import socket
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from ddops.export.errors import ExportError
from ddops.export.graph import OneStepGraph
from ddops.export.onnx import EXTERNAL_DATA_ABOVE, _write, export_onnx
from ddops.export.parity import (
    Parity,
    ParityBounds,
    broken_bounds,
    compare,
    first_divergence,
    measure_parity,
    onnx_drawer,
    require_parity,
)
from ddops.export.session import open_session, run_session
from ddops.models import level_attention
from ddops.models.autoencoder import Attention
from ddops.models.registry import build_student, build_teacher
from helpers.exports import CASES, METADATA, export, exported_case, inputs
from helpers.tiny import tiny

pytestmark = pytest.mark.xdist_group("export")  # which shares the exports


@pytest.fixture(
    scope="module", params=[pytest.param(case, marks=[pytest.mark.slow] * (case != "llamagen-1")) for case in CASES]
)
def exported(request):
    return exported_case(request.param)


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
    """The one-step claim, read off the graph: every linear layer of the student's blocks is applied once in a one-step
    graph and twice in a two-step one, each head once a step that it decides tokens in, and every convolution of the
    decoder once."""
    uses = uses_of_weights(exported.model)
    # Only two rows ever enter the noise/data layers of VAR's student, so that they are folded away (next test); what
    # depends on the class alone is computed once, and a head where it decides tokens.
    student = {
        name: module.weight
        for name, module in exported.graph.student.named_modules()
        if isinstance(module, nn.Linear) and "noise_data" not in name
    }
    once = [name for name in student if "modulation" in name or "head" in name.split(".") or "regression" in name]
    once += [name for name in student if name.startswith("embedding_head")]
    tokenizer = exported.graph.tokenizer
    decoder = {
        name: module.weight
        for name, module in tokenizer.named_modules()
        if isinstance(module, nn.Conv2d) and not name.startswith(("encoder", "quant_conv", "phis"))
    }
    assert len(student) >= 6
    assert len(decoder) >= 15
    used = {name: uses[weight.numpy().tobytes()] for name, weight in student.items()}
    expected = dict.fromkeys(student, exported.steps) | dict.fromkeys(once, 1)
    if exported.case == "llamagen-2":
        expected["head"] = 2  # its second step decides some tokens by logits too
    assert used == expected
    used = {name: uses[weight.numpy().tobytes()] for name, weight in decoder.items()}
    assert used == dict.fromkeys(decoder, 1)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", pytest.param("float16", marks=pytest.mark.rare)])
def test_noise_data_layers_are_folded_in_a_wide_student_too(tmp_path, precision):
    """As wide as it takes for the exporter to leave them, two steps: no product of constants is in the graph."""
    config = tiny("var", "teacher.model.width=128").teacher.model
    torch.manual_seed(0)
    student, tokenizer = build_student(config).eval(), build_teacher(config).eval().tokenizer
    for parameter in (*student.noise_data_embedding.parameters(), *student.noise_data_linears.parameters()):
        nn.init.normal_(parameter, std=0.3)
    graph = OneStepGraph(student, tokenizer, (0, 2), student.layout.num_levels // 2).eval()
    options = {"opset": 18, "precision": precision, "metadata": {}}
    export_onnx(graph, *inputs(student.layout, 2), tmp_path / "model.onnx", **options)
    model = onnx.load(tmp_path / "model.onnx")
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    assert len(products) > 10
    assert not [node.name for node in products if set(node.input) <= weights.keys()]
    contents = {values.tobytes() for values in weights.values()}
    for layer in student.noise_data_linears:
        weight = layer.weight.detach().numpy()
        assert not contents & {half for each in (weight, weight.T) for half in (each.tobytes(), halved(each))}
        rows = layer(student.noise_data_embedding.weight).detach().numpy()
        assert any(each.shape == rows.shape and np.allclose(each, rows, atol=1e-5) for each in weights.values())
    noise, labels = inputs(student.layout, 5)
    parity = measure_parity(graph, onnx_drawer(tmp_path / "model.onnx"), noise, labels)
    assert parity.largest <= (1e-4 if precision == "float32" else 2e-2)


def halved(values):
    return values.astype(np.float16).tobytes()


def test_the_graph_has_as_many_attentions_as_one_pass_a_step(exported):
    depth = exported.graph.student.config.depth
    decoder = [module for module in exported.graph.tokenizer.decoder.modules() if isinstance(module, Attention)]
    kinds = Counter(node.op_type for node in exported.model.graph.node)
    assert kinds["Softmax"] == depth * exported.steps + len(decoder)
    assert kinds["ArgMax"] == (2 if exported.case == "llamagen-2" else 1)
    assert not {"ArgMin", "TopK", "CDist"} & {*kinds}  # no given position is compared with the codebook


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
    parity = measure_parity(exported.graph, onnx_drawer(exported.path), noise, labels)
    assert parity.images == batch
    assert parity.largest <= 1e-4
    assert parity.psnr > 80
    assert parity.equal_tokens == 1
    images = run_session(open_session(exported.path), noise.numpy(), labels.numpy())
    assert images.shape == (batch, 1, 8, 8)
    assert images.dtype == np.float32
    assert np.abs(images).max() <= 1
    assert images.std() > 0.05


def test_noise_and_label_both_reach_the_image(exported):
    session, layout = open_session(exported.path), exported.graph.student.layout
    noise, labels = inputs(layout, 4)
    noise, labels = noise.numpy(), labels.numpy()
    images = run_session(session, noise, labels)
    assert not np.allclose(run_session(session, noise[::-1].copy(), labels), images, atol=1e-2)
    assert not np.allclose(run_session(session, noise, (labels + 1) % 10), images, atol=1e-2)


def test_the_file_knows_nothing_of_this_machine(exported):
    content = exported.path.read_bytes()
    here = [str(Path.home()), str(Path(__file__).parents[2]), sys.prefix, socket.gethostname(), "site-packages", ".py"]
    assert not [word for word in here if len(word) > 2 and word.encode() in content]


@pytest.mark.slow
@pytest.mark.parametrize("exported", ["var-2"], indirect=True)
def test_exporting_again_gives_the_same_bytes(exported, tmp_path):
    export(*CASES[exported.case], tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == exported.path.read_bytes()


def test_logits_are_made_for_the_positions_whose_argmax_is_used(exported):
    """The head over the codebook is the widest layer: each position is asked once, in the step that settles it."""
    layout = exported.graph.student.layout
    prefix = layout.offsets[layout.num_levels // 2]
    bounds = sorted({*(min(prefix, layout.offsets[start]) for start in exported.graph.start_positions), prefix})
    noise, labels = inputs(layout, 2)
    argmaxes = [node.input[0] for node in exported.model.graph.node if node.op_type == "ArgMax"]
    session = open_session(exported.path, extra_outputs=dict.fromkeys(argmaxes, onnx.TensorProto.FLOAT))
    logits = session.run(argmaxes, {"noise": noise.numpy(), "class_label": labels.numpy()})
    assert [value.shape for value in logits] == [(2, stop - start, 64) for start, stop in pairwise(bounds)]


def test_nothing_guards_against_rows_that_see_nothing(exported):
    """Every position sees itself; and TensorRT-RTX fails on the guard when it fuses attention in half precision."""
    assert "IsNaN" not in {node.op_type for node in exported.model.graph.node}


@pytest.mark.slow
def test_levels_that_are_run_one_by_one_are_exported_too(tmp_path, monkeypatch):
    """The digits' few positions go through one masked call; as many as VAR-d16's go through a call a level."""
    monkeypatch.setattr(level_attention, "TOGETHER", 2)
    graph, _ = export("var", (0, 2), tmp_path / "model.onnx")
    masked, levels = 2 * graph.student.config.depth, len(graph.student.layout.sizes)
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert kinds["Softmax"] > masked + levels
    noise, labels = inputs(graph.student.layout, 5)
    assert measure_parity(graph, onnx_drawer(tmp_path / "model.onnx"), noise, labels).largest <= 1e-4


def test_a_first_step_of_two_is_exported_cut(exported):
    """The graph's first step is over the positions before the second start: the blocks' inputs say so."""
    layout = exported.graph.student.layout
    shapes = onnx.shape_inference.infer_shapes(exported.model).graph.value_info
    lengths = {dims[1].dim_value for value in shapes if len(dims := value.type.tensor_type.shape.dim) == 3}
    for start in (*exported.graph.start_positions[1:], layout.num_levels):
        assert layout.offsets[start] + 1 in lengths


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "starts"), [("llamagen", (0, 3, 9)), pytest.param("var", (0, 1, 2), marks=pytest.mark.rare)]
)
def test_three_steps_are_three_passes_of_one_graph_at_the_newer_opset_too(tmp_path, family, starts):
    graph, _ = export(family, starts, tmp_path / "model.onnx", opset=20)
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
    decoder = [module for module in graph.tokenizer.decoder.modules() if isinstance(module, Attention)]
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["Softmax"] == 3 * graph.student.config.depth + len(decoder)
    noise, labels = inputs(graph.student.layout, 5)
    parity = measure_parity(graph, onnx_drawer(tmp_path / "model.onnx"), noise, labels)
    assert parity.largest <= 1e-4
    assert parity.equal_tokens == 1


@pytest.mark.parametrize("exported", ["llamagen-1"], indirect=True)
def test_weights_beyond_the_limit_of_a_protobuf_lie_beside_the_model(exported, tmp_path):
    path = tmp_path / "model.onnx"
    _write(exported.model, path, external_data_above=1000)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert path.stat().st_size < 0.5 * exported.path.stat().st_size
    noise, labels = inputs(exported.graph.student.layout, 3)
    assert measure_parity(exported.graph, onnx_drawer(path), noise, labels).largest <= 1e-4
    _write(exported.model, path, external_data_above=EXTERNAL_DATA_ABOVE)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


# the proof of parity can fail

BOUNDS = ParityBounds(largest=1e-4, psnr=60, equal_tokens=0.99)


def spoilt(exported, tmp_path, name):
    """The exported model with a tenth added to one of its constants."""
    model = onnx.load(exported.path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(name))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(0.1), tensor.name))
    onnx.save(model, tmp_path / "spoilt.onnx")
    return tmp_path / "spoilt.onnx"


@pytest.mark.parametrize(
    ("exported", "weight", "module"),
    [
        ("llamagen-1", "student.input_proj.bias", "student.input_proj"),
        pytest.param("llamagen-2", "embedding_head.proj.bias", "student.embedding_head.proj", marks=pytest.mark.slow),
        pytest.param("var-2", "post_quant_conv.bias", "tokenizer.post_quant_conv", marks=pytest.mark.slow),
    ],
    indirect=["exported"],
)
def test_an_export_that_differs_fails_and_names_where_the_difference_starts(exported, weight, module, tmp_path):
    path = spoilt(exported, tmp_path, weight)
    noise, labels = inputs(exported.graph.student.layout, 4)
    parity = measure_parity(exported.graph, onnx_drawer(path), noise, labels)
    with pytest.raises(ExportError, match="does not draw PyTorch's images") as error:
        require_parity(parity, BOUNDS, path, exported.trace, noise, labels)
    assert str(error.value).endswith(f" in {module}")
    assert "export.tolerance allows 0.0001" in str(error.value)


@pytest.mark.parametrize("exported", ["llamagen-1"], indirect=True)
def test_a_faithful_export_has_no_first_difference(exported):
    noise, labels = inputs(exported.graph.student.layout, 2)
    assert first_divergence(exported.trace, exported.path, noise, labels, 1e-4) is None


def test_the_figures_of_a_comparison():
    """Two of eight pixels differ by a half: worked out by hand."""
    expected = np.zeros((2, 1, 2, 2), np.float32), np.array([[1, 2], [3, 4]])
    drawn = expected[0].copy(), np.array([[1, 2], [3, 5]])
    drawn[0][0, 0, 0] = 0.5
    parity = compare(expected, drawn)
    assert (parity.images, parity.largest, parity.mean, parity.equal_tokens) == (2, 0.5, 0.125, 0.75)
    assert parity.psnr == pytest.approx(10 * math.log10(4 / (2 * 0.25 / 8)))
    assert compare(expected, expected).psnr == pytest.approx(10 * math.log10(4 / 1e-20))
    with pytest.raises(ExportError, match="images: PyTorch makes"):
        compare(expected, (drawn[0][:1], drawn[1]))


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, []),
        ({"largest": 1.01e-4}, ["export.tolerance"]),
        ({"largest": math.nan}, ["export.tolerance"]),
        ({"psnr": 59.9}, ["export.min_psnr"]),
        ({"psnr": math.nan}, ["export.min_psnr"]),
        ({"equal_tokens": 0.98, "largest": 1.0}, ["export.tolerance", "export.min_equal_tokens"]),
    ],
)
def test_each_bound_is_held_to(change, broken):
    parity = Parity(**{"images": 3, "largest": 1e-4, "mean": 0.0, "psnr": 60.0, "equal_tokens": 0.99, **change})
    found = broken_bounds(parity, BOUNDS)
    assert len(found) == len(broken)
    assert all(key in sentence for key, sentence in zip(broken, found, strict=True))
