"""From prompts to what a model of captions takes: the text encoder that a bundle names, run by transformers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ddops.captions.errors import CaptionError
from ddops.export.errors import BundleError
from ddops.export.manifest import ENCODER, CaptionFacts, verify_files
from ddops.extras import MissingExtra

REMEMBERED: Final = 256
"""Prompts whose features are kept: the images of one prompt are many draws."""

Caption = tuple[NDArray[np.float32], NDArray[np.bool_]]
"""Features (T, W) and mask (T,) of one prompt."""


class PromptEncoder:
    """A bundle's text encoder. Not for several threads at once."""

    def __init__(self, bundle: Path, facts: CaptionFacts, directory: Path | None = None) -> None:
        """From the bundle, from the Hugging Face hub where the bundle names a repository, or from a local copy in
        ``directory``.

        Raises:
            BundleError: its files are not there, or not those that the bundle was made with. MissingExtra: what runs it
                is not installed.
        """
        try:
            from ddops.captions.pretrained import TextEncoder
        except ModuleNotFoundError as error:  # PyTorch, which comes with that extra
            raise MissingExtra("a model that draws for captions", "t2i", error) from None

        directory = directory or _find(bundle, facts)
        verify_files(directory, facts.encoder.files)
        try:
            self._encode = TextEncoder(directory, facts.length)
        except CaptionError as error:
            raise BundleError(str(error)) from error
        self._length = facts.length
        self._known: OrderedDict[str, Caption] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Features (B, T, W), float32, and mask (B, T), bool: padded on the left. The features of a prompt are, up to
        rounding, those that it has alone."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            from ddops.models.conditions import pad_left

            features_BTW, mask_BT = pad_left(self._encode(new), self._length)
            self._known.update(zip(new, zip(features_BTW.numpy(), mask_BT.numpy(), strict=True), strict=True))
        captions = [self._known[prompt] for prompt in prompts]
        for prompt in prompts:
            self._known.move_to_end(prompt)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return np.stack([features for features, _ in captions]), np.stack([mask for _, mask in captions])


def _find(bundle: Path, facts: CaptionFacts) -> Path:
    encoder = facts.encoder
    if encoder.name == "seeded":
        return bundle / ENCODER
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(encoder.repo), revision=encoder.revision, allow_patterns=list(encoder.files)))
    except Exception as error:  # the hub's client raises errors of many kinds
        raise BundleError(
            f"{encoder.repo}: the text encoder was not fetched from the hub ({error}); copy its files to this machine "
            "and name their directory (text_encoder=, --text-encoder)"
        ) from error
