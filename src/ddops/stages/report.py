"""Stage ``report``: the page for people."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from typing import Any

from ddops.config.stages import GateConfig, TeacherConfig
from ddops.evaluation.gate import decide, decision
from ddops.evaluation.report import TITLES, chart, embed_png, read_curve, render, table
from ddops.files import sha256_file, write_text
from ddops.stages import paths
from ddops.stages.common import require, run_stage


def report(preset: str, seed: int, teacher: TeacherConfig, gate: GateConfig) -> None:
    """Write ``reports/index.html``. Works for a refused model too, which has no export to show."""
    metrics = json.loads(require(paths.METRICS, "evaluate").read_text())
    features = json.loads(require(paths.FEATURES_METRICS, "features").read_text())
    decided = decision(decide(metrics, gate))
    exported = json.loads(paths.EXPORT_METRICS.read_text()) if decided["passed"] else None
    rows = table(metrics, len(teacher.model.level_sizes))
    page = render(
        preset=preset,
        seed=seed,
        summary=_summary(rows),
        rows=rows,
        protocol=metrics["protocol"],
        samples=metrics["teacher"]["samples"],
        heldout_accuracy=features["heldout_accuracy"],
        decision=decided,
        grids=[(TITLES[name], embed_png(paths.GRIDS / f"{name}.png")) for name in TITLES if _has_grid(name)],
        charts=_charts(),
        export=exported,
        provenance=_provenance(),
    )
    write_text(paths.REPORT, page)


def _has_grid(name: str) -> bool:
    return (paths.GRIDS / f"{name}.png").exists()


def _summary(rows: list[Any]) -> str:
    best = min((row for row in rows if row.name == "dd1_1step"), key=lambda row: float(row.fid))
    teacher = next(row for row in rows if row.name == "teacher")
    return f"{teacher.steps} teacher steps in 1, FID {best.fid:.2f} against the teacher's {teacher.fid:.2f}."


def _charts() -> list[tuple[str, str]]:
    def curves(stage: str, *names: str) -> dict[str, tuple[list[int], list[float]]]:
        directory = paths.CURVES / stage / "plots" / "metrics"
        return {name: read_curve(directory / f"{name}.tsv") for name in names if (directory / f"{name}.tsv").exists()}

    dd1_fids = sorted(path.stem for path in (paths.CURVES / "dd1" / "plots" / "metrics").glob("fid_*.tsv"))
    return [
        ("DD1: FID of the EMA student while training", chart(curves("dd1", *dd1_fids), "FID", log=True)),
        ("DD1: losses", chart(curves("dd1", "cross_entropy", "embedding_error", "perceptual"), "value", log=True)),
        ("DD1: share of tokens predicted as the flow map does", chart(curves("dd1", "accuracy"), "accuracy")),
        ("Teacher: cross-entropy", chart(curves("teacher", "loss"), "nats a token")),
        ("Tokenizer: reconstruction error", chart(curves("tokenizer", "reconstruction_error"), "MSE", log=True)),
        ("Classifier: cross-entropy", chart(curves("classifier", "loss"), "loss", log=True)),
    ]


def _provenance() -> dict[str, str]:
    packages = ("ddops", "torch", "torch-fidelity", "onnx", "onnxruntime", "numpy", "scikit-learn")
    files = {"tokenizer": paths.TOKENIZER, "teacher": paths.TRANSFORMER, "DD1 student": paths.DD1_STUDENT}
    facts = {"platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"}
    facts["versions"] = ", ".join(f"{name} {version(name)}" for name in packages)
    return facts | {f"sha256 of the {name}": sha256_file(path) for name, path in files.items() if path.exists()}


if __name__ == "__main__":
    run_stage(report)
