"""Reduced precision in PyTorch: products in bfloat16, norms, softmax, residuals and heads in float32.

What an export to float16 writes into the graph (:mod:`ddops.export.precision`), for a model that runs in PyTorch:
weights are rounded once, and ``torch.autocast`` brings what enters them to their precision.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

import torch
from torch import Tensor, nn

from ddops.models.interface import Teacher

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Whole(nn.Module):
    """A module that computes in float32 where autocast is on around it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        with torch.autocast(inputs[0].device.type, enabled=False):
            output: Tensor = self.module(*(x.float() for x in inputs))
        return output


def sampled_in_bfloat16(teacher: Teacher) -> Teacher:
    """The teacher, its transformer rounded in place, to be sampled under ``torch.autocast(device, torch.bfloat16)``: it
    then caches keys and values in bfloat16; logits, guidance and filters stay in float32."""
    to_bfloat16(teacher.get_submodule("transformer"), teacher.head_modules)
    return teacher


def to_bfloat16(model: ModuleT, whole: Collection[str]) -> ModuleT:
    """The model, its linear layers and convolutions rounded to bfloat16 in place, but for the submodules ``whole`` and
    all below them. To be run under ``torch.autocast(device, torch.bfloat16)``, without gradients."""
    for name in whole:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Whole(model.get_submodule(name)))
    kept = {id(module) for wrapper in model.modules() if isinstance(wrapper, Whole) for module in wrapper.modules()}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and id(module) not in kept:
            module.to(torch.bfloat16)
    return model
