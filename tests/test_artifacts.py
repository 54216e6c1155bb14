"""What a run shows of its figures and of the gate's decision, without a server."""

import json

import pytest

from ddops.config.evaluation import GateOverride
from ddops.evaluation.gate import Check, Decision, Verdict
from flows import artifacts

STALE = Check("the figures are of this dd1", passed=False, detail="the figures are of aaaa, in hand is bbbb")
FRESH = Check("the figures are of this teacher", passed=True, detail="cccc")
MISSED = Verdict("near the teacher", "dd1_1step.fid", 7.5, "at most 2", passed=False)
KEPT = Verdict("near the teacher", "dd1_1step.fid", 1.5, "at most 2", passed=True)
OVERRIDE = GateOverride(student_sha256="d" * 64, by="ada@example.invalid", reason="the demo\nis today")


@pytest.fixture
def published(monkeypatch):
    """What was handed to Prefect, by key: content and description."""
    shown = {}
    for kind in ("markdown", "table"):
        name = f"create_{kind}_artifact"
        monkeypatch.setattr(
            artifacts, name, lambda content, key, description: shown.update({key: (content, description)})
        )
    return shown


def write(workspace, path, values):
    (workspace / path).parent.mkdir(parents=True, exist_ok=True)
    (workspace / path).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("checks", "verdict", "override", "heading"),
    [
        ((FRESH,), KEPT, None, "# Accepted"),
        ((FRESH,), MISSED, None, "# Refused: nothing was exported, production is untouched"),
        ((FRESH,), MISSED, OVERRIDE, "# Overridden: the rules refused the model, it was let through by name"),
        ((FRESH, STALE), KEPT, None, "# Refused: nothing was exported, production is untouched"),
        ((FRESH, STALE), MISSED, OVERRIDE, "# Refused: nothing was exported, production is untouched"),
    ],
)
def test_the_decision_is_shown_as_it_was_made(tmp_path, published, checks, verdict, override, heading):
    decision = Decision(checks, (verdict,), "d" * 64, override)
    write(tmp_path, artifacts.paths.GATE_DECISION, decision.plain())
    artifacts.gate_decision(tmp_path, None)
    lines = published["gate"][0].splitlines()
    assert lines[0] == heading
    assert ("Overridden by ada@example.invalid: the demo is today" in lines) == (decision.outcome == "overridden")
    assert (f"- **failed** {STALE.name}: {STALE.detail}" in lines) == (STALE in checks)
    assert not any(FRESH.name in line for line in lines)
    said = "passed" if verdict.passed else "**failed**"
    assert f"| {said} | near the teacher | dd1_1step.fid = {verdict.value} | at most 2 |" in lines
