"""What a run shows in Prefect's pages: progress, figures beside production's, the gate's decision, pictures, links."""

from __future__ import annotations

import base64
import contextvars
import json
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from pydantic import TypeAdapter

from ddops import git
from ddops.evaluation.gate import comparable
from ddops.files import read_json
from ddops.flows.progress import Progress
from ddops.production import Registry
from ddops.reports import read_decision
from ddops.stages import paths

Values = dict[str, Any]
_VALUES = TypeAdapter(Values)
Compared = dict[str, dict[str, Values]]
"""Of every file and dotted name: ``new``, this workspace's value, and ``old``, the one in production."""
UPDATE_SECONDS = 2.0
MAX_IMAGE_BYTES = 1 << 20
"""Pictures are kept in Prefect's database; a larger one is left to the report."""
REPORTS_URL = "DDOPS_REPORTS_URL"
"""Where the directory ``reports`` is served, if it is; else links name the file."""
FIGURES = (paths.METRICS, paths.FEATURES_METRICS, paths.TRAJECTORIES_THROUGHPUT)
"""What there is to show once the stage ``evaluate`` has run; later stages' figures are still of an earlier run."""
HEADINGS = {
    "accepted": "# Accepted",
    "refused": "# Refused: nothing was exported, production is untouched",
    "overridden": "# Overridden: the rules refused the model, it was let through by name",
}
"""Of the gate's decision, by its outcome."""


class ProgressArtifact:
    """A stage's progress bar on the run's page. A context manager.

    Updates are sent by a thread of its own: a server that is slow, or away, must not hold up a stage's output.
    """

    def __init__(self, stage: str) -> None:
        self._key = artifact_key("progress", stage)
        self._latest: queue.SimpleQueue[Progress | None] = queue.SimpleQueue()
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._send_all,), name=self._key, daemon=True)

    def __enter__(self) -> ProgressArtifact:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._latest.put(None)
        self._thread.join(timeout=UPDATE_SECONDS * 5)

    def show(self, progress: Progress) -> None:
        """To be sent when its turn comes; of several, only the last."""
        self._latest.put(progress)

    def _send_all(self) -> None:
        artifact = None
        ended = False
        while not ended:
            waiting = [self._latest.get()]
            while not self._latest.empty():
                waiting.append(self._latest.get())
            ended = waiting[-1] is None
            if not (known := [progress for progress in waiting if progress is not None]):
                continue
            try:
                artifact = self._send(artifact, known[-1])
            except httpx.HTTPError:
                # Progress is there to be watched; the stage goes on without.
                continue
            if not ended:
                time.sleep(UPDATE_SECONDS)

    def _send(self, artifact: Any, progress: Progress) -> Any:
        percent, description = float(progress.percent), f"{progress.title}: {progress.text}"
        if artifact is None:
            return create_progress_artifact(percent, key=self._key, description=description)
        update_progress_artifact(artifact, percent, description=description)
        return artifact


def artifact_key(*parts: str) -> str:
    """A key that Prefect takes: lower-case letters, digits and dashes."""
    return "-".join(parts).lower().replace("_", "-")


def metrics_table(workspace: Path, production: str | None) -> None:
    """Every metric of the workspace beside production's: those that Git revision ``production`` has, or if that is None
    those with which the model in production was promoted, or while there is none those of HEAD.

    Figures of a file that were judged by another protocol stand there too, without a change; the description says why.
    """
    registry = read_registry(workspace)
    if production is None and (version := registry["current"]) is not None:
        files = _beside(workspace, {str(paths.METRICS): registry["versions"][version]["metrics"]})
        said = f"This run beside production ({version})."
    else:
        files, said = _beside_revision(workspace, production or "HEAD")
    facts = {file: _facts_that_differ(metrics) for file, metrics in files.items()}
    rows = [
        {
            "metric": f"{Path(file).stem}: {name}",
            **_compared(values.get("new"), values.get("old"), compare=not facts[file]),
        }
        for file, metrics in files.items()
        for name, values in metrics.items()
        if _is_figure(values.get("new")) or _is_figure(values.get("old"))
    ]
    apart = [
        f"The figures of {Path(file).stem} do not compare, their protocols differ: {', '.join(names)}."
        for file, names in facts.items()
        if names
    ]
    create_table_artifact(rows, key="metrics", description=" ".join([said, *apart]))


def read_registry(workspace: Path) -> dict[str, Any]:
    """Which model is in production: ``current``, ``versions``, ``history``."""
    registry = Registry.load(workspace / paths.PRODUCTION)
    return {"current": registry.current, "versions": registry.versions, "history": registry.history}


