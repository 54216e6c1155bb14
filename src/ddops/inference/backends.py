"""One interface over PyTorch, ONNX Runtime and TensorRT: noise and labels, or captions, in; images out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ddops.export.errors import BundleError
from ddops.export.manifest import (
    MODEL,
    STUDENT_FILE,
    TOKENIZER_FILE,
    Manifest,
    ModelFacts,
    model_digests,
    verify_files,
)
from ddops.extras import explained
from ddops.sampling.noise import NOISE_VERSION, Stream, normals_array

Floats = NDArray[np.float32]


class Backend(ABC):
    """A bundle's model, loaded. Not for several threads at once."""

    max_batch: int | None = None
    """The largest batch it takes, where there is one."""

    @abstractmethod
    def draw(self, noise_BLC: Floats, *condition: NDArray[Any]) -> Floats:
        """Images (B, I, H, W) in [-1, 1]. The condition is labels (B,), or features (B, T, W) and mask (B, T)."""


class TorchBackend(Backend):
    """The weights in PyTorch: any device it has, any number of steps the student was trained for.

    In ``bfloat16`` products are rounded (:mod:`ddops.models.reduced`), and the first images are drawn both ways: where
    they differ by more than ``BFLOAT16_BOUNDS``, the precision is refused.
    """

    def __init__(
        self, directory: Path, manifest: Manifest, device: str, steps: int, precision: str = "float32"
    ) -> None:
        import torch

        from ddops.export.graph import load_graph

        verify_files(directory, {name: manifest.files[name] for name in (STUDENT_FILE, TOKENIZER_FILE)})
        starts = manifest.model.start_positions[:steps]
        graph = load_graph(directory / STUDENT_FILE, directory / TOKENIZER_FILE, starts, manifest.model.logit_prefix)
        self._torch, self._half = torch, False
        try:
            self._device = torch.device(device)
            self._graph = graph.to(self._device)
        except (RuntimeError, AssertionError) as error:  # what PyTorch raises where it was built without CUDA
            reason = str(error).splitlines()[0]
            raise BundleError(f"PyTorch cannot use device {device!r} here ({reason}); cpu is always there") from None
        self._model = manifest.model
        if precision == "bfloat16":
            self._round_weights(directory)

    def draw(self, noise_BLC: Floats, *condition: NDArray[Any]) -> Floats:
        images, _ = self._draw(noise_BLC, *condition)
        return images

    def _draw(self, noise_BLC: Floats, *condition: NDArray[Any]) -> tuple[Floats, NDArray[np.int64]]:
        """Images, and the tokens that an argmax decided."""
        torch = self._torch
        noise, *given = (torch.from_numpy(values).to(self._device) for values in (noise_BLC, *condition))
        with torch.inference_mode(), torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
            images_BIHW, ids_Bn = self._graph.draw(noise, self._graph.condition(*given))
        return images_BIHW.float().cpu().numpy(), ids_Bn.cpu().numpy()

    def _round_weights(self, directory: Path) -> None:
        """Raises BundleError where the images change by more than ``BFLOAT16_BOUNDS``."""
        from ddops.export.parity import ParityBounds, broken_bounds, compare
        from ddops.models.reduced import to_bfloat16

        student = self._graph.student
        examples = example_conditions(self._model, BFLOAT16_IMAGES)
        shape = student.layout.length, self._graph.codebook_VC.shape[1]
        noise_BLC = normals_array(0, Stream.SAMPLE_NOISE, np.arange(BFLOAT16_IMAGES), shape)
        expected = self._draw(noise_BLC, *examples)
        self._graph, self._half = to_bfloat16(self._graph, self._graph.whole_modules), True
        parity = compare(expected, self._draw(noise_BLC, *examples))
        if broken_bounds(parity, ParityBounds(None, *BFLOAT16_BOUNDS)):
            raise BundleError(
                f"{directory}: in bfloat16 it draws other images: PSNR {parity.psnr:.1f} dB, {parity.equal_tokens:.1%} "
                f"of the tokens equal; at least {BFLOAT16_BOUNDS[0]:g} dB and {BFLOAT16_BOUNDS[1]:.0%} are asked for. "
                "Use precision float32"
            )


