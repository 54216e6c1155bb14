"""The gate: figures of another model, protocol or day do not pass, overrides are by name, production measures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ddops.cli import main
from ddops.config.base import plain
from ddops.config.evaluation import GateConfig, GateOverride, GateRule
from ddops.config.load import compose, load_config, write_params
from ddops.evaluation.gate import Decision, comparable, decide, gate_decision
from ddops.evaluation.judge import new_classifier, save_classifier
from ddops.evaluation.ruler import open_ruler
from ddops.files import sha256_file, sha256_json, write_json
from ddops.models.errors import CheckpointError
from ddops.production import Registry, RegistryError, metrics_in_production
from ddops.stages import paths
from ddops.stages.common import StageError, drawing_of
from helpers.gate_world import make_workspace, run_gate
from helpers.tiny import PARAMS, tiny

STUDENT = "ab" * 32
MODELS = {"tokenizer": "11" * 32, "teacher": "22" * 32, "dd1": STUDENT}
PROTOCOL = {"name": "digits", "features_sha256": "cd" * 32, "reference_sha256": "ef" * 32, "settings_sha256": "77" * 32}
PROTOCOL["drawing_sha256"] = "88" * 32
METRICS = {
    "protocol": PROTOCOL,
    "models": MODELS,
    "dd1_1step": {"fid": 9.0, "recall": 0.4},
    "teacher": {"fid": 4.5},
}
RULES = {
    "near": GateRule(value="dd1_1step.fid", relative_to="teacher.fid", max=2.5),
    "no worse": GateRule(value="dd1_1step.fid", relative_to="production", max=1.1),
}


def decided(
    metrics=METRICS, rules=RULES, override=None, production=None, models=MODELS, protocol=PROTOCOL, student="dd1"
) -> Decision:
    config = GateConfig(rules=rules, export_rules={}, override=override)
    return gate_decision(
        metrics,
        config,
        models=models,
        protocol=protocol,
        production=production,
        student=student,
        row=f"{student}_1step",
    )


def test_a_model_with_its_own_figures_within_the_rules_passes() -> None:
    decision = decided()
    assert decision.outcome == "accepted"
    assert decision.failed() == []
    plain_values = decision.plain()
    json.dumps(plain_values, allow_nan=False)
    assert plain_values["passed"] is True
    assert [rule["rule"] for rule in plain_values["rules"]] == ["near", "no worse"]


@pytest.mark.parametrize("name", MODELS)
def test_figures_of_another_model_are_stale(name: str) -> None:
    decision = decided(models={**MODELS, name: "99" * 32})
    assert decision.outcome == "refused"
    assert decision.failed() == [
        f"FAILED  the figures are of this {name}: the figures are of {MODELS[name][:12]}, in hand is {'99' * 6}"
    ]


@pytest.mark.parametrize("fact", ["name", "features_sha256", "settings_sha256", "drawing_sha256"])
def test_figures_of_another_protocol_are_refused(fact: str) -> None:
    decision = decided(protocol={**PROTOCOL, fact: "dd_50k"})
    assert not decision.passed
    assert f"the protocol's {fact}" in decision.failed()[0]


def test_figures_that_say_nothing_of_model_and_protocol_are_refused() -> None:
    rows = {name: row for name, row in METRICS.items() if name not in ("protocol", "models")}
    assert len(decided(metrics=rows).failed()) == len(MODELS) + len(PROTOCOL)


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "9.0"])
def test_a_figure_that_is_no_number_fails(value: object) -> None:
    decision = decided(metrics={**METRICS, "dd1_1step": {"fid": value}})
    assert decision.outcome == "refused"
    assert [verdict.passed for verdict in decision.verdicts] == [False, False]


# Production


def test_while_nothing_is_in_production_its_rule_passes_and_says_so() -> None:
    assert decided().verdicts[1].sentence() == (
        "passed  no worse: dd1_1step.fid / production = 9, at most 1.1 (nothing is in production yet)"
    )


@pytest.mark.parametrize(("fid", "passed"), [(8.5, True), (8.0, False)])
def test_a_regression_against_production_fails(fid: float, passed: bool) -> None:
    production = {"protocol": PROTOCOL, "dd1_1step": {"fid": fid}}
    assert decided(production=production).passed is passed


def test_production_that_was_judged_otherwise_does_not_compare() -> None:
    production = {"protocol": {**PROTOCOL, "features_sha256": "00" * 32}, "dd1_1step": {"fid": 100.0}}
    decision = decided(production=production)
    assert not decision.passed
    assert "judged by another protocol: features_sha256" in decision.failed()[0]


def test_protocols_compare_whatever_their_seeds_and_versions() -> None:
    assert comparable(PROTOCOL, {**PROTOCOL, "seeds": [9], "versions": {"torch": "9"}}) == []
    assert comparable(PROTOCOL, {**PROTOCOL, "name": "dd_50k", "resize": "tensorflow1"}) == ["name", "resize"]


def test_rules_on_the_student_are_on_whichever_is_exported() -> None:
    """The row is named in the verdict, the decision is the exported model's, and production's student is its own."""
    rules = {"student": GateRule(value="student.fid", relative_to="dd1_1step.fid", max=1.0)}
    rules["no worse"] = GateRule(value="student.fid", relative_to="production", max=1.1)
    models = {**MODELS, "dd2": "dd" * 32}
    metrics = {**METRICS, "models": models, "dd2_1step": {"fid": 6.0}}
    production = {"protocol": PROTOCOL, "dd2_1step": {"fid": 1.0}, "student": {"fid": 5.0}}
    decision = decided(metrics, rules, models=models, student="dd2", production=production)
    assert [(verdict.quantity, verdict.value) for verdict in decision.verdicts] == [
        ("dd2_1step.fid / dd1_1step.fid", pytest.approx(6 / 9)),
        ("dd2_1step.fid / production", pytest.approx(6 / 5)),
    ]
    assert [verdict.passed for verdict in decision.verdicts] == [True, False]
    assert decision.student_sha256 == "dd" * 32
    assert decided(metrics, rules, models=models).verdicts[0].quantity == "dd1_1step.fid / dd1_1step.fid"


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        ((), []),
        (("evaluate.seeds=[7]", "evaluate.batch_size=10"), []),
        (("evaluate.samples_per_image=2",), ["asked_for"]),
        (("evaluate.neighbours=5",), ["neighbours"]),
        (("evaluate.kid.subset_size=100",), ["kid"]),
        (("evaluate.precision_recall_samples=0",), ["precision_recall_samples"]),
    ],
)
def test_figures_of_fewer_samples_or_other_settings_do_not_compare(
    tmp_path: Path, overrides: tuple[str, ...], facts: list[str]
) -> None:
    """FID of fewer samples reads higher, recall with more neighbours too."""
    config = tiny().features
    save_classifier(tmp_path / "judge", new_classifier(config), config)
    one, other = (open_ruler(tiny("llamagen", *each).evaluate, tmp_path / "judge", None) for each in ((), overrides))
    assert comparable(one.facts(), other.facts()) == facts


# Overrides


STRICT = {"impossible": GateRule(value="dd1_1step.fid", max=0.1)}


def override(student: str = STUDENT) -> GateOverride:
    return GateOverride(student_sha256=student, by="Ada", reason="the demo is today")


def test_an_override_lets_its_model_through_and_is_recorded() -> None:
    decision = decided(rules=STRICT, override=override(STUDENT[:12]))
    assert decision.outcome == "overridden"
    assert decision.plain()["override"]["reason"] == "the demo is today"
    assert decision.plain()["rules"][0]["passed"] is False


def test_an_override_serves_no_other_model_and_no_stale_figures() -> None:
    assert decided(rules=STRICT, override=override("cd" * 32)).outcome == "refused"
    assert decided(rules=STRICT, override=override(), models={**MODELS, "teacher": "99" * 32}).outcome == "refused"
    assert decided(override=override()).plain()["override"] is None, "an accepted model needs none"


@pytest.mark.parametrize("value", [math.nan, None])
def test_an_override_of_a_bound_is_none_of_a_figure_that_is_missing(value: object) -> None:
    """It was given for a figure that was known."""
    rules = {**STRICT, "near": GateRule(value="teacher.fid", relative_to="dd1_1step.fid", max=9.0)}
    assert decided(rules=rules, override=override()).outcome == "overridden"
    for missing in ("dd1_1step", "teacher"):
        decision = decided({**METRICS, missing: {"fid": value}}, rules, override=override())
        assert (decision.outcome, decision.overridable) == ("refused", False)


def test_production_that_does_not_compare_can_be_overridden() -> None:
    """Otherwise a new protocol could never be introduced."""
    production = {"protocol": {**PROTOCOL, "asked_for": "2 samples a real image"}, "dd1_1step": {"fid": 9.0}}
    assert decided(production=production).outcome == "refused"
    assert decided(production=production, override=override()).outcome == "overridden"
    missing = {**METRICS, "dd1_1step": {"fid": math.nan}}
    assert decided(missing, {"no worse": RULES["no worse"]}, override(), production).outcome == "refused"


# The stage


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files that hash, and figures that state their hashes."""
    monkeypatch.chdir(tmp_path)
    make_workspace()
    return tmp_path


