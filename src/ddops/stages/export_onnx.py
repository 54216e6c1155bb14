"""Stage ``export_onnx``: the accepted student as one ONNX graph in a bundle, compared with PyTorch before it counts:
image by image, and by the figures of the protocol.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddops.captions.conditions import open_conditions
from ddops.config.dd2 import DD2Config
from ddops.config.evaluation import EvaluateConfig
from ddops.config.stages import DD1Config, ExportConfig
from ddops.evaluation.drawing import Indices, Request, draw_batches, sample_noise
from ddops.evaluation.protocols import open_protocol
from ddops.evaluation.ruler import Ruler, open_ruler
from ddops.evaluation.samples import open_samples
from ddops.export.bundle import find_sources, write_bundle
from ddops.export.errors import ExportError
from ddops.export.manifest import MANIFEST, MODEL, model_digests, read_manifest
from ddops.export.provenance import provenance
from ddops.export.session import open_session, run_session
from ddops.files import sha256_file, write_json
from ddops.models.conditions import flat
from ddops.models.weights_dd2 import load_generator
from ddops.reports import read_decision, read_metrics
from ddops.stages import paths
from ddops.stages.common import StageError, require, run_stage
from ddops.stages.statistics import asked, statistics_file


def export(preset: str, dd1: DD1Config, dd2: DD2Config, evaluate: EvaluateConfig, export: ExportConfig) -> None:
    """Write ``artifacts/onnx`` and ``reports/export.json``: parity, and what the export cost of the protocol's FID.

    Raises:
        StageError: the gate refused the model, the graph differs from PyTorch, or its FID is worse by too much.
    """
    gate = read_decision(require(paths.GATE_DECISION, "gate"))
    if not gate["passed"]:
        raise StageError(f"the gate refused this model ({paths.GATE_DECISION}): nothing is exported")
    metrics = read_metrics(require(paths.METRICS, "evaluate"))
    if export.row not in metrics:
        raise StageError(f"{paths.METRICS} has no row {export.row}: a model that was not judged is not exported")
    student = require(paths.STUDENTS[export.student], f"distill_{export.student}")
    if (found := sha256_file(student)) != gate["student_sha256"]:
        judged = gate["student_sha256"][:12]
        raise StageError(f"{paths.GATE_DECISION}: judged {judged}, {student} is {found[:12]}; run dvc repro gate")
    sources = find_sources(student, require(paths.TOKENIZER, "teacher"), paths.CAPTIONS, dd1, dd2, export)
    facts = provenance(preset, export, sources.student) | {
        "ddops.protocol": metrics["protocol"]["name"],
        "ddops.fid": f"{metrics[export.row]['fid']:.4f}",
    }
    try:
        parity = write_bundle(paths.ONNX_BUNDLE, sources, export, facts)
    except ExportError as error:
        raise StageError(str(error)) from error
    size = sum(file.stat().st_size for file in paths.ONNX_BUNDLE.glob(f"{MODEL}*"))
    report = {
        "parity": asdict(parity),
        "precision": export.precision,
        "bytes": size,
        "steps": export.steps,
        "sha256": model_digests(read_manifest(paths.ONNX_BUNDLE)),
    }
    if export.max_fid_loss is not None:
        report |= _compared(evaluate, export, export.max_fid_loss)
    write_json(paths.EXPORT_METRICS, report)


def judge_exported(evaluate: EvaluateConfig, export: ExportConfig) -> dict[str, Any]:
    """Every figure of the ONNX graph at the protocol's first seed, with the noise and labels of the student's row, and
    the facts of the ruler. Under ``pytorch`` the figures of the samples that PyTorch drew of the same noise and labels,
    None where they are not there: sampling noise does not stand between those two."""
    student = load_generator(paths.TOKENIZER, paths.STUDENTS[export.student])
    session = open_session(paths.ONNX_BUNDLE / MODEL, precision=export.precision)
    code_dim = session.get_inputs()[0].shape[-1]
    conditions = open_conditions(paths.EVALUATE_CAPTIONS, student)

    def draw(seed: int, indices_B: Indices, labels_B: Tensor) -> Tensor:
        noise_BLC = sample_noise(seed, indices_B, student, code_dim)
        given = (part.numpy() for part in flat(conditions.given(labels_B)))
        return torch.from_numpy(run_session(session, noise_BLC.numpy(), *given))

    protocol, ruler, seed = open_protocol(evaluate), _ruler(evaluate), evaluate.seeds[0]
    before = None
    if (file := _samples_file(evaluate, export)).exists():
        samples = open_samples(file)
        before = ruler.figures(samples.batches(evaluate.batch_size), samples.labels_N)
    labels_N = protocol.labels(seed, conditions)
    request = Request(labels_N, evaluate.batch_size)
    batches = draw_batches(draw, request, seed, "exported", protocol.image_size)
    after = ruler.figures(batches, conditions.classes_K[labels_N])
    facts = {**ruler.facts(), "seeds": [seed]}
    return {"protocol": facts, "samples": len(labels_N), "exported": after, "pytorch": before}


def _compared(evaluate: EvaluateConfig, export: ExportConfig, most: float) -> dict[str, Any]:
    """The graph's figures beside PyTorch's, and the FID that was lost."""
    require(_samples_file(evaluate, export), "sample")
    judged = judge_exported(evaluate, export)
    before, after = judged["pytorch"]["fid"], judged["exported"]["fid"]
    if not after - before <= most * before:
        # It is not what was judged, so nobody may take it for that.
        (paths.ONNX_BUNDLE / MANIFEST).unlink()
        raise StageError(
            f"the exported graph draws worse: FID {after:.4g}, PyTorch {before:.4g} from the same noise; "
            f"export.max_fid_loss allows {most:.1%} more"
        )
    return {**judged, "fid_loss": after - before}


def _samples_file(evaluate: EvaluateConfig, export: ExportConfig) -> Path:
    return paths.SAMPLES / export.row / f"seed{evaluate.seeds[0]}.npz"


def _ruler(evaluate: EvaluateConfig) -> Ruler:
    return open_ruler(
        evaluate,
        require(paths.CLASSIFIER, "features"),
        statistics_file(evaluate),
        asked(evaluate, paths.EVALUATE_CAPTIONS),
    )


if __name__ == "__main__":
    run_stage(export)
