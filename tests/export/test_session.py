"""ONNX Runtime's sessions: the device asked for or an error, and weights wherever the Hugging Face cache keeps them."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from ddops.export.errors import BundleError
from ddops.export.session import open_session, run_outputs
from ddops.extras import MissingExtra

WEIGHT = np.arange(64, dtype=np.float32).reshape(8, 8)


@pytest.fixture
def model(tmp_path):
    """A product by a weight that lies beside the graph."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["inner"]), helper.make_node("Neg", ["inner"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 8])],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path = tmp_path / "model.onnx"
    onnx.save_model(proto, path, save_as_external_data=True, location="model.onnx.data", size_threshold=16)
    return path


@pytest.fixture
def cached(model, tmp_path):
    """The same as the cache holds it: links to files of other names in another folder."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for blob, name in enumerate(("model.onnx", "model.onnx.data")):
        (model.parent / name).rename(blobs / str(blob))
        (snapshot / name).symlink_to(blobs / str(blob))
    return snapshot / "model.onnx"


@pytest.mark.parametrize("place", ["model", "cached"])
@pytest.mark.parametrize(("inner", "precision"), [({}, "float32"), ({"inner": 1}, "float32"), ({}, "bfloat16")])
def test_a_graph_opens_with_the_weights_beside_it(place, inner, precision, request):
    session = open_session(request.getfixturevalue(place), extra_outputs=inner, precision=precision)
    x = np.ones((1, 8), np.float32)
    for name, sign in (("y", -1), *((name, 1) for name in inner)):
        np.testing.assert_array_equal(run_outputs(session, [x], [name])[0], sign * x @ WEIGHT)


def test_a_device_that_does_not_start_is_an_error(model, monkeypatch):
    """The runtime itself warns, and draws on the CPU from then on."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(BundleError, match="could not start CUDAExecutionProvider"),
    ):
        open_session(model, "cuda")


def test_a_device_that_is_not_there_is_an_error(model):
    with pytest.raises(BundleError, match=r"'tpu'.* valid: cpu, cuda"):
        open_session(model, "tpu")
    with pytest.raises(MissingExtra, match=r"ONNX Runtime on cuda needs .*ddops\[gpu\]"):
        open_session(model, "cuda")
