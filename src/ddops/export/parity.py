"""Whether an exported model draws the images of the PyTorch model it was made of; and if not, from where on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddops.config.stages import GraphPrecision
from ddops.export.errors import ExportError
from ddops.export.graph import OneStepGraph
from ddops.export.manifest import OUTPUT_NAME
from ddops.export.session import open_session, run_outputs
from ddops.models.conditions import Condition, flat, take

if TYPE_CHECKING:
    from ddops.export.onnx import ExportTrace

SMALLEST_ERROR = 1e-20
"""Mean squared error that stands for none, so that the PSNR of equal images is a number (206 dB)."""

Floats = NDArray[np.float32]
Drawing = tuple[Floats, NDArray[np.int64]]
"""Images (B, I, H, W) in [-1, 1], and the tokens (B, n) that an argmax decided, step after step."""
Drawer = Callable[[Tensor, Condition], Drawing]


@dataclass(frozen=True)
class Parity:
    """Differences from PyTorch over the same noise and labels; pixels are in [-1, 1]."""

    images: int
    largest: float
    mean: float
    psnr: float
    """Decibels, of all pixels together."""
    equal_tokens: float
    """Share of the tokens decided by an argmax that are the same; 1 where there are none."""


@dataclass(frozen=True)
class ParityBounds:
    """What is asked of a :class:`Parity`; ``largest`` None where single pixels may differ (half precision)."""

    largest: float | None
    psnr: float
    equal_tokens: float


@torch.inference_mode()
def draw_with_torch(graph: OneStepGraph, noise_BLC: Tensor, labels_B: Condition) -> Drawing:
    """What PyTorch draws, and the tokens on the way."""
    images_BIHW, ids_Bn = graph.draw(noise_BLC, labels_B)
    return images_BIHW.numpy(), ids_Bn.numpy()


def onnx_drawer(path: Path, precision: GraphPrecision = "float32") -> Drawer:
    """A function that draws with ONNX Runtime on the CPU."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    argmaxes = [node.output[0] for node in model.graph.node if node.op_type == "ArgMax"]
    session = open_session(path, extra_outputs=dict.fromkeys(argmaxes, onnx.TensorProto.INT64), precision=precision)

    def draw(noise_BLC: Tensor, labels_B: Condition) -> Drawing:
        values = run_outputs(session, _arrays(noise_BLC, labels_B), [OUTPUT_NAME, *argmaxes])
        empty = np.zeros((len(noise_BLC), 0), dtype=np.int64)
        return values[0], np.concatenate([empty, *values[1:]], axis=1)

    return draw


def compare(expected: Drawing, drawn: Drawing) -> Parity:
    """Raises :class:`ExportError` where the shapes differ."""
    shapes = [(expected[0].shape, drawn[0].shape), (expected[1].shape, drawn[1].shape)]
    for what, (wanted, made) in zip(("images", "tokens"), shapes, strict=True):
        if wanted != made:
            raise ExportError(f"{what}: PyTorch makes {wanted}, the exported model {made}")
    difference = drawn[0].astype(np.float64) - expected[0]
    squared = max(float(np.mean(difference**2)), SMALLEST_ERROR)
    return Parity(
        images=len(difference),
        largest=float(np.abs(difference).max()),
        mean=float(np.abs(difference).mean()),
        psnr=10 * math.log10(4 / squared),
        equal_tokens=float(np.mean(expected[1] == drawn[1])) if expected[1].size else 1.0,
    )


def measure_parity(
    graph: OneStepGraph, draw: Drawer, noise_BLC: Tensor, labels_B: Condition, batch_size: int = 64
) -> Parity:
    """Draw the same images with PyTorch and with ``draw``, and compare."""
    slices = [slice(first, first + batch_size) for first in range(0, len(noise_BLC), batch_size)]
    batches = [(noise_BLC[rows], take(labels_B, rows)) for rows in slices]
    expected = [draw_with_torch(graph, *batch) for batch in batches]
    return compare(_joined(expected), _joined([draw(*batch) for batch in batches]))


def _arrays(noise_BLC: Tensor, labels_B: Condition) -> list[NDArray[Any]]:
    return [part.numpy() for part in (noise_BLC, *flat(labels_B))]


def _joined(drawings: list[Drawing]) -> Drawing:
    images, tokens = zip(*drawings, strict=True)
    return np.concatenate(images), np.concatenate(tokens)


def broken_bounds(parity: Parity, bounds: ParityBounds) -> list[str]:
    """One sentence a bound that is not met; a figure that is not a number meets none."""
    broken = []
    if bounds.largest is not None and not parity.largest <= bounds.largest:
        broken.append(f"a pixel differs by {parity.largest:.3g}, export.tolerance allows {bounds.largest:g}")
    if not parity.psnr >= bounds.psnr:
        broken.append(f"PSNR {parity.psnr:.1f} dB, export.min_psnr asks for {bounds.psnr:g}")
    if not parity.equal_tokens >= bounds.equal_tokens:
        broken.append(
            f"{parity.equal_tokens:.2%} of the tokens are equal, export.min_equal_tokens asks for "
            f"{bounds.equal_tokens:.2%}"
        )
    return broken


def require_parity(
    parity: Parity, bounds: ParityBounds, path: Path, trace: ExportTrace, noise_BLC: Tensor, labels_B: Condition
) -> None:
    """Raises:
    ExportError: a bound is not met; names the first tensor that differs on these inputs.
    """
    if broken := broken_bounds(parity, bounds):
        tolerance = bounds.largest if bounds.largest is not None else 0.05
        where = first_divergence(trace, path, noise_BLC, labels_B, tolerance)
        raise ExportError(
            f"{path}: ONNX Runtime does not draw PyTorch's images ({parity.images} compared): {'; '.join(broken)}. "
            f"{where or 'No tensor differs by itself: the differences add up'}"
        )


@torch.inference_mode()
def first_divergence(
    trace: ExportTrace, path: Path, noise_BLC: Tensor, labels_B: Condition, tolerance: float
) -> str | None:
    """A sentence on the first value, in the order of the graph, that differs by more than ``tolerance`` of its own
    largest magnitude (or of 1, where that is smaller); None where there is none."""
    import onnx

    expected = _torch_values(trace.program, noise_BLC, labels_B)
    model = onnx.load(path, load_external_data=False)
    made = [name for node in model.graph.node for name in node.output]
    names = [name for name in made if name in expected and name != OUTPUT_NAME]
    session = open_session(path, extra_outputs=dict.fromkeys(names, onnx.TensorProto.FLOAT))
    values = run_outputs(session, _arrays(noise_BLC, labels_B), names)
    for name, value in zip(names, values, strict=True):
        wanted = expected[name]
        if wanted.shape != value.shape:
            continue
        difference = float(np.abs(value - wanted).max(initial=0.0))
        if not difference <= tolerance * max(1.0, float(np.abs(wanted).max(initial=0.0))):
            return f"The difference starts at the tensor {name!r} in {trace.scopes.get(name) or 'the graph itself'}"
    return None


def _torch_values(program: torch.export.ExportedProgram, noise_BLC: Tensor, labels_B: Condition) -> dict[str, Floats]:
    """Every float value of the traced program, by name."""
    kept: dict[str, Floats] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and value.dtype == torch.float32 and n.op == "call_function":
                kept[n.name] = value.numpy()
            return value

    stored = {**program.state_dict, **program.constants}
    inputs = iter((noise_BLC, *flat(labels_B)))
    arguments = [
        next(inputs) if spec.target is None else stored[spec.target] for spec in program.graph_signature.input_specs
    ]
    Recorder(program.graph_module).run(*arguments)
    return kept
