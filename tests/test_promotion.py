"""Promotion and rollback in a real Git repository with the real DVC and GTO: recorded, tagged, tracked, reversible."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import test_gate
from ddops.cli import main
from ddops.commands import repository as repository_commands
from ddops.config.load import compose, write_params
from ddops.files import sha256_file, write_json
from ddops.production import Registry
from ddops.serving.models import find_bundle
from ddops.stages import paths
from ddops.stages.common import EXIT_REFUSED
from test_gate import run_gate
from tiny import PARAMS

workspace = test_gate.workspace


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()


def export(content: str) -> None:
    """A bundle of the student in hand."""
    paths.ONNX_BUNDLE.mkdir(parents=True, exist_ok=True)
    (paths.ONNX_BUNDLE / "model.onnx").write_text(content)
    facts = {"ddops.student_sha256": sha256_file(paths.DD2_GENERATOR)}
    write_json(paths.ONNX_BUNDLE / "manifest.json", {"facts": facts})
    write_json(paths.EXPORT_METRICS, {"parity": {"largest": 1e-6}})


def commit() -> None:
    git("add", "params.yaml")
    git("commit", "--quiet", "--allow-empty", "--message", "a training")


@pytest.fixture
def repository(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The gate's workspace, accepted and exported, under Git and DVC."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    git("init", "--quiet", "--initial-branch", "main")
    git("config", "user.name", "Ada")
    git("config", "user.email", "ada@example.invalid")
    subprocess.run(["dvc", "init", "--quiet"], check=True)
    monkeypatch.setattr("ddops.stages.export_onnx.judge_exported", lambda evaluate, export: {"fid": 3.1})
    run_gate()
    export("first")
    commit()
    return workspace


def retrain(content: str) -> None:
    """Another student with figures and a decision of its own."""
    paths.DD2_GENERATOR.write_text(content)
    metrics = json.loads(paths.METRICS.read_text())
    metrics["models"]["dd2"] = sha256_file(paths.DD2_GENERATOR)
    write_json(paths.METRICS, metrics)
    run_gate()
    export(content)
    commit()


def test_promotion_is_recorded_and_a_rollback_returns(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["production"]) == 0
    assert "nothing is in production yet" in capsys.readouterr().out

    assert main(["promote", "--reason", "the first"]) == 0, capsys.readouterr().err
    first = Path("production/v1.0.0")
    assert (first / "model.onnx").read_text() == "first"
    assert json.loads((first / "gate.json").read_text())["outcome"] == "accepted"
    assert Path("production/v1.0.0.dvc").exists()
    assert git("status", "--porcelain", "production") == ""
    registry = Registry.load(paths.PRODUCTION)
    assert registry.current == "v1.0.0"
    assert find_bundle(Path("production")) == first.resolve()
    exported = registry.versions["v1.0.0"]["exported"]
    assert exported["figures"] == {"fid": 3.1}
    assert (exported["protocol"]["name"], exported["protocol"]["seeds"]) == ("digits", [1])
    assert registry.versions["v1.0.0"]["row"] == "dd2_1step"
    assert registry.versions["v1.0.0"]["source_commit"] == git("rev-parse", "HEAD~1")
    assert set(git("tag").splitlines()) == {"smoke@v1.0.0", "smoke#production#1"}

    assert main(["promote", "--reason", "again"]) == 1
    assert "in production already, as v1.0.0" in capsys.readouterr().err

    retrain("second")
    assert main(["promote", "--by", "Bob", "--reason", "it is better"]) == 0, capsys.readouterr().err
    assert (first / "model.onnx").read_text() == "first", "the previous one stays"
    assert find_bundle(Path("production")).name == "v2.0.0"

    assert main(["rollback", "--reason", "it was not"]) == 0, capsys.readouterr().err
    registry = Registry.load(paths.PRODUCTION)
    assert registry.current == "v1.0.0"
    assert find_bundle(Path("production")) == first.resolve()
    assert [(step["what"], step["by"]) for step in registry.history] == [
        ("promote", "Ada"),
        ("promote", "Bob"),
        ("rollback", "Ada"),
    ]
    assert "smoke#production#3" in git("tag").splitlines()
    assert git("log", "-1", "--format=%s") == "Roll back smoke from v2.0.0 to v1.0.0: it was not"
    assert main(["production"]) == 0
    assert "in production: v1.0.0" in capsys.readouterr().out

    # The bundle comes back from DVC's cache; an altered one is not returned to.
    subprocess.run(["rm", "-r", "production/v2.0.0"], check=True)
    assert main(["rollback", "--to", "v2.0.0", "--reason", "after all"]) == 0, capsys.readouterr().err
    assert Path("production/v2.0.0/model.onnx").read_text() == "second"
    model = first / "model.onnx"
    model.unlink()
    model.write_text("altered")
    assert main(["rollback", "--reason", "again"]) == 1
    assert "missing or altered; restore it with: dvc checkout" in capsys.readouterr().err
    assert Registry.load(paths.PRODUCTION).current == "v2.0.0"


@pytest.mark.parametrize("step", ["commit", "register", "assign"])
def test_killed_after_the_step_the_next_command_puts_it_on_record(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: str
) -> None:
    """The registry's file is the step; commit and tags follow it. Neither a promotion nor a rollback happens twice."""
    assert main(["promote", "--reason", "the first"]) == 0, capsys.readouterr().err
    retrain("second")

    def dying(command: list[str]) -> str:
        if step in command:
            raise KeyboardInterrupt
        return alive(command)

    alive = repository_commands._run
    tags: list[set[str]] = [{"smoke@v1.0.0", "smoke#production#1"}]
    for command, current, new in (
        (["promote", "--reason", "better"], "v2.0.0", {"smoke@v2.0.0", "smoke#production#2"}),
        (["rollback", "--reason", "it was not"], "v1.0.0", {"smoke#production#3"}),
    ):
        if command[0] == "rollback" and step == "register":
            break  # a rollback registers nothing
        with monkeypatch.context() as broken:
            broken.setattr(repository_commands, "_run", dying)
            with pytest.raises(KeyboardInterrupt):
                main(command)
        assert Registry.load(paths.PRODUCTION).current == current
        tags.append(tags[-1] | new)
        before = len(Registry.load(paths.PRODUCTION).history)
        assert main(command) == 0, capsys.readouterr().err
        assert "committed and tagged now, and nothing else done" in capsys.readouterr().out
        assert Registry.load(paths.PRODUCTION).current == current
        assert len(Registry.load(paths.PRODUCTION).history) == before
        assert set(git("tag").splitlines()) == tags[-1]
        assert git("status", "--porcelain", "production") == ""


