"""Running a TensorRT engine: deserialise, allocate once for the largest batch, infer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddops.export.errors import BundleError
from ddops.export.manifest import OUTPUT_NAME, Manifest, verify_files
from ddops.export.tensorrt import Flavour, choose_engine, import_flavour, this_machine


class EngineSession:
    """An engine on the GPU with its buffers. Not for several threads at once."""

    def __init__(self, directory: Path, manifest: Manifest, flavour: Flavour) -> None:
        """Raises:
        BundleError: no engine of the bundle fits this machine, or its file is damaged.
        """
        self.facts = choose_engine(manifest, this_machine(flavour))
        verify_files(directory, {self.facts.file: self.facts.sha256})
        trt = import_flavour(flavour)
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)
        path = directory / self.facts.file
        engine: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise BundleError(f"{path}: {flavour} {self.facts.version} does not load this engine; build it again")
        self._engine, self._context = engine, engine.create_execution_context()
        self._stream = torch.cuda.Stream()
        model, batch = manifest.model, self.facts.profile.max
        image = (model.image_channels, model.image_size, model.image_size)
        self._inputs = {
            name: torch.empty(batch, *shape, dtype=getattr(torch, dtype), device="cuda")
            for name, (shape, dtype) in model.inputs.items()
        }
        self._images_BIHW = torch.empty(batch, *image, device="cuda")

    def run(self, noise_BLC: NDArray[np.float32], *condition: NDArray[Any]) -> NDArray[np.float32]:
        """Images (B, I, H, W) in [-1, 1]; raises ValueError for a batch outside the engine's profile."""
        batch, profile = len(noise_BLC), self.facts.profile
        if not profile.min <= batch <= profile.max:
            raise ValueError(f"a batch of {batch}: {self.facts.file} is built for {profile.min} to {profile.max}")
        with torch.cuda.stream(self._stream):
            for (name, buffer), values in zip(self._inputs.items(), (noise_BLC, *condition), strict=True):
                self._feed(name, buffer, values)
            self._context.set_tensor_address(OUTPUT_NAME, self._images_BIHW.data_ptr())
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise BundleError(f"{self.facts.file}: the engine failed to run")
            images: NDArray[np.float32] = self._images_BIHW[:batch].to("cpu", copy=True).numpy()
        return images

    def _feed(self, name: str, buffer: Tensor, values: NDArray[Any]) -> None:
        buffer[: len(values)].copy_(torch.from_numpy(values))
        self._context.set_input_shape(name, values.shape)
        self._context.set_tensor_address(name, buffer.data_ptr())
