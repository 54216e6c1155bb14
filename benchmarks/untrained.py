"""Models with random weights, as benchmarks of speed and size use them."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def with_weights(module: ModuleT) -> ModuleT:
    """Weights that start at or near zero made random too, so that comparing two ways compares all they compute."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1 and parameter.std() < 0.01:
            parameter.data.normal_(std=0.02, generator=generator)
    return module.eval().requires_grad_(False)
