"""What the images of a pipeline are asked for by: the classes of its models, or the captions of a prompt set.

Either way a condition is a number; see :mod:`ddops.models.conditions`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ddops.captions.errors import CaptionError
from ddops.captions.store import CaptionSet
from ddops.models.conditions import CaptionEmbedding, Condition, attach_captions


class Conditions:
    """``count`` conditions, which are classes where there is no prompt set."""

    def __init__(self, count: int, captions: CaptionSet | None = None) -> None:
        self.count = count
        self.captions = captions

    @property
    def files(self) -> list[Path]:
        """What a result depends on through them, for fingerprints; nothing for classes."""
        return [] if self.captions is None else [self.captions.manifest]

    @property
    def classes_K(self) -> Tensor:
        """Class of every condition, (K,); captions that speak of no classes are a class each."""
        known = None if self.captions is None else self.captions.classes
        return torch.arange(self.count) if known is None else torch.tensor(known)

    def given(self, numbers_B: Tensor) -> Condition:
        """What a model is handed where no prompt set is attached to it, as an exported graph is."""
        return numbers_B if self.captions is None else self.captions.captions(numbers_B)

    def examples(self, classes_C: Tensor) -> Tensor:
        """The first condition of each class, (C,)."""
        return (self.classes_K == classes_C[:, None]).int().argmax(1)

    def of_images(self, labels_N: Tensor) -> Tensor:
        """The conditions that real images with these labels would be asked for by.

        Raises:
            CaptionError: the prompt set is not of these images.
        """
        if self.captions is None:
            return labels_N
        known = self.captions.of_images
        if known is None or len(known) != len(labels_N):
            raise CaptionError(f"the prompts are not those of these {len(labels_N)} images: use captions.sets of them")
        return torch.tensor(known)


def open_conditions(directory: Path, model: nn.Module, *others: nn.Module) -> Conditions:
    """Of models conditioned alike. Where they draw for captions, the prompt set in ``directory`` is attached to them;
    where they draw for classes, nothing is read.

    Raises:
        CaptionError: the prompt set is missing, damaged, or encoded for another model.
    """
    embeddings = [module for module in model.modules() if isinstance(module, CaptionEmbedding)]
    if not embeddings:
        return Conditions(int(model.num_conditions))  # type: ignore[arg-type]
    captions = CaptionSet(directory)
    try:
        for each in (model, *others):
            attach_captions(each, captions)
    except ValueError as error:
        raise CaptionError(f"{directory}: {error}") from error
    return Conditions(len(captions), captions)
