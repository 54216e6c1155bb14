"""What an image is asked for by: the number of a class, or a caption.

Everywhere a condition is an int64 number: of a class, or of a caption in the prompt set that is attached to the model
(:func:`attach_captions`). Only where the model is cut out of the pipeline, in an exported graph, are the captions
themselves handed over.

Shape suffixes beyond :mod:`ddops.models.interface`: T condition tokens, W width of the caption features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddops.config.models import CaptionShape

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Captions(NamedTuple):
    """Encoded captions, padded on the left."""

    features_BTW: Tensor
    """Zero where nothing is."""
    mask_BT: Tensor
    """Bool: where a token of the caption is."""


Condition = Tensor | Captions
"""Numbers (B,) of classes or of the attached captions; or captions."""


def flat(condition: Condition) -> tuple[Tensor, ...]:
    """The tensors that a condition consists of."""
    return tuple(condition) if isinstance(condition, Captions) else (condition,)


def take(condition: Condition, rows: slice) -> Condition:
    """Some rows of a batch."""
    return Captions(*(part[rows] for part in condition)) if isinstance(condition, Captions) else condition[rows]


def pad_left(features: Sequence[Tensor], length: int) -> Captions:
    """Captions of features (n, W), n at most ``length``, with nothing before them."""
    padded = [F.pad(features_nW, (0, 0, length - len(features_nW), 0)) for features_nW in features]
    tokens_B1 = torch.tensor([[len(features_nW)] for features_nW in features])
    return Captions(torch.stack(padded), torch.arange(length) >= length - tokens_B1)


class CaptionTable(Protocol):
    """The captions of a prompt set, by number."""

    length: int
    """T."""
    width: int
    """W."""

    def __len__(self) -> int: ...

    def captions(self, numbers_B: Tensor) -> Captions:
        """Of these captions, float32 on the CPU."""


class ConditionTokens(NamedTuple):
    """What stands before the image tokens."""

    tokens_BTD: Tensor
    mask_BT: Tensor | None = None
    """Which of them are seen; None for a single one."""

    @property
    def mean_B1D(self) -> Tensor:
        """One token for the whole condition: the mean of those that are seen."""
        if self.mask_BT is None:
            return self.tokens_BTD
        weights_BT1 = self.mask_BT.to(self.tokens_BTD.dtype)[..., None]
        return (self.tokens_BTD * weights_BT1).sum(1, keepdim=True) / weights_BT1.sum(1, keepdim=True).clamp_min(1)


class ConditionEmbedding(nn.Module, ABC):
    """From conditions to tokens."""

    num_conditions: int
    """How many there are to ask for."""

    @abstractmethod
    def tokens(self, condition: Condition) -> ConditionTokens:
        """T tokens a condition."""

    @abstractmethod
    def unconditional(self, numbers_B: Tensor) -> Tensor:
        """The numbers that stand for no condition, to be asked beside these for guidance."""


class ClassEmbedding(nn.Embedding, ConditionEmbedding):
    """One token a class; the last row is the unconditional one."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__(num_classes + 1, width)
        self.num_conditions = num_classes

    def tokens(self, condition: Condition) -> ConditionTokens:
        """See :meth:`ConditionEmbedding.tokens`; raises TypeError for captions."""
        if isinstance(condition, Captions):
            raise TypeError("this model is conditioned on classes, not on captions")
        return ConditionTokens(self(condition)[:, None])

    def unconditional(self, numbers_B: Tensor) -> Tensor:
        """See :meth:`ConditionEmbedding.unconditional`."""
        return torch.full_like(numbers_B, self.num_conditions)


class CaptionEmbedding(ConditionEmbedding):
    """A caption's features through a small network, token by token (LlamaGen's text to image, arXiv 2406.06525).

    The number ``~n`` stands for no condition in the place of caption ``n``: the released model was trained with the
    caption's own mask there, and random features that are not trained.
    """

    def __init__(self, config: CaptionShape, width: int) -> None:
        super().__init__()
        self.config = config
        self.num_conditions = 0
        self.table: CaptionTable | None = None
        self.fc1 = nn.Linear(config.width, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)
        self.register_buffer("uncond_TW", torch.randn(config.length, config.width) / config.width**0.5)
        self.uncond_TW: Tensor

    def tokens(self, condition: Condition) -> ConditionTokens:
        """See :meth:`ConditionEmbedding.tokens`; raises ValueError for numbers while no prompt set is attached."""
        features_BTW, mask_BT = condition if isinstance(condition, Captions) else self._look_up(condition)
        hidden_BTD = F.gelu(self.fc1(features_BTW.to(self.fc1.weight.dtype)), approximate="tanh")
        return ConditionTokens(self.fc2(hidden_BTD), mask_BT)

    def unconditional(self, numbers_B: Tensor) -> Tensor:
        """See :meth:`ConditionEmbedding.unconditional`."""
        return ~numbers_B

    def _look_up(self, numbers_B: Tensor) -> Captions:
        if self.table is None:
            raise ValueError("this model is conditioned on captions: attach a prompt set, or hand them over")
        given_B = numbers_B >= 0
        features_BTW, mask_BT = self.table.captions(torch.where(given_B, numbers_B, ~numbers_B).cpu())
        features_BTW = features_BTW.to(self.uncond_TW)
        return Captions(torch.where(given_B[:, None, None], features_BTW, self.uncond_TW), mask_BT.to(given_B.device))


def condition_embedding(num_classes: int, captions: CaptionShape | None, width: int) -> ConditionEmbedding:
    """Of captions where the configuration has some, else of classes."""
    return ClassEmbedding(num_classes, width) if captions is None else CaptionEmbedding(captions, width)


def attach_captions(model: ModuleT, table: CaptionTable) -> ModuleT:
    """The model, with the captions of a prompt set as the conditions it can be asked for.

    Raises:
        ValueError: the model is conditioned on classes, or on captions of another length or width.
    """
    embeddings = [module for module in model.modules() if isinstance(module, CaptionEmbedding)]
    if not embeddings:
        raise ValueError(f"a {type(model).__name__} conditioned on classes takes no captions")
    for embedding in embeddings:
        if (wanted := (embedding.config.length, embedding.config.width)) != (table.length, table.width):
            raise ValueError(
                f"the prompt set holds captions of {table.length} tokens of width {table.width}, the model takes "
                f"{wanted[0]} of {wanted[1]}: encode the prompts for this model (stage captions)"
            )
        embedding.table, embedding.num_conditions = table, len(table)
    return model
