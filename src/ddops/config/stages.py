"""What each stage of the pipeline is told: one dataclass a section of ``params.yaml``. Imports no torch."""

from __future__ import annotations

from dataclasses import field
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
from ddops.config.captions import CaptionsConfig, SeededEncoderConfig
from ddops.config.dd2 import ARDiffusionConfig, DD2Config
from ddops.config.evaluation import EvaluateConfig, FeaturesConfig, GateConfig, parse_row
from ddops.config.models import ModelConfig, SamplingConfig
from ddops.config.training import TrainingConfig, require_samples_for_all


@config
class PublishedFile:
    """A file of published weights, and where in it they are."""

    name: Annotated[str, Field(min_length=1)]
    """Its path in the repository."""
    layout: Annotated[str, Field(pattern=r"^[^.\s]+(\.[^.\s]+)*$")]
    """``flat``: the file is the state dict; else the keys that lead to it, such as ``trainer.var_wo_ddp``."""


@config
class DownloadSource:
    """Where published weights come from."""

    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    """``owner/name`` on the Hugging Face hub."""
    revision: Annotated[str, Field(min_length=1)]
    """A branch, tag or commit. The commit it stands for at the first download is pinned in ``hub.lock.json``."""
    path: str | None = None
    """A local directory that holds the files (or the file, where there is one): nothing is downloaded then."""


@config
class TeacherDownloadConfig(DownloadSource):
    """The two files of a published teacher."""

    tokenizer: PublishedFile
    transformer: PublishedFile


@config
class StudentDownloadConfig(DownloadSource):
    """The file of a released DD1 student."""

    student: PublishedFile


@config
class TeacherCommon:
    """What every teacher is told, wherever its weights come from."""

    model: ModelConfig


@config
class DownloadedTeacherConfig(TeacherCommon):
    """A published teacher: its weights are fetched, verified and converted."""

    source: Literal["download"]
    download: TeacherDownloadConfig


@config
class TrainedTeacherConfig(TeacherCommon):
    """A teacher whose tokenizer and transformer are trained in its stage, on the embedded data set."""

    source: Literal["train"]
    label_dropout: Fraction
    """Probability of replacing a label by the unconditional one, which guidance needs."""
    token_dropout: DecayRate
    """Share of input tokens replaced by random ones in training: a regulariser for small data sets."""
    codebook_weight: PositiveFloat
    """Weight of the quantiser's loss beside the reconstruction error. VAR's latent has no fixed scale: a large weight
    shrinks it until the coarse scales go unused."""
    tokenizer_training: TrainingConfig
    training: TrainingConfig


TeacherConfig = Annotated[TrainedTeacherConfig | DownloadedTeacherConfig, Field(discriminator="source")]


Precision = Literal["float32", "bfloat16"]


@config
class FlowMapConfig:
    """How the flow map from noise to tokens is solved. Chosen from the chart in benchmarks/."""

    solver: Literal["adaptive", "multistep", "heun", "euler"]
    """``adaptive`` chooses its steps for each token; the others walk a fixed grid."""
    evaluations: Annotated[int, Field(ge=2)]
    """Evaluations of the posterior mean a token; of ``adaptive`` the most that one may take, not the usual number."""
    tolerance: PositiveFloat
    """Error of a step that ``adaptive`` aims at; the others do not read it."""
    compiled: bool = False
    """Compile the posterior step of ``adaptive`` (torch.compile): half a minute at the start, other rounding."""


@config
class TrajectoriesConfig(FlowMapConfig):
    """The data set of (class, noise, token ids): how many, and how the flow map is solved."""

    count: NonNegativeInt
    """0 where nothing is trained on them: a released student."""
    shard_size: PositiveInt
    """Trajectories a shard."""
    batch_size: PositiveInt | Literal["auto"]
    """Samples at a time. ``auto``: as many as the memory at hand holds, see :mod:`ddops.trajectories.memory`; or what
    the shards that are there already were made with. The number is recorded, because rounding may depend on it."""
    precision: Precision = "float32"
    """Of the products in the teacher's transformer, and of its cached keys and values. Its logits, guidance, filters
    and the flow map are in float32 either way."""


@config
class PerceptualConfig:
    """Which network the perceptual term of DD1's loss sees with. There is no fallback from one to the other."""

    network: Literal["digits_classifier", "lpips_vgg"]
    weight: NonNegativeFloat
    batch_size: PositiveInt
    """Images of a training batch that are decoded for the term, by all processes together; the decoder costs more than
    the student does."""
    channels_last: bool = False
    """Decoder and LPIPS network with their channels innermost, which convolutions of many channels are faster in."""


