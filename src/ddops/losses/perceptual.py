"""Perceptual distances between images: LPIPS' formula (arXiv 1801.03924, eq. 1), one value a sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ddops.models.classifier import DigitsClassifier
from ddops.models.errors import CheckpointError
from ddops.torchvision_compat import define_missing_operators

PerceptualDistance = Callable[[Tensor, Tensor], Tensor]
"""Maps two batches of images (B, I, H, W) in [-1, 1] to a distance a sample, (B,)."""


def classifier_distance(classifier: DigitsClassifier) -> PerceptualDistance:
    """LPIPS' formula on the layers of the digits classifier, every channel weighted alike."""

    def distance(a_BIHW: Tensor, b_BIHW: Tensor) -> Tensor:
        layers = zip(classifier.feature_maps(a_BIHW), classifier.feature_maps(b_BIHW), strict=True)
        return sum(  # type: ignore[return-value]
            (_unit_channels(a) - _unit_channels(b)).square().sum(1).mean((1, 2)) for a, b in layers
        )

    return distance


def lpips_distance(
    device: torch.device, memory_format: torch.memory_format = torch.contiguous_format
) -> PerceptualDistance:
    """LPIPS with its VGG-16 backbone, for images on ``device``.

    Raises:
        CheckpointError: torchvision's VGG-16 weights are neither cached nor to be downloaded, or damaged.
    """
    define_missing_operators()
    import lpips

    try:
        network = lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False).eval()
    # torch.hub raises OSError without a network, and RuntimeError where the file's hash is not the published one.
    except (OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise CheckpointError(
            f"LPIPS (lpips_vgg) needs torchvision's VGG-16 weights, which could not be had ({error}). Download "
            f"https://download.pytorch.org/models/vgg16-397923af.pth elsewhere and copy it to {folder}"
        ) from error
    network = network.to(device=device, memory_format=memory_format)

    def distance(a_BIHW: Tensor, b_BIHW: Tensor) -> Tensor:
        result: Tensor = network(a_BIHW, b_BIHW)
        return result.flatten()

    return distance


def _unit_channels(activations_BCHW: Tensor) -> Tensor:
    return F.normalize(activations_BCHW, dim=1, eps=1e-6)
