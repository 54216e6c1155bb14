"""Where figures come from: commit, data hashes, models, machine, versions. As far as each is known here."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import yaml

from ddops import git

PACKAGES: Final = ("ddops", "torch", "torch-fidelity", "onnx", "onnxruntime", "numpy", "scikit-learn", "dvc")
LOCK: Final = Path("dvc.lock")
SOURCES: Final = ("src", "params", "params.yaml", "recipes.yaml", "dvc.yaml")
"""What figures follow from, in Git."""


def provenance(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Facts by name, for people."""
    facts = {"Git commit": _commit(), **_data_hashes(LOCK)}
    facts |= {f"sha256 of {name}": sha256 for name, sha256 in metrics.get("models", {}).items()}
    system = f"{platform.system()} {platform.machine()}, {_processor()}, {os.cpu_count()} cores"
    facts["machine"] = f"{system}, Python {platform.python_version()}"
    facts["versions"] = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return facts


def _commit() -> str:
    """The commit that is checked out, and whether files differ from it; or why Git does not say."""
    try:
        commit = git.head(Path())
        changed = git.ask(Path(), "status", "--porcelain", "--", *SOURCES).strip()
    except git.GitError as error:
        return str(error)
    return f"{commit}, with changes since" if changed else commit


def _data_hashes(lock: Path) -> dict[str, str]:
    """DVC's hash of every directory that a stage made, as far as the lock file has it by now."""
    if not lock.exists():
        return {}
    stages = yaml.safe_load(lock.read_text())["stages"]
    outs = [out for stage in stages.values() for out in stage.get("outs", [])]
    # Sorted: the file's own order is that in which the stages happened to run.
    return {
        f"DVC {path}": md5
        for path, md5 in sorted((out["path"], out.get("md5", "")) for out in outs)
        if md5.endswith(".dir")
    }


def _processor() -> str:
    """The processor's name, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "processor unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "processor unknown"
