"""A repository of its own with this checkout's files, and commands that run in it as a user's would."""

import re
import shutil
import subprocess
from pathlib import Path

import yaml

from ddops.config.load import compose, write_params
from helpers.dvc_environment import dvc_environment

ROOT = Path(__file__).parents[2]
STAGES = list(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])
PATIENCE = 1200
"""Seconds for one command, on a machine that is busy with other things."""


def environment(workspace):
    """This interpreter and the workspace's own code, no configuration of the user's, and no network."""
    return dvc_environment(
        workspace.parent / f"{workspace.name}-dvc",
        workspace / "src",
        # The commit's hash is in the exported model, which must not depend on the time of day.
        **dict.fromkeys(("GIT_AUTHOR_DATE", "GIT_COMMITTER_DATE"), "1767225600 +0000"),
        **{f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "HTTP", "HTTPS")},
    )


def run(workspace, *command, fails=False, **more):
    """Output of a command, both streams together; ``more`` is added to its environment."""
    result = subprocess.run(
        command,
        cwd=workspace,
        env={**environment(workspace), **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (result.returncode != 0) == fails, result.stdout
    return result.stdout


def clone(workspace):
    """A repository of its own with every file of this one that git tracks or would; then preset smoke."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (workspace / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, workspace / name)
    run(workspace, "git", "init", "--quiet")
    commit(workspace)
    write_params(compose(workspace / "params", ["preset=smoke"]), workspace / "params.yaml")
    return workspace


def commit(workspace):
    """Everything that is not ignored, by somebody."""
    run(workspace, "git", "add", "--all")
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.invalid")
    run(workspace, "git", *identity, "commit", "--quiet", "--message", "everything")


def stages_run(output):
    """Of what `dvc repro` printed: the stages that it ran."""
    return re.findall(r"^Running stage '(\w+)'", output, re.MULTILINE)


def lock_of(workspace):
    """What DVC knows of every stage's last run."""
    return yaml.safe_load((workspace / "dvc.lock").read_text())["stages"]


def forget(workspace, stages):
    """Take from a workspace what these stages made, and what DVC knows of their runs."""
    lock = yaml.safe_load((workspace / "dvc.lock").read_text())
    for path in (workspace / out["path"] for stage in stages for out in lock["stages"].pop(stage)["outs"]):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (workspace / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
    shutil.rmtree(workspace / ".dvc" / "cache" / "runs")
