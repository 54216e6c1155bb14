"""Graphs in half precision: what is rounded and what is not, in types that ONNX gives its operators."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from ddops import OneStepPipeline
from ddops.config.stages import EngineConfig, ProfileConfig
from ddops.export.engines import build_engines
from ddops.export.errors import ExportError
from ddops.export.graph import OneStepGraph
from ddops.export.manifest import read_manifest
from ddops.export.onnx import export_onnx
from ddops.export.parity import measure_parity, onnx_drawer
from ddops.export.precision import KINDS, PRODUCTS, widen_products
from ddops.export.session import open_session, run_session
from helpers.exports import exported_case, inputs
from helpers.tiny import untrained
from helpers.tiny_bundle import make_bundle

pytestmark = pytest.mark.xdist_group("export")  # which shares the exports

WHOLE_OPERATORS = ("Softmax", "LayerNormalization", "InstanceNormalization", "Sigmoid", "Add", "Mul", "Pow")
LOOSE = {"tolerance": None, "min_psnr": 20.0, "min_equal_tokens": 0.9}


EXPORTS = [f"{case}-{kind}" for case in ("llamagen-1", "var-2") for kind in KINDS]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name != "llamagen-1-float16")) for name in EXPORTS],
)
def half(request):
    case, _, precision = request.param.rpartition("-")
    return exported_case(case, precision)


def typed(model):
    """Element type of every value of a graph, by ONNX's own inference."""
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    return kinds | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def test_products_are_in_half_precision_but_for_heads_and_last_layers(half):
    """Read off the graph's types: norms, softmax, activations and the residual stream take float32."""
    kinds = typed(half.model)
    whole, halved = [], []
    for node in half.model.graph.node:
        floats = {kinds.get(name) for name in node.input if name} & {onnx.TensorProto.FLOAT, *KINDS.values()}
        assert len(floats) <= 1, node
        if node.op_type in PRODUCTS[half.precision]:
            (halved if floats == {KINDS[half.precision]} else whole).append(node)
        elif node.op_type in WHOLE_OPERATORS:
            assert floats <= {onnx.TensorProto.FLOAT}, node
    heads = 2
    assert len(whole) == heads + ("Conv" in PRODUCTS[half.precision])  # the decoder's last convolution
    assert len(halved) > 10


@pytest.mark.parametrize(
    "half", ["llamagen-1-float16", pytest.param("var-2-float16", marks=pytest.mark.slow)], indirect=True
)
def test_the_decoders_maps_are_shuffled_in_half_precision(half):
    """Between two convolutions the largest maps are not widened only to be rearranged."""
    kinds, shuffles = typed(half.model), [node for node in half.model.graph.node if node.op_type == "DepthToSpace"]
    assert shuffles
    assert {kinds[name] for node in shuffles for name in (*node.input, *node.output)} == {KINDS[half.precision]}


def test_every_operator_gets_a_type_that_it_is_defined_for(half):
    """By the operators' own schemas: a runtime refuses what is not allowed (a convolution in bfloat16, at the opsets of
    an export)."""
    kinds, (opset,) = typed(half.model), half.model.opset_import
    for node in half.model.graph.node:
        schema = onnx.defs.get_schema(node.op_type, opset.version, "")
        allowed = {each.type_param_str: each.allowed_type_strs for each in schema.type_constraints}
        for place, name in enumerate(node.input):
            given = schema.inputs[min(place, len(schema.inputs) - 1)].type_str
            if name:
                kind = onnx.helper.tensor_dtype_to_string(kinds[name]).removeprefix("TensorProto.").lower()
                assert f"tensor({kind})" in allowed.get(given, [given]), node


def test_half_precision_halves_the_weights_and_keeps_the_images(half):
    share = 0.62 if half.precision == "float16" else 0.97  # a tiny model's weights are its decoder's convolutions
    assert half.path.stat().st_size < share * exported_case(half.case).path.stat().st_size
    noise, labels = inputs(half.graph.student.layout, 16)
    parity = measure_parity(half.graph, onnx_drawer(half.path, half.precision), noise, labels)
    largest, psnr = (2e-2, 60) if half.precision == "float16" else (0.2, 40)
    assert 1e-5 < parity.largest < largest
    assert parity.psnr > psnr
    assert parity.equal_tokens > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("half", ["llamagen-1-bfloat16", "var-2-bfloat16"], indirect=True)
