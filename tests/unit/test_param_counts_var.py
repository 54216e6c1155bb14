"""The published models' sizes, as computed from the released code (millions of parameters)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ddops.config.models import VARConfig
from ddops.models.layout import LevelLayout
from ddops.models.var import VARTransformer
from ddops.models.var_student import VARStudent
from helpers.var_helpers import PUBLISHED, PUBLISHED_512, of_depth


def millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize(
    ("config", "depth", "size", "digits"),
    [
        (PUBLISHED, 16, 310.28, 2),
        (PUBLISHED, 20, 600.92, 2),
        (PUBLISHED, 24, 1033.4, 1),
        (PUBLISHED, 30, 2010.0, 1),
        (PUBLISHED_512, 36, 2353.9, 1),
    ],
)
def test_teacher(config: VARConfig, depth: int, size: float, digits: int) -> None:
    with torch.device("meta"):
        transformer = VARTransformer(of_depth(config, depth), LevelLayout(config.level_sizes))
    assert round(millions(transformer), digits) == size


@pytest.mark.parametrize(("depth", "size", "digits"), [(16, 328.17, 2), (20, 635.40, 2), (24, 1092.5, 1)])
def test_student(depth: int, size: float, digits: int) -> None:
    with torch.device("meta"):
        student = VARStudent(of_depth(PUBLISHED, depth))
    assert round(millions(student), digits) == size