def test_a_run_commits_what_it_made_and_promotes_only_what_is_new(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the flow calls it: nobody is there to commit."""
    command = ["promote", "--commit", "--if-new", "--reason", "nightly"]
    paths.PARAMS.write_text(paths.PARAMS.read_text() + "# another run\n")
    Path("mine").write_text("staged by somebody, and left alone")
    git("add", "mine")
    before = git("rev-parse", "HEAD")
    assert main(command) == 0, capsys.readouterr().err
    assert git("log", "--format=%s", f"{before}..HEAD").splitlines() == [
        "Promote smoke v1.0.0: nightly",
        "Run of smoke",
    ]
    committed = set(git("show", "--name-only", "--format=", "HEAD~1").splitlines())
    assert {str(paths.PARAMS), str(paths.METRICS), str(paths.GATE_DECISION), str(paths.EXPORT_METRICS)} == committed
    assert git("diff", "--cached", "--name-only") == "mine"
    source = Registry.load(paths.PRODUCTION).versions["v1.0.0"]["source_commit"]
    assert source == git("rev-parse", "HEAD~1"), "the commit of the run, not the one before it"

    # Exported again, at another commit: the same weights in other bytes.
    run_gate()
    export("the same graph, with another commit in it")
    head = git("rev-parse", "HEAD")
    capsys.readouterr()
    assert main(command) == 0
    assert "in production already, as v1.0.0" in capsys.readouterr().out
    assert git("rev-parse", "HEAD") == head

    retrain("second")
    assert main(command) == 0, capsys.readouterr().err
    assert Registry.load(paths.PRODUCTION).current == "v2.0.0"


def test_a_run_of_code_that_is_not_committed_is_not_promoted(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It commits what the run made, not what somebody is working on."""
    Path("dvc.yaml").write_text("stages: {}\n")
    assert main(["promote", "--commit", "--reason", "nightly"]) == 1
    assert "not committed" in capsys.readouterr().err
    assert not paths.PRODUCTION.exists()


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("refused", EXIT_REFUSED, "the gate refuses this model"),
        ("undecided", 1, "run dvc repro gate"),
        ("other settings", EXIT_REFUSED, "the protocol's drawing_sha256"),
        ("another student", 1, "run dvc repro export_onnx"),
        ("uncommitted", 1, "not committed"),
        ("worse export", EXIT_REFUSED, "the exported graph is refused"),
    ],
)
def test_what_is_not_promoted(
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    code: int,
    message: str,
) -> None:
    if fault == "refused":
        paths.DD2_GENERATOR.write_text("changed since it was judged")
    elif fault == "undecided":
        paths.GATE_DECISION.unlink()
    elif fault == "other settings":
        write_params(compose(PARAMS, ["preset=smoke", "dd2.training.steps=7"]), paths.PARAMS)
        commit()
    elif fault == "another student":
        write_json(paths.ONNX_BUNDLE / "manifest.json", {"facts": {"ddops.student_sha256": "00" * 32}})
    elif fault == "uncommitted":
        paths.PARAMS.write_text(paths.PARAMS.read_text() + "# a note\n")
    else:
        monkeypatch.setattr("ddops.stages.export_onnx.judge_exported", lambda evaluate, export: {"fid": float("nan")})
    commits = git("rev-list", "--count", "HEAD")
    assert main(["promote", "--reason", "because"]) == code
    assert message in capsys.readouterr().err
    assert git("rev-list", "--count", "HEAD") == commits
    assert not paths.PRODUCTION.exists()
    assert git("tag") == ""
