"""Promotion and rollback in a real Git repository with the real DVC and GTO: recorded, tagged, tracked, reversible."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
import yaml

from ddops.cli import main
from ddops.commands import repository as repository_commands
from ddops.commands.arguments import CommandError
from ddops.commands.in_hand import exported_files, judge_export
from ddops.commands.promote import LOCK
from ddops.config.base import plain
from ddops.config.load import compose, load_config, write_params
from ddops.export.errors import BundleError
from ddops.export.manifest import (
    STUDENT_FILE,
    TOKENIZER_FILE,
    Manifest,
    ModelFacts,
    OnnxFacts,
    read_manifest,
    write_manifest,
)
from ddops.files import sha256_file, write_json
from ddops.flows.workspace import locked
from ddops.lock import held
from ddops.production import Registry
from ddops.serving.models import find_bundle
from ddops.stages import paths
from ddops.stages.common import EXIT_REFUSED, EXIT_TRY_AGAIN, ModelRefusedError
from ddops.workspace.code import record
from helpers import forked
from helpers.gate_world import make_workspace, run_gate
from helpers.repository import make_repository
from helpers.tiny import PARAMS

JUDGE: Final = "ddops.stages.export_onnx.judge_exported"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files that hash, and figures that state their hashes."""
    monkeypatch.chdir(tmp_path)
    make_workspace()
    return tmp_path


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()


def export(content: str) -> None:
    """A bundle of the student in hand, with what goes with it; and what DVC notes of the stage."""
    config = load_config()
    paths.ONNX_BUNDLE.mkdir(parents=True, exist_ok=True)
    weights = {STUDENT_FILE: paths.DD2_GENERATOR, TOKENIZER_FILE: paths.TOKENIZER}
    for name, source in weights.items():
        shutil.copy(source, paths.ONNX_BUNDLE / name)
    graph = paths.ONNX_BUNDLE / "model.onnx"
    graph.write_text(content)
    manifest = Manifest(
        format=1,
        facts={"ddops.preset": config.preset},
        model=ModelFacts(
            num_classes=10,
            class_names=None,
            length=16,
            code_dim=8,
            image_size=8,
            image_channels=1,
            steps=config.export.steps,
            start_positions=config.dd1.start_positions,
            logit_prefix=config.dd2.logit_prefix(len(config.teacher.model.level_sizes)),
            noise="test",
        ),
        onnx=OnnxFacts(
            opset=config.export.opset,
            precision=config.export.precision,
            sha256=sha256_file(graph),
            external_sha256=None,
        ),
        engines=(),
        files={name: sha256_file(source) for name, source in weights.items()},
    )
    write_manifest(paths.ONNX_BUNDLE, manifest)
    write_json(paths.EXPORT_METRICS, {"parity": {"largest": 1e-6}, "sha256": {"model.onnx": sha256_file(graph)}})
    paths.MODEL_CARD.write_text(f"student {sha256_file(paths.DD2_GENERATOR)}, graph {sha256_file(graph)}")
    read = {"params.yaml": {"export": plain(config.export)}}
    write_yaml("dvc.lock", {"schema": "2.0", "stages": {"export_onnx": {"cmd": "true", "params": read}}})


def write_yaml(file: str, value: object) -> None:
    Path(file).write_text(yaml.safe_dump(value))


def commit() -> None:
    git("add", "params.yaml", "recipes.yaml", "dvc.yaml", "dvc.lock")
    git("commit", "--quiet", "--allow-empty", "--message", "a training")


def judgement(fid: float = 3.1, **changes: Any) -> Callable[..., dict[str, Any]]:
    """What the stage would find of the graph."""

    def judge(evaluate: object, export: object) -> dict[str, Any]:
        protocol = {**json.loads(paths.METRICS.read_text())["protocol"], "seeds": [1]}
        return {"protocol": protocol, "samples": 4, "exported": {"fid": fid}, "pytorch": None, **changes}

    return judge


