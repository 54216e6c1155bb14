"""How a model is judged: the network that sees, the protocol that counts, the gate that decides."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from pydantic import Field

from ddops.config.base import (
    DecayRate,
    Fraction,
    NonNegativeInt,
    PositiveInt,
    config,
)
from ddops.config.captions import PublishedEncoderConfig
from ddops.config.training import TrainingConfig

ROW_PATTERNS: Final = {
    "teacher": r"teacher",
    "teacher_flow": r"teacher_flow",
    "dd1": r"dd1_([1-9]\d*)step",
    "dd2": r"dd2_([1-9]\d*)step",
    "dd2_refine": r"dd2_refine_([1-9]\d*)",
    "ar_diffusion": r"ar_diffusion",
    "teacher_involved": r"teacher_involved_([1-9]\d*)_([1-9]\d*)",
    "skip": r"skip_([1-9]\d*)",
    "onestep_class": r"onestep_class",
    "onestep_star": r"onestep_star",
}
"""Kinds of rows and how their names are written; a group is a number that the row is told. ``evaluation/rows.py`` draws
them. (``reconstruction`` is no choice: it is there wherever the protocol has real images.)"""


AR_DIFFUSION_ROWS: Final = ("dd2_refine", "ar_diffusion")
"""Kinds that need the AR-diffusion model."""


def parse_row(name: str) -> tuple[str, tuple[int, ...]]:
    """A row's kind and its numbers, e.g. ``("teacher_involved", (4, 6))``.

    Raises:
        ValueError: no row is named so.
    """
    for kind, pattern in ROW_PATTERNS.items():
        if found := re.fullmatch(pattern, name):
            return kind, tuple(int(number) for number in found.groups())
    known = ", ".join(re.sub(r"\(.*?\)", "N", pattern) for pattern in ROW_PATTERNS.values())
    raise ValueError(f"no row is named {name!r}; valid: {known}")


@config
class RemoteFile:
    """A file that is fetched once and checked ever after, or taken from this machine."""

    url: Annotated[str, Field(pattern=r"^(https?://|hf://[\w.-]+/[\w.-]+@[^/]+/).+")]
    """``https://...``, or ``hf://owner/repository@revision/path`` for the Hugging Face hub."""
    path: str | None = None
    """A local copy: nothing is downloaded then."""


@config
class DigitsFeaturesConfig:
    """The judge: a small classifier whose penultimate features the protocol's FID is computed in."""

    name: Literal["digits_classifier"]
    channels: PositiveInt
    feature_dim: PositiveInt
    dropout: DecayRate
    holdout: Fraction
    """Share of the images kept out of training, to measure the classifier's accuracy on."""
    training: TrainingConfig


@config
class InceptionFeaturesConfig:
    """The judge of the published protocols: the Inception network of 2015 that every published FID is computed in."""

    name: Literal["inception"]
    weights: RemoteFile
    layer: Literal[64, 192, 768, 2048]
    """Whose activations, averaged over the image, are the features; named by their number. Papers use 2048."""


FeaturesConfig = Annotated[DigitsFeaturesConfig | InceptionFeaturesConfig, Field(discriminator="name")]


@config
class KIDConfig:
    """Kernel distance (arXiv 1801.01401): its mean over random subsets."""

    subsets: PositiveInt
    subset_size: PositiveInt


