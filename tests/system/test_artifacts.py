"""What a run shows of its figures and of the gate's decision, without a server."""

import json

import pytest

from ddops.config.evaluation import GateOverride
from ddops.evaluation.gate import Check, Decision, Verdict
from ddops.flows import artifacts
from helpers import tiny_pipeline
from helpers.repository import make_repository

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


PROTOCOL = {
    "name": "digits",
    "features_sha256": "e" * 64,
    "kid": {"subsets": 10, "subset_size": 1000},
    "asked_for": "16 samples a real image",
    "seeds": [1, 2, 3],
}


def figures(fid, **facts):
    return {"protocol": {**PROTOCOL, **facts}, "dd1_1step": {"fid": fid}}


def in_production(workspace, metrics):
    registry = {"current": "v1.0.0", "versions": {"v1.0.0": {"metrics": metrics}}, "history": []}
    write(workspace, artifacts.paths.PRODUCTION, registry)


def at_head(workspace, metrics):
    """As the figures of a project's last commit."""
    make_repository(workspace)
    write(workspace, artifacts.paths.METRICS, metrics)
    tiny_pipeline.git(workspace, "add", "--all")
    tiny_pipeline.git(workspace, "commit", "--quiet", "--message", "production")


@pytest.mark.parametrize(
    ("place", "facts", "change", "said"),
    [
        (in_production, {}, "+0.5", ""),
        (in_production, {"seeds": [4]}, "+0.5", ""),
        (in_production, {"features_sha256": "f" * 64}, "", "features_sha256"),
        (in_production, {"asked_for": "8 samples a real image"}, "", "asked_for"),
        (in_production, {"kid": {"subsets": 10, "subset_size": 100}}, "", "kid"),
        (in_production, {"kid": None, "asked_for": "50,000"}, "", "asked_for, kid"),
        (at_head, {"seeds": [4]}, "+0.5", ""),
        (at_head, {"kid": None, "asked_for": "50,000"}, "", "asked_for, kid"),
    ],
)
def test_figures_of_another_protocol_are_shown_without_a_change(tmp_path, published, place, facts, change, said):
    workspace = tmp_path / "work"
    place(workspace, figures(10.0, **facts))
    write(workspace, artifacts.paths.METRICS, figures(10.5))
    artifacts.metrics_table(workspace, None)
    rows, description = published["metrics"]
    (row,) = [row for row in rows if row["metric"] == "metrics: dd1_1step.fid"]
    assert row == {"metric": "metrics: dd1_1step.fid", "this run": "10.5", "production": "10", "change": change}
    reason = f"The figures of metrics do not compare, their protocols differ: {said}."
    assert description.endswith(reason) if said else "protocols" not in description


def test_a_first_run_has_nothing_to_compare_with(tmp_path, published):
    write(tmp_path, artifacts.paths.METRICS, figures(10.5))
    in_production(tmp_path, {})
    artifacts.metrics_table(tmp_path, None)
    rows, description = published["metrics"]
    assert {"metric": "metrics: dd1_1step.fid", "this run": "10.5", "production": "", "change": ""} in rows
    assert "protocols" not in description
