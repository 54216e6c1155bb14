"""A prompt set on disk: the encoded captions in shards, the prompts, and a manifest that is written last.

A shard is a safetensors file with the ``features`` (tokens, W) of its captions, one after the other and without
padding, and their ``lengths`` (n,). Its header names the settings that it was made with, and a seal, the hash of all
of that. Captions are padded on the left, as the released model was trained, when they are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import torch
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from ddops.captions.errors import CaptionError
from ddops.files import atomic_path, read_json, sha256_file, sha256_json, write_json, write_text
from ddops.models.conditions import Captions, pad_left

FORMAT_VERSION: Final = 2
MANIFEST: Final = "manifest.json"
PROMPTS: Final = "prompts.txt"
_HEADER: Final = "ddops.captions"
_WAY_OUT: Final = "delete it and run the stage captions"


class _Version(TypedDict):
    format_version: int


class _Entry(TypedDict):
    name: Annotated[str, Field(pattern=r"^shard-[0-9]+\.safetensors$")]
    first: int
    sha256: str


class _Settings(TypedDict):
    length: int


class _Manifest(TypedDict):
    settings: _Settings
    count: int
    width: int
    prompts_sha256: str
    classes: list[int] | None
    of_images: list[int] | None
    shards: list[_Entry]
    seal: str


_MANIFEST: Final[TypeAdapter[Any]] = TypeAdapter(_Manifest)
_VERSION: Final[TypeAdapter[Any]] = TypeAdapter(_Version)


class CaptionSet:
    """The captions of a prompt set, by number (a :class:`~ddops.models.conditions.CaptionTable`). The shards are mapped
    into memory, and read where they are needed.

    Raises:
        CaptionError: there is no manifest, or a file is missing or altered.
    """

    def __init__(self, directory: Path) -> None:
        manifest = read_manifest(directory)
        self.length: int = manifest["settings"]["length"]
        self.width: int = manifest["width"]
        self.manifest = directory / MANIFEST
        for entry in [*manifest["shards"], {"name": PROMPTS, "sha256": manifest["prompts_sha256"]}]:
            path = directory / entry["name"]
            if not path.is_file() or sha256_file(path) != entry["sha256"]:
                raise CaptionError(f"{path}: missing or altered since the manifest was written; run the stage captions")
        shards = [_read(directory / entry["name"]) for entry in manifest["shards"]]
        self._features = [features_NW for features_NW, _ in shards]
        self._lengths_N = torch.cat([lengths_N for _, lengths_N in shards])
        self._starts_N = torch.cat([lengths_N.cumsum(0) - lengths_N for _, lengths_N in shards])
        self._firsts_S = torch.tensor([entry["first"] for entry in manifest["shards"]])
        self.prompts = (directory / PROMPTS).read_text(encoding="utf-8").splitlines()
        self.classes: list[int] | None = manifest["classes"]
        """Class of every caption, for images that have classes."""
        self.of_images: list[int] | None = manifest["of_images"]
        """Number of every image's caption, for images that are at hand."""

    def __len__(self) -> int:
        return len(self._lengths_N)

    def __deepcopy__(self, memo: Mapping[int, Any]) -> CaptionSet:
        """Itself: copies of a model share it."""
        return self

    def captions(self, numbers_B: Tensor) -> Captions:
        """See :meth:`CaptionTable.captions`; raises IndexError for a number that is none."""
        lengths_B = self._lengths_N[numbers_B]
        offsets_BT = torch.arange(self.length) - (self.length - lengths_B)[:, None]
        mask_BT = offsets_BT >= 0
        rows_BT = self._starts_N[numbers_B][:, None] + offsets_BT.clamp_min(0)
        features_BTW = torch.zeros(len(numbers_B), self.length, self.width)
        shards_B = torch.searchsorted(self._firsts_S, numbers_B, right=True) - 1
        for shard in shards_B.unique().tolist():
            here = shards_B == shard
            features_BTW[here] = self._features[shard][rows_BT[here]].float() * mask_BT[here][..., None]
        return Captions(features_BTW, mask_BT)


