"""The figures, by torch-fidelity's functions on features that were computed once. Nothing goes through its cache, which
is keyed by a name alone, nor through its own moments, which have the features' precision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddops.config.evaluation import EvaluateConfig
from ddops.evaluation.errors import MetricError
from ddops.evaluation.judge import Judge
from ddops.evaluation.moments import Moments, Statistics

INCEPTION_SPLITS = 10
DISTANCE_ROWS = 2500
"""Rows of the distance matrix that precision and recall hold at a time."""


@dataclass(frozen=True)
class Seen:
    """Everything a judge saw of some images: features (N, F) float32, class logits (N, K) where it has classes."""

    features_NF: Tensor
    logits_NK: Tensor | None
    statistics: Statistics


@dataclass(frozen=True)
class Reference:
    """What samples are compared with."""

    statistics: Statistics
    features_NF: Tensor | None
    """Of the real images, where those are at hand: KID, precision and recall need them."""
    sha256: str
    """Of the file or the images it was made of."""


def look(judge: Judge, batches: Iterable[Tensor]) -> Seen:
    """Show a judge uint8 images (B, I, H, W), batch by batch; only the features are kept.

    Raises:
        MetricError: fewer than two images.
    """
    features, logits, moments = [], [], Moments(judge.feature_dim)
    for images_BIHW in batches:
        sight = judge.see(images_BIHW)
        moments.add(sight.features_BF)
        features.append(sight.features_BF.float().cpu())
        if sight.logits_BK is not None:
            logits.append(sight.logits_BK.float().cpu())
    statistics = moments.statistics()
    return Seen(torch.cat(features), torch.cat(logits) if logits else None, statistics)


def seen_features(features_NF: Tensor) -> Seen:
    """Of features that a judge has computed already, (N, F)."""
    moments = Moments(features_NF.shape[1])
    moments.add(features_NF)
    return Seen(features_NF, None, moments.statistics())


def frechet_distance(samples: Statistics, reference: Statistics, *, judged: bool = True) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the distance of two Gaussians (arXiv 1706.08500).

    Where nothing is judged by it, as on the curve of a model that has yet to learn to draw more than one image, a
    singular covariance is let through.

    Raises:
        MetricError: other features, or a covariance that is singular.
    """
    if samples.mean_F.shape != reference.mean_F.shape:
        raise MetricError(
            f"the samples have {len(samples.mean_F)} features, the reference {len(reference.mean_F)}: another network"
        )
    if judged:
        samples.require_regular("samples")
    reference.require_regular("reference")
    from ddops.evaluation import fidelity

    pair = [{"mu": one.mean_F, "sigma": one.covariance_FF} for one in (samples, reference)]
    return float(fidelity.fid_statistics_to_metric(*pair, verbose=False)[fidelity.KEY_METRIC_FID])


def inception_score(logits_NK: Tensor) -> float:
    """exp of the mean divergence of a sample's classes from all samples' (arXiv 1606.03498), mean of ten splits."""
    if len(logits_NK) < INCEPTION_SPLITS:
        raise MetricError(f"the Inception score has {INCEPTION_SPLITS} splits, got {len(logits_NK)} samples")
    from ddops.evaluation import fidelity

    return float(fidelity.isc_features_to_metric(logits_NK, splits=INCEPTION_SPLITS)[fidelity.KEY_METRIC_ISC_MEAN])


def kernel_distance(samples_NF: Tensor, reference_NF: Tensor, subsets: int, subset_size: int) -> float:
    """Squared maximum mean discrepancy under the cubic kernel (arXiv 1801.01401), mean over random subsets."""
    if min(len(samples_NF), len(reference_NF)) < subset_size:
        raise MetricError(
            f"KID draws subsets of {subset_size}, but there are {len(samples_NF)} samples and {len(reference_NF)} real "
            "images: lower evaluate.kid.subset_size"
        )
    from ddops.evaluation import fidelity

    # float64: cubes of inner products cancel in float32.
    pair = (samples_NF.double(), reference_NF.double())
    options = {"kid_subsets": subsets, "kid_subset_size": subset_size, "rng_seed": 2020, "verbose": False}
    return float(fidelity.kid_features_to_metric(*pair, **options)[fidelity.KEY_METRIC_KID_MEAN])


def precision_recall(samples_NF: Tensor, reference_NF: Tensor, neighbours: int) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991): share of samples within the real images' k-nearest-neighbour
    balls, and the other way round."""
    if min(len(samples_NF), len(reference_NF)) <= neighbours:
        raise MetricError(f"precision and recall with {neighbours} neighbours need more images than that")
    from ddops.evaluation import fidelity

    # float64: in float32, cdist's differences of squares lose what near neighbours differ by.
    pair = (samples_NF.double(), reference_NF.double())
    options = {"prc_neighborhood": neighbours, "prc_batch_size": DISTANCE_ROWS, "save_cpu_ram": True, "verbose": False}
    found = fidelity.prc_features_to_metric(*pair, **options)
    return float(found[fidelity.KEY_METRIC_PRECISION]), float(found[fidelity.KEY_METRIC_RECALL])


def measure(
    seen: Seen, labels_N: Tensor, reference: Reference, judge: Judge, settings: EvaluateConfig
) -> dict[str, float]:
    """Every figure that the judge and the reference allow, by name.

    Raises:
        MetricError: a figure that should be there cannot be computed.
    """
    figures = {"fid": frechet_distance(seen.statistics, reference.statistics)}
    if seen.logits_NK is not None:
        figures["inception_score"] = inception_score(seen.logits_NK)
        if judge.knows_classes:
            figures["accuracy"] = float((seen.logits_NK.argmax(1) == labels_N).double().mean())
    if reference.features_NF is not None:
        kid = settings.kid
        figures["kid"] = kernel_distance(seen.features_NF, reference.features_NF, kid.subsets, kid.subset_size)
        samples_NF = seen.features_NF[: settings.precision_recall_samples or None]
        figures["precision"], figures["recall"] = precision_recall(
            samples_NF, reference.features_NF, settings.neighbours
        )
    return figures
