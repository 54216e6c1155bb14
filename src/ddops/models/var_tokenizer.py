"""VAR's tokenizer: an autoencoder whose latent is quantised coarse to fine, each scale coding what is left over.

From arXiv 2404.02905 (algorithms 1 and 2) and the released VAR code. Shape suffixes are those of
:mod:`ddops.models.interface` and: g side of the latent, N vectors. ``f`` is the latent and ``f_hat`` its
approximation by the scales so far, both (B, C, g, g).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddops.config.models import VARConfig
from ddops.models.autoencoder import Decoder, build_encoder, conv3x3
from ddops.models.interface import Tokenizer, TokenizerOutput
from ddops.models.layout import LevelLayout
from ddops.models.precision import full_precision
from ddops.models.quantization import (
    codebook_loss,
    nearest_code,
    reseed_unused_codes,
    straight_through,
    to_map,
    to_sequence,
)


class Phi(nn.Conv2d):
    """Halfway between a map and its 3x3 convolution, (B, C, g, g) to the same: it repairs what upsampling blurred."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x_BCgg: Tensor) -> Tensor:
        return torch.lerp(x_BCgg, super().forward(x_BCgg).to(x_BCgg.dtype), 0.5)


def phi_of_each_scale(scales: int, shared_phi: int) -> tuple[int, ...]:
    """Which of the ``shared_phi`` convolutions serves each scale: the one whose tick is nearest to the scale's place.

    The published ten scales have two exact ties, which these float64 roundings decide as the released VAR code
    does: (0, 0, 1, 1, 1, 2, 2, 3, 3, 3). The same sums in another order or precision give wrong images.
    """
    margin = 1 / 3 / shared_phi if shared_phi == 4 else 1 / 2 / shared_phi
    ticks = np.linspace(margin, 1 - margin, shared_phi)
    return tuple(int(np.argmin(np.abs(ticks - scale / (scales - 1)))) for scale in range(scales))


class QuantizedScale(NamedTuple):
    """What quantising one scale gives."""

    rest_BlC: Tensor
    """What the earlier scales left of the latent, at this scale's resolution."""
    ids_Bl: Tensor
    f_hat_BCgg: Tensor


