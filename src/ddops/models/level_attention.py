"""Attention of a student over levels: a position sees every position of strictly earlier levels, and itself.

As a mask that is dense: flash kernels do not take it, and of VAR's 681 x 681 pairs 62 % are computed to be thrown away.
But what a level sees of the others is a prefix of the sequence, which needs no mask, and the one key beside it, the
position's own, can be the same for all: see :func:`attend_by_levels`.

Shape suffixes are those of :mod:`ddops.models.var` and: P positions of the model, p those of the leading levels.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ddops.models.layout import LevelLayout

TOGETHER: Final = 128
"""Leading levels of at most so many positions together go through one masked call: a call each would cost more."""


def student_mask(layout: LevelLayout, device: torch.device) -> Tensor:
    """True where a row sees a column, (P, P): strictly earlier levels and itself."""
    level_P = layout.level_of_position(device)
    # Not torch.eye: its export compares numbers of 16 bits, which TensorRT does not read.
    place_P = torch.arange(layout.length, device=device)
    return (level_P[:, None] > level_P[None, :]) | (place_P[:, None] == place_P[None, :])


def attend_by_levels(q_BHPE: Tensor, k_BHPE: Tensor, v_BHPE: Tensor, scale: float, *, layout: LevelLayout) -> Tensor:
    """What :func:`student_mask` does with a mask, (B, H, P, E), exactly and level by level.

    Before all keys stands one that means "itself". Queries and keys get two channels more: in them a query holds its
    score with its own key, that one key ones, the others zeros. So it scores what the position's own key would, the
    softmax over it and the prefix is the one asked for, and the weight that falls to it is the own value's. The score
    takes two channels, leading digits and remainder, to lose nothing in half precision.

    The P positions are the first of ``layout`` and end with a level.
    """
    q_BHPE, k_BHPE = q_BHPE.to(v_BHPE.dtype), k_BHPE.to(v_BHPE.dtype)
    offsets = [offset for offset in layout.offsets if offset <= q_BHPE.shape[2]]
    leading = max(offset for offset in offsets if offset <= max(TOGETHER, layout.sizes[0]))
    q_BHpE, k_BHpE, v_BHpE = (x_BHPE[:, :, :leading] for x_BHPE in (q_BHPE, k_BHPE, v_BHPE))
    mask_pp = student_mask(layout, q_BHPE.device)[:leading, :leading]
    y_BHpE = F.scaled_dot_product_attention(q_BHpE, k_BHpE, v_BHpE, attn_mask=mask_pp, scale=scale)
    if leading == offsets[-1]:
        return y_BHpE
    return torch.cat([y_BHpE, _attend_later(q_BHPE, k_BHPE, v_BHPE, scale, offsets[offsets.index(leading) :])], dim=2)


def _attend_later(q_BHPE: Tensor, k_BHPE: Tensor, v_BHPE: Tensor, scale: float, offsets: list[int]) -> Tensor:
    """The levels that ``offsets`` bound, (B, H, positions, E)."""
    width, first, last = v_BHPE.shape[-1], offsets[0], offsets[-2]
    q_BHlE, v_BHlE = q_BHPE[:, :, first:], v_BHPE[:, :, first:]
    score_BHl1 = (q_BHlE.float() * k_BHPE[:, :, first:].float()).sum(-1, keepdim=True)
    leading_BHl1 = score_BHl1.to(q_BHPE.dtype)
    remainder_BHl1 = (score_BHl1 - leading_BHl1).to(q_BHPE.dtype)
    queries_BHlX = torch.cat([q_BHlE, leading_BHl1, remainder_BHl1], dim=-1)
    ones, zeros = torch.ones_like(q_BHPE[:, :, :1, :1]), torch.zeros_like(q_BHPE[:, :, :1])
    keys_BHKX = torch.cat([torch.cat([zeros, ones, ones], -1), F.pad(k_BHPE[:, :, :last], (0, 2))], dim=2)
    values_BHKX = torch.cat([torch.cat([zeros, ones, 0 * ones], -1), F.pad(v_BHPE[:, :, :last], (0, 2))], dim=2)
    levels = [
        F.scaled_dot_product_attention(
            queries_BHlX[:, :, start - first : stop - first],
            keys_BHKX[:, :, : 1 + start],
            values_BHKX[:, :, : 1 + start],
            scale=scale,
        )
        for start, stop in pairwise(offsets)
    ]
    y_BHlX = torch.cat(levels, dim=2)
    return torch.addcmul(y_BHlX[..., :width], y_BHlX[..., width : width + 1], v_BHlE)
