"""Stage ``evaluate``: judge every row's samples by the protocol; mean and spread over its seeds."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from ddops.config.evaluation import EvaluateConfig
from ddops.evaluation.rows import RECONSTRUCTION
from ddops.evaluation.ruler import open_ruler
from ddops.evaluation.samples import open_samples
from ddops.files import write_json, write_text
from ddops.reports import read_samples_manifest
from ddops.stages import paths
from ddops.stages.common import StageError, require, run_stage
from ddops.stages.statistics import asked, statistics_file


def evaluate(evaluate: EvaluateConfig) -> None:
    """Write ``reports/metrics.json`` and the same table as CSV for ``dvc plots``.

    Raises:
        StageError: there are no samples. ReportError: the manifest beside them is damaged.
        MetricError: a figure cannot be computed.
    """
    ruler = open_ruler(
        evaluate,
        require(paths.CLASSIFIER, "features"),
        statistics_file(evaluate),
        asked(evaluate, paths.EVALUATE_CAPTIONS),
    )
    manifest = read_samples_manifest(require(paths.SAMPLES_MANIFEST, "sample"))
    directories = sorted(path for path in paths.SAMPLES.iterdir() if path.is_dir())
    if not directories:
        raise StageError(f"{paths.SAMPLES} holds no samples: they are made by the stage sample")

    if strange := {path.name for path in directories} - {RECONSTRUCTION, *manifest["rows"]}:
        raise StageError(
            f"{paths.SAMPLES_MANIFEST}: says nothing of {', '.join(sorted(strange))}; run dvc repro sample again"
        )
    rows: dict[str, dict[str, Any]] = {}
    for directory in tqdm(directories, desc="evaluate", unit="row"):
        runs, files = [], sorted(directory.glob("*.npz"))
        if not files:
            raise StageError(f"{directory} holds no samples; run dvc repro sample again")
        for file in files:
            samples = open_samples(file)
            runs.append(ruler.figures(samples.batches(evaluate.batch_size), samples.labels_N))
        rows[directory.name] = {
            **summary(runs),
            "samples": len(samples),
            "runs": len(runs),
            **manifest["rows"].get(directory.name, {}),
        }
    protocol = {**ruler.facts(), "drawing_sha256": manifest["drawing_sha256"]}
    write_json(paths.METRICS, {"protocol": protocol, "models": manifest["models"], **rows})
    write_text(paths.ROWS_TABLE, _csv(rows))


def summary(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of every figure over the runs, and its standard deviation (0 where there is one run)."""
    result = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        result[name] = statistics.mean(values)
        result[f"{name}_spread"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return result


def _csv(rows: dict[str, dict[str, Any]]) -> str:
    names = [name for name in next(iter(rows.values())) if name not in ("samples", "runs", "passes", "parameters")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", *names])
    for row, values in sorted(rows.items(), key=lambda item: float(item[1]["fid"])):
        writer.writerow([row, *(values[name] for name in names)])
    return text.getvalue()


if __name__ == "__main__":
    run_stage(evaluate)
