"""From model outputs to bytes: quantisation, grids, pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddops.files import atomic_path


def to_uint8(images_BIHW: Tensor) -> Tensor:
    """Images in [-1, 1] to 0..255, clamped and rounded to the nearest level, uint8 of the same shape."""
    return images_BIHW.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(images_BIHW: Tensor) -> Tensor:
    """The inverse of :func:`to_uint8`, up to its rounding; float32 in [-1, 1]."""
    return images_BIHW.float().div(127.5).sub(1)


def grid(images_BIHW: Tensor, columns: int, *, scale: int = 1, margin: int = 1) -> Image.Image:
    """uint8 images laid out row by row, each pixel enlarged ``scale`` times, ``margin`` unscaled pixels apart."""
    count, channels, height, width = images_BIHW.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + margin) + margin, columns * (width + margin) + margin, channels), 255, np.uint8)
    for index, image_HWI in enumerate(images_BIHW.permute(0, 2, 3, 1).numpy()):
        top = margin + (index // columns) * (height + margin)
        left = margin + (index % columns) * (width + margin)
        canvas[top : top + height, left : left + width] = image_HWI
    picture = Image.fromarray(canvas[..., 0] if channels == 1 else canvas)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG atomically."""
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")
