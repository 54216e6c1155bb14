"""``ddops override``: let one model through that the gate's rules refuse, by name and on record."""

from __future__ import annotations

import argparse

import yaml

from ddops.commands.arguments import CommandError, Subparsers
from ddops.commands.repository import user
from ddops.config.load import load_config, validate, write_params
from ddops.reports import read_decision
from ddops.stages import paths


def register(commands: Subparsers) -> None:
    """Declare the arguments."""
    parser = commands.add_parser(
        "override",
        help="let one model through that the gate's rules refuse",
        description="Write gate.override into params.yaml, for the model that the gate refused last and no other. The "
        "reason goes into the decision file, the report and the registry. Then: dvc repro.",
    )
    parser.add_argument("--reason", required=True)
    parser.add_argument("--by", help="default: Git's user.name")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the override; raises CommandError where there is nothing to override."""
    load_config(paths.PARAMS)
    if not paths.GATE_DECISION.exists():
        raise CommandError(f"{paths.GATE_DECISION}: missing; there is no refusal to override")
    decision = read_decision(paths.GATE_DECISION)
    if decision["outcome"] != "refused":
        raise CommandError(f"{paths.GATE_DECISION}: this model is {decision['outcome']}; there is nothing to override")
    if not all(check["passed"] for check in decision["checks"]):
        raise CommandError("the figures are not of this model: that cannot be overridden; run dvc repro evaluate")
    if missing := [rule["quantity"] for rule in decision["rules"] if not rule.get("measured", True)]:
        raise CommandError(f"{', '.join(missing)}: missing or not a number, which cannot be overridden: measure it")
    values = yaml.safe_load(paths.PARAMS.read_text())
    override = {
        "student_sha256": decision["student_sha256"],
        "by": arguments.by or user(),
        "reason": arguments.reason,
    }
    values["gate"]["override"] = override
    validate(values, str(paths.PARAMS))
    write_params(values, paths.PARAMS)
    print(f"{paths.PARAMS}: gate.override is for {override['student_sha256'][:12]} alone. Next: dvc repro")