class OnnxBackend(Backend):
    """The graph in ONNX Runtime."""

    def __init__(self, directory: Path, manifest: Manifest, device: str, threads: int) -> None:
        from ddops.export.session import open_session, run_session

        verify_files(directory, model_digests(manifest))
        self._session = open_session(directory / MODEL, device, threads, precision=manifest.onnx.precision)
        self._run = run_session

    def draw(self, noise_BLC: Floats, *condition: NDArray[Any]) -> Floats:
        return self._run(self._session, noise_BLC, *condition)


class TensorRTBackend(Backend):
    """The bundle's engine that fits this GPU, of whichever flavour is installed."""

    def __init__(self, directory: Path, manifest: Manifest, device: str) -> None:
        from ddops.export.tensorrt import installed_flavour

        if device not in ("cuda", "cuda:0"):
            raise BundleError(f"backend tensorrt runs on cuda, not on {device!r}")
        flavour = installed_flavour([engine.flavour for engine in manifest.engines])
        from ddops.export.engine_session import EngineSession  # loads PyTorch, which comes with the flavour's extra

        self._session = EngineSession(directory, manifest, flavour)
        self.max_batch = self._session.facts.profile.max

    def draw(self, noise_BLC: Floats, *condition: NDArray[Any]) -> Floats:
        return self._session.run(noise_BLC, *condition)


BACKENDS: Final = ("torch", "onnx", "tensorrt")
PRECISIONS: Final = ("float32", "bfloat16")
BFLOAT16_IMAGES: Final = 4
"""How many images are drawn in both precisions before bfloat16 is used."""
BFLOAT16_BOUNDS: Final = (25.0, 0.97)
"""PSNR and share of equal tokens that are asked for then *(ours)*: a token in a hundred may fall otherwise."""
DEFAULT_DEVICE: Final = {"torch": "cpu", "onnx": "cpu", "tensorrt": "cuda"}


def example_conditions(model: ModelFacts, count: int) -> tuple[NDArray[Any], ...]:
    """Class after class (B,); or captions of random features that fill their tokens, (B, T, W) and (B, T)."""
    if model.captions is None:
        return (np.arange(count) % model.num_classes,)
    shape = model.captions.length, model.captions.width
    features_BTW = normals_array(0, Stream.PATH, np.arange(count), shape)
    return features_BTW, np.ones(features_BTW.shape[:2], dtype=bool)


def load_backend(
    directory: Path,
    manifest: Manifest,
    name: str,
    *,
    device: str | None = None,
    steps: int | None = None,
    threads: int = 0,
    precision: str = "float32",
) -> Backend:
    """A backend by name; ``steps`` None takes as many as the exported graph does, ``threads`` 0 the library's choice.
    ``precision`` bfloat16 is for backend torch; the others' is in the graph.

    Raises:
        BundleError: unknown backend, device or precision, a damaged file, a number of steps it cannot take, noise of
            another construction, or no engine for this machine. MissingExtra: its packages are not installed.
    """
    if name not in BACKENDS:
        raise BundleError(f"no backend {name!r}; valid: {', '.join(BACKENDS)}")
    if precision not in PRECISIONS:
        raise BundleError(f"no precision {precision!r}; valid: {', '.join(PRECISIONS)}")
    model = manifest.model
    if model.noise != NOISE_VERSION:
        raise BundleError(f"the bundle's images are of noise {model.noise!r}, this ddops makes {NOISE_VERSION!r}")
    device, steps = device or DEFAULT_DEVICE[name], model.steps if steps is None else steps
    if name == "torch" and not 1 <= steps <= len(model.start_positions):
        raise BundleError(f"{steps} steps: this student takes 1 to {len(model.start_positions)}")
    if name != "torch" and precision != "float32":
        raise BundleError(f"precision {precision} is for backend torch; that of {name} was decided at the export")
    if name != "torch" and steps != model.steps:
        raise BundleError(
            f"{steps} steps: the exported graph takes {model.steps}; use backend torch, or export with "
            f"export.steps={steps}"
        )
    try:
        if name == "torch":
            return TorchBackend(directory, manifest, device, steps, precision)
        if name == "onnx":
            return OnnxBackend(directory, manifest, device, threads)
        return TensorRTBackend(directory, manifest, device)
    except ModuleNotFoundError as error:
        raise explained(error, f"backend {name}") from None
