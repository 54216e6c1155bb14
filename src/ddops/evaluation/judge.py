"""Who looks at images: one interface, the digits classifier and the Inception network behind it."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddops.config.evaluation import DigitsFeaturesConfig
from ddops.evaluation.images import from_uint8
from ddops.files import atomic_path
from ddops.models.classifier import DigitsClassifier
from ddops.models.errors import CheckpointError


class Sight(NamedTuple):
    """What a judge sees of a batch: features (B, F), and class logits (B, K) if it has classes."""

    features_BF: Tensor
    logits_BK: Tensor | None


class Judge(ABC):
    """Sees uint8 images (B, I, H, W) as features, which the figures are computed in."""

    name: str
    sha256: str
    """Of the weights: figures of other weights do not compare."""
    feature_dim: int
    knows_classes: bool
    """Whether its classes are those that images are asked for by."""

    @abstractmethod
    def see(self, images_BIHW: Tensor) -> Sight:
        """Features and logits of a batch; no gradients."""


class DigitsJudge(Judge):
    """The digits classifier: 64 penultimate features, ten classes."""

    name = "digits_classifier"
    knows_classes = True

    def __init__(self, classifier: DigitsClassifier, sha256: str = "") -> None:
        self.classifier, self.sha256 = classifier, sha256
        self.feature_dim = classifier.project.out_features

    @torch.no_grad()
    def see(self, images_BIHW: Tensor) -> Sight:
        features_BF = self.classifier.features(from_uint8(images_BIHW))
        return Sight(features_BF, self.classifier.classify(features_BF))


def new_classifier(config: DigitsFeaturesConfig) -> DigitsClassifier:
    """An untrained classifier."""
    return DigitsClassifier(channels=config.channels, feature_dim=config.feature_dim, dropout=config.dropout)


def save_classifier(path: Path, classifier: DigitsClassifier, config: DigitsFeaturesConfig) -> None:
    """Write weights and hyper-parameters atomically."""
    shape = {"channels": config.channels, "feature_dim": config.feature_dim, "dropout": config.dropout}
    with atomic_path(path) as temporary:
        save_file(classifier.state_dict(), temporary, metadata={"classifier": json.dumps(shape)})


def load_classifier(path: Path) -> DigitsClassifier:
    """The trained classifier, in evaluation mode and without gradients.

    Raises:
        CheckpointError: not a classifier's weights.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shape = json.loads((file.metadata() or {})["classifier"])
        classifier = DigitsClassifier(**shape)
        classifier.load_state_dict(load_file(path))
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a digits classifier ({error}); run the stage features again") from error
    return classifier.eval().requires_grad_(False)