def test_the_stage_writes_its_decision_either_way(workspace: Path) -> None:
    run_gate()
    assert json.loads(paths.GATE_DECISION.read_text())["outcome"] == "accepted"
    paths.DD2_GENERATOR.write_text("another training")
    with pytest.raises(StageError, match=r" dd2: "):
        run_gate()
    assert json.loads(paths.GATE_DECISION.read_text())["outcome"] == "refused"
    paths.DD2_GENERATOR.unlink()
    with pytest.raises(StageError, match=r"generator\.safetensors is missing.*distill_dd2"):
        run_gate()


@pytest.mark.parametrize("change", ["sampling.guidance=3.0", "dd1.logit_prefix=0", "trajectories.evaluations=5"])
def test_figures_drawn_with_other_settings_are_stale(workspace: Path, change: str) -> None:
    """The weights are the same, the images are not."""
    run_gate()
    write_params(compose(PARAMS, ["preset=smoke", change]), paths.PARAMS)
    with pytest.raises(StageError, match="drawing_sha256"):
        run_gate()
    assert main(["override", "--by", "Ada", "--reason", "never mind"]) == 1


def test_a_reference_that_was_replaced_makes_the_figures_stale(workspace: Path) -> None:
    """Its path is the same, and so are the settings."""
    statistics = Path("statistics.npz")
    statistics.write_bytes(b"of these images")
    local = [f"evaluate.statistics.path={statistics}", "gate=smoke"]
    write_params(compose(PARAMS, ["preset=released_dd1_var_d16", *local]), paths.PARAMS)
    config, metrics = load_config(), json.loads(paths.METRICS.read_text())
    metrics["protocol"] |= {
        "name": "dd_50k",
        "settings_sha256": sha256_json(plain(config.evaluate)),
        "drawing_sha256": drawing_of(config),
        "reference_sha256": sha256_file(statistics),
    }
    write_json(paths.METRICS, {**metrics, "dd1_1step": {"fid": 3.0}})
    run_gate()
    statistics.write_bytes(b"of others")
    with pytest.raises(StageError, match="reference_sha256"):
        run_gate()
    statistics.unlink()
    with pytest.raises(CheckpointError, match=r"statistics\.npz"):
        run_gate()


