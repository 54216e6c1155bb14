"""What each stage of the pipeline is told: one dataclass a section of ``params.yaml``. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ddops.config.base import (
    DecayRate,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    config,
)
from ddops.config.models import ModelConfig, SamplingConfig, VARConfig


@config
class TrainingConfig:
    """One optimisation: AdamW, linear warm-up then cosine decay, gradient clipping, EMA weights as the result."""

    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    final_learning_rate: NonNegativeFloat
    """Where the cosine ends."""
    warmup_steps: NonNegativeInt
    betas: tuple[DecayRate, DecayRate]
    weight_decay: NonNegativeFloat
    gradient_clip: PositiveFloat
    """Largest norm of the gradient."""
    ema_decay: DecayRate
    log_every: PositiveInt
    """Steps between points of the curves."""
    checkpoint_every: PositiveInt
    """Steps between checkpoints: what a killed run loses at most."""

    def __post_init__(self) -> None:
        if self.final_learning_rate > self.learning_rate:
            raise ValueError("final_learning_rate must not exceed learning_rate")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} exceed steps {self.steps}")


@config
class FeaturesConfig:
    """The judge: a small classifier whose penultimate features the protocol's FID is computed in."""

    name: Literal["digits_classifier"]
    channels: PositiveInt
    feature_dim: PositiveInt
    dropout: DecayRate
    holdout: Fraction
    """Share of the images kept out of training, to measure the classifier's accuracy on."""
    training: TrainingConfig


@config
class TeacherConfig:
    """The teacher: its architecture, how it is obtained and how it is sampled."""

    source: Literal["train"]
    """``train``: tokenizer and transformer are trained in this stage, on the embedded data set."""
    model: ModelConfig
    sampling: SamplingConfig
    label_dropout: Fraction
    """Probability of replacing a label by the unconditional one, which guidance needs."""
    dropout: DecayRate
    """Share of input tokens replaced by random ones in training: a regulariser for small data sets."""
    tokenizer_training: TrainingConfig
    training: TrainingConfig

    def __post_init__(self) -> None:
        if self.sampling.top_k > self.model.codebook_size:
            raise ValueError(
                f"sampling.top_k {self.sampling.top_k} exceeds the codebook's {self.model.codebook_size} codes"
            )


@config
class TrajectoriesConfig:
    """The data set of (class, noise, token ids): how many, and how the flow map is solved."""

    count: PositiveInt
    shard_size: PositiveInt
    """Trajectories a shard."""
    batch_size: PositiveInt
    solver: Literal["multistep", "heun"]
    evaluations: Annotated[int, Field(ge=2)]
    """Evaluations of the posterior mean a token."""


@config
class PerceptualConfig:
    """Which network the perceptual term of DD1's loss sees with. There is no fallback from one to the other."""

    network: Literal["digits_classifier", "lpips_vgg"]
    weight: NonNegativeFloat
    batch_size: PositiveInt
    """Images of a training batch that are decoded for the term; the decoder costs more than the student does."""


@config
class DD1Config:
    """Distilled Decoding 1 (arXiv 2412.17153)."""

    start_positions: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    """Numbers of leading levels that are given: what training draws from, and what sampling steps through."""
    logit_prefix: NonNegativeInt
    """Leading levels whose final tokens come from the logits' argmax; the regressed embedding serves the rest."""
    cross_entropy_weight: NonNegativeFloat
    embedding_weight: NonNegativeFloat
    """Weight of the squared error of the regressed embedding (0 in the paper; steadies small models)."""
    perceptual: PerceptualConfig
    evaluate_every: PositiveInt
    """Steps between FID points of the training curve."""
    evaluate_count: PositiveInt
    """Samples a point of that curve is computed from."""
    training: TrainingConfig

    def __post_init__(self) -> None:
        if self.start_positions[0] != 0 or list(self.start_positions) != sorted(set(self.start_positions)):
            raise ValueError(f"start_positions must begin with 0 and increase strictly, got {self.start_positions}")


@config
class EvaluateConfig:
    """The protocol: what is sampled for a figure, and the features it is computed in."""

    protocol: Literal["digits"]
    samples_per_image: PositiveInt
    """Samples drawn for each image of the reference set, with that image's label: the data's class proportions."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    """Every row is sampled and judged once a seed; the table shows mean and spread."""
    batch_size: PositiveInt
    grid_per_class: PositiveInt


@config
class GateRule:
    """One bound on ``value`` (``row.metric``), or on its ratio to ``relative_to`` where that is given."""

    value: str
    relative_to: str | None = None
    max: float | None = None
    min: float | None = None

    def __post_init__(self) -> None:
        if self.max is None and self.min is None:
            raise ValueError(f"the rule on {self.value} needs a max or a min")


@config
class GateConfig:
    """What a model must reach before it is exported."""

    rules: dict[str, GateRule]


@config
class ExportConfig:
    """The exported graph: noise and class label in, images out, one pass a step."""

    student: Literal["dd1"]
    steps: PositiveInt
    opset: Literal[18, 20]
    tolerance: PositiveFloat
    """Largest absolute difference of a pixel in [-1, 1] between PyTorch and ONNX Runtime."""
    parity_count: PositiveInt
    parity_seed: NonNegativeInt


@config
class Config:
    """The whole of ``params.yaml``."""

    preset: str
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    features: FeaturesConfig
    teacher: TeacherConfig
    trajectories: TrajectoriesConfig
    dd1: DD1Config
    evaluate: EvaluateConfig
    gate: GateConfig
    export: ExportConfig

    def __post_init__(self) -> None:
        levels = len(self.teacher.model.level_sizes)
        unit = "levels" if isinstance(self.teacher.model, VARConfig) else "tokens"
        if self.dd1.start_positions[-1] >= levels:
            raise ValueError(
                f"dd1.start_positions: {self.dd1.start_positions[-1]} is past the end, the teacher has {levels} {unit}"
            )
        if self.dd1.logit_prefix > levels:
            raise ValueError(f"dd1.logit_prefix: {self.dd1.logit_prefix} exceeds the teacher's {levels} {unit}")
        if self.export.steps > len(self.dd1.start_positions):
            raise ValueError(
                f"export.steps: {self.export.steps} steps need as many dd1.start_positions, "
                f"which are {self.dd1.start_positions}"
            )