@config
class DD1Common:
    """How a DD1 student (arXiv 2412.17153) is sampled, wherever its weights come from."""

    start_positions: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    """Numbers of leading levels that are given: what training draws from, and what sampling steps through."""
    logit_prefix: NonNegativeInt
    """Leading levels whose final tokens come from the logits' argmax; the regressed embedding serves the rest."""
    teacher_involved_logit_prefix: dict[str, NonNegativeInt] = field(default_factory=dict)
    """Another ``logit_prefix`` for rows of the evaluation, as in the paper: ``{teacher_involved_1_6: 9}``."""

    def __post_init__(self) -> None:
        if self.start_positions[0] != 0 or list(self.start_positions) != sorted(set(self.start_positions)):
            raise ValueError(f"start_positions must begin with 0 and increase strictly, got {self.start_positions}")


@config
class TrainedDD1Config(DD1Common):
    """A student that is distilled from the teacher's trajectories."""

    source: Literal["train"]
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
        DD1Common.__post_init__(self)
        decoded, processes = self.perceptual.batch_size, self.training.processes
        if decoded % processes:
            raise ValueError(f"perceptual.batch_size {decoded} is not a multiple of the {processes} processes")
        require_samples_for_all(self.evaluate_count, processes)


@config
class ReleasedDD1Config(DD1Common):
    """A student that DD1's authors released: its weights are fetched, verified and converted."""

    source: Literal["released"]
    download: StudentDownloadConfig


DD1Config = Annotated[TrainedDD1Config | ReleasedDD1Config, Field(discriminator="source")]


GraphPrecision = Literal["float32", "float16", "bfloat16"]


@config
class ExportConfig:
    """The exported graph: noise and class label in, images out, one pass a step."""

    student: Literal["dd1", "dd2"]
    steps: PositiveInt
    opset: Literal[18, 20]
    precision: GraphPrecision
    """Of the matrix products, and in float16 of the convolutions (ONNX has none in bfloat16 at these opsets); heads and
    last layers excepted."""
    tolerance: PositiveFloat | None
    """Largest absolute difference of a pixel in [-1, 1] between PyTorch and ONNX Runtime; null asks for none, for
    half precision, where a token that flips moves many pixels."""
    min_psnr: PositiveFloat
    """In decibels, of the exported model's images against PyTorch's."""
    min_equal_tokens: Fraction
    """Share of the tokens decided by an argmax that must be PyTorch's."""
    max_fid_loss: NonNegativeFloat | None
    """Share by which the graph's FID may be worse than PyTorch's, from the noise and labels of the protocol's first
    seed; null leaves it to the promotion, for protocols of tens of thousands of large images."""
    parity_count: PositiveInt
    parity_seed: NonNegativeInt
    license: Annotated[str, Field(min_length=1)]
    """Of the weights; goes into the model's metadata."""

    @property
    def row(self) -> str:
        """The row of the table that has the exported model's figures."""
        return f"{self.student}_{self.steps}step"


@config
class ProfileConfig:
    """Batch sizes that an engine is built for: it runs no other, and is fastest at ``opt``."""

    min: PositiveInt
    opt: PositiveInt
    max: PositiveInt

    def __post_init__(self) -> None:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"min {self.min}, opt {self.opt} and max {self.max} must not decrease")


@config
class EngineConfig:
    """TensorRT engines to be built from the exported graph."""

    flavour: Literal["tensorrt", "tensorrt_rtx"]
    """``tensorrt`` builds on the GPU it is for; ``tensorrt_rtx`` for any that it knows, on any machine."""
    targets: tuple[Annotated[str, Field(pattern=r"^(portable|current|\d+)$")], ...]
    """Compute capabilities such as "89", "portable" for all, "current" for this machine's GPU. None: no engine."""
    profile: ProfileConfig


