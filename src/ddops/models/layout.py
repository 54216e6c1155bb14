"""How a sequence of L tokens is cut into S levels, sampled one level after the other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class LevelLayout:
    """Level sizes of a sequence: ``(1,) * 256`` for LlamaGen, ``(1, 4, 9, ...)`` for VAR.

    All tokens of a level are sampled in parallel given every earlier level.
    A *start* counts the levels that are given: ``start = 0`` gives nothing, ``start = S`` everything.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"a layout needs levels of at least one token, got {self.sizes}")

    @property
    def num_levels(self) -> int:
        return len(self.sizes)

    @property
    def length(self) -> int:
        """L, the number of tokens."""
        return sum(self.sizes)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First position of each level, then L: S + 1 numbers. ``offsets[start]`` positions are given at ``start``."""
        return (0, *accumulate(self.sizes))

    def positions(self, level: int) -> slice:
        """The positions of one level."""
        return slice(self.offsets[level], self.offsets[level + 1])

    def level_of_position(self, device: torch.device | str = "cpu") -> Tensor:
        """Level of each position, int64 of shape (L,)."""
        if torch.device(device).type == "cpu":
            # A constant, so that an exported graph holds it as one.
            return torch.tensor([level for level, size in enumerate(self.sizes) for _ in range(size)])
        # Made where it is used: a copy from the host would first wait for all that the GPU has been given to do.
        runs, first = [], 0
        for size, equal in groupby(self.sizes):
            levels_S = torch.arange(first, first := first + len(tuple(equal)), device=device)
            runs.append(levels_S[:, None].expand(-1, size).flatten())
        return torch.cat(runs)

    def given_mask(self, start_B: Tensor) -> Tensor:
        """True where a position belongs to one of the first ``start`` levels: bool of shape (B, L)."""
        return self.level_of_position(start_B.device)[None, :] < start_B[:, None]


def noise_data_rows(table_2D: Tensor, given: int, length: int) -> Tensor:
    """Row 1 of ``table_2D`` (data) for the first ``given`` positions, row 0 (noise) for the others: (length, D)."""
    noise_1D, data_1D = table_2D.split(1)
    return torch.cat([data_1D.expand(given, -1), noise_1D.expand(length - given, -1)])
