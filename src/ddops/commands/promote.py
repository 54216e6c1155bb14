"""``ddops promote``, ``ddops rollback``, ``ddops production``: which model is in production, step by recorded step."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ddops.commands.arguments import CommandError, Subparsers
from ddops.commands.in_hand import exported_files, fresh_decision, judge_export, require_consistent
from ddops.commands.repository import (
    commit_and_tag,
    commit_changed,
    dvc,
    git,
    is_recorded,
    require_committed,
    require_tools,
    user,
)
from ddops.commands.stale import stale_summary
from ddops.config.base import plain
from ddops.config.load import load_config
from ddops.files import sha256_file, sha256_json
from ddops.lock import held
from ddops.production import Registry
from ddops.reports import read_metrics
from ddops.stages import paths
from ddops.workspace.recipes import require_recipes

BESIDE: Final = (paths.METRICS, paths.GATE_DECISION, paths.EXPORT_METRICS, paths.MODEL_CARD)
"""Files that go with a version's bundle, as far as they are there."""
CODE: Final = (Path("dvc.yaml"), Path("recipes.yaml"), Path("src"))
RUN: Final = (Path("dvc.lock"), paths.PARAMS)
"""What must be committed, so that the commit says where a version is from: what ran, and with which settings."""
RESULTS: Final = (
    *(paths.METRICS, paths.ROWS_TABLE, paths.FEATURES_METRICS, paths.GATE_DECISION, paths.EXPORT_METRICS),
    *(paths.ENGINE_METRICS, paths.SUMMARY, paths.TRAJECTORIES_THROUGHPUT, paths.CODE),
)
"""What a run writes that Git keeps, beside :data:`RUN`."""

EXPORTING: Final = "export_onnx"
"""The stage whose bundle is promoted."""
LOCK: Final = Path(".ddops/production.lock")
"""Held through a promotion or a rollback. Not the lock of a run, which holds that while it promotes."""


def register(commands: Subparsers) -> None:
    """Declare the arguments."""
    promoting = commands.add_parser(
        "promote",
        help="make the model that passed the gate the production model",
        description="Check the gate's decision against the files in hand, judge the exported graph, copy the bundle to "
        "production/<version>, track it with DVC, commit the registry and tag the commit with GTO.",
    )
    promoting.set_defaults(run=run_promote)
    promoting.add_argument("--commit", action="store_true", help="commit dvc.lock, params.yaml and the figures first")
    promoting.add_argument(
        "--if-new",
        action="store_true",
        help="do nothing where production has the same weights, exported with the same settings (the commit is in the "
        "bundle, so it differs whenever it is made)",
    )
    rolling = commands.add_parser("rollback", help="return to the production model before, or to a version")
    rolling.add_argument("--to", metavar="VERSION", help="default: the one before the current")
    rolling.set_defaults(run=run_rollback)
    for parser in (promoting, rolling):
        parser.add_argument("--reason", required=True, help="recorded with the step")
        parser.add_argument("--by", help="recorded with the step; default: Git's user.name")
    showing = commands.add_parser("production", help="the model in production, and every step that led there")
    showing.set_defaults(run=run_show)


def run_promote(arguments: argparse.Namespace) -> None:
    """Promote what is in the workspace. The registry's file is written last: until then production has not changed.

    Raises:
        ModelRefusedError: a rule of the gate fails, or one for the exported graph.
        CommandError: what is in hand is not what was judged, or not committed.
        RecipeError: the workspace is of another ddops: its model would be judged anew by other code than made it.
        BundleError: there is no bundle, or it is damaged.
        HeldError: another promotion or rollback is at it.
    """
    require_tools()
    by = arguments.by or user()
    with held(LOCK, f"ddops promote, by {by}"):
        _promote(arguments, by)


