"""Training the digits classifier."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddops.data.digits import LabelledImages
from ddops.models.classifier import DigitsClassifier
from ddops.training.device import device_of
from ddops.training.loop import Objective


def split(data: LabelledImages, holdout: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """A random share ``holdout`` kept for measuring accuracy, the rest for training."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    kept = round(len(data) * holdout)
    parts = [LabelledImages(data.images_NIHW[part], data.labels_N[part]) for part in (order[kept:], order[:kept])]
    return parts[0], parts[1]


def classifier_objective(data: LabelledImages) -> Objective:
    """Cross-entropy on images with a little noise, so that its features do not hang on single grey levels."""

    def objective(model: nn.Module, indices_B: Tensor, step: int) -> Mapping[str, Tensor]:
        images_BIHW = data.images_NIHW[indices_B].to(device_of(model))
        logits_BK = model(images_BIHW + 0.1 * torch.randn_like(images_BIHW))
        labels_B = data.labels_N[indices_B].to(logits_BK.device)
        accuracy = (logits_BK.argmax(1) == labels_B).float().mean()
        return {"loss": F.cross_entropy(logits_BK, labels_B), "accuracy": accuracy}

    return objective


@torch.no_grad()
def accuracy(classifier: DigitsClassifier, data: LabelledImages) -> float:
    """Share of images classified correctly; NaN-free even for an empty set, where it is refused.

    Raises:
        ValueError: no images.
    """
    if not len(data):
        raise ValueError("no held-out images: features.holdout must be above 0 to measure an accuracy")
    predicted_N = classifier(data.images_NIHW.to(device_of(classifier))).argmax(1).cpu()
    return float((predicted_N == data.labels_N).double().mean())
