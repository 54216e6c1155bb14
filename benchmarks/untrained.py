"""Models with random weights, as benchmarks of speed and size use them."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from ddops.losses.perceptual import PerceptualDistance
from ddops.torchvision_compat import define_missing_operators

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def with_weights(module: ModuleT) -> ModuleT:
    """Weights that start at or near zero made random too, so that comparing two ways compares all they compute."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1 and parameter.std() < 0.01:
            parameter.data.normal_(std=0.02, generator=generator)
    return module.eval().requires_grad_(False)


def random_lpips(memory_format: torch.memory_format, device: torch.device | str = "cpu") -> PerceptualDistance:
    """LPIPS with random weights: the published ones need a download and cost the same."""
    define_missing_operators()
    import lpips

    network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).requires_grad_(False).eval()
    network = network.to(device=device, memory_format=memory_format)
    return lambda a_BIHW, b_BIHW: network(a_BIHW, b_BIHW).flatten()
