"""The published models' sizes, as computed from the released code (millions of parameters)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ddops.models.llamagen import LlamaGenTransformer
from ddops.models.llamagen_student import LlamaGenStudent
from helpers.llamagen_helpers import published

BASE = (12, 12, 768, 2048)
LARGE = (24, 16, 1024, 2816)


def millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize(
    ("shape", "size", "digits"),
    [
        (BASE, 110.89, 2),
        (LARGE, 342.91, 2),
        ((36, 20, 1280, 3584), 774.70, 2),
        ((48, 24, 1536, 4096), 1410.97, 2),
        ((24, 32, 3200, 8704), 3096.7, 1),
    ],
)
def test_teacher(shape: tuple[int, int, int, int], size: float, digits: int) -> None:
    with torch.device("meta"):
        transformer = LlamaGenTransformer(published(*shape))
    assert round(millions(transformer), digits) == size


@pytest.mark.parametrize(("shape", "size"), [(BASE, 98.32), (LARGE, 326.16)])
def test_student(shape: tuple[int, int, int, int], size: float) -> None:
    with torch.device("meta"):
        student = LlamaGenStudent(published(*shape))
    assert round(millions(student), 2) == size