@config
class Config:
    """The whole of ``params.yaml``."""

    preset: str
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    features: FeaturesConfig
    captions: CaptionsConfig
    teacher: TeacherConfig
    sampling: SamplingConfig
    trajectories: TrajectoriesConfig
    dd1: DD1Config
    ar_diffusion: ARDiffusionConfig
    dd2: DD2Config
    evaluate: EvaluateConfig
    gate: GateConfig
    export: ExportConfig
    engine: EngineConfig

    def __post_init__(self) -> None:
        levels = len(self.teacher.model.level_sizes)
        unit = "tokens" if max(self.teacher.model.level_sizes) == 1 else "levels"
        codes = self.teacher.model.codebook_size
        if self.sampling.top_k > codes:
            raise ValueError(f"sampling.top_k: {self.sampling.top_k} exceeds the codebook's {codes} codes")
        self._check_captions()
        if self.dd1.start_positions[-1] >= levels:
            raise ValueError(
                f"dd1.start_positions: {self.dd1.start_positions[-1]} is past the end, the teacher has {levels} {unit}"
            )
        if self.dd1.logit_prefix > levels:
            raise ValueError(f"dd1.logit_prefix: {self.dd1.logit_prefix} exceeds the teacher's {levels} {unit}")
        if self.dd1.source == "train" and self.trajectories.count == 0:
            raise ValueError("trajectories.count: 0, but dd1.source is train, which needs some")
        self._check_dd2()
        if self.export.student == "dd2" and self.dd2.source == "none":
            raise ValueError("export.student: dd2, but dd2.source is none")
        if (self.evaluate.protocol == "digits") != (self.features.name == "digits_classifier"):
            raise ValueError(f"features.name: {self.features.name} do not judge the protocol {self.evaluate.protocol}")
        for row in self.evaluate.rows:
            self._check_row(row)
        if self.export.steps > len(self.dd1.start_positions):
            raise ValueError(
                f"export.steps: {self.export.steps} steps need as many dd1.start_positions, "
                f"which are {self.dd1.start_positions}"
            )
        if self.export.row not in self.evaluate.rows:
            raise ValueError(
                f"evaluate.rows: {self.export.row} is missing, which is what is exported: it must be judged"
            )

    def _check_captions(self) -> None:
        """They are encoded as the teacher takes them."""
        shape = getattr(self.teacher.model, "captions", None)
        if (shape is None) != (self.captions.source == "none"):
            needs = "draws for classes" if shape is None else "draws for captions"
            raise ValueError(f"captions.source: {self.captions.source}, but the teacher {needs}")
        if shape is None or self.captions.source == "none":
            if self.evaluate.protocol == "t2i_30k":
                raise ValueError("evaluate.protocol: t2i_30k asks by captions, and the teacher draws for classes")
            return
        if self.evaluate.protocol in ("dd_50k", "adm_50k"):
            raise ValueError(f"evaluate.protocol: {self.evaluate.protocol} asks by classes, the teacher takes captions")
        if self.captions.length != shape.length:
            raise ValueError(f"captions.length: {self.captions.length}, but the teacher takes {shape.length} tokens")
        encoder = self.captions.encoder
        if encoder.name == "clip":
            raise ValueError("captions.encoder.name: clip encodes no captions here; valid: seeded, t5")
        if isinstance(encoder, SeededEncoderConfig) and encoder.width != shape.width:
            raise ValueError(f"captions.encoder.width: {encoder.width}, but the teacher takes {shape.width}")
        if "onestep_class" in self.evaluate.rows and self.captions.sets.train != self.captions.sets.evaluate:
            raise ValueError("evaluate.rows: onestep_class knows the captions of captions.sets.train only")

    def _check_dd2(self) -> None:
        """DD2 must be given what it starts from, and a head that fits its output."""
        if self.dd2.source == "none":
            return
        if self.trajectories.count == 0:
            raise ValueError("trajectories.count: 0, but dd2.source is train, which needs some")
        if "ar_diffusion" not in (self.dd2.start, self.dd2.guidance.start):
            return
        if self.ar_diffusion.source == "none":
            raise ValueError("ar_diffusion.source: none, but dd2 starts from the AR-diffusion model")
        predicts = self.ar_diffusion.head.predicts
        if self.dd2.output == "embeddings" and self.dd2.guidance.start == "ar_diffusion" and predicts == "codes":
            raise ValueError(
                "dd2.output: embeddings lie between codes, which a guidance network of codes cannot follow: "
                "set ar_diffusion.head.predicts to embedding"
            )
        if self.dd2.anchor_weight and self.dd2.start == "ar_diffusion" and predicts == "embedding":
            raise ValueError(
                "dd2.anchor_weight: needs trained logits, and a head that predicts the embedding has none: "
                "set it to 0, or ar_diffusion.head.predicts to codes"
            )

    def _check_row(self, name: str) -> None:
        """A row must be one that these models can draw."""
        levels, starts = len(self.teacher.model.level_sizes), self.dd1.start_positions
        kind, numbers = parse_row(name)
        if kind == "dd2" and self.dd2.source == "none":
            raise ValueError(f"evaluate.rows: {name} needs a DD2 generator, and dd2.source is none")
        if kind == "dd2_refine" and "none" in (self.dd2.source, self.ar_diffusion.source):
            raise ValueError(f"evaluate.rows: {name} needs DD2's generator and AR-diffusion model, and one is none")
        if kind == "ar_diffusion" and self.ar_diffusion.source == "none":
            raise ValueError(f"evaluate.rows: {name} needs an AR-diffusion model, and ar_diffusion.source is none")
        if kind in ("dd1", "dd2") and numbers[0] > len(starts):
            raise ValueError(f"evaluate.rows: {name} needs {numbers[0]} dd1.start_positions, which are {starts}")
        if kind == "skip" and numbers[0] >= levels:
            raise ValueError(f"evaluate.rows: {name} skips too much, the teacher has {levels} levels")
        if kind == "teacher_involved" and (numbers[0] >= numbers[1] or numbers[1] - 1 not in starts):
            raise ValueError(
                f"evaluate.rows: {name}: the teacher draws levels n to m - 1 and the student goes on from there: "
                f"n < m, and m - 1 must be one of dd1.start_positions {starts}"
            )
        if kind.startswith("onestep") and self.trajectories.count == 0:
            raise ValueError(f"evaluate.rows: {name} needs trajectories, and trajectories.count is 0")
