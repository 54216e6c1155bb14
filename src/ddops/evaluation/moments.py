"""Mean and covariance of features: streamed in float64, or read from a file of published statistics."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddops.evaluation.errors import MetricError
from ddops.files import mistaken_for
from ddops.models.published_files import NUMPY

Doubles = NDArray[np.float64]
_KEYS: Final = (("mu", "sigma"), ("m", "s"))


@dataclass(frozen=True)
class Statistics:
    """A Gaussian fitted to features: mean (F,) and unbiased covariance (F, F), float64."""

    mean_F: Doubles
    covariance_FF: Doubles
    count: int | None = None
    """How many samples it was fitted to, where that is known."""

    def require_regular(self, whose: str) -> None:
        """The Fréchet distance needs a covariance of full rank.

        Raises:
            MetricError: too few samples, a value that is no number, or features that depend on each other.
        """
        dim = len(self.mean_F)
        if self.count is not None and self.count <= dim:
            raise MetricError(
                f"{whose}: the Fréchet distance in {dim} features needs more than {dim} samples, got {self.count}"
            )
        if not (np.isfinite(self.mean_F).all() and np.isfinite(self.covariance_FF).all()):
            raise MetricError(f"{whose}: features that are not finite numbers")
        if (rank := int(np.linalg.matrix_rank(self.covariance_FF, hermitian=True))) < dim:
            raise MetricError(
                f"{whose}: the covariance of {dim} features is singular, of rank {rank}: constant or repeated images, "
                "or too few of them"
            )


class Moments:
    """Streamed mean and covariance: batches in, :class:`Statistics` out, independent of how they were cut.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self._mean_F = torch.zeros(dim, dtype=torch.float64)
        self._scatter_FF = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features_BF: Tensor) -> None:
        """Take in a batch (B, F)."""
        batch_BF = features_BF.detach().cpu().double()
        mean_F = batch_BF.mean(0)
        centred_BF = batch_BF - mean_F
        step_F, total = mean_F - self._mean_F, self.count + len(batch_BF)
        self._scatter_FF += centred_BF.T @ centred_BF
        self._scatter_FF += torch.outer(step_F, step_F) * (self.count * len(batch_BF) / total)
        self._mean_F += step_F * (len(batch_BF) / total)
        self.count = total

    def statistics(self) -> Statistics:
        """What the batches so far amount to; raises MetricError for fewer than two samples."""
        if self.count < 2:
            raise MetricError(f"a covariance needs at least 2 samples, got {self.count}")
        return Statistics(self._mean_F.numpy().copy(), (self._scatter_FF / (self.count - 1)).numpy(), self.count)


def read_statistics(path: Path) -> Statistics:
    """Published statistics: an ``.npz``, or a ``.pth`` with the same keys, ``mu`` and ``sigma`` or ``m`` and ``s``.

    Raises:
        MetricError: not such a file, or its arrays are not a mean and its covariance.
    """
    values = _read(path)
    keys = next((keys for keys in _KEYS if set(keys) <= set(values)), None)
    if keys is None:
        raise MetricError(f"{path}: holds {', '.join(values) or 'nothing'}; expected mu and sigma, or m and s")
    try:
        mean_F, covariance_FF = (_doubles(values[key]) for key in keys)
    except (TypeError, ValueError) as error:
        raise MetricError(f"{path}: {' and '.join(keys)} are not arrays of numbers ({error})") from error
    if mean_F.ndim != 1 or covariance_FF.shape != (len(mean_F), len(mean_F)):
        raise MetricError(
            f"{path}: {keys[0]} is {mean_F.shape} and {keys[1]} {covariance_FF.shape}: no mean, covariance"
        )
    if not np.allclose(covariance_FF, covariance_FF.T, rtol=1e-5, atol=1e-8):
        raise MetricError(f"{path}: {keys[1]} is not symmetric: no covariance")
    return Statistics(mean_F, covariance_FF)


def _doubles(values: Any) -> Doubles:
    if isinstance(values, Tensor):
        values = values.detach().double().numpy()
    return np.asarray(values, dtype=np.float64)


def _read(path: Path) -> dict[str, Any]:
    """The arrays named in ``_KEYS`` that the file holds; no code in it is run."""
    if path.is_file() and (found := mistaken_for(path)):
        raise MetricError(f"{path}: is {found}, not a file of statistics; fetch it again")
    wanted = {key for keys in _KEYS for key in keys}
    try:
        if zipfile.is_zipfile(path) and any(name.endswith(".npy") for name in zipfile.ZipFile(path).namelist()):
            with np.load(path, allow_pickle=False) as file:
                return {key: file[key] for key in file.files if key in wanted}
        return {key: value for key, value in _load_pth(path).items() if key in wanted}
    except MetricError:
        raise
    except (OSError, ValueError, RuntimeError, EOFError, LookupError, zipfile.BadZipFile) as error:
        raise MetricError(f"{path}: not readable as .npz or .pth ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _load_pth(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(NUMPY):
            values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MetricError(f"{path}: not a file of statistics, or it asks to run code, which is refused") from error
    if not isinstance(values, dict):
        raise MetricError(f"{path}: holds a {type(values).__name__}; expected mu and sigma, or m and s")
    return values
