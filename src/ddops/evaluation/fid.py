"""Fréchet distance through torch-fidelity, with the protocol's own feature extractor registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddops.evaluation.images import from_uint8
from ddops.models.classifier import DigitsClassifier
from ddops.torchvision_compat import define_missing_operators

define_missing_operators()

from torch_fidelity import calculate_metrics, register_feature_extractor  # noqa: E402
from torch_fidelity.feature_extractor_base import FeatureExtractorBase  # noqa: E402
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY  # noqa: E402

DIGITS_EXTRACTOR = "ddops-digits-classifier"


class MetricError(ValueError):
    """A metric that cannot be computed from what was given."""


class _Uint8Images(Dataset[Tensor]):
    def __init__(self, images_NIHW: Tensor) -> None:
        self.images_NIHW = images_NIHW

    def __len__(self) -> int:
        return len(self.images_NIHW)

    def __getitem__(self, index: int) -> Tensor:
        return self.images_NIHW[index]


def _digits_extractor(classifier: DigitsClassifier) -> type[FeatureExtractorBase]:
    class DigitsFeatures(FeatureExtractorBase):  # type: ignore[misc]
        """Penultimate features of the digits classifier, of uint8 images (B, 1, 8, 8), in float64."""

        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)
            self.classifier = classifier

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("features",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, images_BIHW: Tensor) -> tuple[Tensor, ...]:
            # float64, so that torch-fidelity's mean and covariance are computed in it too.
            return (self.classifier.features(from_uint8(images_BIHW)).double(),)

    return DigitsFeatures


def make_fid(classifier: DigitsClassifier, reference_NIHW: Tensor) -> Callable[[Tensor], float]:
    """A function from uint8 samples (N, I, H, W) to their Fréchet distance to ``reference_NIHW``.

    Raises (from the returned function):
        MetricError: fewer samples than features, so that the covariance would be singular.
    """
    extractor = _digits_extractor(classifier)
    reference = _Uint8Images(reference_NIHW)

    def fid(samples_NIHW: Tensor) -> float:
        feature_dim = classifier.project.out_features
        if len(samples_NIHW) <= feature_dim:
            raise MetricError(
                f"the Fréchet distance in {feature_dim} features needs more than {feature_dim} samples, "
                f"got {len(samples_NIHW)}"
            )
        # torch-fidelity finds extractors by name: at each call ours stands for the classifier in hand.
        FEATURE_EXTRACTORS_REGISTRY.pop(DIGITS_EXTRACTOR, None)
        register_feature_extractor(DIGITS_EXTRACTOR, extractor)
        metrics = calculate_metrics(
            input1=_Uint8Images(samples_NIHW),
            input2=reference,
            fid=True,
            feature_extractor=DIGITS_EXTRACTOR,
            # Its cache is keyed by a name alone and would answer for another classifier or data set.
            cache=False,
            cuda=torch.cuda.is_available(),
            save_cpu_ram=True,
            batch_size=512,
            verbose=False,
        )
        return float(metrics["frechet_inception_distance"])

    return fid


@torch.no_grad()
def class_accuracy(classifier: DigitsClassifier, samples_NIHW: Tensor, labels_N: Tensor) -> float:
    """Share of uint8 samples that the classifier puts into the class they were asked for."""
    predicted_N = torch.cat([classifier(from_uint8(batch)).argmax(1) for batch in samples_NIHW.split(2048)])
    return float((predicted_N == labels_N).double().mean())
