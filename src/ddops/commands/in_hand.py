"""Is what lies in the workspace what was judged? The decision, the bundle, what is said of it, how its graph draws."""

from __future__ import annotations

from typing import Any

from ddops.commands.arguments import CommandError
from ddops.commands.repository import stale_stages
from ddops.config.stages import Config
from ddops.evaluation.gate import comparable, decide
from ddops.export.manifest import STUDENT_FILE, TOKENIZER_FILE, Manifest, model_digests, read_manifest, verify_files
from ddops.files import sha256_file
from ddops.reports import read_decision, read_export, read_metrics
from ddops.stages import paths
from ddops.stages.common import ModelRefusedError, StageError, drawing_of


def fresh_decision(config: Config) -> dict[str, Any]:
    """The gate's decision, made anew on the files in hand: a model that changed since is not the one that passed.

    Raises:
        ModelRefusedError: it is a refusal.
        CommandError: there is none, or it was of another model.
    """
    from ddops.stages.gate import decide_now

    if not paths.GATE_DECISION.exists():
        raise CommandError(f"{paths.GATE_DECISION}: missing; run dvc repro gate")
    try:
        decided = decide_now(config.gate, config.evaluate, config.export, drawing_of(config))
    except StageError as error:
        raise CommandError(str(error)) from error
    recorded = read_decision(paths.GATE_DECISION)
    if not decided.passed:
        raise ModelRefusedError("the gate refuses this model\n  " + "\n  ".join(decided.failed()))
    if recorded["student_sha256"] != decided.student_sha256 or not recorded["passed"]:
        raise CommandError(f"{paths.GATE_DECISION}: is of another model or refused it; run dvc repro gate")
    return decided.plain()


def exported_files(config: Config) -> dict[str, str]:
    """The bundle's files and their hashes, if the bundle is the configuration's, of the weights in hand, and if that is
    what the export's figures and the model card are of.

    Raises:
        BundleError: there is no bundle, or a file of it is damaged.
        CommandError: it is another.
    """
    manifest = read_manifest(paths.ONNX_BUNDLE)
    graph = model_digests(manifest)
    verify_files(paths.ONNX_BUNDLE, {**manifest.files, **graph})
    if different := _differences(manifest, config):
        said = "\n  ".join(different)
        raise CommandError(
            f"{paths.ONNX_BUNDLE}: is not of this configuration and these files; run dvc repro\n  {said}"
        )
    if not paths.EXPORT_METRICS.exists() or read_export(paths.EXPORT_METRICS)["sha256"] != graph:
        raise CommandError(f"{paths.EXPORT_METRICS}: missing, or of another graph than the bundle's; run dvc repro")
    if paths.MODEL_CARD.exists():
        card = paths.MODEL_CARD.read_text(encoding="utf-8")
        if not all(sha256 in card for sha256 in (manifest.files[STUDENT_FILE], *graph.values())):
            raise CommandError(f"{paths.MODEL_CARD}: is of another model or graph; run dvc repro")
    files = sorted(file for file in paths.ONNX_BUNDLE.rglob("*") if file.is_file())
    return {str(file.relative_to(paths.ONNX_BUNDLE)): sha256_file(file) for file in files}


def _differences(manifest: Manifest, config: Config) -> list[str]:
    from ddops.export.bundle import logit_prefix  # loads torch

    dd1, export, model = config.dd1, config.export, manifest.model
    levels = len(config.teacher.model.level_sizes)
    facts: dict[str, tuple[object, object]] = {
        "preset": (manifest.facts.get("ddops.preset"), config.preset),
        "student": (manifest.files.get(STUDENT_FILE), sha256_file(paths.STUDENTS[export.student])),
        "tokenizer": (manifest.files.get(TOKENIZER_FILE), sha256_file(paths.TOKENIZER)),
        "steps": (model.steps, export.steps),
        "precision": (manifest.onnx.precision, export.precision),
        "opset": (manifest.onnx.opset, export.opset),
        "start positions": (model.start_positions, dd1.start_positions),
        "logit prefix": (model.logit_prefix, logit_prefix(dd1, config.dd2, export, levels)),
    }
    return [f"{name}: {found}, in hand is {wanted}" for name, (found, wanted) in facts.items() if found != wanted]


def require_consistent(target: str) -> None:
    """DVC must have nothing to do up to a stage: else settings that did not make the model would be committed as its.

    Raises:
        CommandError: a stage is out of date.
    """
    if stale := stale_stages(target):
        said = "\n  ".join(f"{stage}: {', '.join(names)}" for stage, names in stale.items())
        raise CommandError(
            f"stages are out of date, so what is here did not all make the model; run dvc repro\n  {said}"
        )


def judge_export(config: Config) -> dict[str, Any]:
    """Figures of the graph's own samples, by the protocol that the model was judged by, at its first seed. The rules
    have them under ``exported``, and under ``pytorch`` those of PyTorch's samples of the same noise and labels; where
    these were not kept, the student's row, of all seeds.

    Raises:
        ModelRefusedError: an export rule fails.
        CommandError: it is another protocol by now.
    """
    from ddops.stages.export_onnx import judge_exported

    judged = judge_exported(config.evaluate, config.export)
    metrics = read_metrics(paths.METRICS)
    if different := comparable(metrics["protocol"], judged["protocol"]):
        raise CommandError(
            f"{paths.METRICS}: the model was judged by another protocol than its graph is now: {', '.join(different)}; "
            "run dvc repro"
        )
    exported, pytorch = judged["exported"], judged["pytorch"] or metrics[config.export.row]
    report = read_export(paths.EXPORT_METRICS)
    known = {**metrics, "export": report, "exported": exported, "pytorch": pytorch}
    verdicts = decide(known, config.gate.export_rules, row=config.export.row)
    if failed := [verdict.sentence() for verdict in verdicts if not verdict.passed]:
        raise ModelRefusedError("the exported graph is refused\n  " + "\n  ".join(failed))
    return {
        "protocol": judged["protocol"],
        "figures": exported,
        "pytorch": judged["pytorch"],
        "rules": [verdict.sentence() for verdict in verdicts],
    }
