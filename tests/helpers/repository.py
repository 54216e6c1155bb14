"""An empty repository under Git and DVC: made once, and copied from then on."""

import atexit
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from helpers import forked
from helpers.dvc_environment import dvc_environment

ROOT = Path(__file__).parents[2]


def make_repository(directory):
    """Put one in a directory, which is made if need be: what ``git init`` and ``dvc init`` put there."""
    return shutil.copytree(_template(), directory, dirs_exist_ok=True)


@cache
def _template():
    private = Path(tempfile.mkdtemp(prefix="ddops-template-"))
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    directory = private / "repository"
    directory.mkdir()
    env = dvc_environment(private / "dvc", ROOT / "src")
    subprocess.run(["git", "init", "--quiet", "--initial-branch", "main"], cwd=directory, env=env, check=True)
    done = forked.run_module("dvc", "init", "--quiet", cwd=directory, env=env)
    assert done.returncode == 0, done.stderr
    return directory
