"""Running an exported model with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ddops.config.stages import GraphPrecision
from ddops.export.errors import BundleError
from ddops.export.manifest import EXTERNAL_SUFFIX, OUTPUT_NAME
from ddops.extras import MissingExtra, explained

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def open_session(
    path: Path,
    device: str = "cpu",
    threads: int = 0,
    extra_outputs: Mapping[str, int] = {},
    precision: GraphPrecision = "float32",
) -> onnxruntime.InferenceSession:
    """A session on ``cpu`` or ``cuda``.

    ``threads`` 0 leaves their number to the runtime. ``extra_outputs`` (name -> ONNX element type) are inner values
    to be returned as well; the file is not changed. On a CPU a graph of ``precision`` bfloat16 computes in float32
    between its roundings. Only a graph that is changed so needs the package onnx.

    Raises:
        BundleError: a device that is unknown, or does not start. MissingExtra: one whose package is not installed, or
            onnx is not.
    """
    provider = _provider(device)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    source: str | bytes = str(path)
    if extra_outputs or (precision == "bfloat16" and device == "cpu"):
        source = _changed(path, extra_outputs, widened=device == "cpu")
        folder = _weights(path).parent
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(source, options, providers=[provider])
    if provider not in session.get_providers():  # a library of it did not load: the runtime warns and takes the CPU
        raise BundleError(
            f"ONNX Runtime could not start {provider} and would have run on the CPU; its warning above names what is "
            "missing (for CUDA: the CUDA and cuDNN libraries of the version that onnxruntime-gpu was built for)"
        )
    return session


def _changed(path: Path, extra_outputs: Mapping[str, int], *, widened: bool) -> bytes:
    """The graph with more outputs, its products in float32 where they are ``widened``."""
    try:
        import onnx

        from ddops.export.precision import widen_products
    except ImportError as error:
        raise explained(error, f"{path}: a graph in bfloat16 on a CPU") from None
    model = onnx.load(path, load_external_data=False)
    if widened:
        widen_products(model)
    for name, kind in extra_outputs.items():
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = _weights(path).name
    return bytes(model.SerializeToString())


def _weights(path: Path) -> Path:
    """The file of the external weights. In the Hugging Face cache ``path`` and the weights are links to files
    elsewhere, and the runtime opens no weights by a link out of the folder it was given."""
    return path.with_name(path.name + EXTERNAL_SUFFIX).resolve()


def _provider(device: str) -> str:
    if device not in PROVIDERS:
        raise BundleError(f"no device {device!r} for ONNX Runtime; valid: {', '.join(PROVIDERS)}")
    if PROVIDERS[device] in onnxruntime.get_available_providers():
        return PROVIDERS[device]
    if any(metadata.distributions(name="onnxruntime-gpu")):
        raise BundleError(
            f"ONNX Runtime has no {PROVIDERS[device]}, though onnxruntime-gpu is installed: onnxruntime was written "
            "over it, into the same directory. pip install --force-reinstall --no-deps onnxruntime-gpu"
        )
    raise MissingExtra(f"ONNX Runtime on {device}", "gpu", ImportError(f"no {PROVIDERS[device]}"))


def run_session(
    session: onnxruntime.InferenceSession, noise_BLC: NDArray[np.float32], *condition: NDArray[Any]
) -> NDArray[np.float32]:
    """Images (B, I, H, W) in [-1, 1]; the condition is a label (B,), or features (B, T, W) and mask (B, T)."""
    images: NDArray[np.float32] = run_outputs(session, (noise_BLC, *condition), [OUTPUT_NAME])[0]
    return images


def run_outputs(
    session: onnxruntime.InferenceSession, inputs: Sequence[NDArray[Any]], names: Sequence[str]
) -> list[NDArray[Any]]:
    """The named outputs; inputs in the graph's order."""
    feed = dict(zip((each.name for each in session.get_inputs()), inputs, strict=True))
    values: list[NDArray[Any]] = session.run(list(names), feed)
    return values