def _beside_revision(workspace: Path, revision: str) -> tuple[Compared, str]:
    try:
        files = {path: git.file_at(workspace, revision, path) for path in FIGURES}
    except git.GitError as error:
        return _beside(workspace, {}), f"This run. No figures of production: {error}."
    old = {str(path): json.loads(text) for path, text in files.items() if text is not None}
    return _beside(workspace, old), f"This run beside production (Git revision `{revision}`)."


def _beside(workspace: Path, old: dict[str, Values]) -> Compared:
    compared: Compared = {}
    for path in FIGURES:
        new = read_json(workspace / path, _VALUES, "run its stage again") if (workspace / path).exists() else {}
        here, there = dict(_flat(new)), dict(_flat(old.get(str(path), {})))
        names = dict.fromkeys([*here, *there])
        compared[str(path)] = {name: {"new": here.get(name), "old": there.get(name)} for name in names}
    return compared


def _flat(values: Values, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return found


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _facts_that_differ(metrics: dict[str, dict[str, Any]]) -> list[str]:
    """Why this file's figures and production's do not compare; empty where they do, or where there are none."""
    if not any(_is_figure(values.get("new")) and _is_figure(values.get("old")) for values in metrics.values()):
        return []
    return comparable(_protocol(metrics, "new"), _protocol(metrics, "old"))


def _protocol(metrics: dict[str, dict[str, Any]], side: str) -> dict[str, dict[str, Any]]:
    """Each fact's parts by their dotted names, which are equal just where the facts are."""
    facts: dict[str, dict[str, Any]] = {}
    for name, values in metrics.items():
        section, _, rest = name.partition(".")
        if section == "protocol":
            fact, _, part = rest.partition(".")
            facts.setdefault(fact, {})[part] = values.get(side)
    return facts


def _compared(new: Any, old: Any, *, compare: bool) -> dict[str, str]:
    change = f"{new - old:+.4g}" if compare and _is_figure(new) and _is_figure(old) else ""
    return {"this run": _shown(new), "production": _shown(old), "change": change}


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def gate_decision(workspace: Path, production: str | None) -> None:
    """What the gate decided, who overrode it and why, the checks that failed, and every rule's verdict."""
    decision = read_decision(workspace / paths.GATE_DECISION)
    override = decision["override"]
    lines = [
        HEADINGS[decision["outcome"]],
        "",
        *([f"Overridden by {override['by']}: {_cell(override['reason'])}", ""] if override else []),
        # Such figures are of something else: what the rules say of them means nothing.
        *(f"- **failed** {check['name']}: {check['detail']}" for check in decision["checks"] if not check["passed"]),
        "",
        "| | rule | value | bound |",
        "|---|---|---|---|",
        *(
            f"| {'passed' if rule['passed'] else '**failed**'} | {rule['rule']} | "
            f"{rule['quantity']} = {_shown(rule['value']) or 'missing'} | {rule['bound']} |"
            for rule in decision["rules"]
        ),
    ]
    create_markdown_artifact("\n".join(lines), key="gate", description="The gate's decision")


def image_grids(workspace: Path, production: str | None) -> None:
    """Each grid of samples, in the artifact itself, so that the page shows it wherever the browser is."""
    for path in sorted((workspace / paths.GRIDS).glob("*.png")):
        if path.stat().st_size > MAX_IMAGE_BYTES:
            _link(workspace, path, artifact_key("grid", path.stem))
            continue
        url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        create_image_artifact(url, key=artifact_key("grid", path.stem), description=path.stem)


def report_link(workspace: Path, production: str | None) -> None:
    """Where the report is."""
    _link(workspace, workspace / paths.REPORT, "report")


def in_production(workspace: Path) -> None:
    """The version in production, and every step that led there, newest first."""
    registry = read_registry(workspace)
    lines = [
        f"# In production: {registry['current']}",
        "",
        "| when | what | version | by | why |",
        "|---|---|---|---|---|",
        *(
            f"| {step['at']} | {step['what']} | {step['version']} | {step['by']} | {_cell(step['reason'])} |"
            for step in reversed(registry["history"])
        ),
    ]
    create_markdown_artifact("\n".join(lines), key="production", description="The model in production")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _link(workspace: Path, path: Path, key: str) -> None:
    base = os.environ.get(REPORTS_URL)
    inside = path.relative_to(workspace / paths.REPORTS)
    url = f"{base.rstrip('/')}/{inside}" if base else path.resolve().as_uri()
    create_link_artifact(url, link_text=str(path.relative_to(workspace)), key=key)


AFTER_STAGE: dict[str, Callable[[Path, str | None], None]] = {
    "sample": image_grids,
    "evaluate": metrics_table,
    "gate": gate_decision,
    "report": report_link,
}
"""What to publish when a stage has made its outputs, or DVC found them up to date; arguments: workspace, production."""