def test_without_figures_there_is_no_decision_left_from_before(workspace: Path) -> None:
    run_gate()
    paths.METRICS.unlink()
    with pytest.raises(StageError, match=r"metrics\.json is missing"):
        run_gate()
    assert not paths.GATE_DECISION.exists()


def test_an_override_by_command_is_for_the_refused_model_alone(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["override", "--by", "Ada", "--reason", "the demo is today"]
    assert main(arguments) == 1
    assert "there is no refusal to override" in capsys.readouterr().err
    run_gate()
    assert main(arguments) == 1
    assert "nothing to override" in capsys.readouterr().err

    values = compose(PARAMS, ["preset=smoke"])
    values["gate"]["rules"]["there is a figure"]["max"] = 0.1
    write_params(values, paths.PARAMS)
    with pytest.raises(StageError, match="ddops override --reason WHY"):
        run_gate()
    figures = paths.METRICS.read_text()
    paths.METRICS.write_text(figures.replace("3.0", "NaN"))
    with pytest.raises(StageError, match=r"missing or not a number") as refusal:
        run_gate()
    assert "ddops override" not in str(refusal.value)
    assert main(arguments) == 1
    assert "dd2_1step.fid" in capsys.readouterr().err
    paths.METRICS.write_text(figures)
    with pytest.raises(StageError, match="ddops override --reason WHY"):
        run_gate()
    assert main(arguments) == 0
    run_gate()
    decision = json.loads(paths.GATE_DECISION.read_text())
    assert (decision["outcome"], decision["override"]["by"]) == ("overridden", "Ada")


# The registry


FACTS = {
    "preset": "digits",
    "bundle": "production/v1.0.0",
    "files": {"model.onnx": "11"},
    "metrics": METRICS,
    "row": "dd1_1step",
}


def facts(number: int) -> dict:
    return {**FACTS, "files": {"model.onnx": str(number)}, "metrics": {"dd1_1step": {"fid": float(number)}}}


def test_versions_follow_each_other_and_a_rollback_returns_step_by_step(tmp_path: Path) -> None:
    path = tmp_path / "registry.json"
    assert metrics_in_production(path) is None
    for number in (1, 2, 3):
        registry = Registry.load(path)
        registry.promote(registry.next_version(), facts(number), by="Ada", reason=f"reason {number}")
    assert metrics_in_production(path) == {"dd1_1step": {"fid": 3.0}, "student": {"fid": 3.0}}
    for expected in ("v2.0.0", "v1.0.0"):
        registry = Registry.load(path)
        registry.rollback(registry.earlier(None), by="Bob", reason="it is slow")
        assert Registry.load(path).current == expected
    with pytest.raises(RegistryError, match="no earlier version"):
        Registry.load(path).earlier(None)
    registry = Registry.load(path)
    registry.rollback(registry.earlier("v3.0.0"), by="Bob", reason="it was not")
    registry = Registry.load(path)
    assert registry.next_version() == "v4.0.0", "a version is never given twice"
    assert [(step["what"], step["version"]) for step in registry.history[-2:]] == [
        ("rollback", "v1.0.0"),
        ("rollback", "v3.0.0"),
    ]
    assert len(registry.history) == 6


def test_what_the_registry_does_not_allow(tmp_path: Path) -> None:
    path = tmp_path / "registry.json"
    registry = Registry.load(path)
    with pytest.raises(RegistryError, match="no earlier version"):
        registry.earlier(None)
    registry.promote("v1.0.0", facts(1), by="Ada", reason="first")
    with pytest.raises(RegistryError, match=r"in production already, as v1\.0\.0"):
        registry.promote("v2.0.0", facts(1), by="Ada", reason="again")
    with pytest.raises(RegistryError, match=r"v1\.0\.0 is in production already"):
        registry.earlier("v1.0.0")
    with pytest.raises(RegistryError, match=r"no version v9; there are: v1\.0\.0"):
        registry.earlier("v9")
    path.write_text('{"current": "v7", "versions": {}, "history": []}')
    with pytest.raises(RegistryError, match="damaged"):
        Registry.load(path)


def test_a_rule_may_ask_for_figures_of_the_exported_graph() -> None:
    known = {**METRICS, "export": {"parity": {"largest": 2e-6}}, "exported": {"fid": 9.1}}
    rules = {
        "computes": GateRule(value="export.parity.largest", max=1e-4),
        "draws": GateRule(value="exported.fid", relative_to="dd1_1step.fid", max=1.005),
    }
    assert [verdict.passed for verdict in decide(known, rules, row="dd1_1step")] == [True, False]
