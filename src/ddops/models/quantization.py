"""Vector quantisation: the nearest code, its training loss, and codes that nothing uses (VQ-VAE, arXiv 1711.00937).

Shape suffixes are those of :mod:`ddops.models.interface` and: N vectors, g side of the latent.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ddops.models.precision import full_precision

COMMITMENT: Final = 0.25
"""Weight of the commitment term (beta), as in both released tokenizers."""


def to_sequence(map_BCgg: Tensor) -> Tensor:
    """A token map (B, C, g, g) as a sequence in raster order, (B, g x g, C)."""
    return map_BCgg.flatten(2).transpose(1, 2)


def to_map(q_BlC: Tensor, side: int) -> Tensor:
    """A sequence in raster order as a token map, (B, C, side, side)."""
    map_BCgg: Tensor = q_BlC.transpose(1, 2).unflatten(2, (side, side))
    return map_BCgg


@torch.no_grad()
@full_precision
def nearest_code(x_BlC: Tensor, codebook_VC: Tensor) -> Tensor:
    """Id of the code at the smallest Euclidean distance from each vector, int64 of shape (B, l)."""
    # |x|^2 is the same for every code, so |x - c|^2 orders them as |c|^2 / 2 - x.c does.
    half_norm_V = codebook_VC.square().sum(1) / 2
    return (x_BlC @ codebook_VC.T - half_norm_V).argmax(-1)


def codebook_loss(x: Tensor, q: Tensor) -> Tensor:
    """Scalar: ``q`` drawn to the encoder's ``x``, and, at :data:`COMMITMENT` times the weight, ``x`` to ``q``."""
    return F.mse_loss(q, x.detach()) + COMMITMENT * F.mse_loss(x, q.detach())


def straight_through(x: Tensor, q: Tensor) -> Tensor:
    """The value of ``q`` with the gradient of ``x``."""
    return x + (q - x).detach()


@torch.no_grad()
def reseed_unused_codes(
    codebook_VC: Tensor, x_NC: Tensor, ids_N: Tensor, generator: torch.Generator | None = None
) -> int:
    """Move, in place, every code that no vector chose onto a vector that its own code serves badly.

    ``ids_N`` holds the nearest code of each encoder output ``x_NC``. Vectors are drawn without replacement with
    probabilities proportional to their squared error. Returns how many codes moved.
    """
    unused_V = torch.bincount(ids_N, minlength=len(codebook_VC)) == 0
    error_N = (x_NC - codebook_VC[ids_N]).square().sum(1)
    count = min(int(unused_V.sum()), int(error_N.count_nonzero()))
    if count:
        chosen = torch.multinomial(error_N, count, generator=generator)
        codebook_VC[unused_V.nonzero()[:count, 0]] = x_NC[chosen]
    return count