class VARTokenizer(Tokenizer):
    """Images to tokens, scale by scale, and back."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = LevelLayout(config.level_sizes)
        self.encoder = build_encoder(config.autoencoder, config.image_channels, config.code_dim)
        self.quant_conv = conv3x3(config.code_dim, config.code_dim)
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.code_dim))
        self.phis = nn.ModuleList(Phi(config.code_dim) for _ in range(config.shared_phi))
        self.post_quant_conv = conv3x3(config.code_dim, config.code_dim)
        self.decoder = Decoder(config.autoencoder, config.image_channels, config.code_dim)
        self._phi_of_scale = phi_of_each_scale(len(config.patch_sizes), config.shared_phi)

    @property
    def codebook_VC(self) -> Tensor:
        return self.codebook

    @torch.no_grad()
    def encode(self, images_BIHW: Tensor) -> Tensor:
        """See :meth:`Tokenizer.encode`. No gradient."""
        return self.quantize(self.features(images_BIHW))[0]

    def decode(self, q_BLC: Tensor) -> Tensor:
        """See :meth:`Tokenizer.decode`."""
        return self.decode_latent(self.accumulate(q_BLC))

    def forward(self, images_BIHW: Tensor) -> TokenizerOutput:
        """See :meth:`Tokenizer.forward`. Every scale's ``f_hat`` is drawn to ``f``, with equal weights."""
        f_BCgg = self.features(images_BIHW)
        ids_BL, f_hats = self.quantize(f_BCgg.detach())
        losses = [codebook_loss(f_BCgg, f_hat_BCgg) for f_hat_BCgg in f_hats]
        reconstruction_BIHW = self.decode_latent(straight_through(f_BCgg, f_hats[-1]))
        return TokenizerOutput(reconstruction_BIHW, torch.stack(losses).mean(), ids_BL)

    def features(self, images_BIHW: Tensor) -> Tensor:
        """The latent ``f`` before quantisation, (B, C, g, g)."""
        f_BCgg: Tensor = self.quant_conv(self.encoder(images_BIHW))
        return f_BCgg

    def quantize(self, f_BCgg: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Ids (B, L) and, for each scale, ``f_hat`` once that scale is added. Gradients reach codebook and phi only."""
        scales = list(self._quantize_scales(f_BCgg))
        return torch.cat([scale.ids_Bl for scale in scales], dim=1), [scale.f_hat_BCgg for scale in scales]

    @torch.no_grad()
    def reseed_unused_codes(self, images_BIHW: Tensor, generator: torch.Generator | None = None) -> int:
        """Move the codes that no token of these images uses; see :func:`ddops.models.quantization.reseed_unused_codes`.

        Call it with a good part of the data set, before the first step and then from time to time, but not near the
        end: a code needs steps to settle. Returns how many codes moved.
        """
        scales = list(self._quantize_scales(self.features(images_BIHW)))
        rest_NC = torch.cat([scale.rest_BlC.flatten(0, 1) for scale in scales])
        ids_N = torch.cat([scale.ids_Bl.flatten() for scale in scales])
        return reseed_unused_codes(self.codebook, rest_NC, ids_N, generator)

    def next_input(self, f_hat_BCgg: Tensor, level: int, q_BlC: Tensor) -> tuple[Tensor, Tensor]:
        """Add one scale's embeddings: the new ``f_hat`` and what the transformer reads for the next scale, (B, l, C).

        The given ``f_hat`` (zeros before level 0) is left as it is. After the last scale the input is ``f_hat`` itself.
        """
        f_hat_BCgg = f_hat_BCgg + self._at_full_size(level, q_BlC)
        sides = self.config.patch_sizes
        next_side = sides[min(level + 1, len(sides) - 1)]
        return f_hat_BCgg, to_sequence(F.adaptive_avg_pool2d(f_hat_BCgg, next_side))

    @full_precision
    def teacher_forcing_input(self, q_BLC: Tensor) -> Tensor:
        """What the transformer reads for scales 1 to S - 1 when all embeddings are known, (B, L - l_0, C)."""
        f_hat_BCgg = self._zeros(q_BLC)
        inputs = []
        for level in range(self.layout.num_levels - 1):
            f_hat_BCgg, input_BlC = self.next_input(f_hat_BCgg, level, q_BLC[:, self.layout.positions(level)])
            inputs.append(input_BlC)
        return torch.cat(inputs, dim=1)

    def accumulate(self, q_BLC: Tensor) -> Tensor:
        """``f_hat`` of all scales, (B, C, g, g)."""
        f_hat_BCgg = self._zeros(q_BLC)
        for level in range(self.layout.num_levels):
            f_hat_BCgg = f_hat_BCgg + self._at_full_size(level, q_BLC[:, self.layout.positions(level)])
        return f_hat_BCgg

    def decode_latent(self, f_hat_BCgg: Tensor) -> Tensor:
        """Images (B, I, H, W), not clamped."""
        images_BIHW: Tensor = self.decoder(self.post_quant_conv(f_hat_BCgg))
        return images_BIHW

    def _at_full_size(self, level: int, q_BlC: Tensor) -> Tensor:
        """One scale's embeddings as they enter ``f_hat``, (B, C, g, g)."""
        side, grid = self.config.patch_sizes[level], self.config.grid
        map_BCgg = to_map(q_BlC, side)
        if side != grid:
            map_BCgg = F.interpolate(map_BCgg, size=(grid, grid), mode="bicubic")
        full_BCgg: Tensor = self.phis[self._phi_of_scale[level]](map_BCgg)
        return full_BCgg

    def _quantize_scales(self, f_BCgg: Tensor) -> Iterator[QuantizedScale]:
        """Coarse to fine, each scale quantises what the earlier ones left of the latent."""
        f_hat_BCgg = torch.zeros_like(f_BCgg)
        for level, side in enumerate(self.config.patch_sizes):
            rest_BlC = to_sequence(F.adaptive_avg_pool2d((f_BCgg - f_hat_BCgg).detach(), side))
            ids_Bl = nearest_code(rest_BlC, self.codebook)
            f_hat_BCgg = f_hat_BCgg + self._at_full_size(level, F.embedding(ids_Bl, self.codebook))
            yield QuantizedScale(rest_BlC, ids_Bl, f_hat_BCgg)

    def _zeros(self, q_BLC: Tensor) -> Tensor:
        return q_BLC.new_zeros(q_BLC.shape[0], q_BLC.shape[2], self.config.grid, self.config.grid)
