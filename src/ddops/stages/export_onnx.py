"""Stage ``export_onnx``: the accepted student as one ONNX graph in a bundle, compared with PyTorch before it counts."""

from __future__ import annotations

import json
from dataclasses import asdict

from ddops.config.dd2 import DD2Config, NotTrainedConfig
from ddops.config.stages import DD1Config, ExportConfig
from ddops.export.bundle import Sources, write_bundle
from ddops.export.errors import ExportError
from ddops.export.manifest import MODEL
from ddops.export.provenance import provenance
from ddops.files import write_json
from ddops.models.weights import TOKENIZER, load_metadata
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
    row = f"{export.student}_{export.steps}step"
    if row not in metrics:
        raise StageError(f"{paths.METRICS} has no row {row}: a model that was not judged is not exported")
    sources = _sources(dd1, dd2, export)
    facts = provenance(preset, export, sources.student) | {
        "ddops.protocol": metrics["protocol"]["name"],
        "ddops.fid": f"{metrics[row]['fid']:.4f}",
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


def _sources(dd1: DD1Config, dd2: DD2Config, export: ExportConfig) -> Sources:
    tokenizer = require(paths.TOKENIZER, "teacher")
    if export.student == "dd1" or isinstance(dd2, NotTrainedConfig):
        return Sources(require(paths.DD1_STUDENT, "distill_dd1"), tokenizer, dd1.start_positions, dd1.logit_prefix)
    config, _ = load_metadata(tokenizer, TOKENIZER)
    logit_prefix = dd2.logit_prefix(len(config.level_sizes))
    return Sources(require(paths.DD2_GENERATOR, "distill_dd2"), tokenizer, dd1.start_positions, logit_prefix)


if __name__ == "__main__":
    run_stage(export)
