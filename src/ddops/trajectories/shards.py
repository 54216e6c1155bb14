"""The trajectory data set on disk: shards of (class, token ids), and a manifest that is written last.

The noise is not stored: it is a function of (seed, sample index), see :mod:`ddops.sampling.noise`.
A shard is a safetensors file with ``labels`` (n,) and ``ids`` (n, L), both uint16 (labels uint32 where they are more
captions than that). Its header says the settings it was
made with, the index of its first sample, and a seal, the hash of all of that. The same settings give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from typing_extensions import TypedDict

from ddops.files import atomic_path, read_json, sha256_file, sha256_json, write_json
from ddops.trajectories.errors import DatasetError, SettingsDiffer

FORMAT_VERSION = 2
HEADER = "ddops.trajectories"
MANIFEST = "manifest.json"

_WAY_OUT = "delete it and run the trajectories stage"


class _Version(TypedDict):
    format_version: int


class _Entry(TypedDict):
    name: Annotated[str, Field(pattern=r"^shard-[0-9]+\.safetensors$")]
    first: Annotated[int, Field(ge=0, lt=2**53)]
    count: Annotated[int, Field(gt=0, lt=2**53)]
    sha256: str


class _Manifest(TypedDict):
    fingerprint: str
    settings: dict[str, Any]
    count: int
    shards: list[_Entry]


_MANIFEST: TypeAdapter[Any] = TypeAdapter(_Manifest)
_VERSION: TypeAdapter[Any] = TypeAdapter(_Version)

Labels = NDArray[np.uint16] | NDArray[np.uint32]


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


class Shard(NamedTuple):
    """What a shard holds, and says of itself."""

    labels_N: Labels
    ids_NL: NDArray[np.uint16]
    first: int
    settings: dict[str, Any]
    seal: str

    @property
    def whole(self) -> bool:
        """Whether the contents are those that were sealed."""
        return self.seal == _seal(self.settings, self.first, self.labels_N, self.ids_NL)


def write_shard(path: Path, labels_N: Labels, ids_NL: NDArray[np.uint16], first: int, settings: dict[str, Any]) -> None:
    """Write one shard atomically."""
    seal = _seal(settings, first, labels_N, ids_NL)
    header = json.dumps({"first": first, "seal": seal, "settings": settings}, sort_keys=True)
    # One key of metadata: safetensors writes several in any order.
    payload = save({"labels": labels_N, "ids": ids_NL}, metadata={HEADER: header})
    with atomic_path(path) as temporary:
        temporary.write_bytes(payload)


def read_shard(path: Path) -> Shard:
    """Everything in a shard.

    Raises:
        DatasetError: missing, truncated or not a shard.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            tensors = file.get_tensor("labels"), file.get_tensor("ids")
            return Shard(*tensors, header["first"], header["settings"], header["seal"])
    except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
        raise DatasetError(f"{path}: not a readable shard ({error!r}); generate again, it alone is replaced") from error


def shard_problem(path: Path, plan: ShardPlan, settings: dict[str, Any]) -> str | None:
    """Why a file is not the shard that the plan wants; None where it is.

    Raises:
        SettingsDiffer: it is whole, but was made with other settings.
    """
    if not path.exists():
        return "missing"
    try:
        shard = read_shard(path)
    except DatasetError:
        return "damaged or truncated"
    if not shard.whole:
        return "altered since it was written"
    if different := differences(shard.settings, settings):
        raise SettingsDiffer(f"{path}: made with other settings: {different}")
    if (shard.first, len(shard.labels_N)) != (plan.first, plan.count):
        return (
            f"holds samples from {shard.first} on, {len(shard.labels_N)} of them, not {plan.count} from {plan.first} on"
        )
    return None


def differences(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> str:
    """The keys whose values differ, as ``key found, wanted wanted``; empty where none does."""
    parts = []
    for key in sorted(found.keys() | wanted.keys()):
        was, now = found.get(key), wanted.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            parts.append(differences(was, now, f"{prefix}{key}."))
        elif was != now:
            parts.append(f"{prefix}{key} {was}, now {now}")
    return "; ".join(filter(None, parts))


def _seal(settings: dict[str, Any], first: int, labels_N: Labels, ids_NL: NDArray[np.uint16]) -> str:
    head = json.dumps([settings, first], sort_keys=True).encode()
    return hashlib.sha256(head + labels_N.tobytes() + ids_NL.tobytes()).hexdigest()


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
        version = read_json(path, _VERSION, _WAY_OUT, DatasetError)["format_version"]
        if version != FORMAT_VERSION:
            raise DatasetError(f"{path}: format {version}, this version reads {FORMAT_VERSION}; {_WAY_OUT}")
        manifest: dict[str, Any] = read_json(path, _MANIFEST, _WAY_OUT, DatasetError)
    except FileNotFoundError:
        raise DatasetError(f"{path}: no manifest, the data set is incomplete; run the trajectories stage") from None
    if manifest["fingerprint"] != sha256_json(manifest["settings"]):
        raise DatasetError(f"{path}: damaged (its settings are not those it was written with); {_WAY_OUT}")
    if manifest["shards"] and not {"seed", "noise_version", "batch_size"} <= manifest["settings"].keys():
        raise DatasetError(f"{path}: damaged (its settings lack the seed, the noise or the batch); {_WAY_OUT}")
    return manifest
