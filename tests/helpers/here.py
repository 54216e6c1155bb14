"""What users start as a process, run in the process of the tests: loading torch takes longer than the work."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from ddops.stages.common import run_stage
from helpers.house import ROOT, run_stage_call


@dataclass(frozen=True)
class Ended:
    """How it ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


def run_stage_here(workspace: Path, name: str) -> Ended:
    """``python -m ddops.stages.NAME`` in a workspace; what it logs goes to the tests' log."""
    stage, trains = run_stage_call(name)
    with contextlib.chdir(workspace):
        return _ended(lambda: run_stage(stage, trains=trains))


def run_script_here(script: str, *arguments: str) -> Ended:
    """``python SCRIPT ARGUMENTS`` in the repository."""
    path = [str(ROOT / Path(script).parent), *sys.path]
    with (
        contextlib.chdir(ROOT),
        mock.patch.object(sys, "argv", [script, *arguments]),
        mock.patch.object(sys, "path", path),
        torch.enable_grad(),  # what a script sets for good ends with it
    ):
        return _ended(lambda: runpy.run_path(script, run_name="__main__"))


def _ended(run: Callable[[], object]) -> Ended:
    """As Python ends a process: 1 and the words where it was left with words."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            run()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
            if isinstance(left.code, str):
                print(left.code, file=stderr)
    return Ended(code, stdout.getvalue(), stderr.getvalue())
