"""What the two stages of DD2 (arXiv 2510.21003) are told: ``ar_diffusion`` and ``dd2``. Imports no torch."""

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
from ddops.config.models import HeadConfig
from ddops.config.training import TrainingConfig, require_samples_for_all


@config
class TimesConfig:
    """Where a token's time t is drawn from, uniformly: 0 is noise, 1 the data."""

    min: Fraction
    max: Annotated[float, Field(gt=0, lt=1)]
    """Short of 1: the score grows without bound there, and one code is left long before."""

    def __post_init__(self) -> None:
        if self.min >= self.max:
            raise ValueError(f"min {self.min} must be less than max {self.max}")


@config
class TrainedARDiffusionConfig:
    """DD2's AR-diffusion model (arXiv 2510.21003): the teacher's backbone and a conditional head."""

    source: Literal["train"]
    head: HeadConfig
    target: Literal["ground_truth_score", "flow_matching"]
    """What the head learns: the teacher's closed-form posterior mean, or the clean token itself (the ablation)."""
    weighting: Literal["mean", "velocity"]
    """Whose error is measured: the posterior mean's, or the velocity's, which weighs times near the data more."""
    times: TimesConfig
    draws: PositiveInt
    """Noise draws a token in each training step: the head is cheap beside the backbone."""
    evaluations: Annotated[int, Field(ge=2)]
    """Evaluations of the head a token when the model is sampled."""
    evaluate_every: PositiveInt
    evaluate_count: PositiveInt
    training: TrainingConfig

    def __post_init__(self) -> None:
        require_samples_for_all(self.evaluate_count, self.training.processes)


@config
class NotTrainedConfig:
    """A preset without DD2."""

    source: Literal["none"]


ARDiffusionConfig = Annotated[TrainedARDiffusionConfig | NotTrainedConfig, Field(discriminator="source")]


@config
class GuidanceConfig:
    """DD2's guidance network: what it is, and its side of the alternating updates."""

    start: Literal["ar_diffusion", "teacher"]
    """``ar_diffusion``: the paper's, with a conditional head. ``teacher``: the teacher with its classifier, whose
    posterior mean is in closed form and which learns by cross-entropy; needs ``output: codes`` *(ours)*."""
    alignment_steps: NonNegativeInt
    """Updates before the generator's first."""
    updates: PositiveInt
    """Updates for each of the generator's."""
    draws: PositiveInt
    """Noise draws a token in each update; without effect where nothing is drawn (``start: teacher``)."""
    batch_size: PositiveInt
    optimizer: Literal["adamw", "muon"]
    """See :class:`~ddops.config.training.TrainingConfig`."""
    learning_rate: PositiveFloat
    betas: tuple[DecayRate, DecayRate]
    weight_decay: NonNegativeFloat
    gradient_clip: PositiveFloat
    ema_decay: DecayRate
    """Of the average of its weights that the generator's directions are taken from, an update; 0 takes the weights as
    they are. The average wavers less than they do, and follows the generator a little later *(ours)*."""


@config
class TrainedDD2Config:
    """Conditional score distillation (arXiv 2510.21003): the one-step generator."""

    source: Literal["train"]
    start: Literal["ar_diffusion", "dd1", "teacher"]
    """What the generator is initialised from."""
    output: Literal["codes", "embeddings"]
    """``codes``: the likeliest code, with the gradient of the expected one *(ours)*; ``embeddings``: the regressed
    embedding, the paper's."""
    guidance: GuidanceConfig
    times: TimesConfig
    draws: PositiveInt
    """Noise draws a token behind one direction."""
    weighting: Literal["mean", "velocity", "score"]
    normalization: Literal["distance", "direction", "none"]
    divergence: Literal["reverse", "jensen_shannon", "forward"]
    """Of the generated conditionals q from the teacher's p. ``reverse``, KL(q || p): the paper's. The others keep more
    of the teacher's variety *(ours)*; they need the densities that ``guidance.start: teacher`` has."""
    anchor_weight: NonNegativeFloat
    """Weight of DD1's cross-entropy on the trajectories beside the distillation loss *(ours)*; 0 is the paper's.
    Needs trained logits: of a generator that starts from DD1 or the teacher, or whose head predicts codes."""
    refine_start: Annotated[float, Field(ge=0, lt=1)]
    """How far refining returns a sample to noise before it is denoised again: 0 all the way, 1 not at all."""
    min_diversity: Fraction
    """The stage stops when a class's samples spread less than this share of what the trajectories do."""
    min_recall: Fraction
    """Or when the samples' recall of the real images is less than this, where the preset has real images."""
    evaluate_every: PositiveInt
    evaluate_count: PositiveInt
    training: TrainingConfig
    """The generator's."""

    def logit_prefix(self, levels: int) -> int:
        """How many levels of a sample take the likeliest code; the others take the regressed embedding."""
        return levels if self.output == "codes" else 0

    def __post_init__(self) -> None:
        if self.guidance.start == "teacher" and self.output != "codes":
            raise ValueError(
                "guidance.start teacher knows codes only: set output to codes, or start it from ar_diffusion"
            )
        if self.divergence != "reverse" and self.guidance.start != "teacher":
            raise ValueError(
                f"divergence {self.divergence} needs the generator's densities: set guidance.start to teacher, or "
                "divergence to reverse"
            )
        if self.guidance.batch_size % self.training.processes:
            raise ValueError(
                f"guidance.batch_size {self.guidance.batch_size} is not a multiple of the "
                f"{self.training.processes} processes"
            )
        require_samples_for_all(self.evaluate_count, self.training.processes)


DD2Config = Annotated[TrainedDD2Config | NotTrainedConfig, Field(discriminator="source")]
