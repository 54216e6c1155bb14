"""Stages of the pipeline in a workspace of their own, without DVC; what is finished is kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ddops.config.load import write_params
from ddops.files import write_json
from ddops.workspace.files import TEMPLATE
from ddops.workspace.recipes import RECIPES


def run_stages(
    workspace: Path, values: dict[str, Any], stages: Sequence[str], clock: Callable[[], float]
) -> dict[str, float]:
    """Run those stages that ``seconds.json`` in the workspace does not hold yet; what each took, by ``clock``.

    Raises:
        SystemExit: the workspace is of other parameters, or a stage fails.
    """
    workspace.mkdir(parents=True, exist_ok=True)
    params, timings = workspace / "params.yaml", workspace / "seconds.json"
    if params.exists() and yaml.safe_load(params.read_text()) != values:
        raise SystemExit(f"{params} is of other parameters: remove {workspace}, or name another directory")
    write_params(values, params)
    shutil.copy(TEMPLATE / RECIPES, workspace)
    seconds: dict[str, float] = json.loads(timings.read_text()) if timings.exists() else {}
    for stage in stages:
        if stage in seconds:
            continue
        started = clock()
        if subprocess.run([sys.executable, "-m", f"ddops.stages.{stage}"], cwd=workspace, check=False).returncode:
            raise SystemExit(f"{stage} failed in {workspace}; run the same command again to go on")
        seconds[stage] = round(clock() - started, 1)
        write_json(timings, seconds)
    return seconds
