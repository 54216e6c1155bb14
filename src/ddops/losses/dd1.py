"""DD1's loss (arXiv 2412.17153, section 3.3): pure functions, one value a sample."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits_BLV: Tensor, ids_BL: Tensor, predicted_BL: Tensor) -> Tensor:
    """Mean over the predicted positions of -log softmax(logits)[id]; shape (B,).

    ``predicted_BL`` (bool) is False where a position was given. A sample with none predicted counts as zero.
    """
    losses_BL = F.cross_entropy(logits_BLV.transpose(1, 2), ids_BL, reduction="none")
    return _mean_where(losses_BL, predicted_BL)


def embedding_error(embeddings_BLC: Tensor, target_BLC: Tensor, predicted_BL: Tensor) -> Tensor:
    """Mean over the predicted positions of the squared distance of the regressed embedding to its code; shape (B,)."""
    return _mean_where((embeddings_BLC - target_BLC).square().sum(-1), predicted_BL)


def _mean_where(values_BL: Tensor, mask_BL: Tensor) -> Tensor:
    return (values_BL * mask_BL).sum(1) / mask_BL.sum(1).clamp_min(1)
