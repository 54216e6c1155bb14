"""The gate: do the figures belong to the model in hand, and does it keep the rules? Pure; the stage reads the files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from ddops.config.evaluation import GateConfig, GateOverride, GateRule
from ddops.workspace.recipes import recipe

PRODUCTION: Final = "production"
STUDENT: Final = "student"
"""In a rule: the row of the model that is exported, whichever the preset names."""
_COMPARED: Final = (
    *("name", "recipes", "features", "features_sha256", "feature_dim", "reference_sha256", "labels", "image_size"),
    *("resize", "quantisation", "asked_for", "kid", "neighbours", "precision_recall_samples", "prompts_sha256"),
    "clip_sha256",
)
"""Facts of a protocol in which two figures must agree. (Seeds and versions are recorded, and may differ.)"""
_FIRST: Final = {"recipes": {"sample": 1, "evaluate": 1}}
"""Figures that name no recipes are of before there were any, and have been vouched for by ``dvc commit`` since."""


@dataclass(frozen=True)
class Verdict:
    """One rule's outcome. ``value`` is None where a metric is missing or no finite number, or production's does not
    compare: that fails."""

    rule: str
    quantity: str
    value: float | None
    bound: str
    passed: bool
    measured: bool = True
    """Whether the figures that it needs are there and are numbers. Where not, there is nothing to override: measure."""

    def sentence(self) -> str:
        """For people: which rule, its value and bound, and by how much it failed."""
        shown = "missing or not a number" if self.value is None else f"{self.value:.4g}"
        return f"{'passed' if self.passed else 'FAILED'}  {self.rule}: {self.quantity} = {shown}, {self.bound}"


@dataclass(frozen=True)
class Check:
    """Whether the figures belong to what is in hand. A failed check cannot be overridden: measure again instead."""

    name: str
    passed: bool
    detail: str

    def sentence(self) -> str:
        """For people."""
        return f"{'passed' if self.passed else 'FAILED'}  {self.name}: {self.detail}"


@dataclass(frozen=True)
class Decision:
    """Everything the gate found, and what follows from it."""

    checks: tuple[Check, ...]
    verdicts: tuple[Verdict, ...]
    student_sha256: str
    override: GateOverride | None

    @property
    def outcome(self) -> str:
        """``accepted``, ``refused``, or ``overridden``: refused by a rule and let through by name."""
        if not all(check.passed for check in self.checks):
            return "refused"
        if all(verdict.passed for verdict in self.verdicts):
            return "accepted"
        applies = self.override is not None and self.student_sha256.startswith(self.override.student_sha256)
        return "overridden" if applies and self.overridable else "refused"

    @property
    def overridable(self) -> bool:
        """Whether only bounds were missed: all figures are there, and are of what is in hand."""
        return all(check.passed for check in self.checks) and all(verdict.measured for verdict in self.verdicts)

    @property
    def passed(self) -> bool:
        """Whether the pipeline goes on."""
        return self.outcome != "refused"

    def failed(self) -> list[str]:
        """A sentence for everything that did not pass."""
        return [one.sentence() for one in self._all() if not one.passed]

    def sentences(self) -> list[str]:
        """A sentence for everything."""
        return [one.sentence() for one in self._all()]

    def _all(self) -> list[Check | Verdict]:
        return [*self.checks, *self.verdicts]

    def plain(self) -> dict[str, Any]:
        """For the decision file, which the report, the export and the promotion read."""
        override = asdict(self.override) if self.override is not None and self.outcome == "overridden" else None
        return {
            "passed": self.passed,
            "outcome": self.outcome,
            "student_sha256": self.student_sha256,
            "override": override,
            "checks": [asdict(check) for check in self.checks],
            "rules": [asdict(verdict) for verdict in self.verdicts],
        }


def decide(
    metrics: Mapping[str, Any],
    rules: Mapping[str, GateRule],
    production: Mapping[str, Any] | None = None,
    *,
    row: str,
) -> list[Verdict]:
    """A verdict for every rule, in order.

    Args:
        production: the metrics of the model in production, if there is one; under ``student`` those of its own row.
        row: what ``student`` in a rule stands for.
    """
    return [_judge(name, rule, metrics, production, row) for name, rule in rules.items()]


def gate_decision(
    metrics: Mapping[str, Any],
    config: GateConfig,
    *,
    models: Mapping[str, str],
    protocol: Mapping[str, Any],
    production: Mapping[str, Any] | None,
    student: str,
    row: str,
) -> Decision:
    """The decision on the model ``student`` and its ``row``: ``models`` are the hashes of the files in hand,
    ``protocol`` is what the figures must state."""
    checks = (*_model_checks(metrics, models), *_protocol_checks(metrics, protocol))
    verdicts = tuple(decide(metrics, config.rules, production, row=row))
    return Decision(checks, verdicts, models[student], config.override)


def comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The facts in which two protocols differ, so that their figures do not compare; none where they do."""
    one, other = _FIRST | dict(a), _FIRST | dict(b)
    return [fact for fact in _COMPARED if one.get(fact) != other.get(fact)]


