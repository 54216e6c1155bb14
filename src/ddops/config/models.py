"""Architectures of the two teacher families. A DD1 student shares its teacher's configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ddops.config.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, config


@config
class AutoencoderConfig:
    """The convolutional encoder and decoder of a tokenizer (GroupNorm has 32 groups)."""

    channels: PositiveInt
    channel_multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    res_blocks: PositiveInt
    """Residual blocks a resolution in the encoder; the decoder has one more."""
    encoder: Literal["convolutional", "patch"] = "convolutional"
    """``patch``: a small network on each patch of pixels by itself, so that a token speaks of its own patch only."""

    def __post_init__(self) -> None:
        if self.channels % 32:
            raise ValueError(f"channels must be a multiple of 32 (GroupNorm has 32 groups), got {self.channels}")

    @property
    def downsampling(self) -> int:
        return 1 << (len(self.channel_multipliers) - 1)


@config
class VARConfig:
    """VAR (arXiv 2404.02905): next-scale prediction over a multi-scale residual tokenizer."""

    family: Literal["var"]
    num_classes: PositiveInt
    image_size: PositiveInt
    image_channels: PositiveInt
    codebook_size: PositiveInt
    code_dim: PositiveInt
    patch_sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=2)]
    """Side length, in tokens, of each scale's token map; the last one is the latent's side length."""
    shared_phi: PositiveInt
    """Number of residual convolutions (phi) shared between the scales."""
    autoencoder: AutoencoderConfig
    depth: PositiveInt
    width: PositiveInt
    heads: PositiveInt
    mlp_ratio: PositiveFloat
    attention_l2_norm: bool
    shared_ada_ln: bool
    norm_eps: PositiveFloat

    def __post_init__(self) -> None:
        if list(self.patch_sizes) != sorted(set(self.patch_sizes)):
            raise ValueError(f"patch_sizes must increase strictly, got {self.patch_sizes}")
        _check_grid(self.image_size, self.patch_sizes[-1], self.autoencoder)
        _check_heads(self.width, self.heads, 1)

    @property
    def grid(self) -> int:
        """Side length of the latent, in tokens."""
        return self.patch_sizes[-1]

    @property
    def level_sizes(self) -> tuple[int, ...]:
        return tuple(size * size for size in self.patch_sizes)


@config
class CaptionShape:
    """Captions as a model takes them: the features of a text encoder."""

    length: PositiveInt
    """Tokens a caption, padded on the left."""
    width: PositiveInt
    """Of the encoder's features."""


@config
class LlamaGenConfig:
    """LlamaGen (arXiv 2406.06525), of classes or captions: next-token prediction in raster order."""

    family: Literal["llamagen"]
    num_classes: NonNegativeInt
    """0 where it draws for captions."""
    image_size: PositiveInt
    image_channels: PositiveInt
    codebook_size: PositiveInt
    code_dim: PositiveInt
    grid: PositiveInt
    """Side length of the token map."""
    latent_channels: PositiveInt
    """Channels between the convolutional stacks and the 1x1 convolutions to and from ``code_dim``."""
    autoencoder: AutoencoderConfig
    depth: PositiveInt
    width: PositiveInt
    heads: PositiveInt
    ffn_hidden: PositiveInt
    rope_base: PositiveFloat
    norm_eps: PositiveFloat
    captions: CaptionShape | None = None
    """What it draws for in place of classes: text to image."""

    def __post_init__(self) -> None:
        _check_grid(self.image_size, self.grid, self.autoencoder)
        _check_heads(self.width, self.heads, 4)
        if (self.num_classes == 0) != (self.captions is not None):
            raise ValueError(
                f"num_classes {self.num_classes}: a model draws for classes, or with 0 of them for captions"
            )

    @property
    def level_sizes(self) -> tuple[int, ...]:
        return (1,) * (self.grid * self.grid)

    @property
    def condition_tokens(self) -> int:
        """T: one for a class, a caption's length otherwise."""
        return 1 if self.captions is None else self.captions.length


ModelConfig = Annotated[VARConfig | LlamaGenConfig, Field(discriminator="family")]


@config
class HeadConfig:
    """The conditional head of DD2's AR-diffusion model: adaptive-norm residual MLP blocks."""

    width: PositiveInt
    blocks: PositiveInt
    predicts: Literal["embedding", "codes"]
    """``embedding``: the posterior mean itself, in the classifier's place, as in the paper. ``codes`` *(ours)*: a
    correction of the classifier's logits, from which the mean follows in closed form."""


@config
class SamplingConfig:
    """How a teacher is sampled. Each family turns ``guidance`` into a scale a level (``Teacher.guidance_scale``)."""

    guidance: NonNegativeFloat
    top_k: Annotated[int, Field(ge=0)]
    """Keep the k likeliest codes (ties at the k-th are kept); 0 keeps all."""
    top_p: Annotated[float, Field(gt=0, le=1)]
    """Keep the smallest set of likeliest codes whose probability reaches p; 1 keeps all."""
    temperature: PositiveFloat


def _check_grid(image_size: int, grid: int, autoencoder: AutoencoderConfig) -> None:
    if image_size != grid * autoencoder.downsampling:
        raise ValueError(
            f"image_size {image_size} is not the latent's side {grid} times the downsampling "
            f"{autoencoder.downsampling} of {len(autoencoder.channel_multipliers)} channel_multipliers"
        )


def _check_heads(width: int, heads: int, head_multiple: int) -> None:
    if width % (heads * head_multiple):
        raise ValueError(f"width {width} must be a multiple of heads {heads} x {head_multiple}")
