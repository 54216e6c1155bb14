"""The trajectory data set on disk: shards of (class, token ids), and a manifest that is written last.

The noise is not stored: it is a function of (seed, sample index), see :mod:`ddops.sampling.noise`.
A shard is a safetensors file with ``labels`` (n,) and ``ids`` (n, L), both uint16, and a seal: a hash of the settings
it was made with and of its contents. The same settings give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ddops.files import atomic_path, sha256_file, sha256_json, write_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class DatasetError(ValueError):
    """A trajectory data set that cannot be used. The message names the file and the way out."""


@dataclass(frozen=True)
class ShardPlan:
    """Which samples a shard holds: ``first`` .. ``first + count - 1``."""

    number: int
    first: int
    count: int

    @property
    def name(self) -> str:
        return f"shard-{self.number:05d}.safetensors"


def plan_shards(count: int, shard_size: int) -> list[ShardPlan]:
    """``count`` samples in shards of ``shard_size``, the last one possibly smaller."""
    firsts = range(0, count, shard_size)
    return [ShardPlan(number, first, min(shard_size, count - first)) for number, first in enumerate(firsts)]


def write_shard(path: Path, labels_N: NDArray[np.uint16], ids_NL: NDArray[np.uint16], fingerprint: str) -> None:
    """Write one shard atomically."""
    payload = save({"labels": labels_N, "ids": ids_NL}, metadata={"seal": _seal(fingerprint, labels_N, ids_NL)})
    with atomic_path(path) as temporary:
        temporary.write_bytes(payload)


def read_shard(path: Path) -> tuple[NDArray[np.uint16], NDArray[np.uint16], str]:
    """Labels (n,), token ids (n, L) and the seal.

    Raises:
        DatasetError: missing, truncated or not a shard.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            seal = (file.metadata() or {}).get("seal", "")
            return file.get_tensor("labels"), file.get_tensor("ids"), seal
    except (SafetensorError, OSError) as error:
        raise DatasetError(f"{path}: not a readable shard ({error}); delete it and generate again") from error


def is_complete(path: Path, plan: ShardPlan, fingerprint: str) -> bool:
    """Whether a shard is there, whole, unaltered and made with these settings."""
    if not path.exists():
        return False
    try:
        labels_N, ids_NL, seal = read_shard(path)
    except DatasetError:
        return False
    return seal == _seal(fingerprint, labels_N, ids_NL) and len(labels_N) == plan.count


def _seal(fingerprint: str, labels_N: NDArray[np.uint16], ids_NL: NDArray[np.uint16]) -> str:
    return hashlib.sha256(fingerprint.encode() + labels_N.tobytes() + ids_NL.tobytes()).hexdigest()


def write_manifest(directory: Path, settings: dict[str, Any], plans: list[ShardPlan]) -> None:
    """Declare the data set complete."""
    shards = [
        {"name": plan.name, "first": plan.first, "count": plan.count, "sha256": sha256_file(directory / plan.name)}
        for plan in plans
    ]
    manifest = {"format_version": FORMAT_VERSION, "fingerprint": sha256_json(settings), "settings": settings}
    write_json(directory / MANIFEST, {**manifest, "count": sum(plan.count for plan in plans), "shards": shards})


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a complete data set.

    Raises:
        DatasetError: there is none (generation did not finish), or it is damaged.
    """
    path = directory / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        if manifest["format_version"] != FORMAT_VERSION:
            raise DatasetError(f"{path}: format {manifest['format_version']}, this version reads {FORMAT_VERSION}")
        return manifest
    except FileNotFoundError:
        raise DatasetError(f"{path}: no manifest, the data set is incomplete; run the trajectories stage") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DatasetError(f"{path}: damaged ({error!r}); delete it and run the trajectories stage") from error
