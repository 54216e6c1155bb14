"""A repository of its own with this checkout's files, and commands that run in it as a user's would."""

import shutil
import subprocess
from pathlib import Path

from helpers.dvc_environment import dvc_environment

ROOT = Path(__file__).parents[2]


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


def run(workspace, *command, fails=False):
    """Output of a command, both streams together."""
    result = subprocess.run(
        command,
        cwd=workspace,
        env=environment(workspace),
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
    run(workspace, "git", "add", "--all")
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.invalid")
    run(workspace, "git", *identity, "commit", "--quiet", "--message", "everything")
    run(workspace, "ddops", "compose", "preset=smoke")
    return workspace
