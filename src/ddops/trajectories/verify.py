"""Checking a data set without a teacher, and saying what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ddops.files import sha256_file
from ddops.sampling.noise import NOISE_VERSION
from ddops.trajectories.errors import DatasetError
from ddops.trajectories.generate import STAGE, trajectory_labels
from ddops.trajectories.shards import differences, read_manifest, read_shard
from ddops.workspace.recipes import recipe


def problems(directory: Path, num_classes: int, codebook_size: int) -> Iterator[str]:
    """What is wrong with a data set, each with the file's name; nothing where all is well.

    Every shard's bytes are compared with the manifest, its seal with its contents, its settings with the manifest's,
    its recipe with this ddops', its labels with those of seed and index, and the shards with the whole: no sample is
    missing or there twice.

    Raises:
        DatasetError: there is no manifest, so the data set is incomplete, or it is damaged.
    """
    manifest = read_manifest(directory)
    settings, expected = manifest["settings"], 0
    if manifest["shards"] and settings["noise_version"] != NOISE_VERSION:
        yield f"{directory}: made with noise {settings['noise_version']}, this version computes {NOISE_VERSION}"
    if manifest["shards"] and (made_by := settings.get("recipe")) != recipe(STAGE):
        yield f"{directory}: made by recipe {made_by}, this version computes by {recipe(STAGE)}"
    for entry in manifest["shards"]:
        path = directory / entry["name"]
        if entry["first"] != expected:
            yield f"{path}: begins with sample {entry['first']}, not {expected}"
        expected = entry["first"] + entry["count"]
        if not path.is_file():
            yield f"{path}: missing"
        elif sha256_file(path) != entry["sha256"]:
            yield f"{path}: altered, damaged or truncated: not the bytes that the manifest vouches for"
        else:
            yield from _problems_inside(path, settings, entry["first"], num_classes, codebook_size)
    if expected != manifest["count"]:
        yield f"{directory}: the shards hold {expected} samples, the manifest says {manifest['count']}"
    known = {entry["name"] for entry in manifest["shards"]}
    for path in sorted(directory.glob("shard-*.safetensors")):
        if path.name not in known:
            yield f"{path}: not in the manifest"


def _problems_inside(
    path: Path, settings: dict[str, object], first: int, num_classes: int, codebook_size: int
) -> Iterator[str]:
    try:
        shard = read_shard(path)
    except DatasetError as error:
        yield str(error)
        return
    if not shard.whole:
        yield f"{path}: its contents are not those that were sealed"
    if different := differences(shard.settings, settings):
        yield f"{path}: made with other settings than the manifest says: {different}"
    indices_N = np.arange(first, first + len(shard.labels_N), dtype=np.int64)
    seed = settings["seed"]
    assert isinstance(seed, int)
    if not np.array_equal(shard.labels_N, trajectory_labels(seed, indices_N, num_classes)):
        yield f"{path}: the labels are not those of seed {seed} and samples {first} on"
    if shard.ids_NL.max(initial=0) >= codebook_size:
        yield f"{path}: holds token ids past the {codebook_size} codes"
