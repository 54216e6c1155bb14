"""scikit-learn's handwritten digits (UCI Optical Recognition of Handwritten Digits): the embedded data set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor


@dataclass(frozen=True)
class LabelledImages:
    """Images (N, I, H, W) in [-1, 1] and their class labels (N,), int64."""

    images_NIHW: Tensor
    labels_N: Tensor

    def __len__(self) -> int:
        return len(self.labels_N)


def load() -> LabelledImages:
    """The 1,797 images of 8x8 pixels, ten classes; 17 grey levels from -1 to 1."""
    data = load_digits()
    images = torch.from_numpy(data.images.astype(np.float32)) / 8 - 1
    return LabelledImages(images[:, None], torch.from_numpy(data.target.astype(np.int64)))
