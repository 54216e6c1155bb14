"""Encoding a prompt set, shard by shard: a killed run goes on after the last whole one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ddops.captions.digits import describe
from ddops.captions.errors import CaptionError
from ddops.captions.prompts import read_prompts
from ddops.captions.store import MANIFEST, PROMPTS, is_shard, write_manifest, write_shard
from ddops.config.captions import EncodedCaptionsConfig, PromptsConfig
from ddops.data import digits
from ddops.files import sha256_file, sha256_json
from ddops.workspace.recipes import recipe

log = logging.getLogger(__name__)

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Encoder = Callable[[Sequence[str]], list[Tensor]]


class PromptSet(NamedTuple):
    """Prompts, and what is known of them."""

    texts: list[str]
    classes: list[int] | None = None
    of_images: list[int] | None = None
    bad_rows: dict[str, Any] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {"classes": self.classes, "of_images": self.of_images, "bad_rows": self.bad_rows}


def load_prompts(config: PromptsConfig) -> PromptSet:
    """The prompts that a configuration names.

    Raises:
        CaptionError: see :func:`read_prompts`; or the file is another than the configuration says.
    """
    if config.source == "digits":
        return PromptSet(*describe(digits.load()))
    path = Path(config.path).expanduser()
    prompts = read_prompts(path, config.column, config.max_characters, config.limit)
    if config.sha256 is not None and (found := sha256_file(path)) != config.sha256:
        raise CaptionError(f"{path}: has sha256 {found}, captions.sets says {config.sha256}")
    for complaint in prompts.complaints():
        log.warning("%s: %s", path, complaint)
    bad_rows = {kind: {"count": bad.count, "first": bad.rows} for kind, bad in prompts.bad.items()}
    return PromptSet(prompts.texts, bad_rows=bad_rows)


def encode_set(
    directory: Path, prompts: PromptSet, encode: Encoder, config: EncodedCaptionsConfig, encoder_facts: dict[str, Any]
) -> int:
    """Complete the prompt set in ``directory``, of which whole shards made with the same settings and recipe are kept;
    how many prompts were encoded."""
    settings = {
        "recipe": recipe("captions"),
        "encoder": encoder_facts,
        "length": config.length,
        "dtype": config.dtype,
        "shard_size": config.shard_size,
        "prompts": sha256_json(prompts.texts),
    }
    fingerprint = sha256_json(settings)
    firsts = {
        f"shard-{number:05d}.safetensors": first
        for number, first in enumerate(range(0, len(prompts.texts), config.shard_size))
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    for path in directory.iterdir():
        if path.name not in (*firsts, PROMPTS):
            path.unlink()
    made = 0
    with tqdm(total=len(prompts.texts), desc=f"captions, {directory.name}", unit="prompt", mininterval=1.0) as bar:
        for name, first in firsts.items():
            texts = prompts.texts[first : first + config.shard_size]
            if not is_shard(directory / name, fingerprint, first, len(texts)):
                batches = range(0, len(texts), config.batch_size)
                features = [one for begin in batches for one in encode(texts[begin : begin + config.batch_size])]
                write_shard(directory / name, features, DTYPES[config.dtype], fingerprint, first)
                made += len(texts)
            bar.update(len(texts))
    write_manifest(directory, settings, prompts.texts, firsts, prompts.facts)
    return made
