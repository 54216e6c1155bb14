"""Whether a backend of a bundle draws PyTorch's images: the parity of an engine, where there is a GPU to run it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from ddops.export.errors import BundleError
from ddops.export.manifest import Manifest
from ddops.export.parity import Drawing, Parity, compare
from ddops.inference.backends import Backend, example_conditions, load_backend
from ddops.sampling.noise import Stream, normals_array

MIN_PSNR: Final = {"float32": 30.0, "float16": 30.0, "bfloat16": 25.0}
"""Decibels asked of an engine by its graph's precision *(ours)*. TensorRT takes float32 through TF32, which has the
digits of float16."""


def compare_with_torch(directory: Path, manifest: Manifest, other: Backend, images: int = 16) -> Parity:
    """Draw the same images with PyTorch on the CPU and with ``other``. Tokens are not compared: an engine gives images
    alone. Raises BundleError where the bundle's weights are damaged."""
    reference = load_backend(directory, manifest, "torch")
    return compare(_drawing(reference, manifest, images, None), _drawing(other, manifest, images, other.max_batch))


def require_images(parity: Parity, manifest: Manifest, what: str) -> None:
    """Raises:
    BundleError: the images differ from PyTorch's by more than the graph's precision explains.
    """
    least = MIN_PSNR[manifest.onnx.precision]
    if not parity.psnr >= least:
        raise BundleError(
            f"{what} does not draw PyTorch's images: PSNR {parity.psnr:.1f} dB over {parity.images} images, "
            f"{least:g} dB are asked for in {manifest.onnx.precision}; build it again, or use backend onnx"
        )


def _drawing(backend: Backend, manifest: Manifest, images: int, most: int | None) -> Drawing:
    model = manifest.model
    noise_BLC = normals_array(0, Stream.SAMPLE_NOISE, np.arange(images), (model.length, model.code_dim))
    inputs = (noise_BLC, *example_conditions(model, images))
    size = most or images
    parts = [backend.draw(*(each[first : first + size] for each in inputs)) for first in range(0, images, size)]
    return np.concatenate(parts), np.zeros((images, 0), dtype=np.int64)
