"""The wheel, built from what the clone holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers.tiny import ROOT

PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")


def build_wheel(place: Path) -> Path:
    """The wheel, in the directory ``place``."""
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(place)]
    command = [sys.executable, *PIP, "wheel", *options, str(_copy_of_the_sources(place / "sources"))]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = place.glob("*.whl")
    return wheel


def _copy_of_the_sources(place: Path) -> Path:
    """Without what earlier builds left: setuptools puts it into the wheel."""
    listed = ["git", "ls-files", "-co", "--exclude-standard", "-z", "src", "pyproject.toml", "README.md", "LICENSE"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes((ROOT / name).read_bytes())
    return place
