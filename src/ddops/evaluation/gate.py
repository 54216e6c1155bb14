"""The gate: rules on metrics, each with its verdict. Pure; the stage reads the files and sets the exit code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ddops.config.stages import GateConfig, GateRule


@dataclass(frozen=True)
class Verdict:
    """One rule's outcome. ``value`` is None where the metric is missing or not a finite number: that fails."""

    rule: str
    quantity: str
    value: float | None
    bound: str
    passed: bool

    def sentence(self) -> str:
        """For people: which rule, its value and bound, and by how much it failed."""
        shown = "missing or not a number" if self.value is None else f"{self.value:.4g}"
        return f"{'passed' if self.passed else 'FAILED'}  {self.rule}: {self.quantity} = {shown}, {self.bound}"


def decide(metrics: Mapping[str, Any], config: GateConfig) -> list[Verdict]:
    """A verdict for every rule, in order."""
    return [_judge(name, rule, metrics) for name, rule in config.rules.items()]


def decision(verdicts: list[Verdict]) -> dict[str, Any]:
    """The decision as plain values, for the file that the report and later stages read."""
    return {"passed": all(verdict.passed for verdict in verdicts), "rules": [asdict(verdict) for verdict in verdicts]}


def _judge(name: str, rule: GateRule, metrics: Mapping[str, Any]) -> Verdict:
    value, quantity = _lookup(metrics, rule.value), rule.value
    if rule.relative_to is not None:
        base, quantity = _lookup(metrics, rule.relative_to), f"{rule.value} / {rule.relative_to}"
        value = value / base if value is not None and base else None
    bounds, passed = [], value is not None
    if rule.max is not None:
        bounds.append(f"at most {rule.max:g}")
        passed = passed and value is not None and value <= rule.max
    if rule.min is not None:
        bounds.append(f"at least {rule.min:g}")
        passed = passed and value is not None and value >= rule.min
    bound = " and ".join(bounds) + _distance(value, rule)
    return Verdict(name, quantity, value, bound, passed)


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
