"""What the stages read, from fixed numbers: no other stage computes it, whose change would move every digest."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from ddops.captions import store
from ddops.config.base import plain
from ddops.config.load import validate
from ddops.config.stages import Config
from ddops.data import digits
from ddops.evaluation.judge import new_classifier, save_classifier
from ddops.evaluation.samples import write_samples
from ddops.files import sha256_json, write_json
from ddops.models.ar_diffusion import new_ar_diffusion
from ddops.models.registry import build_student, build_teacher
from ddops.models.weights import STUDENT, TOKENIZER, TRANSFORMER, save_weights
from ddops.models.weights_dd2 import as_backbone, save_ar_diffusion, save_generator
from ddops.sampling.noise import NOISE_VERSION
from ddops.stages import paths
from ddops.trajectories import shards

GOLDEN = Path(__file__).parents[2] / "golden"
IMAGES = 80
"""Of the embedded data set, for the stages that compare with it."""
TRAJECTORIES = 48
PROMPTS = 20


@cache
def _settings(family: str) -> dict[str, Any]:
    return dict(yaml.safe_load((GOLDEN / "recipes" / f"{family}.yaml").read_text()))


def config_of(family: str, **changes: Any) -> Config:
    """The frozen settings of ``llamagen``, ``var`` or ``t2i``; ``dd1__training__steps=3`` changes one."""
    values = json.loads(json.dumps(_settings(family)))
    for name, value in changes.items():
        *above, last = name.split("__")
        here = values
        for key in above:
            here = here[key]
        here[last] = plain(value)
    return validate(values, family)


def numbers(name: str, *shape: int) -> Tensor:
    """Normal numbers that follow from the name and the shape alone, float32."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def integers(name: str, below: int, *shape: int) -> Tensor:
    """Whole numbers, as :func:`numbers`; int64."""
    return torch.from_numpy(np.random.default_rng(zlib.crc32(name.encode())).integers(below, size=shape))


def filled(module: nn.Module, name: str) -> dict[str, Tensor]:
    """A module's state, with parameters so large that every one matters; buffers as they are."""
    parameters = {key: 0.2 * numbers(f"{name}.{key}", *value.shape) for key, value in module.named_parameters()}
    return {**module.state_dict(), **parameters}


def telling(module: nn.Module, name: str) -> dict[str, Tensor]:
    """As :func:`filled`, with products that keep the size of what they are given: a judge that tells images apart."""
    gains = {key: 2 / max(1, value[0].numel()) ** 0.5 for key, value in module.named_parameters() if value.ndim > 1}
    parameters = {key: gain * numbers(f"{name}.{key}", *module.get_parameter(key).shape) for key, gain in gains.items()}
    return {**filled(module, name), **parameters}


def write_classifier(config: Config) -> None:
    features: Any = config.features
    classifier = new_classifier(features)
    classifier.load_state_dict(telling(classifier, "classifier"))
    save_classifier(paths.CLASSIFIER, classifier, features)


def write_teacher(config: Config) -> None:
    model = config.teacher.model
    teacher = build_teacher(model)
    save_weights(paths.TOKENIZER, filled(teacher.tokenizer, "tokenizer"), model, TOKENIZER)
    save_weights(paths.TRANSFORMER, filled(teacher.get_submodule("transformer"), "transformer"), model, TRANSFORMER)


def write_students(config: Config) -> None:
    """Of DD1 and DD2, of another size each."""
    state, model = filled(build_student(config.teacher.model), "student"), config.teacher.model
    save_weights(paths.DD1_STUDENT, state, model, STUDENT)
    save_generator(paths.DD2_GENERATOR, {name: 0.8 * value for name, value in state.items()}, model, None)


def write_ar_diffusion(config: Config) -> None:
    section: Any = config.ar_diffusion
    module = new_ar_diffusion(as_backbone(build_teacher(config.teacher.model)), section.head)
    save_ar_diffusion(paths.AR_DIFFUSION, filled(module, "ar_diffusion"), config.teacher.model, section.head)


def write_trajectories(config: Config) -> None:
    model = config.teacher.model
    plans = shards.plan_shards(TRAJECTORIES, TRAJECTORIES)
    conditions = getattr(model, "num_classes", 0) or PROMPTS
    labels_N = np.arange(TRAJECTORIES, dtype=np.uint16) % conditions  # of every condition some
    ids_NL = integers("ids", model.codebook_size, TRAJECTORIES, sum(model.level_sizes)).numpy().astype(np.uint16)
    settings = {"seed": 5, "noise_version": NOISE_VERSION, "batch_size": TRAJECTORIES}
    shards.write_shard(paths.TRAJECTORIES / plans[0].name, labels_N, ids_NL, 0, settings)
    shards.write_manifest(paths.TRAJECTORIES, settings, plans)


def write_captions(config: Config) -> None:
    """Both prompt sets, the same: features of 1 to ``length`` tokens."""
    section: Any = config.captions
    lengths = [1 + int(length) for length in integers("lengths", section.length, PROMPTS)]
    features = [numbers(f"prompt {number}", length, section.encoder.width) for number, length in enumerate(lengths)]
    settings = {"length": section.length}
    prompts = [f"prompt {number}" for number in range(PROMPTS)]
    facts = {
        "classes": [number % 10 for number in range(PROMPTS)],
        "of_images": integers("of_images", PROMPTS, IMAGES).tolist(),
        "bad_rows": None,
    }
    for directory in (paths.TRAIN_CAPTIONS, paths.EVALUATE_CAPTIONS):
        name = "shard-00000.safetensors"
        store.write_shard(directory / name, features, torch.float32, sha256_json(settings), 0)
        store.write_manifest(directory, settings, prompts, {name: 0}, facts)


def write_samples_of(config: Config, row: str, seed: int) -> None:
    """Images that look somewhat like the digits; of ``teacher`` more than of others."""
    data, strength = digits.load(), {"teacher": 30.0}.get(row, 60.0)
    noisy = (data.images_NIHW + 1) * 127.5 + strength * numbers(f"{row} {seed}", *data.images_NIHW.shape)
    write_samples(paths.SAMPLES / row / f"seed{seed}.npz", [noisy.clamp(0, 255).round().byte()], data.labels_N)


def write_samples_manifest(rows: Mapping[str, Any]) -> None:
    hashes = dict.fromkeys(("tokenizer", "teacher", "dd1", "dd2"), "ab" * 32)
    write_json(paths.SAMPLES_MANIFEST, {"models": hashes, "drawing_sha256": "cd" * 32, "rows": dict(rows)})


def write_all(config: Config) -> None:
    """All that the stages up to ``sample`` read."""
    if config.captions.source != "none":
        write_captions(config)
    write_classifier(config)
    write_teacher(config)
    write_students(config)
    if config.ar_diffusion.source != "none":
        write_ar_diffusion(config)
    write_trajectories(config)
