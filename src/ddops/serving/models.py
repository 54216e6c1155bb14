"""The model being served, and its replacement without losing a request."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddops.export.errors import BundleError
from ddops.export.manifest import MANIFEST, Manifest, read_manifest
from ddops.inference.backends import load_backend
from ddops.inference.prompts import PromptEncoder
from ddops.inference.seeds import Draw, Pixels, condition_of, noise_of, to_pixels
from ddops.production import REGISTRY, Registry
from ddops.serving.batcher import Batcher
from ddops.serving.metrics import Metrics
from ddops.serving.settings import ServeSettings

log = logging.getLogger("ddops.serving")


class NoBundle(BundleError):
    """Nothing to serve at a place."""


@dataclass(frozen=True)
class ServedModel:
    """A loaded and warmed-up bundle with its own queue: who was accepted by it is answered by it."""

    manifest: Manifest
    batcher: Batcher


def find_bundle(place: Path) -> Path:
    """The bundle that ``place`` stands for now: a directory, a link to one, a file that names one, or a directory with
    the registry of ``ddops promote``, whose current version is meant.

    Raises:
        NoBundle: there is none. RegistryError: the registry is damaged.
    """
    directory = place
    if (place / REGISTRY).is_file():
        registry = Registry.load(place / REGISTRY)
        if registry.current is None:
            raise NoBundle(f"{place}: nothing is in production yet: ddops promote --reason WHY")
        directory = place / registry.current
    elif place.is_file():
        directory = place.parent / place.read_text().strip()
    directory = directory.resolve()
    if not (directory / MANIFEST).is_file():
        raise NoBundle(f"{place}: no bundle there ({directory / MANIFEST} is missing); write one with ddops export")
    return directory


def identify(directory: Path) -> str:
    """Tells one bundle from the next: its place, and the hash of its manifest."""
    return f"{directory} {hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()}"


class ModelSlot:
    """Holds the current model and looks for a newer one."""

    def __init__(self, place: Path, settings: ServeSettings, metrics: Metrics) -> None:
        self._place, self._settings, self._metrics = place, settings, metrics
        self._seen: str | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self.current: ServedModel | None = None

    async def refresh(self) -> None:
        """Load and warm up the bundle if it is another one than before, then let it take over.

        Raises:
            NoBundle: none is there.
            BundleError: it cannot be served, and will not be tried again. So with whatever else loading raises.
                In all cases the current model stays.
        """
        directory = find_bundle(self._place)
        identity = identify(directory)
        if identity == self._seen:
            return
        self._seen = identity
        loaded = await asyncio.to_thread(self._load, directory)
        previous, self.current = self.current, loaded(self._settings)
        self._metrics.set_model(self.current.manifest)
        log.info("model ready", extra={"model": self.current.manifest.identity, "bundle": str(directory)})
        if previous is not None:
            task = asyncio.create_task(previous.batcher.close())
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def watch(self) -> None:
        """Refresh from time to time, for ever."""
        told = ""
        while True:
            await asyncio.sleep(self._settings.reload_every_s)
            try:
                await self.refresh()
            except NoBundle as missing:  # it is just being replaced; or its files are not here yet, which is said once
                if str(missing) != told:
                    log.warning("the model stays", extra={"reason": (told := str(missing))})
            except Exception as error:  # a bundle that fails must not take down the one that works
                self._metrics.reload_failures.inc()
                log.error("the new bundle is not served", extra={"error": str(error)})

    async def close(self) -> None:
        """Finish what was accepted."""
        if self.current is not None:
            await self.current.batcher.close()
        await asyncio.gather(*self._retiring)

    def _load(self, directory: Path) -> _Loaded:
        """In a thread: a model that has drawn its first images."""
        settings = self._settings
        manifest = read_manifest(directory)
        backend = load_backend(directory, manifest, settings.backend, device=settings.device, threads=settings.threads)
        captions, copy = manifest.model.captions, settings.text_encoder
        encoder = None if captions is None else PromptEncoder(directory, captions, Path(copy) if copy else None)
        max_batch = min(settings.max_batch, backend.max_batch or settings.max_batch)

        def render(draws: Sequence[Draw]) -> Pixels:
            images_BIHW = backend.draw(noise_of(draws, manifest.model), *condition_of(draws, encoder))
            if not np.isfinite(images_BIHW).all():
                raise FloatingPointError("the model made values that are no numbers")
            return to_pixels(images_BIHW)

        for batch in sorted({1, max_batch}):
            render([Draw(seed=0, index=index, label=0 if captions is None else "") for index in range(batch)])

        def observed(draws: Sequence[Draw]) -> Pixels:
            with self._metrics.batch(len(draws)):
                return render(draws)

        return _Loaded(manifest, observed, max_batch)


@dataclass(frozen=True)
class _Loaded:
    """What a thread can prepare; the queue must be made on the event loop."""

    manifest: Manifest
    render: Callable[[Sequence[Draw]], Pixels]
    max_batch: int

    def __call__(self, settings: ServeSettings) -> ServedModel:
        batcher = Batcher(
            self.render,
            max_batch=self.max_batch,
            max_delay_s=settings.max_delay_ms / 1000,
            queue_limit=settings.queue_limit,
        )
        return ServedModel(self.manifest, batcher)