def _promote(arguments: argparse.Namespace, by: str) -> None:
    config, registry = load_config(paths.PARAMS), Registry.load(paths.PRODUCTION)
    # A run asks for what is new, whatever was left to be done of the step before; a person, for one step.
    if _finished(registry) and not arguments.if_new:
        return
    require_recipes()
    decision = fresh_decision(config)
    files = exported_files(config)
    model = {"student_sha256": decision["student_sha256"], "export_sha256": sha256_json(plain(config.export))}
    if registry.current is not None:
        known = registry.versions[registry.current]
        said = f"this model is in production already, as {registry.current}"
        if arguments.if_new and known.get("model") == model:
            print(said)
            return
        if known["files"] == files:
            raise CommandError(said)
    origin = CODE if arguments.commit else (*CODE, *RUN)
    require_committed([path for path in origin if path.exists()])
    require_consistent(EXPORTING)
    exported = judge_export(config)
    if arguments.commit:
        commit_changed([path for path in (*RUN, *RESULTS) if path.exists()], f"Run of {config.preset}")
    if Registry.load(paths.PRODUCTION) != registry:
        raise CommandError(f"{paths.PRODUCTION}: changed while the graph was judged; see ddops production, then go on")

    version = registry.next_version()
    directory = paths.PRODUCTION.parent / version
    _copy_bundle(directory)
    dvc("add", "--quiet", str(directory))
    facts = {
        "preset": config.preset,
        "bundle": str(directory),
        "files": files,
        "model": model,
        "source_commit": git("rev-parse", "HEAD"),
        "decision": decision,
        "exported": exported,
        "code": stale_summary(EXPORTING),
        "row": config.export.row,
        "metrics": read_metrics(paths.METRICS),
    }
    registry.promote(version, facts, by=by, reason=arguments.reason)
    _record(registry)
    print(f"{version} is in production: {directory}. Back to the one before: ddops rollback --reason WHY")


def run_rollback(arguments: argparse.Namespace) -> None:
    """Return to an earlier version, whose bundle must be whole; raises as :func:`run_promote`."""
    require_tools()
    by = arguments.by or user()
    with held(LOCK, f"ddops rollback, by {by}"):
        registry = Registry.load(paths.PRODUCTION)
        if _finished(registry):
            return
        version = registry.earlier(arguments.to)
        facts = registry.versions[version]
        _require_whole(Path(facts["bundle"]), facts["files"])
        registry.rollback(version, by=by, reason=arguments.reason)
        _record(registry)
        print(f"{version} is in production again: {facts['bundle']}")


def _finished(registry: Registry) -> bool:
    """Whether there was a step left to commit and tag, by a command that was killed after it had taken it; done then.

    Nothing else is done in that case: going on would take a step more than was asked for.
    """
    if not registry.history:
        return False
    version = registry.history[-1]["version"]
    presets = [registry.versions[step["version"]]["preset"] for step in registry.history]
    if is_recorded(registry.path, presets[-1], version, presets.count(presets[-1])):
        return False
    _record(registry)
    print(f"{version} has been in production, but was not on record: committed and tagged now, and nothing else done")
    return True


def _record(registry: Registry) -> None:
    """Commit and tag the registry's last step."""
    step = registry.history[-1]
    version, what = step["version"], step["what"]
    facts, files = registry.versions[version], [registry.path]
    if what == "promote":
        directory = Path(facts["bundle"])
        files += [directory.with_name(f"{version}.dvc"), directory.with_name(".gitignore")]
        message = f"Promote {facts['preset']} {version}: {step['reason']}"
    else:
        message = f"Roll back {facts['preset']} from {step['from']} to {version}: {step['reason']}"
    commit_and_tag(files, message, facts["preset"], version, new=what == "promote")


def run_show(arguments: argparse.Namespace) -> None:
    """Print the registry."""
    registry = Registry.load(paths.PRODUCTION)
    if registry.current is None:
        print("nothing is in production yet: ddops promote --reason WHY")
        return
    print(f"in production: {registry.current}, {registry.versions[registry.current]['bundle']}")
    for step in registry.history:
        print(f"  {step['at']}  {step['what']:<9}{step['version']:<8}{step['by']}: {step['reason']}")


def _copy_bundle(directory: Path) -> None:
    """The bundle and what is said of it, under a temporary name until it is whole."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(paths.ONNX_BUNDLE, temporary)
    for file in BESIDE:
        if file.exists():
            shutil.copy2(file, temporary / file.name)
    # Left behind by a promotion that failed half-way: no version of the registry.
    shutil.rmtree(directory, ignore_errors=True)
    temporary.replace(directory)


def _require_whole(directory: Path, files: Mapping[str, str]) -> None:
    """Every file with its recorded hash, from DVC's cache where it is not there.

    Raises:
        CommandError: it is not to be had, or altered.
    """
    if not directory.exists():
        dvc("checkout", f"{directory}.dvc")
    for name, sha256 in files.items():
        file = directory / name
        if not file.exists() or sha256_file(file) != sha256:
            raise CommandError(f"{file}: missing or altered; restore it with: dvc checkout --force {directory}.dvc")
