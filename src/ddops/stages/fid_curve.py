"""The FID that a training stage watches: the digits judge, on fewer samples than the evaluation's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ddops.data import digits
from ddops.evaluation.fid import make_fid
from ddops.evaluation.images import to_uint8
from ddops.evaluation.judge import load_classifier
from ddops.evaluation.rows import Protocol, collect
from ddops.stages import paths

CURVE_BATCH: Final = 1000
CURVE_SEED: Final = 2**31
"""Seed of the samples behind the curves: none of the seeds that the evaluation uses."""


class FIDCurve:
    """Judges what ``decode(sample indices, labels) -> images`` draws."""

    def __init__(self, count: int) -> None:
        data = digits.load()
        self._protocol = Protocol(data.labels_N, count, CURVE_BATCH)
        self._fid = make_fid(load_classifier(paths.CLASSIFIER), to_uint8(data.images_NIHW))

    def __call__(self, decode: Callable[[NDArray[np.int64], Tensor], Tensor]) -> float:
        return self._fid(collect(self._protocol, "fid", decode))
