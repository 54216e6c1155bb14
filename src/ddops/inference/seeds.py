"""From seeds to pixels: the noise of an image, and its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddops.export.manifest import ModelFacts
from ddops.sampling.noise import Stream, normals_array

if TYPE_CHECKING:
    from ddops.inference.prompts import PromptEncoder

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Draw:
    """One image to be drawn. It depends on these three and the model, and on nothing else."""

    seed: int
    index: int
    label: int | str
    """Its class, or its prompt."""


def noise_of(draws: Sequence[Draw], model: ModelFacts) -> NDArray[np.float32]:
    """Noise sequences (B, L, C), each from its own seed and index."""
    shape = (model.length, model.code_dim)
    rows = [normals_array(draw.seed, Stream.SAMPLE_NOISE, np.array([draw.index]), shape) for draw in draws]
    return np.concatenate(rows)


def condition_of(draws: Sequence[Draw], encode: PromptEncoder | None) -> tuple[NDArray[Any], ...]:
    """What a model takes beside the noise: labels (B,), or through ``encode`` features (B, T, W) and mask (B, T)."""
    if encode is None:
        return (np.array([draw.label for draw in draws], dtype=np.int64),)
    return encode([str(draw.label) for draw in draws])


def to_pixels(images_BIHW: NDArray[np.float32]) -> Pixels:
    """Images in [-1, 1] as uint8 (B, H, W, I), rounded to the nearest level."""
    levels = np.clip(np.rint((images_BIHW + 1) * 127.5), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(0, 2, 3, 1))


def to_picture(pixels_HWI: Pixels) -> Image.Image:
    """A grey or colour picture."""
    return Image.fromarray(pixels_HWI[..., 0] if pixels_HWI.shape[-1] == 1 else pixels_HWI)
