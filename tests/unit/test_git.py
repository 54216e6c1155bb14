"""A record names the commit it is from, or says why it cannot: five reasons, told apart by asking a real Git."""

import subprocess
from pathlib import Path

import pytest

from ddops import git
from ddops.config.load import compose, validate
from ddops.evaluation.provenance import provenance as facts_of_report
from ddops.export.provenance import provenance as facts_of_export
from helpers.tiny import PARAMS


def run(directory, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    command = ["git", *identity, "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """With one commit, and nobody's settings; the working directory."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    directory = tmp_path / "work"
    directory.mkdir()
    run(directory, "init", "--quiet")
    run(directory, "commit", "--quiet", "--allow-empty", "--message", "one")
    monkeypatch.chdir(directory)
    return directory


def refused(monkeypatch):
    """As in a container whose user does not own the files."""
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")


def reason(directory):
    with pytest.raises(git.NoCommitError) as error:
        git.head(directory)
    return str(error.value)


def test_the_commit_is_named_from_anywhere_in_the_repository(repository):
    (repository / "below").mkdir()
    assert git.head(repository) == git.head(repository / "below") == run(repository, "rev-parse", "HEAD")


def test_a_refusal_is_named_with_the_way_out(repository, monkeypatch):
    refused(monkeypatch)
    said = reason(repository)
    assert "another user owns" in said
    assert said.endswith(f"git config --global --add safe.directory {repository}")


def test_no_repository_no_commit_and_no_git_are_three_things(repository, tmp_path, monkeypatch):
    assert reason(tmp_path) == "not in a Git repository"
    empty = tmp_path / "empty"
    empty.mkdir()
    run(empty, "init", "--quiet")
    assert reason(empty) == "no commit yet"
    assert "cannot change to" in reason(tmp_path / "nowhere")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert reason(repository) == "unknown: git is not installed"


def test_a_file_is_read_as_another_commit_has_it(repository):
    below = repository / "below"
    below.mkdir()
    for text in ("old", "new"):
        (below / "figures.json").write_text(text)
        run(repository, "add", "--all")
        run(repository, "commit", "--quiet", "--message", text)
    (below / "figures.json").write_text("not committed")
    assert git.file_at(below, "HEAD", Path("figures.json")) == "new"
    assert git.file_at(repository, "HEAD~1", Path("below/figures.json")) == "old"
    assert git.file_at(repository, "HEAD~2", Path("below/figures.json")) is None
    with pytest.raises(git.GitError, match="nowhere"):
        git.file_at(repository, "nowhere", Path("below/figures.json"))


def test_a_git_that_hangs_holds_nothing_up(repository, tmp_path, monkeypatch):
    slow = tmp_path / "git"
    slow.write_text("#!/bin/sh\nexec sleep 20\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(git, "PATIENCE", 0.2)
    assert reason(repository) == "unknown: git gave no answer within 0.2 s"


def test_the_reports_facts_say_commit_changes_or_refusal(repository, monkeypatch):
    head = git.head(repository)
    assert facts_of_report({})["Git commit"] == head
    (repository / "params.yaml").write_text("seed: 1\n")
    assert facts_of_report({})["Git commit"] == f"{head}, with changes since"
    refused(monkeypatch)
    assert "safe.directory" in facts_of_report({})["Git commit"]


def test_the_manifests_facts_have_the_commit_or_why_it_is_missing(repository, monkeypatch):
    student = repository / "student.safetensors"
    student.write_bytes(b"weights")
    export = validate(compose(PARAMS), "composed").export
    facts = facts_of_export("digits", export, student)
    assert facts["ddops.git_commit"] == git.head(repository)
    assert "ddops.git_commit_missing" not in facts
    refused(monkeypatch)
    facts = facts_of_export("digits", export, student)
    assert "ddops.git_commit" not in facts
    assert "safe.directory" in facts["ddops.git_commit_missing"]
    assert all(isinstance(value, str) for value in facts.values())
