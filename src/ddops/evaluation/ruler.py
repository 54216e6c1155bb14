"""A protocol's ruler: who judges, and against what. Two figures compare where their rulers' facts are equal."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ddops.captions.pretrained import ImageTextModel
from ddops.config.base import plain
from ddops.config.evaluation import (
    ADM50kEvaluateConfig,
    DigitsEvaluateConfig,
    EvaluateConfig,
    ImageNetEvaluateConfig,
    T2IEvaluateConfig,
)
from ddops.data import digits
from ddops.evaluation.gate import recipes_of_figures
from ddops.evaluation.images import to_uint8
from ddops.evaluation.judge import DigitsJudge, Judge, load_classifier
from ddops.evaluation.metrics import Reference, look, measure
from ddops.evaluation.moments import read_statistics
from ddops.evaluation.samples import IMAGES, Samples, open_samples
from ddops.files import sha256_file, sha256_json

CLIP_WEIGHTS: Final = "model.safetensors"
PACKAGES: Final = ("ddops", "torch", "torch-fidelity", "numpy")


@dataclass(frozen=True)
class Asked:
    """The prompts that images were asked for by, by number, and a CLIP model's directory where there is one."""

    prompts: Sequence[str]
    sha256: str
    clip: Path | None = None


@dataclass(frozen=True)
class Ruler:
    """A judge and a reference."""

    config: EvaluateConfig
    judge: Judge
    reference: Reference
    asked: Asked | None = None

    def figures(self, batches: Iterable[Tensor], labels_N: Tensor) -> dict[str, float]:
        """Every figure of uint8 images (B, I, H, W) drawn for these labels; raises MetricError.

        ``clip_score`` is the mean of ``100 max(cos, 0)`` over the images and their prompts (arXiv 2104.08718, without
        its factor of 2.5).
        """
        similarities: list[Tensor] = []
        if self.asked is not None and self.asked.clip is not None:
            batches = _compared(batches, labels_N, self.asked.prompts, ImageTextModel(self.asked.clip), similarities)
        figures = measure(look(self.judge, batches), labels_N, self.reference, self.judge, self.config)
        if similarities:
            figures["clip_score"] = float(100 * torch.cat(similarities).clamp_min(0).mean())
        return figures

    def facts(self) -> dict[str, Any]:
        """What every figure carries."""
        own: dict[str, Any] = {"labels": "of the real images, over and over"}
        if isinstance(self.config, ImageNetEvaluateConfig):
            labels = "as many of every class" if self.config.protocol == "adm_50k" else "drawn at random"
            own = {"labels": labels, "image_size": self.config.image_size, "resize": self.config.resize}
        if isinstance(self.config, T2IEvaluateConfig) and self.asked is not None:
            clip = self.asked.clip
            own = {
                "labels": "a prompt each",
                "image_size": self.config.image_size,
                "resize": self.config.resize,
                "prompts_sha256": self.asked.sha256,
                "clip_sha256": None if clip is None else sha256_file(clip / CLIP_WEIGHTS),
            }
        return {
            "name": self.config.protocol,
            "recipes": recipes_of_figures(),
            "features": self.judge.name,
            "features_sha256": self.judge.sha256,
            "feature_dim": self.judge.feature_dim,
            "reference_sha256": self.reference.sha256,
            "reference_images": self.reference.statistics.count,
            "seeds": list(self.config.seeds),
            "settings_sha256": sha256_json(plain(self.config)),
            "quantisation": "uint8, nearest level",
            "asked_for": _asked_for(self.config),
            "kid": plain(self.config.kid),
            "neighbours": self.config.neighbours,
            "precision_recall_samples": self.config.precision_recall_samples,
            **own,
            "versions": {name: version(name) for name in PACKAGES},
        }


def open_ruler(config: EvaluateConfig, judge_file: Path, statistics: Path | None, asked: Asked | None = None) -> Ruler:
    """The ruler of a protocol, with the weights that the stage ``features`` wrote and, for a published protocol, its
    file of statistics; for one that asks by prompts, those.

    Raises:
        CheckpointError: other weights.
        MetricError: the file of statistics is damaged.
    """
    if isinstance(config, DigitsEvaluateConfig):
        judge: Judge = DigitsJudge(load_classifier(judge_file), sha256_file(judge_file))
        return Ruler(config, judge, _digits_reference(judge, config.batch_size))
    if statistics is None:
        raise ValueError(f"the protocol {config.protocol} needs a file of statistics")
    from ddops.evaluation.inception import load_inception  # loads torchvision

    judge = load_inception(judge_file, config.resize, sha256_file(judge_file))
    images = _images_in(statistics)
    features_NF = None if images is None else look(judge, images.batches(config.batch_size)).features_NF
    reference = Reference(read_statistics(statistics), features_NF, sha256_file(statistics))
    return Ruler(config, judge, reference, asked)


def _asked_for(config: EvaluateConfig) -> str:
    """How many samples a figure is of: the Fréchet distance of fewer reads higher."""
    if isinstance(config, DigitsEvaluateConfig):
        return f"{config.samples_per_image} samples a real image"
    if isinstance(config, ADM50kEvaluateConfig):
        return f"{config.samples_per_class} samples a class"
    return f"{config.samples} samples"


def _compared(
    batches: Iterable[Tensor], labels_N: Tensor, prompts: Sequence[str], clip: ImageTextModel, into: list[Tensor]
) -> Iterator[Tensor]:
    """The batches as they are, each compared with its prompts on the way."""
    first = 0
    for images_BIHW in batches:
        numbers = labels_N[first : first + len(images_BIHW)].tolist()
        into.append(clip.similarity(images_BIHW, [prompts[number] for number in numbers]))
        first += len(images_BIHW)
        yield images_BIHW


def _digits_reference(judge: Judge, batch_size: int) -> Reference:
    images_NIHW = to_uint8(digits.load().images_NIHW)
    seen = look(judge, images_NIHW.split(batch_size))
    return Reference(seen.statistics, seen.features_NF, hashlib.sha256(images_NIHW.numpy().tobytes()).hexdigest())


def _images_in(statistics: Path) -> Samples | None:
    """The real images of an ADM reference batch, if the file has any."""
    if not zipfile.is_zipfile(statistics) or IMAGES not in zipfile.ZipFile(statistics).namelist():
        return None
    return open_samples(statistics)
