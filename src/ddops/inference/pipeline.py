"""``OneStepPipeline``: class labels or prompts, and a seed, in; pictures out.

from ddops import OneStepPipeline

pipe = OneStepPipeline.from_pretrained("artifacts/bundle")
pipe(class_labels=[3, 7], seed=0).images[0].save("three.png")
pipe(prompt="a handwritten seven, slanted left").images[0]  # where the model draws for captions
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddops.class_names import class_number
from ddops.export.copying import copy_bundle
from ddops.export.errors import BundleError
from ddops.export.manifest import MANIFEST, Manifest, read_manifest
from ddops.extras import MissingExtra
from ddops.files import write_text
from ddops.inference.backends import Backend, load_backend
from ddops.inference.card import model_card
from ddops.inference.prompts import PromptEncoder
from ddops.inference.seeds import Draw, condition_of, noise_of, to_picture, to_pixels

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True)
class PipelineOutput:
    """What a call gives."""

    images: list[Image.Image]


class OneStepPipeline:
    """A distilled generator. The picture of (seed, place in the list, label) does not depend on the others of a call,
    nor on the backend beyond a tolerance: on a CPU, in float32, the one that the bundle's export was held to (one
    level of 255); on a GPU what ``ddops engine --verify`` asks for."""

    def __init__(
        self,
        directory: Path,
        *,
        backend: str = "onnx",
        device: str | None = None,
        threads: int = 0,
        precision: str = "float32",
        text_encoder: Path | None = None,
    ) -> None:
        """A pipeline on a bundle's directory; ``text_encoder`` as of :class:`PromptEncoder`. Raises BundleError."""
        self.directory = directory
        self._text_encoder = text_encoder
        self._encoder: PromptEncoder | None = None
        self.manifest: Manifest = read_manifest(directory)
        self.backend, self.device, self.precision, self._threads = backend, device, precision, threads
        self._loaded: dict[int, Backend] = {}
        self._load(self.manifest.model.steps)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        backend: str = "onnx",
        device: str | None = None,
        threads: int = 0,
        precision: str = "float32",
        revision: str | None = None,
        text_encoder: str | Path | None = None,
    ) -> OneStepPipeline:
        """A pipeline from a bundle: a directory, or ``owner/name`` on the Hugging Face hub. Backend torch also takes
        ``precision="bfloat16"``, where the images allow it. ``text_encoder``: a local directory with the encoder's
        files, for a model that draws for captions.

        Raises:
            BundleError: neither of the two, or the bundle cannot be used here; says why. MissingExtra: the backend's
                packages, or those that speak to the hub, are not installed.
        """
        directory = Path(path_or_id)
        if not directory.exists():
            if not HUB_ID.fullmatch(str(path_or_id)):
                raise BundleError(f"{path_or_id}: no such directory, and not of the form owner/name either")
            directory = _download(str(path_or_id), revision)
        encoder = None if text_encoder is None else Path(text_encoder)
        return cls(
            directory, backend=backend, device=device, threads=threads, precision=precision, text_encoder=encoder
        )

    def __call__(
        self,
        class_labels: Sequence[int | str] | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        batch_size: int = 32,
    ) -> PipelineOutput:
        """Draw one picture a label (a number, or a name where the classes have names), or one a prompt.

        One ``seed`` serves the whole list, each picture with its place as the index; a list of seeds gives each picture
        its own, with index 0. ``steps`` None takes as many as were exported.

        Raises:
            ValueError: no such class, a seed that is none, or not what this model draws for. BundleError: a number of
                steps it cannot take, or no text encoder.
        """
        facts = self.manifest.model
        labels = self._conditions(class_labels, prompt)
        if isinstance(seed, int | np.integer):
            draws = [Draw(operator.index(seed), index, label) for index, label in enumerate(labels)]
        elif len(seed) == len(labels):
            draws = [Draw(operator.index(one), 0, label) for one, label in zip(seed, labels, strict=True)]
        else:
            raise ValueError(f"{len(seed)} seeds for {len(labels)} images; give one, or as many")
        for draw in draws:
            if not 0 <= draw.seed <= LARGEST_SEED:
                raise ValueError(f"a seed is an integer in 0..2**64-1, got {draw.seed}")
        backend = self._load(facts.steps if steps is None else steps)
        size = min(batch_size, backend.max_batch or batch_size)
        images: list[Image.Image] = []
        for first in range(0, len(draws), size):
            batch = draws[first : first + size]
            drawn = backend.draw(noise_of(batch, facts), *condition_of(batch, self._encoder))
            if not np.isfinite(drawn).all():
                raise BundleError(f"{self.directory}: backend {self.backend} made values that are no numbers")
            images += [to_picture(pixels) for pixels in to_pixels(drawn)]
        return PipelineOutput(images)

    def _conditions(
        self, class_labels: Sequence[int | str] | None, prompt: str | Sequence[str] | None
    ) -> Sequence[int | str]:
        """What to draw, one a picture; the text encoder is loaded with the first prompt."""
        facts = self.manifest.model
        if facts.captions is None:
            if class_labels is None or prompt is not None:
                raise ValueError("this model draws for class_labels, and for no prompt")
            if isinstance(class_labels, str):
                raise ValueError(f"class_labels is a list, got {class_labels!r}")
            return [class_number(str(label), facts.num_classes, facts.class_names or ()) for label in class_labels]
        if prompt is None or class_labels is not None:
            raise ValueError("this model draws for a prompt, and for no class_labels")
        self._encoder = self._encoder or PromptEncoder(self.directory, facts.captions, self._text_encoder)
        return [prompt] if isinstance(prompt, str) else prompt

    def to(self, device: str) -> OneStepPipeline:
        """This pipeline on another device, e.g. ``cuda``. Raises BundleError or MissingExtra, and stays where it was,
        if it cannot."""
        before, loaded = self.device, self._loaded
        self.device, self._loaded = device, {}
        try:
            self._load(self.manifest.model.steps)
        except (BundleError, MissingExtra):
            self.device, self._loaded = before, loaded
            raise
        return self

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the bundle, with a model card, to another directory."""
        target = Path(directory)
        copy_bundle(self.directory, target, self.manifest)
        write_text(target / "README.md", model_card(self.manifest))

    def push_to_hub(self, repo_id: str, *, private: bool = False, message: str = "Upload a ddops bundle") -> str:
        """Upload the bundle with its model card to the Hugging Face hub; returns the commit's address. Raises
        MissingExtra."""
        import tempfile

        api = _hub("push_to_hub").HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            return str(api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message=message).commit_url)

    def _load(self, steps: int) -> Backend:
        if steps not in self._loaded:
            self._loaded[steps] = load_backend(
                self.directory,
                self.manifest,
                self.backend,
                device=self.device,
                steps=steps,
                threads=self._threads,
                precision=self.precision,
            )
        return self._loaded[steps]


def _hub(what: str) -> Any:
    """The hub's client, which ``what`` needs."""
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise MissingExtra(what, "hub", error) from None
    return huggingface_hub


def _download(repo: str, revision: str | None) -> Path:
    hub = _hub(f"{repo}: fetching a bundle from the hub")
    try:
        directory = Path(hub.snapshot_download(repo, revision=revision))
    except Exception as error:  # the hub's client raises errors of many kinds
        raise BundleError(f"{repo}: not found on disk, and not fetched from the hub: {error}") from error
    if not (directory / MANIFEST).is_file():
        raise BundleError(f"{repo}: holds no {MANIFEST}, so it is no ddops bundle")
    return directory
