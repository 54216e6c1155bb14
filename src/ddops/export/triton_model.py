"""Triton's Python backend: seeds, indices and class labels, or encoded captions, in; pixels out. Copied into a bundle
as ``model.py``.

It runs beside a copy of ``ddops/sampling/noise.py`` and needs NumPy and ONNX Runtime, neither ddops nor PyTorch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils
from ddops_noise import Stream, normals_array

NUMBERS = ("seed", "index", "class_label")
"""Inputs of one number an image."""


class TritonPythonModel:
    """What Triton looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the graph."""
        directory = Path(args["model_repository"]) / args["model_version"]
        facts = json.loads((directory / "model.json").read_text())
        self.noise_shape = facts["length"], facts["code_dim"]
        self.num_classes = facts["num_classes"]
        self.condition = facts["condition"]
        self.session = onnxruntime.InferenceSession(str(directory / "model.onnx"), providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Draw the images of all requests as one batch. A request that cannot be drawn is answered with an error of its
        own, and does not disturb those it shares the batch with."""
        inputs = [self._read(request) for request in requests]
        problems = [self._problem(each) for each in inputs]
        drawn = iter(self._draw([each for each, problem in zip(inputs, problems, strict=True) if problem is None]))
        return [_answer(next(drawn)) if problem is None else _error(problem) for problem in problems]

    def _read(self, request: Any) -> dict[str, np.ndarray]:
        """The request's inputs (B, ...) by name; numbers as (B,)."""
        names = ("seed", "index", *self.condition)
        inputs = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names}
        return {name: value[:, 0] if name in NUMBERS else value for name, value in inputs.items()}

    def _problem(self, inputs: dict[str, np.ndarray]) -> str | None:
        """What of a request the graph must not see: it would draw some picture for any number."""
        if (inputs["index"] < 0).any():
            return "index is 0 or more"
        label_B = inputs.get("class_label")
        if label_B is not None and ((label_B < 0) | (label_B >= self.num_classes)).any():
            return f"class_label is in 0..{self.num_classes - 1}, got {label_B.tolist()}"
        return None

    def _draw(self, requests: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
        """Images (B, I, H, W) of each request."""
        if not requests:
            return []
        joint = {name: np.concatenate([each[name] for each in requests]) for name in requests[0]}
        pairs = zip(joint.pop("seed"), joint.pop("index"), strict=True)
        noise_1LC = [normals_array(int(s), Stream.SAMPLE_NOISE, np.array([i]), self.noise_shape) for s, i in pairs]
        (images_BIHW,) = self.session.run(["images"], {"noise": np.concatenate(noise_1LC), **joint})
        ends = np.cumsum([len(each["seed"]) for each in requests])
        return list(np.split(images_BIHW, ends[:-1]))


def _answer(images_BIHW: np.ndarray) -> Any:
    if not np.isfinite(images_BIHW).all():
        return _error("the model made values that are no numbers")
    pixels_BHWI = np.clip(np.rint((images_BIHW + 1) * 127.5), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return pb_utils.InferenceResponse([pb_utils.Tensor("pixels", np.ascontiguousarray(pixels_BHWI))])


def _error(message: str) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))
