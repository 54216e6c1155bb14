"""The digits classifier on disk."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ddops.config.stages import DigitsFeaturesConfig
from ddops.files import atomic_path
from ddops.models.classifier import DigitsClassifier
from ddops.models.errors import CheckpointError


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
