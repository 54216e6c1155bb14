"""Stage ``gate``: let the model through, or stop the pipeline before anything is exported."""

from __future__ import annotations

import logging

from ddops.config.base import plain
from ddops.config.dd2 import ARDiffusionConfig, DD2Config
from ddops.config.evaluation import DigitsEvaluateConfig, EvaluateConfig, GateConfig
from ddops.config.models import SamplingConfig
from ddops.config.stages import DD1Config, ExportConfig, TrajectoriesConfig
from ddops.evaluation.gate import Decision, gate_decision, recipes_of_figures
from ddops.files import sha256_file, sha256_json, write_json
from ddops.production import metrics_in_production
from ddops.reports import read_metrics
from ddops.stages import paths
from ddops.stages.common import ModelRefusedError, drawing_sha256, require, run_stage

log = logging.getLogger(__name__)


def gate(
    gate: GateConfig,
    evaluate: EvaluateConfig,
    export: ExportConfig,
    sampling: SamplingConfig,
    trajectories: TrajectoriesConfig,
    dd1: DD1Config,
    ar_diffusion: ARDiffusionConfig,
    dd2: DD2Config,
) -> None:
    """Write ``reports/gate.json``. The last five sections are what the samples must have been drawn with.

    Raises:
        ModelRefusedError: a rule failed, or the figures are of another model; the decision is written all the same.
    """
    paths.GATE_DECISION.unlink(missing_ok=True)
    decision = decide_now(gate, evaluate, export, drawing_sha256(sampling, trajectories, dd1, ar_diffusion, dd2))
    write_json(paths.GATE_DECISION, decision.plain())
    if not decision.passed:
        way_out = ""
        if decision.overridable:
            model = decision.student_sha256[:12]
            way_out = f" To let the model {model} through all the same: ddops override --reason WHY"
        raise ModelRefusedError(
            "the model is refused\n  "
            + "\n  ".join(decision.failed())
            + f"\nNothing was exported. Decision: {paths.GATE_DECISION}.{way_out}"
        )
    log.info("\n".join(decision.sentences()))
    if decision.outcome == "overridden" and decision.override is not None:
        log.warning("OVERRIDDEN by %s: %s", decision.override.by, decision.override.reason)


def decide_now(gate: GateConfig, evaluate: EvaluateConfig, export: ExportConfig, drawing: str) -> Decision:
    """The decision on what lies in the workspace now, and of it on the student that is to be exported; ``drawing`` is
    the hash of the settings that samples follow from now.

    Raises:
        StageError: the figures or the model are missing. CheckpointError: so with what the protocol compares with.
    """
    metrics = read_metrics(require(paths.METRICS, "evaluate"))
    files = {
        "tokenizer": require(paths.TOKENIZER, "teacher"),
        "teacher": require(paths.TRANSFORMER, "teacher"),
        "dd1": require(paths.DD1_STUDENT, "distill_dd1"),
    }
    if export.student == "dd2" or paths.DD2_GENERATOR.exists():
        files["dd2"] = require(paths.DD2_GENERATOR, "distill_dd2")
    protocol = {
        "name": evaluate.protocol,
        "recipes": recipes_of_figures(),
        "settings_sha256": sha256_json(plain(evaluate)),
        "features_sha256": sha256_file(require(paths.CLASSIFIER, "features")),
        "drawing_sha256": drawing,
        **_reference(evaluate),
    }
    models = {name: sha256_file(path) for name, path in files.items()}
    production = metrics_in_production(paths.PRODUCTION)
    return gate_decision(
        metrics,
        gate,
        models=models,
        protocol=protocol,
        production=production,
        student=export.student,
        row=export.row,
    )


def _reference(evaluate: EvaluateConfig) -> dict[str, str | None]:
    if isinstance(evaluate, DigitsEvaluateConfig):
        return {}
    from ddops.stages.statistics import reference_facts  # loads torch, which a verdict on digits can do without

    return reference_facts(evaluate, paths.EVALUATE_CAPTIONS)


if __name__ == "__main__":
    run_stage(gate)
