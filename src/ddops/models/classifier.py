"""The digits classifier: the judge whose features the `digits` protocol and perceptual loss are computed in."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class DigitsClassifier(nn.Module):
    """A small convolutional classifier of 8x8 images (B, 1, 8, 8) in [-1, 1].

    ``feature_maps`` gives the activations of every layer (for the perceptual loss), ``features`` the penultimate
    vector (for the Fréchet distance), ``forward`` the class logits.
    """

    def __init__(self, *, channels: int, feature_dim: int, dropout: float, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.middle = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.deep = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.project = nn.Linear(2 * channels * 4, feature_dim)
        self.classify = nn.Linear(feature_dim, num_classes)
        self.dropout = dropout

    def feature_maps(self, images_BIHW: Tensor) -> list[Tensor]:
        """Activations at 8x8, 4x4 and 2x2, each (B, channels, side, side)."""
        stem = F.gelu(self.stem(images_BIHW))
        middle = F.gelu(self.middle(F.max_pool2d(stem, 2)))
        return [stem, middle, F.gelu(self.deep(F.max_pool2d(middle, 2)))]

    def features(self, images_BIHW: Tensor) -> Tensor:
        """Penultimate features (B, feature_dim)."""
        return F.gelu(self.project(self.feature_maps(images_BIHW)[-1].flatten(1)))

    def forward(self, images_BIHW: Tensor) -> Tensor:
        """Class logits (B, num_classes)."""
        logits_BK: Tensor = self.classify(F.dropout(self.features(images_BIHW), self.dropout, self.training))
        return logits_BK
