"""Where an exported model comes from, as it is written into the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ddops import __version__, git
from ddops.config.stages import ExportConfig
from ddops.files import sha256_file
from ddops.reports import read_metrics


def provenance(preset: str, export: ExportConfig, student: Path, lock: Path = Path("dvc.lock")) -> dict[str, str]:
    """Preset, code and weights. A DVC hash that is not known is left out."""
    facts = {
        "ddops.version": __version__,
        "ddops.preset": preset,
        "ddops.student": export.student,
        "ddops.steps": str(export.steps),
        "ddops.precision": export.precision,
        "ddops.license": export.license,
        "ddops.student_sha256": sha256_file(student),
        **git_fact(student.parent),
    }
    md5 = dvc_md5(student.parent, lock)
    return facts if md5 is None else {**facts, "ddops.dvc_md5": md5}


def judged(metrics: Path, export: ExportConfig, student_sha256: str) -> dict[str, str]:
    """Protocol and FID of the student's row; nothing where there are no figures, or they are of another student."""
    if not metrics.is_file():
        return {}
    figures = read_metrics(metrics)
    if figures.get("models", {}).get(export.student) != student_sha256 or export.row not in figures:
        return {}
    return {"ddops.protocol": figures["protocol"]["name"], "ddops.fid": f"{figures[export.row]['fid']:.4f}"}


def git_fact(directory: Path) -> dict[str, str]:
    """The commit that is checked out around ``directory``; or, under another name, why Git names none."""
    try:
        return {"ddops.git_commit": git.head(directory)}
    except git.NoCommitError as error:
        return {"ddops.git_commit_missing": str(error)}


def dvc_md5(out: Path, lock: Path) -> str | None:
    """DVC's hash of an output, as the last run of its stage left it in ``dvc.lock``."""
    if not lock.exists():
        return None
    stages: dict[str, Any] = (yaml.safe_load(lock.read_text()) or {}).get("stages", {})
    entries = (entry for stage in stages.values() for entry in stage.get("outs", []))
    wanted = out.relative_to(lock.parent) if out.is_relative_to(lock.parent) else out
    return next((str(entry["md5"]) for entry in entries if entry["path"] == str(wanted)), None)
