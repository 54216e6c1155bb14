"""Stage ``evaluate``: judge every row's samples by the protocol; mean and spread over its seeds."""

from __future__ import annotations

import csv
import io
import statistics
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from ddops.config.stages import DigitsEvaluateConfig, EvaluateConfig
from ddops.data import digits
from ddops.evaluation.fid import class_accuracy, make_fid
from ddops.evaluation.images import to_uint8
from ddops.evaluation.judge import load_classifier
from ddops.files import sha256_file, write_json, write_text
from ddops.stages import paths
from ddops.stages.common import StageError, inception_not_built, require, run_stage


def evaluate(evaluate: EvaluateConfig) -> None:
    """Write ``reports/metrics.json`` and the same table as CSV for ``dvc plots``.

    Raises:
        StageError: the protocol is not ``digits``, or there are no samples.
    """
    if not isinstance(evaluate, DigitsEvaluateConfig):
        raise inception_not_built(f"evaluate.protocol {evaluate.protocol}")
    classifier_file = require(paths.CLASSIFIER, "features")
    classifier = load_classifier(classifier_file)
    data = digits.load()
    fid = make_fid(classifier, to_uint8(data.images_NIHW))
    files = sorted(require(paths.SAMPLES, "sample").glob("*.safetensors"))
    if not files:
        raise StageError(f"{paths.SAMPLES} holds no samples: they are made by the stage sample")

    rows: dict[str, dict[str, Any]] = {}
    for file in tqdm(files, desc="evaluate", unit="row"):
        runs = list(load_file(file).values())
        labels_N = data.labels_N[torch.arange(len(runs[0])) % len(data)]
        fids = [fid(images) for images in runs]
        accuracies = [class_accuracy(classifier, images, labels_N) for images in runs]
        rows[file.stem] = {
            "fid": statistics.mean(fids),
            "fid_spread": statistics.stdev(fids) if len(fids) > 1 else 0.0,
            "accuracy": statistics.mean(accuracies),
            "samples": len(runs[0]),
            "runs": len(runs),
        }
    protocol = {
        "name": evaluate.protocol,
        "reference_images": len(data),
        "features_sha256": sha256_file(classifier_file),
        "seeds": list(evaluate.seeds),
    }
    write_json(paths.METRICS, {"protocol": protocol, **rows})
    write_text(paths.ROWS_TABLE, _csv(rows))


def _csv(rows: dict[str, dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "fid", "fid_spread", "accuracy"])
    for name, row in sorted(rows.items(), key=lambda item: float(item[1]["fid"])):
        writer.writerow([name, row["fid"], row["fid_spread"], row["accuracy"]])
    return text.getvalue()


if __name__ == "__main__":
    run_stage(evaluate)
