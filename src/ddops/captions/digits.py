"""Captions of the embedded digits: "a bold handwritten seven, slanted left", from label, ink and slant.

Slant and thickness are told against the other images of the class: a seven leans by itself. The same images give the
same captions.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from ddops.data.digits import LabelledImages

NUMERALS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
THICKNESS: Final = ("thin ", "", "bold ")
SLANT: Final = (", slanted left", "", ", slanted right")
OUTER: Final = 0.25
"""Share of a class's images that counts as thin, as bold, as slanted left or right."""


class DescribedImages(NamedTuple):
    """Captions of images, each caption once."""

    prompts: list[str]
    classes: list[int]
    """Class of every prompt."""
    of_images: list[int]
    """Number of every image's prompt."""


def describe(data: LabelledImages) -> DescribedImages:
    """A caption for each image."""
    levels_N2 = torch.zeros(len(data), 2, dtype=torch.long)
    measured_N2 = torch.stack([ink(data.images_NIHW), slant(data.images_NIHW)], dim=1)
    for label in data.labels_N.unique():
        here = data.labels_N == label
        bounds_22 = measured_N2[here].quantile(torch.tensor([OUTER, 1 - OUTER], dtype=measured_N2.dtype), dim=0)
        levels_N2[here] = (measured_N2[here] > bounds_22[0]).long() + (measured_N2[here] > bounds_22[1])
    kinds = torch.cat([data.labels_N[:, None], levels_N2], dim=1)
    found, of_images_N = kinds.unique(dim=0, return_inverse=True)
    prompts = [f"a {THICKNESS[ink]}handwritten {NUMERALS[label]}{SLANT[slant]}" for label, ink, slant in found.tolist()]
    return DescribedImages(prompts, found[:, 0].tolist(), of_images_N.tolist())


def ink(images_NIHW: Tensor) -> Tensor:
    """Mean darkness of images in [-1, 1], float64 (N,)."""
    return images_NIHW.double().add(1).div(2).mean((1, 2, 3))


def slant(images_NIHW: Tensor) -> Tensor:
    """By how many pixels the ink moves to the right from one row to the row above, float64 (N,): the regression of
    columns on rows."""
    ink_NHW = images_NIHW.double().add(1).div(2).mean(1)
    total_N = ink_NHW.sum((1, 2))
    rows_H1 = torch.arange(ink_NHW.shape[1], dtype=torch.double)[:, None]
    columns_W = torch.arange(ink_NHW.shape[2], dtype=torch.double)
    down_NHW = rows_H1 - ((ink_NHW * rows_H1).sum((1, 2)) / total_N)[:, None, None]
    across_NHW = columns_W - ((ink_NHW * columns_W).sum((1, 2)) / total_N)[:, None, None]
    return -(ink_NHW * across_NHW * down_NHW).sum((1, 2)) / (ink_NHW * down_NHW.square()).sum((1, 2))
