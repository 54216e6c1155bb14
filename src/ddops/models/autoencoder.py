"""The convolutional encoder and decoder of both tokenizers, as VQGAN has them (arXiv 2012.09841).

Shape suffixes are those of :mod:`ddops.models.interface` and: K channels of a feature map, h and w its sides,
N = h x w, Z channels of the latent, g its side.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import torch.nn.functional as F
from torch import Tensor, nn

from ddops.config.models import AutoencoderConfig

NORM_GROUPS: Final = 32
NORM_EPS: Final = 1e-6


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class ResBlock(nn.Module):
    """Two normalised convolutions beside a shortcut: (B, K_in, h, w) -> (B, K_out, h, w)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = group_norm(inputs)
        self.conv1 = conv3x3(inputs, outputs)
        self.norm2 = group_norm(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        # Each block starts as its shortcut: trained from scratch, that stands a higher learning rate.
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x_BKhw: Tensor) -> Tensor:
        y_BKhw = self.conv1(F.silu(self.norm1(x_BKhw)))
        y_BKhw = self.conv2(F.silu(self.norm2(y_BKhw)))
        out_BKhw: Tensor = self.shortcut(x_BKhw) + y_BKhw
        return out_BKhw


class Attention(nn.Module):
    """Single-head attention between the positions of a feature map, with a residual: (B, K, h, w) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x_BKhw: Tensor) -> Tensor:
        qkv_B31KN = self.qkv(self.norm(x_BKhw)).flatten(2).unflatten(1, (3, 1, -1))
        q_B1NK, k_B1NK, v_B1NK = qkv_B31KN.transpose(3, 4).unbind(1)
        y_B1NK = F.scaled_dot_product_attention(q_B1NK, k_B1NK, v_B1NK)
        out_BKhw: Tensor = x_BKhw + self.out(y_B1NK.squeeze(1).transpose(1, 2).reshape(x_BKhw.shape))
        return out_BKhw


class Stage(nn.Module):
    """The residual blocks of one resolution, each followed by attention where asked, then the change of resolution."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool, resample: nn.Module) -> None:
        super().__init__()
        widths = (inputs, *(outputs,) * blocks)
        self.blocks = nn.ModuleList(ResBlock(before, after) for before, after in pairwise(widths))
        self.attentions = nn.ModuleList(Attention(outputs) if attention else nn.Identity() for _ in range(blocks))
        self.resample = resample

    def forward(self, x_BKhw: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x_BKhw = attention(block(x_BKhw))
        out_BKhw: Tensor = self.resample(x_BKhw)
        return out_BKhw


def middle(channels: int) -> nn.Sequential:
    """What runs at the deepest resolution, between the stages and the latent."""
    return nn.Sequential(ResBlock(channels, channels), Attention(channels), ResBlock(channels, channels))


def downsample(channels: int) -> nn.Sequential:
    """Halve the sides; the padding is on the right and at the bottom only."""
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))


def upsample(channels: int) -> nn.Sequential:
    """Double the sides."""
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), conv3x3(channels, channels))


class Encoder(nn.Module):
    """Images (B, I, H, W) to a latent (B, Z, g, g)."""

    def __init__(self, config: AutoencoderConfig, image_channels: int, latent_channels: int) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        last = len(widths) - 1
        self.conv_in = conv3x3(image_channels, config.channels)
        self.stages = nn.ModuleList(
            Stage(
                inputs,
                outputs,
                config.res_blocks,
                attention=index == last,
                resample=nn.Identity() if index == last else downsample(outputs),
            )
            for index, (inputs, outputs) in enumerate(pairwise([config.channels, *widths]))
        )
        self.middle = middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv3x3(widths[-1], latent_channels)

    def forward(self, images_BIHW: Tensor) -> Tensor:
        x_BKhw = self.conv_in(images_BIHW)
        for stage in self.stages:
            x_BKhw = stage(x_BKhw)
        latent_BZgg: Tensor = self.conv_out(F.silu(self.norm_out(self.middle(x_BKhw))))
        return latent_BZgg


class PatchEncoder(nn.Sequential):
    """Images (B, I, H, W) to a latent (B, Z, g, g) whose every place depends on its own patch of pixels alone."""

    def __init__(self, config: AutoencoderConfig, image_channels: int, latent_channels: int) -> None:
        super().__init__(
            nn.Conv2d(image_channels, config.channels, config.downsampling, stride=config.downsampling),
            nn.SiLU(),
            nn.Conv2d(config.channels, config.channels, 1),
            nn.SiLU(),
            nn.Conv2d(config.channels, latent_channels, 1),
        )


def build_encoder(config: AutoencoderConfig, image_channels: int, latent_channels: int) -> nn.Module:
    """The encoder that the configuration names."""
    encoder = PatchEncoder if config.encoder == "patch" else Encoder
    return encoder(config, image_channels, latent_channels)


class Decoder(nn.Module):
    """A latent (B, Z, g, g) to images (B, I, H, W). Its stages are in the order they run, the deepest first."""

    def __init__(self, config: AutoencoderConfig, image_channels: int, latent_channels: int) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in reversed(config.channel_multipliers)]
        last = len(widths) - 1
        self.conv_in = conv3x3(latent_channels, widths[0])
        self.middle = middle(widths[0])
        self.stages = nn.ModuleList(
            Stage(
                inputs,
                outputs,
                config.res_blocks + 1,
                attention=index == 0,
                resample=nn.Identity() if index == last else upsample(outputs),
            )
            for index, (inputs, outputs) in enumerate(pairwise([widths[0], *widths]))
        )
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv3x3(widths[-1], image_channels)

    def forward(self, latent_BZgg: Tensor) -> Tensor:
        x_BKhw = self.middle(self.conv_in(latent_BZgg))
        for stage in self.stages:
            x_BKhw = stage(x_BKhw)
        images_BIHW: Tensor = self.conv_out(F.silu(self.norm_out(x_BKhw)))
        return images_BIHW
