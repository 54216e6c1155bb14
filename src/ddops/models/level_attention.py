"""Attention of a student over levels: a position sees every position of strictly earlier levels, and itself.

As a mask that is dense: flash kernels do not take it, and of VAR's 681 x 681 pairs 62 % are computed to be thrown away.
But what a level sees of the others is a prefix of the sequence, which needs no mask, and the one key beside it, the
position's own, can be the same for all: see :class:`LevelAttention`.

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


class LevelAttention:
    """What :func:`student_mask` does with a mask, exactly, as an :data:`ddops.models.var.Attend` for the first
    ``length`` positions of ``layout``, which end with a level.

    Before all keys stands one that means "itself". Queries and keys get two channels more: in them a query holds its
    score with its own key, that one key ones, the others zeros. So it scores what the position's own key would, the
    softmax over it and the prefix is the one asked for, and the weight that falls to it is the own value's. The score
    takes two channels, leading digits and remainder, to lose nothing in half precision.

    Away from the CPU all levels go through one masked call: a few launches more a block cost a GPU more than the pairs
    left out would save it at small batches, and no measurement says yet from where on they do not *(ours)*.
    """

    def __init__(self, layout: LevelLayout, length: int, like: Tensor) -> None:
        together = max(TOGETHER, layout.sizes[0]) if like.device.type == "cpu" else length
        offsets = [offset for offset in layout.offsets if offset <= length]
        self._leading = max(offset for offset in offsets if offset <= together)
        self._bounds = list(pairwise(offsets[offsets.index(self._leading) :]))
        self._mask_pp = student_mask(layout, like.device)[: self._leading, : self._leading]
        # Of the key and the value that mean "itself": the channels beyond the head's own. Used on the CPU only.
        self._own_key_2 = torch.tensor([1.0, 1.0])
        self._own_value_2 = torch.tensor([1.0, 0.0])

    def __call__(self, q_BHPE: Tensor, k_BHPE: Tensor, v_BHPE: Tensor, scale: float) -> Tensor:
        """See :data:`ddops.models.var.Attend`."""
        q_BHPE, k_BHPE = q_BHPE.to(v_BHPE.dtype), k_BHPE.to(v_BHPE.dtype)
        q_BHpE, k_BHpE, v_BHpE = (x_BHPE[:, :, : self._leading] for x_BHPE in (q_BHPE, k_BHPE, v_BHPE))
        y_BHpE = F.scaled_dot_product_attention(q_BHpE, k_BHpE, v_BHpE, attn_mask=self._mask_pp, scale=scale)
        if not self._bounds:
            return y_BHpE
        width, last = v_BHPE.shape[-1], self._bounds[-1][0]
        q_BHlE, v_BHlE = q_BHPE[:, :, self._leading :], v_BHPE[:, :, self._leading :]
        score_BHl1 = (q_BHlE.float() * k_BHPE[:, :, self._leading :].float()).sum(-1, keepdim=True)
        digits_BHl1 = score_BHl1.to(q_BHlE.dtype)
        queries_BHlX = torch.cat([q_BHlE, digits_BHl1, (score_BHl1 - digits_BHl1).to(q_BHlE.dtype)], dim=-1)
        keys_BHKX = _after(self._own_key_2, k_BHPE[:, :, :last])
        values_BHKX = _after(self._own_value_2, v_BHPE[:, :, :last])
        levels = [
            F.scaled_dot_product_attention(
                queries_BHlX[:, :, start - self._leading : stop - self._leading],
                keys_BHKX[:, :, : 1 + start],
                values_BHKX[:, :, : 1 + start],
                scale=scale,
            )
            for start, stop in self._bounds
        ]
        y_BHlX = torch.cat(levels, dim=2)
        y_BHlE = torch.addcmul(y_BHlX[..., :width], y_BHlX[..., width : width + 1], v_BHlE)
        return torch.cat([y_BHpE, y_BHlE], dim=2)


def _after(channels_2: Tensor, x_BHKE: Tensor) -> Tensor:
    """``x_BHKE`` with two channels of zeros, after a row of zeros with ``channels_2`` in them: (B, H, 1 + K, E + 2)."""
    row_X = F.pad(channels_2.to(x_BHKE.dtype), (x_BHKE.shape[-1], 0))
    return torch.cat([row_X.expand(*x_BHKE.shape[:2], 1, -1), F.pad(x_BHKE, (0, 2))], dim=2)
