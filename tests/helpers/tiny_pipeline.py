"""A DVC project with the pipeline's stage names whose stages only sleep, print or fail: for the tests of the flows.

Each stage runs tiny_work.py, which does what the file ``behave.yaml`` says for its name; DVC does not know of
that file, so changing it does not make a stage out of date. Parameters come from the real ``params/``.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from ddops.config.load import compose, write_params
from helpers.dvc_environment import dvc_environment
from helpers.repository import make_repository

ROOT = Path(__file__).parents[2]

STAGES = {
    "teacher": {"needs": [], "outs": ["artifacts/teacher"], "meta": {"timeout": 300}},
    "distill_dd1": {"needs": ["artifacts/teacher"], "outs": ["artifacts/dd1"]},
    "sample": {"needs": ["artifacts/dd1"], "outs": ["reports/grids"], "meta": {"device": "cpu"}},
    "evaluate": {"needs": ["reports/grids"], "metrics": ["reports/metrics.json"], "meta": {"device": "cpu"}},
    "gate": {"needs": ["reports/metrics.json"], "outs": ["reports/gate.json"], "meta": {"device": "cpu"}},
    "export_onnx": {
        "needs": ["reports/gate.json", "artifacts/dd1"],
        "outs": ["artifacts/onnx"],
        "meta": {"device": "cpu"},
    },
    "report": {"needs": ["artifacts/onnx"], "outs": ["reports/index.html"], "meta": {"device": "cpu"}},
}


def declared(names=tuple(STAGES), **meta):
    """``dvc.yaml`` with some of the stages; ``meta`` changes a stage's, by name."""
    stages = {}
    for name in names:
        stage = STAGES[name]
        outputs = [*stage.get("outs", []), *stage.get("metrics", [])]
        needs = [path for path in stage["needs"] if any(path in outs(STAGES[other]) for other in names)]
        stages[name] = {
            "cmd": f"python work.py {name} {' '.join(outputs)}",
            "params": ["seed"],
            "deps": needs,
            "meta": {**stage.get("meta", {}), **meta.get(name, {})},
            **({"outs": stage["outs"]} if "outs" in stage else {}),
            **({"metrics": [{path: {"cache": False}} for path in stage["metrics"]]} if "metrics" in stage else {}),
        }
    return {"stages": stages}


def outs(stage):
    return [*stage.get("outs", []), *stage.get("metrics", [])]


def make(workspace, names=tuple(STAGES), **meta):
    """Write, compose (preset smoke) and commit such a project; its code and flows are this checkout's."""
    make_repository(workspace)
    shutil.copytree(ROOT / "params", workspace / "params")
    for file in ("prefect.yaml", "recipes.yaml"):
        shutil.copy(ROOT / file, workspace)
    for linked in ("deploy",):
        (workspace / linked).symlink_to(ROOT / linked)
    shutil.copy(ROOT / "tests" / "helpers" / "tiny_work.py", workspace / "work.py")
    (workspace / ".gitignore").write_text("/.ddops/\n__pycache__\n/artifacts/\n/behave.yaml\n/deploy\n")
    (workspace / "dvc.yaml").write_text(yaml.safe_dump(declared(names, **meta), sort_keys=False))
    behave(workspace)
    write_params(compose(workspace / "params", ["preset=smoke"]), workspace / "params.yaml")
    git(workspace, "add", "--all")
    git(workspace, "commit", "--quiet", "--message", "tiny")
    return workspace


def behave(workspace, **behaviour):
    """Say how stages behave from now on."""
    (workspace / "behave.yaml").write_text(yaml.safe_dump(behaviour))


def ran(workspace):
    """The stages that ran, in order, and under which process id."""
    path = workspace / ".ddops" / "ran"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(name, int(pid)) for name, pid in map(str.split, lines)]


def environment(workspace):
    """This interpreter and checkout, one thread, no configuration of the user's, nothing of Prefect's, no network."""
    identity = {
        f"GIT_{who}_{what}": f"{what.lower()}@example.invalid"
        for who in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    private = workspace.parent / f"{workspace.name}-dvc"
    everything = dvc_environment(private, ROOT / "src", **identity)
    return {name: value for name, value in everything.items() if not name.startswith(("PREFECT", "DDOPS"))}


def git(workspace, *arguments):
    subprocess.run(["git", *arguments], cwd=workspace, env=environment(workspace), check=True)


def python(workspace, *arguments):
    """Run this interpreter there; gives what it printed."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=workspace,
        env=environment(workspace),
        check=True,
        capture_output=True,
        text=True,
    ).stdout
