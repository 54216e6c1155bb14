"""The JSON files that the pipeline's stages hand to each other and to people: read here and nowhere else, so that one
that was damaged is named, with the stage that makes it again.

The shapes say what readers go by; a file may hold more.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NotRequired, TypeVar

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from ddops.files import read_json

T = TypeVar("T")


class ReportError(ValueError):
    """A report that is missing or damaged. The message names the file and the stage that makes it."""


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Row = dict[str, float]
"""Figures by name, and what the row costs."""
FACTS: Final = ("protocol", "models")
"""What the metrics file holds beside rows."""


class Protocol(TypedDict, total=False):
    """What figures state of the protocol that they follow; which of it a reader compares is the reader's."""

    name: str
    features: str
    features_sha256: str
    reference_sha256: str | None
    drawing_sha256: str
    quantisation: str
    labels: str
    seeds: list[int]


class Override(TypedDict):
    """Who let a refused model through, and why."""

    student_sha256: str
    by: str
    reason: str


class Check(TypedDict):
    """Whether the figures are of what is in hand."""

    name: str
    passed: bool
    detail: str


class Rule(TypedDict):
    """A rule's verdict."""

    rule: str
    quantity: str
    value: float | None
    bound: str
    passed: bool
    measured: NotRequired[bool]


class GateDecision(TypedDict):
    """``reports/gate.json``."""

    passed: bool
    outcome: Literal["accepted", "refused", "overridden"]
    student_sha256: Sha256
    override: Override | None
    checks: list[Check]
    rules: list[Rule]


class ParityReport(TypedDict, total=False):
    """How far the graph is from PyTorch."""

    images: int
    largest: float
    mean: float


class ExportReport(TypedDict):
    """``reports/export.json``."""

    parity: ParityReport
    sha256: dict[str, Sha256]
    bytes: NotRequired[int]
    steps: NotRequired[int]
    exported: NotRequired[Row]
    pytorch: NotRequired[Row | None]
    fid_loss: NotRequired[float]


class Judge(TypedDict):
    """``reports/features.json``."""

    name: str
    heldout_accuracy: NotRequired[Annotated[float, Field(ge=0, le=1)]]
    heldout: NotRequired[int]
    origin: NotRequired[str]


class RowCost(TypedDict):
    """What drawing a row takes."""

    passes: int
    parameters: int


class SamplesManifest(TypedDict):
    """``data/samples/manifest.json``."""

    models: dict[str, Sha256]
    drawing_sha256: Sha256
    rows: dict[str, RowCost]


_METRICS: Final = TypeAdapter(dict[str, dict[str, Any]])
_PROTOCOL: Final = TypeAdapter(Protocol)
_MODELS: Final = TypeAdapter(dict[str, str])
_ROW: Final = TypeAdapter(Row)
_DECISION: Final = TypeAdapter(GateDecision)
_EXPORT: Final = TypeAdapter(ExportReport)
_JUDGE: Final = TypeAdapter(Judge)
_SAMPLES: Final = TypeAdapter(SamplesManifest)


def read_metrics(path: Path) -> dict[str, Any]:
    """``reports/metrics.json``: the protocol, the models, and a row of figures for everything that was judged.

    Raises:
        ReportError: missing or damaged.
    """
    metrics = _read(path, _METRICS, "evaluate")
    for name, shape in {"protocol": _PROTOCOL, "models": _MODELS}.items():
        _check(path, shape, metrics.get(name, {}), name, "evaluate")
    for name in metrics.keys() - set(FACTS):
        _check(path, _ROW, metrics[name], name, "evaluate")
    return metrics


def read_decision(path: Path) -> GateDecision:
    """What the gate decided.

    Raises:
        ReportError: missing or damaged, or it contradicts itself.
    """
    decision = _read(path, _DECISION, "gate")
    checked = all(check["passed"] for check in decision["checks"])
    passed = checked and (all(rule["passed"] for rule in decision["rules"]) or decision["override"] is not None)
    if not decision["passed"] == passed == (decision["outcome"] != "refused"):
        raise _damaged(path, "its verdict is not what its checks and rules say", "gate")
    return decision


def read_export(path: Path) -> ExportReport:
    """How the exported graph compares. Raises ReportError: missing or damaged."""
    return _read(path, _EXPORT, "export_onnx")


def read_judge(path: Path) -> Judge:
    """What the figures are computed with. Raises ReportError: missing or damaged."""
    return _read(path, _JUDGE, "features")


def read_samples_manifest(path: Path) -> SamplesManifest:
    """What the samples are of. Raises ReportError: missing or damaged."""
    return _read(path, _SAMPLES, "sample")


def require_values(path: Path, value: Any, keys: Iterable[str], stage: str) -> None:
    """Dotted ``keys`` that one reader cannot do without, in what was read from ``path``.

    Raises:
        ReportError: one is missing.
    """
    for dotted in keys:
        here = value
        for key in dotted.split("."):
            here = here.get(key) if isinstance(here, dict) else None
        if here is None:
            raise _damaged(path, f"it lacks {dotted}", stage)


def _read(path: Path, shape: TypeAdapter[T], stage: str) -> T:
    try:
        return read_json(path, shape, _way_out(stage), ReportError)
    except FileNotFoundError:
        raise ReportError(f"{path} is missing: it is made by the stage {stage} (dvc repro {stage})") from None


def _check(path: Path, shape: Any, value: Any, name: str, stage: str) -> None:
    try:
        shape.validate_python(value, strict=True)
    except ValueError as error:
        raise _damaged(path, f"{name}: {error}", stage) from error


def _damaged(path: Path, why: str, stage: str) -> ReportError:
    return ReportError(f"{path}: damaged ({why}); {_way_out(stage)}")


def _way_out(stage: str) -> str:
    return f"delete it and run dvc repro {stage}, or restore it from Git"
