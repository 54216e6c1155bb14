"""Stage ``report``: the page for people."""

from __future__ import annotations

from typing import Any, Final

from ddops.config.stages import ExportConfig
from ddops.evaluation.provenance import provenance
from ddops.evaluation.report import FIGURES, chart, embed_png, grids, read_curve, render, table, title
from ddops.evaluation.summary import summary
from ddops.files import write_json, write_text
from ddops.reports import (
    FACTS,
    ExportReport,
    Judge,
    read_decision,
    read_export,
    read_judge,
    read_metrics,
    require_values,
)
from ddops.stages import paths
from ddops.stages.common import require, run_stage

PROTOCOL: Final = ("name", "features", "features_sha256", "labels", "quantisation", "reference_sha256", "seeds")
"""Of the protocol's facts those that the page shows."""


def report(preset: str, seed: int, export: ExportConfig) -> None:
    """Write ``reports/index.html``, ``reports/model_card.md`` and ``reports/summary.json``, of a refused model too."""
    metrics = read_metrics(require(paths.METRICS, "evaluate"))
    decision = read_decision(require(paths.GATE_DECISION, "gate"))
    judge = read_judge(require(paths.FEATURES_METRICS, "features"))
    exported = read_export(paths.EXPORT_METRICS) if decision["passed"] else None
    _require_shown(metrics, judge, exported, export)
    values = {
        "preset": preset,
        "seed": seed,
        "summary": _sentence(metrics, export),
        "exported": title(export.row),
        "table": table(metrics),
        "protocol": metrics["protocol"],
        "samples": max(row["samples"] for name, row in metrics.items() if name not in FACTS),
        "judge": judge,
        "decision": decision,
        "export": exported,
        "provenance": provenance(metrics),
    }
    pictures = {
        "grids": grids(paths.GRIDS),
        "interpolations": grids(paths.GRIDS, interpolations=True),
        "progress": _progress(),
    }
    write_text(paths.REPORT, render("report.html", **values, **pictures, charts=_charts()))
    write_text(paths.MODEL_CARD, render("model_card.md", **values))
    write_json(paths.SUMMARY, summary(metrics, export.row))


def _require_shown(metrics: dict[str, Any], judge: Judge, exported: ExportReport | None, export: ExportConfig) -> None:
    """All that the page and the card show.

    Raises:
        ReportError: a file lacks some of it.
    """
    keys = [f"protocol.{name}" for name in PROTOCOL]
    for name, row in {export.row: {}, **{key: row for key, row in metrics.items() if key not in FACTS}}.items():
        spreads = [f"{figure}_spread" for figure in FIGURES if figure in row and row.get("runs", 1) > 1]
        keys += [f"{name}.{key}" for key in ("fid", "samples", *spreads, *(["passes"] if name == "teacher" else []))]
    digits = metrics.get("protocol", {}).get("name") == "digits"
    keys += [f"protocol.{name}" for name in (["reference_images"] if digits else ["feature_dim", "resize"])]
    require_values(paths.METRICS, metrics, keys, "evaluate")
    require_values(paths.FEATURES_METRICS, judge, ["heldout_accuracy" if digits else "origin"], "features")
    if exported is not None:
        compared = ["exported.fid", "pytorch.fid"] if "fid_loss" in exported else []
        parity = [f"parity.{name}" for name in ("images", "largest", "mean")]
        require_values(paths.EXPORT_METRICS, exported, ["bytes", "steps", *parity, *compared], "export_onnx")


def _sentence(metrics: dict[str, Any], export: ExportConfig) -> str:
    """What is exported, beside the teacher, and DD1's student where that is another one."""
    student, teacher = metrics[export.row], metrics.get("teacher")
    if teacher is None:
        return f"{title(export.row)}, FID {student['fid']:.2f}."
    dd1 = metrics.get(f"dd1_{export.steps}step") if export.student != "dd1" else None
    beside = f", DD1's student has {dd1['fid']:.2f}" if dd1 else ""
    return (
        f"{teacher['passes']} teacher steps in {export.steps}: {title(export.row)}, FID {student['fid']:.2f} against "
        f"the teacher's {teacher['fid']:.2f}{beside}."
    )


def _progress() -> list[tuple[str, str]]:
    """The generator's samples while DD2 trained, the same noise and classes in each."""
    files = sorted((paths.CURVES / "dd2").glob("samples_*.png"))
    return [(f"DD2 after {int(file.stem.removeprefix('samples_'))} updates", embed_png(file)) for file in files]


def _charts() -> list[tuple[str, str]]:
    """A chart a training; none of what was fetched."""
    dd1_fids = sorted(path.stem for path in (paths.CURVES / "dd1" / "plots" / "metrics").glob("fid_*.tsv"))
    dd2_fids = sorted(path.stem for path in (paths.CURVES / "dd2" / "plots" / "metrics").glob("fid_*.tsv"))
    wanted = [
        ("DD2: FID of the EMA generator while training", "dd2", dd2_fids, "FID", True),
        ("DD2: divergence from the teacher", "dd2", ["kl"], "nats a token", False),
        ("DD2: the two posterior means' difference", "dd2", ["score_gap"], "mean square", True),
        ("DD2: loss of the guidance network", "dd2", ["guidance_loss"], "nats a token", False),
        ("AR-diffusion: error of the posterior mean", "ar_diffusion", ["excess"], "mean square", True),
        ("DD1: FID of the EMA student while training", "dd1", dd1_fids, "FID", True),
        ("DD1: losses", "dd1", ["cross_entropy", "embedding_error", "perceptual"], "value", True),
        ("DD1: share of tokens predicted as the flow map does", "dd1", ["accuracy"], "accuracy", False),
        ("Teacher: cross-entropy", "teacher", ["loss"], "nats a token", False),
        ("Tokenizer: reconstruction error", "tokenizer", ["reconstruction_error"], "MSE", True),
        ("Classifier: cross-entropy", "classifier", ["loss"], "loss", True),
    ]
    charts = []
    for heading, stage, names, unit, log in wanted:
        files = [paths.CURVES / stage / "plots" / "metrics" / f"{name}.tsv" for name in names]
        if curves := {file.stem: read_curve(file) for file in files if file.exists()}:
            charts.append((heading, chart(curves, unit, log=log)))
    return charts


if __name__ == "__main__":
    run_stage(report)
