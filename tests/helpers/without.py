"""Processes for which some packages are not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def environment_without(directory: Path, packages: Iterable[str]) -> dict[str, str]:
    """Variables under which a Python, and those that it starts, finds nothing in the place of ``packages``; a file in
    ``directory`` sees to it."""
    directory.mkdir(parents=True, exist_ok=True)
    block = f"import sys\nsys.modules.update(dict.fromkeys({sorted(packages)!r}))\n"
    (directory / "sitecustomize.py").write_text(block)
    path = os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def python_without(directory: Path, packages: Iterable[str], *arguments: Any) -> subprocess.CompletedProcess[str]:
    """Python with ``arguments``, in ``directory``, without ``packages``."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=directory,
        env={**os.environ, **environment_without(directory / "without", packages)},
        capture_output=True,
        text=True,
        check=False,
    )