def recipes_of_figures() -> dict[str, int]:
    """The recipes that this ddops draws and judges samples by: a protocol's fact, beside its settings."""
    return {stage: recipe(stage) for stage in _FIRST["recipes"]}


def _model_checks(metrics: Mapping[str, Any], models: Mapping[str, str]) -> list[Check]:
    measured = metrics.get("models", {})
    checks = []
    for name, sha256 in models.items():
        same = measured.get(name) == sha256
        detail = sha256[:12] if same else f"the figures are of {str(measured.get(name))[:12]}, in hand is {sha256[:12]}"
        checks.append(Check(f"the figures are of this {name}", same, detail))
    return checks


def _protocol_checks(metrics: Mapping[str, Any], expected: Mapping[str, Any]) -> list[Check]:
    stated = _FIRST | metrics.get("protocol", {})
    checks = []
    for fact, value in expected.items():
        same = stated.get(fact) == value
        shown = _short(value) if same else f"the figures have {_short(stated.get(fact))}, asked for is {_short(value)}"
        checks.append(Check(f"the protocol's {fact}", same, shown))
    return checks


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def _judge(
    name: str, stated: GateRule, metrics: Mapping[str, Any], production: Mapping[str, Any] | None, row: str
) -> Verdict:
    relative_to = stated.relative_to and _resolve(stated.relative_to, row)
    rule = replace(stated, value=_resolve(stated.value, row), relative_to=relative_to)
    value, quantity = _lookup(metrics, rule.value), rule.value
    bounds = [f"at most {rule.max:g}"] if rule.max is not None else []
    bounds += [f"at least {rule.min:g}"] if rule.min is not None else []
    bound, measured = " and ".join(bounds), value is not None
    if rule.relative_to is not None:
        quantity = f"{rule.value} / {rule.relative_to}"
        base = None
        if rule.relative_to != PRODUCTION:
            base = _lookup(metrics, rule.relative_to)
            measured = measured and bool(base)
        elif production is None:
            return Verdict(name, quantity, value, f"{bound} (nothing is in production yet)", measured, measured)
        elif different := comparable(metrics.get("protocol", {}), production.get("protocol", {})):
            reason = f"the model in production was judged by another protocol: {', '.join(different)}"
            return Verdict(name, quantity, None, f"{bound} ({reason})", False, measured)
        else:
            base = _lookup(production, stated.value)
        value = value / base if value is not None and base else None
    passed = value is not None
    if value is not None and rule.max is not None:
        passed = passed and value <= rule.max
    if value is not None and rule.min is not None:
        passed = passed and value >= rule.min
    return Verdict(name, quantity, value, bound + _distance(value, rule), passed, measured)


def _resolve(quantity: str, row: str) -> str:
    """``student.fid`` is the row's; anything else is itself."""
    name, dot, figure = quantity.partition(".")
    return f"{row}{dot}{figure}" if name == STUDENT else quantity


def _distance(value: float | None, rule: GateRule) -> str:
    if value is None:
        return ""
    if rule.max is not None and value > rule.max:
        return f" (exceeded by {value - rule.max:.4g})"
    if rule.min is not None and value < rule.min:
        return f" (short by {rule.min - value:.4g})"
    return ""


def _lookup(metrics: Mapping[str, Any], dotted: str) -> float | None:
    value: Any = metrics
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