@pytest.fixture
def repository(workspace: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """The gate's workspace, accepted and exported, under Git and DVC. Its parameter is whether DVC and GTO
    are started anew at each step, as a user has it; to fork them instead saves a second or two a step."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    make_repository(workspace)
    git("config", "user.name", "Ada")
    git("config", "user.email", "ada@example.invalid")
    if not getattr(request, "param", False):
        monkeypatch.setattr(repository_commands, "subprocess", SimpleNamespace(run=forked.run))
    monkeypatch.setattr(JUDGE, judgement())
    write_yaml("dvc.yaml", {"stages": {"export_onnx": {"cmd": "true", "params": ["export"]}}})
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


@pytest.mark.slow
@pytest.mark.parametrize("repository", [True], indirect=True, ids=["processes"])
def test_promotion_is_recorded_and_a_rollback_returns(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["production"]) == 0
    assert "nothing is in production yet" in capsys.readouterr().out

    ran = record("gate", "0.0.1")
    ran["files"]["evaluation/gate.py"]["code"] = "edited since"
    write_json(paths.code_record("gate"), ran)
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
    code = registry.versions["v1.0.0"]["code"]
    assert code["gate"] == {"recipe": 1, "changed": ["evaluation/gate.py"]}
    assert code["teacher"] is None, "nothing is known of it"
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
    assert set(map(str, (paths.PARAMS, paths.METRICS, paths.GATE_DECISION, paths.EXPORT_METRICS))) == committed
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
        ("another student", 1, "run dvc repro\n  student: "),
        ("another number of steps", 1, "run dvc repro\n  steps: 1, in hand is 2"),
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
        shutil.copy(paths.TOKENIZER, paths.ONNX_BUNDLE / STUDENT_FILE)
        manifest = read_manifest(paths.ONNX_BUNDLE)
        spoilt = {**manifest.files, STUDENT_FILE: sha256_file(paths.TOKENIZER)}
        write_manifest(paths.ONNX_BUNDLE, replace(manifest, files=spoilt))
    elif fault == "another number of steps":
        write_params(compose(PARAMS, ["preset=smoke", "export.steps=2"]), paths.PARAMS)
        write_json(paths.METRICS, {**json.loads(paths.METRICS.read_text()), "dd2_2step": {"fid": 2.0}})
        run_gate()
        commit()
    elif fault == "uncommitted":
        paths.PARAMS.write_text(paths.PARAMS.read_text() + "# a note\n")
    else:
        monkeypatch.setattr(JUDGE, judgement(float("nan")))
    commits = git("rev-list", "--count", "HEAD")
    assert main(["promote", "--reason", "because"]) == code
    assert message in capsys.readouterr().err
    assert git("rev-list", "--count", "HEAD") == commits
    assert not paths.PRODUCTION.exists()
    assert git("tag") == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("export.steps=2", "steps: 1, in hand is 2"),
        ("export.precision=float16", "precision: float32, in hand is float16"),
        ("export.opset=20", "opset: 18, in hand is 20"),
        ("preset", "preset: smoke, in hand is another"),
        ("start positions", "start positions: (0, 5), in hand is "),
        ("logit prefix", "logit prefix: 3, in hand is "),
        ("tokenizer", "tokenizer: "),
    ],
)
def test_a_bundle_that_is_not_of_the_configuration(workspace: Path, change: str, said: str) -> None:
    """Committed settings and the row that was judged say nothing of a bundle that was exported before."""
    export("first")
    values, manifest = compose(PARAMS, ["preset=smoke"]), read_manifest(paths.ONNX_BUNDLE)
    if change.startswith("export."):
        values = compose(PARAMS, ["preset=smoke", change])
    elif change == "preset":
        values["preset"] = "another"
    elif change == "tokenizer":
        spoilt = {**manifest.files, TOKENIZER_FILE: sha256_file(paths.DD2_GENERATOR)}
        shutil.copy(paths.DD2_GENERATOR, paths.ONNX_BUNDLE / TOKENIZER_FILE)
        write_manifest(paths.ONNX_BUNDLE, replace(manifest, files=spoilt))
    else:
        fact = {"start_positions": (0, 5)} if change == "start positions" else {"logit_prefix": 3}
        write_manifest(paths.ONNX_BUNDLE, replace(manifest, model=replace(manifest.model, **fact)))
    write_params(values, paths.PARAMS)
    with pytest.raises(CommandError, match="is not of this configuration and these files; run dvc repro") as error:
        exported_files(load_config(paths.PARAMS))
    assert said in str(error.value)


@pytest.mark.parametrize("file", ["export.json", "model_card.md", "model.onnx"])
def test_what_goes_with_a_bundle_is_of_its_graph(workspace: Path, file: str) -> None:
    export("first")
    config, graph = load_config(paths.PARAMS), sha256_file(paths.ONNX_BUNDLE / "model.onnx")
    assert exported_files(config)["model.onnx"] == graph
    if file == "export.json":
        write_json(paths.EXPORT_METRICS, {"parity": {"largest": 1e-6}, "sha256": {"model.onnx": "00" * 32}})
        said = "of another graph than the bundle's; run dvc repro"
    elif file == "model_card.md":
        paths.MODEL_CARD.write_text(f"student {'00' * 32}, graph {graph}")
        said = r"model_card\.md: is of another model or graph; run dvc repro"
    else:
        (paths.ONNX_BUNDLE / file).write_text("altered")
        said = r"model\.onnx: damaged or changed"
    with pytest.raises((CommandError, BundleError), match=said):
        exported_files(config)


def test_settings_that_did_not_make_the_model_are_not_its_source(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Committed, they would be in the version's source commit."""
    write_params(compose(PARAMS, ["preset=smoke", "export.license=none"]), paths.PARAMS)
    commit()
    assert main(["promote", "--commit", "--reason", "because"]) == 1
    assert "run dvc repro\n  export_onnx: params.yaml" in capsys.readouterr().err
    assert not paths.PRODUCTION.exists()


def test_what_was_put_away_or_follows_the_export_stops_no_promotion(repository: Path) -> None:
    write_yaml(
        "dvc.yaml",
        {
            "stages": {
                "sample": {"cmd": "mkdir samples", "outs": ["samples"]},
                "export_onnx": {"cmd": "true", "params": ["export"], "deps": ["samples"]},
                "later": {"cmd": "false", "outs": ["never"]},
            }
        },
    )
    subprocess.run(["dvc", "repro", "--quiet", "export_onnx"], check=True)
    commit()
    Path("samples").rmdir()
    assert main(["promote", "--reason", "because"]) == 0


def test_a_graph_that_is_judged_otherwise_than_its_model_was_is_not_promoted(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stated = json.loads(paths.METRICS.read_text())["protocol"]
    monkeypatch.setattr(JUDGE, judgement(protocol={**stated, "reference_sha256": "00" * 32}))
    assert main(["promote", "--reason", "because"]) == 1
    assert "by another protocol than its graph is now: reference_sha256; run dvc repro" in capsys.readouterr().err
    # What is stored is what the graph was judged by.
    monkeypatch.setattr(JUDGE, judgement(protocol={**stated, "versions": {"torch": "9"}}))
    assert main(["promote", "--reason", "because"]) == 0
    kept = Registry.load(paths.PRODUCTION).versions["v1.0.0"]["exported"]
    assert kept["protocol"]["versions"] == {"torch": "9"}


@pytest.mark.parametrize(("pytorch", "passes"), [({"fid": 3.1}, True), ({"fid": 2.9}, False), (None, False)])
def test_the_graph_is_compared_with_pytorch_from_the_same_noise(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, pytorch: dict[str, float] | None, passes: bool
) -> None:
    """The row's 3.0 is a mean of seeds; where PyTorch's samples of this one are not there, it has to do."""
    export("first")
    values = compose(PARAMS, ["preset=smoke"])
    values["gate"]["export_rules"] = {"as well": {"value": "exported.fid", "relative_to": "pytorch.fid", "max": 1.02}}
    write_params(values, paths.PARAMS)
    monkeypatch.setattr(JUDGE, judgement(pytorch=pytorch))
    config = load_config(paths.PARAMS)
    if passes:
        assert judge_export(config)["pytorch"] == pytorch
        return
    ratio = 3.1 / (pytorch or {"fid": 3.0})["fid"]
    with pytest.raises(ModelRefusedError, match=rf"exported\.fid / pytorch\.fid = {ratio:.4g}, at most 1\.02"):
        judge_export(config)


@pytest.mark.parametrize("preset", ["digits", "digits_var", "var_d16", "released_dd1_var_d16"])
def test_the_presets_compare_the_graph_with_pytorch_alone(preset: str) -> None:
    rules = compose(PARAMS, [f"preset={preset}"])["gate"]["export_rules"].values()
    compared = [rule["relative_to"] for rule in rules if rule.get("relative_to")]
    assert compared
    assert all(quantity.startswith("pytorch.") for quantity in compared)


# Two at a time


def test_one_promotion_or_rollback_at_a_time(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = (["promote", "--reason", "mine"], ["rollback", "--reason", "mine"])
    with held(LOCK, "ddops promote, by Bob"):
        for command in commands:
            assert main(command) == EXIT_TRY_AGAIN
            assert "production.lock is held by ddops promote, by Bob (process " in capsys.readouterr().err
    assert not paths.PRODUCTION.exists()
    # A run holds its workspace while it promotes.
    with locked(repository, "run nightly", 0, print):
        assert main(commands[0]) == 0, capsys.readouterr().err
    assert Registry.load(paths.PRODUCTION).current == "v1.0.0"


def test_a_registry_that_changes_meanwhile_is_not_overwritten(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a pull from Git, say, which takes no lock."""
    assert main(["promote", "--reason", "the first"]) == 0, capsys.readouterr().err
    retrain("second")

    def pulled(evaluate: object, export: object) -> dict[str, Any]:
        theirs = Registry.load(paths.PRODUCTION)
        facts = {**theirs.versions["v1.0.0"], "files": {"model.onnx": "11" * 32}}
        theirs.promote("v2.0.0", facts, by="Bob", reason="theirs")
        Path("production/v2.0.0").mkdir()
        return judgement()(evaluate, export)

    monkeypatch.setattr(JUDGE, pulled)
    assert main(["promote", "--reason", "ours"]) == 1
    assert "changed while the graph was judged" in capsys.readouterr().err
    assert [step["reason"] for step in Registry.load(paths.PRODUCTION).history] == ["the first", "theirs"]
    assert list(Path("production/v2.0.0").iterdir()) == []


def test_a_rollback_to_another_presets_version_is_put_on_record_too(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The version's own tags look the same before and after it; killed in between, it must be tagged all the same."""
    assert main(["promote", "--reason", "the first"]) == 0, capsys.readouterr().err
    write_params({**compose(PARAMS, ["preset=smoke"]), "preset": "other"}, paths.PARAMS)
    retrain("second")
    assert main(["promote", "--reason", "another preset"]) == 0, capsys.readouterr().err
    alive = repository_commands._run

    def dying(command: list[str]) -> str:
        if "assign" in command:
            raise KeyboardInterrupt
        return alive(command)

    command = ["rollback", "--reason", "it was not"]
    with monkeypatch.context() as broken:
        broken.setattr(repository_commands, "_run", dying)
        with pytest.raises(KeyboardInterrupt):
            main(command)
    assert "smoke#production#2" not in git("tag").split()
    assert main(command) == 0, capsys.readouterr().err
    assert "committed and tagged now" in capsys.readouterr().out
    assert {"smoke#production#1", "other#production#1", "smoke#production#2"} <= set(git("tag").split())
    assert main(command) == 1, "and only once: there is no earlier version"
