"""Stage ``features``: train the judge, the digits classifier whose features every figure is computed in."""

from __future__ import annotations

from ddops.config.stages import FeaturesConfig, InceptionFeaturesConfig
from ddops.data import digits
from ddops.evaluation.judge import new_classifier, save_classifier
from ddops.files import write_json
from ddops.pretrain.classifier import accuracy, classifier_objective, split
from ddops.stages import paths
from ddops.stages.checkpoints import checkpoint_file
from ddops.stages.common import inception_not_built, run_stage
from ddops.training.loop import seeded, train


def features(seed: int, features: FeaturesConfig) -> None:
    """Train on all but the held-out images, measure on those.

    Raises:
        StageError: the features are not the digits classifier's.
    """
    if isinstance(features, InceptionFeaturesConfig):
        raise inception_not_built("features.name inception")
    training, heldout = split(digits.load(), features.holdout, seed)
    classifier = seeded(seed, lambda: new_classifier(features))
    checkpoint = checkpoint_file("classifier", [seed, features])
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
    write_json(paths.FEATURES_METRICS, {"heldout_accuracy": accuracy(classifier, heldout), "heldout": len(heldout)})
    checkpoint.remove()


if __name__ == "__main__":
    run_stage(features)
