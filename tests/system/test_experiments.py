"""A queued experiment runs the code that it records, whatever has become of the checkout since."""

import pytest

from helpers.pipeline_world import clone, run

pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("workspace")]

STAGE = "src/ddops/stages/captions.py"


def say(workspace, word):
    """Have a stage, which does nothing for a preset of classes, say a word."""
    head, _, _ = (workspace / STAGE).read_text().partition("\nif __name__")
    (workspace / STAGE).write_text(
        f'{head}\nif __name__ == "__main__":\n    print("{word}")\n    run_stage(captions)\n'
    )


def test_a_queued_experiment_runs_the_code_it_was_queued_with(tmp_path):
    workspace = clone(tmp_path / "work")
    for name in ("name", "email"):
        run(workspace, "git", "config", f"user.{name}", "ada@example.invalid")
    say(workspace, "as queued")
    run(workspace, "git", "commit", "--quiet", "--all", "--message", "code that is queued")
    run(workspace, "dvc", "exp", "run", "--queue", "--name", "mine", "-S", "preset=smoke", "captions")
    say(workspace, "as edited")
    run(workspace, "dvc", "exp", "run", "--run-all")
    said = run(workspace, "dvc", "queue", "logs", "mine")
    assert "as queued" in said
    assert "as edited" not in said
    recorded = run(workspace, "git", "for-each-ref", "--format=%(refname)", "refs/exps/*/*/mine").strip()
    assert 'print("as queued")' in run(workspace, "git", "show", f"{recorded}:{STAGE}")
