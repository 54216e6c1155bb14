"""Stage ``export_onnx``: the accepted student as one ONNX graph, compared with PyTorch before it takes its place."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import torch

from ddops import __version__
from ddops.config.stages import DD1Config, ExportConfig
from ddops.evaluation.rows import dd1_row, sample_noise
from ddops.export.graph import OneStepGraph
from ddops.export.onnx import ExportError, export_onnx, measure_parity, require_parity
from ddops.files import sha256_file, write_json
from ddops.models.weights import load_student, load_teacher
from ddops.stages import paths
from ddops.stages.common import StageError, require, run_stage

MODEL = paths.ONNX_BUNDLE / "model.onnx"
MANIFEST = paths.ONNX_BUNDLE / "manifest.json"


def export(preset: str, dd1: DD1Config, export: ExportConfig) -> None:
    """Write ``artifacts/onnx`` and the parity figures.

    Raises:
        StageError: the gate refused the model, or the graph differs from PyTorch.
    """
    gate = json.loads(require(paths.GATE_DECISION, "gate").read_text())
    if not gate["passed"]:
        raise StageError(f"the gate refused this model ({paths.GATE_DECISION}): nothing is exported")
    teacher = load_teacher(require(paths.TOKENIZER, "teacher"), require(paths.TRANSFORMER, "teacher"))
    student = load_student(require(paths.DD1_STUDENT, "distill_dd1"))
    graph = OneStepGraph(student, teacher, dd1.start_positions[: export.steps], dd1.logit_prefix).eval()

    indices_B = np.arange(export.parity_count, dtype=np.int64)
    noise_BLC = sample_noise(export.parity_seed, indices_B, student, teacher.codebook_VC.shape[1])
    labels_B = torch.from_numpy(indices_B % student.num_classes)
    facts = _facts(preset, export)
    export_onnx(graph, noise_BLC[:2], labels_B[:2], MODEL, opset=export.opset, metadata=facts)
    parity = measure_parity(graph, MODEL, noise_BLC, labels_B)
    try:
        require_parity(parity, export.tolerance, MODEL)
    except ExportError as error:
        MODEL.unlink()
        raise StageError(str(error)) from error
    inputs = {"noise": [student.layout.length, teacher.codebook_VC.shape[1]], "class_label": student.num_classes}
    write_json(MANIFEST, {**facts, "inputs": inputs, "sha256": sha256_file(MODEL)})
    write_json(paths.EXPORT_METRICS, {"parity": asdict(parity), "bytes": MODEL.stat().st_size, "steps": export.steps})


def _facts(preset: str, export: ExportConfig) -> dict[str, str]:
    metrics = json.loads(require(paths.METRICS, "evaluate").read_text())
    return {
        "ddops.version": __version__,
        "ddops.preset": preset,
        "ddops.student": export.student,
        "ddops.steps": str(export.steps),
        "ddops.student_sha256": sha256_file(paths.DD1_STUDENT),
        "ddops.protocol": metrics["protocol"]["name"],
        "ddops.fid": f"{metrics[dd1_row(export.steps)]['fid']:.4f}",
    }


if __name__ == "__main__":
    run_stage(export)