def test_what_a_cpu_computes_of_a_bfloat16_graph_is_what_the_graph_says(half):
    """ONNX's reference runs the file as it is; ONNX Runtime, with float32 between the roundings. Where a sum falls
    between two numbers of bfloat16 they may round it apart, which is as much as bfloat16 may be off at all."""
    noise, labels = inputs(half.graph.student.layout, 4)
    feed = {"noise": noise.numpy(), "class_label": labels.numpy()}
    (reference,) = ReferenceEvaluator(half.model).run(None, feed)
    drawn = run_session(open_session(half.path, precision="bfloat16"), *feed.values())
    assert np.abs(reference - drawn).mean() < 5e-3
    assert np.quantile(np.abs(reference - drawn), 0.99) < 0.05
    with pytest.raises(Exception, match="Could not find an implementation for"):
        open_session(half.path)


@pytest.mark.parametrize("half", ["llamagen-1-float16"], indirect=True)
def test_only_bfloat16_is_widened(half):
    before = half.model.SerializeToString(deterministic=True)
    model = copy.deepcopy(half.model)
    widen_products(model)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "weight"), [("float16", 1e5), pytest.param("bfloat16", 3.4e38, marks=pytest.mark.rare)]
)
def test_a_weight_beyond_half_precision_is_refused_by_name(tmp_path, precision, weight):
    teacher, student = copy.deepcopy(untrained("llamagen"))
    student.trunk.blocks[0].ffn.down.weight.data[0, 0] = weight
    graph = OneStepGraph(student, teacher.tokenizer, (0,), 8)
    example = inputs(student.layout, 2)
    with pytest.raises(
        ExportError, match=rf"{weight:g} is no {precision}; export with precision float32".replace("+", r"\+")
    ):
        export_onnx(graph, *example, tmp_path / "m.onnx", opset=18, precision=precision, metadata={})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def bundle_bf16(tmp_path_factory):
    """A bundle in bfloat16 with an engine that TensorRT-RTX built of it, and Triton's repository."""
    directory = make_bundle(tmp_path_factory.mktemp("bfloat16") / "bundle", precision="bfloat16", **LOOSE)
    config = EngineConfig(flavour="tensorrt_rtx", targets=("89",), profile=ProfileConfig(min=1, opt=2, max=4))
    build_engines(directory, directory, config, None, lambda *phase: None)
    return directory


@pytest.mark.slow
def test_a_bundle_in_bfloat16_is_built_into_an_engine_and_drawn_on_a_cpu(bundle_bf16):
    manifest = read_manifest(bundle_bf16)
    assert (manifest.onnx.precision, manifest.engines[0].precision) == ("bfloat16", "bfloat16")
    assert (bundle_bf16 / manifest.engines[0].file).stat().st_size > 100_000
    onnx_pipe = OneStepPipeline.from_pretrained(bundle_bf16)
    torch_pipe = OneStepPipeline.from_pretrained(bundle_bf16, backend="torch")
    labels = list(range(10))
    images = [
        np.stack([np.asarray(image) for image in pipe(labels).images]).astype(int) for pipe in (onnx_pipe, torch_pipe)
    ]
    assert 0 < np.abs(images[0] - images[1]).mean() < 2


@pytest.mark.slow
def test_tritons_variant_for_a_cpu_is_a_graph_that_a_cpu_runs(bundle_bf16):
    """It opens its file without ddops; the variant for ONNX Runtime's backend keeps the graph as exported."""
    variants = [bundle_bf16 / f"triton/onestep_{name}/1/model.onnx" for name in ("python", "onnx")]
    assert variants[1].read_bytes() == (bundle_bf16 / "model.onnx").read_bytes()
    session = onnxruntime.InferenceSession(str(variants[0]), providers=["CPUExecutionProvider"])
    noise, labels = inputs(untrained("llamagen")[1].layout, 3)
    expected = run_session(
        open_session(bundle_bf16 / "model.onnx", precision="bfloat16"), noise.numpy(), labels.numpy()
    )
    assert np.array_equal(run_session(session, noise.numpy(), labels.numpy()), expected)
