"""A workspace outside the clone, by the wheel: made, run, migrated; and what is refused on the way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ddops.cli import main
from ddops.commands import migrate
from ddops.workspace.files import PIPELINE, TEMPLATE, WorkspaceError, template_files, write_files
from ddops.workspace.recipes import known_recipes
from helpers.dvc_environment import dvc_environment
from helpers.tiny import ROOT
from helpers.wheel import PIP, build_wheel

pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("workspace")]

IDENTITY = {f"GIT_{who}_{what}": "ada@example.invalid" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel's files in a directory of their own."""
    place = tmp_path_factory.mktemp("wheel")
    install = ["install", "--no-deps", "--target", str(place / "site"), str(build_wheel(place))]
    subprocess.run([sys.executable, *PIP, *install], check=True)
    return place / "site"


def run(where, source, *command):
    """What a command prints, with the ddops in ``source`` and no environment activated."""
    environment = dvc_environment(where.parent / f"{where.name}-dvc", source, **IDENTITY)
    environment["PATH"] = os.defpath
    command = [sys.executable, "-m", "ddops.cli", *command[1:]] if command[0] == "ddops" else command
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_wheel_makes_a_workspace_that_trains_a_teacher(installed, tmp_path):
    """Outside the clone, in a shell that has activated nothing: init, then the pipeline as far as the teacher."""
    run(tmp_path, installed, "ddops", "init", "work", "--preset", "smoke")
    workspace = tmp_path / "work"
    assert yaml.safe_load((workspace / "params.yaml").read_text())["preset"] == "smoke"
    assert run(workspace, installed, "git", "status", "--porcelain") == ""
    assert all((workspace / name).is_file() for name in template_files()), "dvc init deletes what is in .dvc"
    dvc = str(Path(sys.executable).with_name("dvc"))
    assert "teacher: 100%" in run(workspace, installed, dvc, "repro", "teacher")
    assert (workspace / "artifacts/teacher/transformer.safetensors").is_file()

    (workspace / "params/preset").mkdir()
    own = "# @package _global_\n# Mine.\ndefaults: [smoke]\npreset: mine\nseed: 7\n"
    (workspace / "params/preset/mine.yaml").write_text(own)
    run(workspace, installed, dvc, "exp", "run", "-S", "preset=mine", "captions")
    assert yaml.safe_load((workspace / "params.yaml").read_text())["seed"] == 7
    assert "1 were up to date" in run(workspace, installed, "ddops", "run", "mine", "--target", "captions")


def test_presets_are_known_and_planned_where_there_is_no_workspace(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "preset").mkdir(parents=True)
    (tmp_path / "mine/preset/own.yaml").write_text("# @package _global_\n# Mine. Not yours.\n")
    assert main(["presets", "--params", "mine"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {"digits", "smoke", "var_d16", "llamagen_l_dd2"} <= set(lines)
    assert lines["own"] == "Mine."
    assert all(sentence.endswith(".") for sentence in lines.values())
    assert main(["plan", "var_d16"]) == 0
    assert "310.28 M parameters" in capsys.readouterr().out


def test_the_clone_is_a_workspace_like_any_other():
    """What ddops init writes is what lies here: change the template, then ddops migrate."""
    files = (*PIPELINE, "prefect.yaml")
    assert [name for name in files if (ROOT / name).read_bytes() != (TEMPLATE / name).read_bytes()] == []


def test_the_files_of_others_are_not_overwritten(tmp_path):
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    with pytest.raises(WorkspaceError, match=r"dvc\.yaml"):
        write_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["dvc.yaml"]


def test_writing_goes_on_where_it_was_killed(tmp_path):
    write_files(tmp_path)
    (tmp_path / "stage.sh").unlink()
    write_files(tmp_path)
    assert all((tmp_path / name).read_bytes() == file.read_bytes() for name, file in template_files().items())


def test_an_unknown_preset_writes_nothing(tmp_path, capsys):
    assert main(["init", str(tmp_path / "work"), "--preset", "smok"]) == 1
    assert "'smoke'" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """Of this checkout's code, committed, without DVC; the test works in it."""
    for name, value in {**IDENTITY, "GIT_CONFIG_GLOBAL": os.devnull}.items():
        monkeypatch.setenv(name, value)
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    git("init")
    git("add", "--all")
    git("commit", "--message", "before")
    return tmp_path


def git(command, *arguments):
    subprocess.run(
        ["git", command, "--quiet", *arguments] if command != "add" else ["git", command, *arguments], check=True
    )


def test_a_workspace_of_an_earlier_ddops_is_brought_up_to_date(workspace, capsys, monkeypatch):
    known = dict(known_recipes())
    monkeypatch.setattr(migrate, "known_recipes", lambda: {**known, "distill_dd1": known["distill_dd1"] + 1})
    (workspace / "dvc.yaml").write_text("stages: {}\n")
    git("commit", "--all", "--message", "older")
    assert main(["migrate"]) == 0
    said = capsys.readouterr().out
    assert f"distill_dd1 {known['distill_dd1']} -> {known['distill_dd1'] + 1}" in said
    assert (workspace / "dvc.yaml").read_bytes() == (TEMPLATE / "dvc.yaml").read_bytes()
    assert main(["migrate"]) == 0
    assert "nothing to migrate" in capsys.readouterr().out


def test_what_was_made_before_there_were_recipes_can_be_kept(workspace, capsys):
    """Whole outputs alone: DVC would refuse to commit a stage one of whose outputs is missing."""
    old = {"deps": [{"path": "src/ddops/hub"}]}
    (workspace / "dvc.lock").write_text(yaml.safe_dump({"stages": {"captions": old, "teacher": old}}))
    (workspace / "recipes.yaml").unlink()
    (workspace / "data/captions").mkdir(parents=True)
    (workspace / "artifacts/teacher").mkdir(parents=True)
    git("commit", "--all", "--message", "older")
    assert main(["migrate"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("dvc commit --force captions")
    assert main(["stale", "captions"]) == 0
    assert "accepted" in capsys.readouterr().out


def test_a_workspace_of_a_newer_ddops_is_left_alone(workspace, capsys):
    newer = {**known_recipes(), "distill_dd1": 99}
    (workspace / "recipes.yaml").write_text(yaml.safe_dump(newer))
    assert main(["migrate"]) == 1
    assert "distill_dd1 is 99" in capsys.readouterr().err
    assert yaml.safe_load((workspace / "recipes.yaml").read_text()) == newer


def test_what_is_not_committed_is_not_replaced(workspace, capsys):
    (workspace / "dvc.yaml").write_text("mine: 1\n")
    assert main(["migrate"]) == 1
    assert "dvc.yaml" in capsys.readouterr().err
    assert (workspace / "dvc.yaml").read_text() == "mine: 1\n"
    git("commit", "--all", "--message", "mine")
    assert main(["migrate"]) == 0
    assert (workspace / "dvc.yaml").read_bytes() == (TEMPLATE / "dvc.yaml").read_bytes()


def test_migrate_wants_a_workspace(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["migrate"]) == 1
    assert "dvc.yaml" in capsys.readouterr().err
