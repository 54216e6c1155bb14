"""A bundle with engines: what is served where there is a GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ddops.config.stages import EngineConfig
from ddops.export.copying import copy_bundle
from ddops.export.manifest import MANIFEST, MODEL, model_digests, read_manifest, verify_files, write_manifest
from ddops.export.tensorrt import BuildReport, Report, build_engine, describe_engine, engine_name
from ddops.export.triton import REPOSITORY, write_model_repository


def build_engines(
    source: Path, target: Path, config: EngineConfig, timing_cache: Path | None, report: Report
) -> list[BuildReport]:
    """Write the bundle ``source`` to ``target`` (which may be the same), with a Triton model repository and the engines
    that ``config`` asks for.

    Engines of ``source`` for other targets are kept, and so is each that was built when a later one fails: the manifest
    comes last, and vouches for what there is.

    Raises:
        BundleError: the bundle is damaged.
        ExportError, MissingExtra: see :func:`ddops.export.tensorrt.build_engine`.
    """
    manifest = read_manifest(source)
    verify_files(source, model_digests(manifest))
    if not (target.exists() and source.samefile(target)):
        copy_bundle(source, target, manifest)
    reports, engines = [], {engine.file: engine for engine in manifest.engines}
    try:
        for name in config.targets:
            file = target / engine_name(config.flavour, name)
            reports.append(
                build_engine(
                    target / MODEL, file, manifest.model, config.profile, config.flavour, name, timing_cache, report
                )
            )
            facts = describe_engine(target, manifest, config.flavour, name, config.profile)
            engines[facts.file] = facts
    finally:
        manifest = dataclasses.replace(manifest, engines=tuple(engines.values()))
        (target / MANIFEST).unlink()
        triton = write_model_repository(target, manifest, config.profile)
        others = {name: digest for name, digest in manifest.files.items() if not name.startswith(f"{REPOSITORY}/")}
        write_manifest(target, dataclasses.replace(manifest, files={**others, **triton}))
    return reports