class CaptionList:
    """Captions in memory (a :class:`~ddops.models.conditions.CaptionTable`): of prompts that are in no set."""

    def __init__(self, features: Sequence[Tensor], length: int) -> None:
        """Of features (n, W), n at most ``length``."""
        self._captions = pad_left(features, length)
        self.length, self.width = length, features[0].shape[1]

    def __len__(self) -> int:
        return len(self._captions.mask_BT)

    def captions(self, numbers_B: Tensor) -> Captions:
        """See :meth:`CaptionTable.captions`."""
        return Captions(*(part[numbers_B] for part in self._captions))


def write_shard(path: Path, features: Sequence[Tensor], dtype: torch.dtype, fingerprint: str, first: int) -> None:
    """Write the captions ``first...`` atomically, each (n, W)."""
    lengths_N = torch.tensor([len(features_nW) for features_nW in features], dtype=torch.int32)
    features_NW = torch.cat(list(features)).to(dtype)
    header = json.dumps(_header(fingerprint, first, features_NW, lengths_N), sort_keys=True)
    with atomic_path(path) as temporary:
        save_file({"features": features_NW, "lengths": lengths_N}, temporary, {_HEADER: header})


def is_shard(path: Path, fingerprint: str, first: int, count: int) -> bool:
    """Whether a file is the shard of these captions, made with these settings, and whole."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            features_NW, lengths_N = file.get_tensor("features"), file.get_tensor("lengths")
    except (SafetensorError, OSError, LookupError, TypeError, ValueError):
        return False
    return len(lengths_N) == count and header == _header(fingerprint, first, features_NW, lengths_N)


def _header(fingerprint: str, first: int, features_NW: Tensor, lengths_N: Tensor) -> dict[str, Any]:
    facts = {"fingerprint": fingerprint, "first": first}
    seal = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for part in (features_NW, lengths_N):
        seal.update(part.contiguous().view(torch.uint8).numpy().data)
    return {**facts, "seal": seal.hexdigest()}


def write_manifest(
    directory: Path,
    settings: Mapping[str, Any],
    prompts: Sequence[str],
    firsts: Mapping[str, int],
    facts: Mapping[str, Any],
) -> None:
    """Declare a prompt set complete; ``firsts`` are its shards and their first captions."""
    write_text(directory / PROMPTS, "".join(f"{prompt}\n" for prompt in prompts))
    features_NW, _ = _read(directory / next(iter(firsts)))
    manifest = {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "count": len(prompts),
        "width": features_NW.shape[1],
        "prompts_sha256": sha256_file(directory / PROMPTS),
        **facts,
        "shards": [
            {"name": name, "first": first, "sha256": sha256_file(directory / name)} for name, first in firsts.items()
        ],
    }
    write_json(directory / MANIFEST, {**manifest, "seal": sha256_json(manifest)})


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a complete prompt set.

    Raises:
        CaptionError: there is none (the stage did not finish), or it is damaged.
    """
    path = directory / MANIFEST
    try:
        version = read_json(path, _VERSION, _WAY_OUT, CaptionError)["format_version"]
        if version != FORMAT_VERSION:
            raise CaptionError(f"{path}: format {version}, this version reads {FORMAT_VERSION}; {_WAY_OUT}")
        manifest: dict[str, Any] = read_json(path, _MANIFEST, _WAY_OUT, CaptionError)
    except FileNotFoundError:
        raise CaptionError(f"{path}: no such prompt set, or not finished; run the stage captions") from None
    if manifest.pop("seal") != sha256_json(manifest):
        raise CaptionError(f"{path}: damaged (its contents are not those that were sealed); {_WAY_OUT}")
    return manifest


def _read(path: Path) -> tuple[Tensor, Tensor]:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("features"), file.get_tensor("lengths").long()
