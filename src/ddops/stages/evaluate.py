"""Stage ``evaluate``: judge every row's samples by the protocol; mean and spread over its seeds."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ddops.config.evaluation import EvaluateConfig
from ddops.evaluation.device import accelerator
from ddops.evaluation.rows import RECONSTRUCTION
from ddops.evaluation.ruler import Ruler, open_ruler
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
    files = {directory.name: sorted(directory.glob("*.npz")) for directory in directories}
    if empty := [row for row, found in files.items() if not found]:
        raise StageError(f"{paths.SAMPLES / empty[0]} holds no samples; run dvc repro sample again")
    figures = _judge([file for row in files.values() for file in row], ruler, evaluate)
    rows: dict[str, dict[str, Any]] = {
        row: {
            **summary([figures[file] for file in judged]),
            "samples": len(open_samples(judged[0])),
            "runs": len(judged),
            **manifest["rows"].get(row, {}),
        }
        for row, judged in files.items()
    }
    protocol = {**ruler.facts(), "drawing_sha256": manifest["drawing_sha256"]}
    write_json(paths.METRICS, {"protocol": protocol, "models": manifest["models"], **rows})
    write_text(paths.ROWS_TABLE, _csv(rows))


def _judge(files: Sequence[Path], ruler: Ruler, evaluate: EvaluateConfig) -> dict[Path, dict[str, float]]:
    """The figures of every file of samples; on a CPU several files at a time, in threads: what they share is read."""

    def figures(file: Path) -> dict[str, float]:
        samples = open_samples(file)
        return ruler.figures(samples.batches(evaluate.batch_size), samples.labels_N)

    with ThreadPoolExecutor(evaluate.processes if accelerator().type == "cpu" else 1) as pool:
        judged = tqdm(pool.map(figures, files), total=len(files), desc="evaluate", unit="file")
        return dict(zip(files, judged, strict=True))


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
