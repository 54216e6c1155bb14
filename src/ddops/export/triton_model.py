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


class TritonPythonModel:
    """What Triton looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the graph."""
        directory = Path(args["model_repository"]) / args["model_version"]
        facts = json.loads((directory / "model.json").read_text())
        self.noise_shape = facts["length"], facts["code_dim"]
        self.condition = facts["condition"]
        self.session = onnxruntime.InferenceSession(str(directory / "model.onnx"), providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Draw the images of all requests as one batch."""
        seeds, indices, *condition = (
            [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            for name in ("seed", "index", *self.condition)
        )
        noise_BLC = np.concatenate(
            [
                normals_array(int(seed), Stream.SAMPLE_NOISE, np.array([index]), self.noise_shape)
                for seed, index in zip(np.concatenate(seeds)[:, 0], np.concatenate(indices)[:, 0], strict=True)
            ]
        )
        feed = {"noise": noise_BLC}
        for name, values in zip(self.condition, condition, strict=True):
            feed[name] = np.concatenate(values)[:, 0] if name == "class_label" else np.concatenate(values)
        (images_BIHW,) = self.session.run(["images"], feed)
        pixels_BHWI = np.clip(np.rint((images_BIHW + 1) * 127.5), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
        ends = np.cumsum([len(seeds_b) for seeds_b in seeds])
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("pixels", np.ascontiguousarray(part))])
            for part in np.split(pixels_BHWI, ends[:-1])
        ]
