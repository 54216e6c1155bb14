"""Mixed precision written into an ONNX graph: products in half precision, all else in float32.

TensorRT (strongly typed since version 10) and ONNX Runtime both take precision from the graph, so this is the one
place that decides it. Norms, softmax, activations and the residual stream stay in float32, and so does every module
that the caller names: heads and last layers, whose rounding would be seen.

In float16 products are matrix products and convolutions, in bfloat16 matrix products alone: ONNX has no convolution of
bfloat16 before opset 22. TensorRT takes its float32 convolutions through TF32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, Literal

import numpy as np
import onnx
from onnx import numpy_helper

from ddops.export.errors import ExportError

Half = Literal["float16", "bfloat16"]
KINDS: Final[dict[Half, int]] = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}
PRODUCTS: Final[dict[Half, frozenset[str]]] = {
    "float16": frozenset({"MatMul", "Gemm", "Conv"}),
    "bfloat16": frozenset({"MatMul", "Gemm"}),
}
"""Where the time and the weights are."""
LAYOUT: Final = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "DepthToSpace"})
"""They move numbers and do not change them: between two products the half-precision values pass through."""


def to_mixed_precision(
    model: onnx.ModelProto, scopes: Mapping[str, str], whole: Collection[str], precision: Half
) -> None:
    """Rewrite ``model`` in place.

    ``scopes`` names the module of each node by the node's first output; products in a module of ``whole``, or below
    one, are left alone. Raises :class:`ExportError` where a weight does not fit into half precision.
    """
    graph = model.graph
    _Rewriter(graph, scopes, tuple(whole), precision).run()
    _drop_unused_casts(graph)
    del graph.value_info[:]  # it describes the values as they were


def widen_products(model: onnx.ModelProto) -> None:
    """Let every product of bfloat16 values compute in float32 between casts, in place.

    For a runtime that has no arithmetic in bfloat16, as ONNX Runtime has none on a CPU. What comes out is what a tensor
    core makes: products of rounded numbers, summed in float32, the sum rounded.
    """
    graph, kind = model.graph, onnx.TensorProto.BFLOAT16
    rounded = {tensor.name for tensor in graph.initializer if tensor.data_type == kind}
    widened: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        rounds = node.op_type == "Cast" and node.attribute[0].i == kind
        if rounds or (node.op_type in LAYOUT and node.input[0] in rounded):
            rounded.update(node.output)
        elif node.op_type in PRODUCTS["bfloat16"] and node.input[0] in rounded:
            new = [name for name in dict.fromkeys(node.input) if name not in widened]
            nodes += [_cast(name, f"{name}.wide", onnx.TensorProto.FLOAT) for name in new]
            widened.update(new)
            rounded.update(node.output)
            (output,) = node.output
            node.input[:] = [f"{name}.wide" for name in node.input]
            node.output[:] = [f"{output}.sum"]
            nodes += [node, _cast(f"{output}.sum", output, kind)]
            continue
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


class _Rewriter:
    def __init__(
        self, graph: onnx.GraphProto, scopes: Mapping[str, str], whole: tuple[str, ...], precision: Half
    ) -> None:
        self.graph, self.scopes, self.whole, self.precision = graph, scopes, whole, precision
        self.kind = KINDS[precision]
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.half_of: dict[str, str] = {}
        """For a float32 value, the name of the same value in half precision, once there is one."""
        self.nodes: list[onnx.NodeProto] = []

    def run(self) -> None:
        for node in self.graph.node:
            if node.op_type in PRODUCTS[self.precision] and not self._is_whole(node):
                node.input[:] = [self._halved(name) for name in node.input]
                self._emit_half(node)
            elif node.op_type in LAYOUT and node.input[0] in self.half_of:
                node.input[0] = self.half_of[node.input[0]]
                self._emit_half(node)
            else:
                self.nodes.append(node)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)

    def _is_whole(self, node: onnx.NodeProto) -> bool:
        scope = self.scopes.get(node.output[0], "")
        return any(scope == module or scope.startswith(f"{module}.") for module in self.whole)

    def _halved(self, name: str) -> str:
        if name and name not in self.half_of:
            self.half_of[name] = f"{name}.half"
            if name in self.weights:
                self._halve_weight(self.weights[name])
            else:
                self.nodes.append(_cast(name, self.half_of[name], self.kind))
        return self.half_of.get(name, name)

    def _halve_weight(self, tensor: onnx.TensorProto) -> None:
        values = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            halved = values.astype(onnx.helper.tensor_dtype_to_np_dtype(self.kind))
        if not np.isfinite(halved).all():
            largest = np.abs(values).max()
            raise ExportError(f"{tensor.name}: {largest:g} is no {self.precision}; export with precision float32")
        self.graph.initializer.append(numpy_helper.from_array(halved, self.half_of[tensor.name]))

    def _emit_half(self, node: onnx.NodeProto) -> None:
        """The node, whose inputs are in half precision now, and its outputs in both precisions."""
        outputs = list(node.output)
        node.output[:] = [f"{name}.half" for name in outputs]
        self.nodes.append(node)
        for name in outputs:
            self.half_of[name] = f"{name}.half"
            self.nodes.append(_cast(f"{name}.half", name, onnx.TensorProto.FLOAT))


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [source], [target], name=f"cast.{target}", to=kind)


def _drop_unused_casts(graph: onnx.GraphProto) -> None:
    """Remove the casts that turned out to be read by nothing."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if node.op_type != "Cast" or needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
