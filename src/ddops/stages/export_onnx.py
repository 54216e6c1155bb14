"""Stage ``export_onnx``: the accepted student as one ONNX graph in a bundle, compared with PyTorch before it counts."""

from __future__ import annotations

import json
from dataclasses import asdict

from ddops.config.dd2 import DD2Config
from ddops.config.stages import DD1Config, ExportConfig
from ddops.export.bundle import find_sources, write_bundle
from ddops.export.errors import ExportError
from ddops.export.manifest import MODEL
from ddops.export.provenance import provenance
from ddops.files import write_json
from ddops.stages import paths
from ddops.stages.common import StageError, require, run_stage


def export(preset: str, dd1: DD1Config, dd2: DD2Config, export: ExportConfig) -> None:
    """Write ``artifacts/onnx`` and the parity figures.

    Raises:
        StageError: the gate refused the model, or the graph differs from PyTorch.
    """
    gate = json.loads(require(paths.GATE_DECISION, "gate").read_text())
    if not gate["passed"]:
        raise StageError(f"the gate refused this model ({paths.GATE_DECISION}): nothing is exported")
    metrics = json.loads(require(paths.METRICS, "evaluate").read_text())
    if export.row not in metrics:
        raise StageError(f"{paths.METRICS} has no row {export.row}: a model that was not judged is not exported")
    student = require(paths.STUDENTS[export.student], f"distill_{export.student}")
    sources = find_sources(student, require(paths.TOKENIZER, "teacher"), dd1, dd2, export)
    facts = provenance(preset, export, sources.student) | {
        "ddops.protocol": metrics["protocol"]["name"],
        "ddops.fid": f"{metrics[export.row]['fid']:.4f}",
    }
    try:
        parity = write_bundle(paths.ONNX_BUNDLE, sources, export, facts)
    except ExportError as error:
        raise StageError(str(error)) from error
    size = sum(file.stat().st_size for file in paths.ONNX_BUNDLE.glob(f"{MODEL}*"))
    write_json(
        paths.EXPORT_METRICS,
        {"parity": asdict(parity), "precision": export.precision, "bytes": size, "steps": export.steps},
    )


if __name__ == "__main__":
    run_stage(export)
