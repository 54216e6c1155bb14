"""scikit-learn's handwritten digits (UCI Optical Recognition of Handwritten Digits): the embedded data set."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
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
    # Read from the package's file: importing sklearn.datasets takes a second, in every stage. A test compares the two.
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("scikit-learn is not installed: it holds the digits (pip install scikit-learn)")
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    images = torch.from_numpy(table[:, :64].astype(np.float32)).view(-1, 1, 8, 8) / 8 - 1
    return LabelledImages(images, torch.from_numpy(table[:, 64].astype(np.int64)))
