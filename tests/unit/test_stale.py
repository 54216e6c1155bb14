"""`ddops stale`: which files of a stage's code changed since, comments told from code; and that a stage notes them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import ddops
from ddops.cli import main
from ddops.commands.stale import stale_summary
from ddops.files import write_json
from ddops.stages import paths
from ddops.workspace.code import PACKAGE, changes, code_sha256, reached, read_record, record
from ddops.workspace.recipes import RecipeError, recipe
from helpers.tiny import write_tiny_params

SOURCE = '''
"""A module."""
LIMIT = 3
"""A limit."""

def double(x):
    """Twice."""
    # for speed
    return x + x
'''


@pytest.mark.parametrize(
    ("was", "now"),
    [("Twice.", "Two times."), ("# for speed", "# why"), ("A limit.", ""), ("x + x", "(x + x)"), ("A module.", "One.")],
)
def test_comments_docstrings_and_layout_are_no_code(was, now):
    assert SOURCE.replace(was, now) != SOURCE
    assert code_sha256(SOURCE.replace(was, now)) == code_sha256(SOURCE)


@pytest.mark.parametrize(("was", "now"), [("x + x", "2 * x"), ("LIMIT = 3", "LIMIT = 4"), ("def double", "def twice")])
def test_what_computes_is_code(was, now):
    assert code_sha256(SOURCE.replace(was, now)) != code_sha256(SOURCE)


def test_a_body_of_a_docstring_alone_is_code_still():
    assert code_sha256('class A:\n    """An a."""') == code_sha256("class A:\n    pass")


def reached_from(stage):
    return {str(file.relative_to(PACKAGE)) for file in reached(PACKAGE / "stages" / f"{stage}.py")}


def test_a_stage_reaches_what_it_imports_at_any_depth_and_its_templates():
    trained = reached_from("distill_dd1")
    assert {"stages/distill_dd1.py", "losses/dd1.py", "training/muon.py", "flow/adaptive.py"} <= trained
    assert not any(name.startswith(("serving/", "flows/", "commands/", "export/")) for name in trained)
    assert {"evaluation/report.html", "evaluation/model_card.md"} <= reached_from("report")


def test_a_record_is_the_same_whenever_it_is_made():
    made = record("gate", "1.0")
    assert made == record("gate", "1.0")
    assert (made["ddops"], made["recipe"]) == ("1.0", recipe("gate"))
    assert not any(str(Path.home()) in name or Path(name).is_absolute() for name in made["files"])


def test_changes_are_told_apart():
    was = {"files": {name: {"text": "1", "code": "1"} for name in ("same", "code", "comment", "gone")}}
    now = {"files": {name: {"text": "1", "code": "1"} for name in ("same", "new")}}
    now["files"] |= {"code": {"text": "2", "code": "2"}, "comment": {"text": "2", "code": "1"}}
    expected = {"code": "code", "comment": "comments only", "gone": "gone", "new": "new"}
    assert changes(was, now) == expected


# The command


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def note(stage, **changed):
    """A record as of before these files were edited: a hash that is not theirs."""
    made = record(stage, "0.0.1")
    for name, kinds in changed.items():
        made["files"][name.replace("__", "/") + ".py"] |= dict.fromkeys(kinds.split("_"), "another")
    write_json(paths.code_record(stage), made)


def said(capsys, *arguments):
    assert main(["stale", *arguments]) == 0
    return capsys.readouterr().out


def test_without_a_record_it_says_so(workspace, capsys):
    lines = said(capsys).splitlines()
    assert len(lines) == 13
    assert all("no record" in line for line in lines)


def test_nothing_changed(workspace, capsys):
    note("gate")
    assert "gate: recipe 1; nothing changed" in said(capsys, "gate")


def test_changed_files_are_named_with_how(workspace, capsys):
    note("gate", evaluation__gate="text_code", config__load="text")
    lines = [line.split() for line in said(capsys, "gate").splitlines()]
    assert lines[0] == ["gate:", "recipe", "1;", "made", "by", "ddops", "0.0.1"]
    assert ["code", "evaluation/gate.py"] in lines
    assert ["comments", "only", "config/load.py"] in lines
    assert len(lines) == 3


def test_a_raised_recipe_is_named(workspace, capsys, raised):
    note("gate")
    raised("gate")
    assert "recipe 1, now 2" in said(capsys, "gate")


def test_an_unknown_stage_is_named(workspace, capsys):
    assert main(["stale", "gat"]) == 1
    assert "no stage gat" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"files": {}}', '{"recipe": 1, "files": {"a": {}}}'])
def test_a_damaged_record_is_named(workspace, capsys, content):
    path = paths.code_record("gate")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(RecipeError, match="damaged"):
        read_record(path)
    assert main(["stale", "gate"]) == 1
    assert str(path) in capsys.readouterr().err


def test_the_summary_for_a_version_is_of_the_stages_that_led_to_it(workspace):
    note("gate", evaluation__gate="text_code", config__load="text")
    summary = stale_summary("export_onnx")
    assert list(summary)[-1] == "export_onnx"
    assert not {"build_engine", "report"} & set(summary)
    assert summary["gate"] == {"recipe": 1, "changed": ["evaluation/gate.py"]}
    assert summary["teacher"] is None


def test_a_stage_notes_its_code_before_it_works(tmp_path):
    """Of a stage that fails too: DVC records none of its outputs then."""
    write_tiny_params(tmp_path)
    command = [sys.executable, "-m", "ddops.stages.report"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "reports/metrics.json is missing" in result.stderr
    assert json.loads((tmp_path / paths.code_record("report")).read_text()) == record("report", ddops.__version__)
