"""Bundles from one directory to another."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ddops.export.manifest import MANIFEST, Manifest, model_digests, write_manifest
from ddops.files import atomic_path


def all_digests(manifest: Manifest) -> dict[str, str]:
    """Every file of a bundle and its hash."""
    engines = {engine.file: engine.sha256 for engine in manifest.engines}
    return {**manifest.files, **model_digests(manifest), **engines}


def copy_bundle(source: Path, target: Path, manifest: Manifest) -> None:
    """The bundle in another directory, the manifest last. Files are linked where the file system can, else copied."""
    (target / MANIFEST).unlink(missing_ok=True)
    for name in all_digests(manifest):
        place_file(source / name, target / name)
    write_manifest(target, manifest)


def place_file(source: Path, target: Path) -> None:
    """``source`` as ``target``: a hard link, or a copy where the two are on different file systems. Atomic."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and source.samefile(target):
        return
    with atomic_path(target) as temporary:
        try:
            os.link(source.resolve(), temporary)
        except OSError:
            shutil.copyfile(source, temporary)
