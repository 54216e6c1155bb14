"""Tokens drawn independently of one another: DD1's baseline ``onestep*``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenPools:
    """What was seen at each position, class by class. A token drawn from it has the position's marginal distribution
    in its class; a table of those would be (classes, L, V), tens of gigabytes for a published teacher."""

    ids_NL: Tensor
    """Sequences, one class after the other."""
    first_K: Tensor
    count_K: Tensor

    @classmethod
    def of(cls, ids_NL: Tensor, labels_N: Tensor, num_classes: int) -> Self:
        """Raises ValueError for a class without a sequence."""
        count_K = torch.bincount(labels_N, minlength=num_classes)
        if missing := (count_K == 0).nonzero()[:, 0].tolist():
            raise ValueError(f"no trajectory has class {missing[0]}: its marginals are unknown")
        return cls(ids_NL[labels_N.argsort(stable=True)], count_K.cumsum(0) - count_K, count_K)

    def draw(self, labels_B: Tensor, uniforms_BL: Tensor) -> Tensor:
        """Ids (B, L), int64: at each position that of a sequence of the class, another sequence at every position."""
        count_B1 = self.count_K[labels_B, None]
        chosen_BL = (uniforms_BL.double() * count_B1).long().clamp_max(count_B1 - 1)
        positions_L = torch.arange(self.ids_NL.shape[1])
        return self.ids_NL[self.first_K[labels_B, None] + chosen_BL, positions_L].long()
