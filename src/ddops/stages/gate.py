"""Stage ``gate``: let the model through, or stop the pipeline before anything is exported."""

from __future__ import annotations

import json
import logging

from ddops.config.stages import GateConfig
from ddops.evaluation.gate import decide, decision
from ddops.files import write_json
from ddops.stages import paths
from ddops.stages.common import ModelRefusedError, require, run_stage

log = logging.getLogger(__name__)


def gate(gate: GateConfig) -> None:
    """Write ``reports/gate.json``.

    Raises:
        ModelRefusedError: a rule failed; the decision file is written all the same.
    """
    metrics = json.loads(require(paths.METRICS, "evaluate").read_text())
    verdicts = decide(metrics, gate)
    write_json(paths.GATE_DECISION, decision(verdicts))
    lines = [verdict.sentence() for verdict in verdicts]
    if failed := [line for line, verdict in zip(lines, verdicts, strict=True) if not verdict.passed]:
        raise ModelRefusedError(
            "the model is refused\n  "
            + "\n  ".join(failed)
            + f"\nNothing was exported. Decision: {paths.GATE_DECISION}"
        )
    log.info("\n".join(lines))


if __name__ == "__main__":
    run_stage(gate)
