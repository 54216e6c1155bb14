"""The FID, and recall, that a training stage watches: the digits judge, on fewer samples than the evaluation's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from ddops.captions.conditions import Conditions
from ddops.data import digits
from ddops.evaluation.drawing import Indices, Request, draw_batches
from ddops.evaluation.images import to_uint8
from ddops.evaluation.judge import DigitsJudge, load_classifier
from ddops.evaluation.metrics import Seen, frechet_distance, look, precision_recall, seen_features
from ddops.stages import paths
from ddops.training.replicas import gathered, own_part

CURVE_BATCH: Final = 500
CURVE_SEED: Final = 2**31
"""Seed of the samples behind the curves: none of the seeds that the evaluation uses."""
NEIGHBOURS: Final = 3
"""k of precision and recall, as in the evaluation."""


class FIDCurve:
    """Judges what ``decode(sample indices, labels) -> images`` draws."""

    def __init__(self, count: int, conditions: Conditions) -> None:
        data = digits.load()
        labels_N = conditions.of_images(data.labels_N)
        self._labels_N = labels_N[torch.arange(count) % len(data)]
        self._judge = DigitsJudge(load_classifier(paths.CLASSIFIER))
        self._reference = look(self._judge, to_uint8(data.images_NIHW).split(CURVE_BATCH))

    def __call__(self, decode: Callable[[Indices, Tensor], Tensor]) -> float:
        return self.fid(self.see(decode))

    def see(self, decode: Callable[[Indices, Tensor], Tensor]) -> Seen:
        """What the judge sees of the samples; in a training of several processes, which all call this, they share them.

        Raises:
            ReplicaLost: one of the processes ended.
        """
        count = len(self._labels_N)
        part = own_part(count)
        request = Request(self._labels_N[part], CURVE_BATCH, shown=part.start == 0, first=part.start)
        batches = draw_batches(lambda _, indices_B, labels_B: decode(indices_B, labels_B), request, 0, "fid")
        features_NF = torch.cat([self._judge.see(images_BIHW).features_BF.float().cpu() for images_BIHW in batches])
        return seen_features(gathered(features_NF, count))

    def fid(self, seen: Seen) -> float:
        """Of a singular covariance too: a model that has yet to learn may draw one image only."""
        return frechet_distance(seen.statistics, self._reference.statistics, judged=False)

    def recall(self, seen: Seen) -> float:
        """Share of the real images that lie among the samples; as many samples as there are images."""
        real_NF = self._reference.features_NF
        return precision_recall(seen.features_NF[: len(real_NF)], real_NF, NEIGHBOURS)[1]
