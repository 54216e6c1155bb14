"""LlamaGen's tokenizer: a VQGAN whose codes and latents are compared as directions (arXiv 2406.06525).

Shape suffixes are those of :mod:`ddops.models.interface` and: g side of the latent.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddops.config.models import LlamaGenConfig
from ddops.models.autoencoder import Decoder, build_encoder
from ddops.models.interface import Tokenizer, TokenizerOutput
from ddops.models.layout import LevelLayout
from ddops.models.quantization import (
    codebook_loss,
    nearest_code,
    reseed_unused_codes,
    straight_through,
    to_map,
    to_sequence,
)


class LlamaGenTokenizer(Tokenizer):
    """Images to tokens in raster order and back. The codes are stored at any length and used at unit length."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = LevelLayout(config.level_sizes)
        self.encoder = build_encoder(config.autoencoder, config.image_channels, config.latent_channels)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        self.codebook = nn.Parameter(F.normalize(torch.randn(config.codebook_size, config.code_dim), dim=-1))
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)
        self.decoder = Decoder(config.autoencoder, config.image_channels, config.latent_channels)

    @property
    def codebook_VC(self) -> Tensor:
        return F.normalize(self.codebook, dim=-1)

    @torch.no_grad()
    def encode(self, images_BIHW: Tensor) -> Tensor:
        """See :meth:`Tokenizer.encode`. No gradient."""
        return nearest_code(F.normalize(self.features(images_BIHW), dim=-1), self.codebook_VC)

    def decode(self, q_BLC: Tensor) -> Tensor:
        """See :meth:`Tokenizer.decode`. The embeddings are used as they are, not normalised."""
        # As it lies, the map would be taken for one of channels last, and every map after it be made so.
        map_BCgg = to_map(q_BLC, self.config.grid).contiguous()
        images_BIHW: Tensor = self.decoder(self.post_quant_conv(map_BCgg))
        return images_BIHW

    def forward(self, images_BIHW: Tensor) -> TokenizerOutput:
        """See :meth:`Tokenizer.forward`."""
        x_BLC = F.normalize(self.features(images_BIHW), dim=-1)
        codebook_VC = self.codebook_VC
        ids_BL = nearest_code(x_BLC, codebook_VC)
        q_BLC = F.embedding(ids_BL, codebook_VC)
        reconstruction_BIHW = self.decode(straight_through(x_BLC, q_BLC))
        return TokenizerOutput(reconstruction_BIHW, codebook_loss(x_BLC, q_BLC), ids_BL)

    def features(self, images_BIHW: Tensor) -> Tensor:
        """The latent before normalisation and quantisation, (B, L, C)."""
        return to_sequence(self.quant_conv(self.encoder(images_BIHW)))

    @torch.no_grad()
    def reseed_unused_codes(self, images_BIHW: Tensor, generator: torch.Generator | None = None) -> int:
        """Move the codes that no token of these images uses; see :func:`ddops.models.quantization.reseed_unused_codes`.

        Call it with a good part of the data set, before the first step and then from time to time, but not near the
        end: a code needs steps to settle. Returns how many codes moved.
        """
        x_NC = F.normalize(self.features(images_BIHW), dim=-1).flatten(0, 1)
        ids_N = nearest_code(x_NC, self.codebook_VC)
        return reseed_unused_codes(self.codebook, x_NC, ids_N, generator)
