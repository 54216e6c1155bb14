"""Stage ``features``: the judge in whose features every figure is computed: trained here, or fetched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ddops.config.evaluation import FeaturesConfig, InceptionFeaturesConfig
from ddops.data import digits
from ddops.evaluation.judge import new_classifier, save_classifier
from ddops.files import write_json
from ddops.pretrain.classifier import accuracy, classifier_objective, split
from ddops.stages import paths
from ddops.stages.checkpoints import checkpoint_file
from ddops.stages.common import run_stage
from ddops.training.device import training_device
from ddops.training.loop import seeded, train


def features(seed: int, features: FeaturesConfig) -> None:
    """Write the judge: train the classifier on all but the held-out images, or fetch the published network.

    Raises:
        CheckpointError: the published weights cannot be had, or are not Inception's.
    """
    if isinstance(features, InceptionFeaturesConfig):
        _fetch(features)
        return
    training, heldout = split(digits.load(), features.holdout, seed)
    classifier = seeded(seed, lambda: new_classifier(features)).to(training_device(features.training.processes))
    checkpoint = checkpoint_file("features", "classifier", [seed, features])
    with _one_thread():
        state = train(
            classifier,
            classifier_objective(training),
            config=features.training,
            seed=seed,
            dataset_size=len(training),
            checkpoint=checkpoint,
            curves_dir=paths.CURVES / "classifier",
            description="classifier",
        )
    classifier.load_state_dict(state)
    save_classifier(paths.CLASSIFIER, classifier.eval(), features)
    write_json(
        paths.FEATURES_METRICS,
        {"name": features.name, "heldout_accuracy": accuracy(classifier, heldout), "heldout": len(heldout)},
    )
    checkpoint.remove()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads share a convolution's sums: with another number of them the judge, and all it judges, has other bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fetch(features: InceptionFeaturesConfig) -> None:
    # Here, because they are slow to load and training a classifier needs neither.
    from ddops.evaluation.inception import convert_inception
    from ddops.hub.files import obtain_file

    weights = obtain_file(features.weights, "features.weights")
    convert_inception(weights.path, paths.CLASSIFIER, features.layer)
    write_json(paths.FEATURES_METRICS, {"name": features.name, "layer": features.layer, "origin": weights.origin})
    origin = {"trained": False, "files": [{"origin": weights.origin, "sha256": weights.sha256}]}
    write_json(paths.CURVES / "classifier" / "origin.json", origin)


if __name__ == "__main__":
    run_stage(features, trains="features")
