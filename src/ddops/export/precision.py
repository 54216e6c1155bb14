"""Mixed precision written into an ONNX graph: matrix products and convolutions in half precision, all else in float32.

TensorRT (strongly typed since version 10) and ONNX Runtime both take precision from the graph, so this is the one
place that decides it. Norms, softmax, activations and the residual stream stay in float32, and so does every module
that the caller names: heads and last layers, whose rounding would be seen.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

import numpy as np
import onnx
from onnx import numpy_helper

from ddops.export.errors import ExportError

PRODUCTS: Final = frozenset({"MatMul", "Gemm", "Conv"})
"""Where the time and the weights are."""
LAYOUT: Final = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split"})
"""They move numbers and do not change them: between two products the half-precision values pass through."""


def to_mixed_precision(model: onnx.ModelProto, scopes: Mapping[str, str], whole: Collection[str]) -> None:
    """Rewrite ``model`` in place.

    ``scopes`` names the module of each node by the node's first output; products in a module of ``whole``, or below
    one, are left alone. Raises :class:`ExportError` where a weight does not fit into half precision.
    """
    graph = model.graph
    _Rewriter(graph, scopes, tuple(whole)).run()
    _drop_unused_casts(graph)
    del graph.value_info[:]  # it describes the values as they were


class _Rewriter:
    def __init__(self, graph: onnx.GraphProto, scopes: Mapping[str, str], whole: tuple[str, ...]) -> None:
        self.graph, self.scopes, self.whole = graph, scopes, whole
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.half_of: dict[str, str] = {}
        """For a float32 value, the name of the same value in half precision, once there is one."""
        self.nodes: list[onnx.NodeProto] = []

    def run(self) -> None:
        for node in self.graph.node:
            if node.op_type in PRODUCTS and not self._is_whole(node):
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
                self._cast(name, self.half_of[name], onnx.TensorProto.FLOAT16)
        return self.half_of.get(name, name)

    def _halve_weight(self, tensor: onnx.TensorProto) -> None:
        values = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            halved = values.astype(np.float16)
        if not np.isfinite(halved).all():
            largest = np.abs(values).max()
            raise ExportError(f"{tensor.name}: {largest:g} is no float16; export with precision float32")
        self.graph.initializer.append(numpy_helper.from_array(halved, self.half_of[tensor.name]))

    def _emit_half(self, node: onnx.NodeProto) -> None:
        """The node, whose inputs are in half precision now, and its outputs in both precisions."""
        outputs = list(node.output)
        node.output[:] = [f"{name}.half" for name in outputs]
        self.nodes.append(node)
        for name in outputs:
            self.half_of[name] = f"{name}.half"
            self._cast(f"{name}.half", name, onnx.TensorProto.FLOAT)

    def _cast(self, source: str, target: str, kind: int) -> None:
        self.nodes.append(onnx.helper.make_node("Cast", [source], [target], name=f"cast.{target}", to=kind))


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
