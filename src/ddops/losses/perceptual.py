"""Perceptual distances between images: LPIPS' formula (arXiv 1801.03924, eq. 1), one value a sample."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from ddops.models.classifier import DigitsClassifier
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


def lpips_distance() -> PerceptualDistance:
    """LPIPS with its VGG-16 backbone.

    Raises:
        RuntimeError: torchvision's VGG-16 weights are neither cached nor to be downloaded.
    """
    define_missing_operators()
    import lpips

    try:
        network = lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False).eval()
    except OSError as error:
        raise RuntimeError(
            "dd1.perceptual.network lpips_vgg needs torchvision's vgg16 weights, which could not be downloaded "
            f"({error}). Put vgg16-397923af.pth into the hub/checkpoints folder of TORCH_HOME."
        ) from error

    def distance(a_BIHW: Tensor, b_BIHW: Tensor) -> Tensor:
        result: Tensor = network.to(a_BIHW.device)(a_BIHW, b_BIHW)
        return result.flatten()

    return distance


def _unit_channels(activations_BCHW: Tensor) -> Tensor:
    return F.normalize(activations_BCHW, dim=1, eps=1e-6)