@config
class EvaluateCommon:
    """What every protocol says besides its own rules."""

    rows: Annotated[tuple[str, ...], Field(min_length=1)]
    """What is drawn and judged beside the tokenizer's reconstruction; see ``ROW_PATTERNS``."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    """Every row is sampled and judged once a seed; the table shows mean and spread."""
    batch_size: PositiveInt
    processes: PositiveInt
    """Processes that share the drawing on a CPU, a thread each, and files that are judged at a time there; 1 leaves the
    threads to torch. On a GPU it is one."""
    kid: KIDConfig
    neighbours: PositiveInt
    """k of improved precision and recall (arXiv 1904.06991)."""
    precision_recall_samples: NonNegativeInt
    """Samples that precision and recall look at, the first ones; 0 for all."""
    grid_classes: PositiveInt
    grid_per_class: PositiveInt

    def __post_init__(self) -> None:
        for name in self.rows:
            try:
                parse_row(name)
            except ValueError as error:
                raise ValueError(f"rows: {error}") from None
        if len(set(self.rows)) < len(self.rows):
            raise ValueError(f"rows: one is named twice: {self.rows}")


@config
class DigitsEvaluateConfig(EvaluateCommon):
    """The protocol ``digits``: the embedded data set's labels and the digits classifier's features."""

    protocol: Literal["digits"]
    samples_per_image: PositiveInt
    """Samples drawn for each image of the reference set, with that image's label: the data's class proportions."""


@config
class ImageNetEvaluateConfig(EvaluateCommon):
    """What the two published protocols have in common: Inception's features against a file of statistics."""

    statistics: RemoteFile
    """Mean and covariance of the real images' features, with the keys ``m`` and ``s`` or ``mu`` and ``sigma``; where it
    holds real images too (``arr_0``), KID, precision and recall are computed against those."""
    image_size: PositiveInt
    """Side of the images that are judged; larger ones are brought to it (bicubic) before they are quantised."""
    resize: Literal["pytorch_fid", "tensorflow1"]
    """How images come to Inception's 299 pixels: as pytorch-fid does it, or as the ADM evaluator does."""


@config
class DD50kEvaluateConfig(ImageNetEvaluateConfig):
    """The protocol ``dd_50k`` of the DD papers: labels drawn at random, pytorch-fid's preprocessing."""

    protocol: Literal["dd_50k"]
    samples: PositiveInt


@config
class ADM50kEvaluateConfig(ImageNetEvaluateConfig):
    """The protocol ``adm_50k`` of VAR and LlamaGen: every class as often, the ADM evaluator's reference batch."""

    protocol: Literal["adm_50k"]
    samples_per_class: PositiveInt


@config
class LocalFile:
    """A file that nobody publishes: yours."""

    path: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """What it must be, where that is known."""


@config
class T2IEvaluateConfig(EvaluateCommon):
    """The protocol ``t2i_30k`` *(ours, after the text-to-image papers' habit)*: one image for each of 30,000 captions
    (of COCO's validation images, usually), Inception's features against a file of statistics of the real images."""

    protocol: Literal["t2i_30k"]
    samples: PositiveInt
    """The first prompts of ``captions.sets.evaluate``, an image each."""
    statistics: LocalFile
    """As of the other protocols: keys ``m`` and ``s``, or ``mu`` and ``sigma``."""
    image_size: PositiveInt
    resize: Literal["pytorch_fid", "tensorflow1"]
    clip: PublishedEncoderConfig | None
    """A CLIP model, of which every row then has a ``clip_score``."""


EvaluateConfig = Annotated[
    DigitsEvaluateConfig | DD50kEvaluateConfig | ADM50kEvaluateConfig | T2IEvaluateConfig,
    Field(discriminator="protocol"),
]


@config
class GateRule:
    """One bound on ``value`` (``row.metric``), or on its ratio to ``relative_to`` where that is given.

    ``relative_to: production`` is the same figure of the model that is in production now: the rule passes while there
    is none, and fails where that model was judged by another protocol.
    """

    value: str
    relative_to: str | None = None
    max: float | None = None
    min: float | None = None

    def __post_init__(self) -> None:
        if self.max is None and self.min is None:
            raise ValueError(f"the rule on {self.value} needs a max or a min")


@config
class GateOverride:
    """Lets one model through that the rules refuse. It holds for no other model, and not for figures that do not belong
    to the model in hand."""

    student_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{12,64}$")]
    """Of the model it is for (its beginning, at least), as the decision file states it."""
    by: Annotated[str, Field(min_length=1)]
    reason: Annotated[str, Field(min_length=1)]


@config
class GateConfig:
    """What a model must reach before it is exported."""

    rules: dict[str, GateRule]
    export_rules: dict[str, GateRule]
    """What the exported graph must reach before it can be promoted: on ``reports/export.json``
    (``export.parity.largest``), and on the figures of its own samples (``exported.fid``) beside those of PyTorch's
    samples of the same noise and labels (``pytorch.fid``; where these were not kept, the student's row)."""
    override: GateOverride | None = None
