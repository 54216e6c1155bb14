"""Samples on disk, in the format that the ADM evaluator reads: an ``.npz`` of uint8 images ``arr_0`` (N, H, W, I) and
their labels ``arr_1`` (N,). Written and read batch by batch: fifty thousand images are ten gigabytes.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from ddops.files import atomic_path
from ddops.models.errors import CheckpointError

IMAGES: Final = "arr_0.npy"
LABELS: Final = "arr_1.npy"
UNKNOWN: Final = -1
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
"""The time stamp of every entry, so that the same samples are the same bytes."""


@dataclass(frozen=True)
class Samples:
    """A file of samples."""

    path: Path
    shape: tuple[int, int, int, int]
    """(N, H, W, I)."""
    labels_N: Tensor
    """-1 where the file has no labels."""

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 images (B, I, H, W), in order.

        Raises:
            CheckpointError: the file is cut short or altered, which its checksum tells once the last image is read.
        """
        pixels = int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as archive, archive.open(IMAGES) as file:
            _read_header(file)
            for first in range(0, len(self), size):
                count = min(size, len(self) - first)
                try:
                    content = file.read(count * pixels)
                except (zipfile.BadZipFile, zlib.error) as error:
                    raise CheckpointError(f"{self.path}: damaged ({error}); run the stage sample again") from error
                if len(content) != count * pixels:
                    raise CheckpointError(f"{self.path}: cut short; run the stage sample again")
                images_BHWI = np.frombuffer(bytearray(content), np.uint8).reshape(count, *self.shape[1:])
                yield torch.from_numpy(images_BHWI).permute(0, 3, 1, 2).contiguous()


def write_samples(path: Path, batches: Iterable[Tensor], labels_N: Tensor) -> None:
    """Write uint8 images (B, I, H, W) as they come; the file is there when it is whole.

    Raises:
        ValueError: there are not as many images as labels.
    """
    written = 0
    with atomic_path(path) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open(zipfile.ZipInfo(IMAGES, _EPOCH), "w", force_zip64=True) as file:
                for images_BIHW in batches:
                    images_BHWI = images_BIHW.permute(0, 2, 3, 1).contiguous().numpy()
                    if not written:
                        header = {
                            "descr": "|u1",
                            "fortran_order": False,
                            "shape": (len(labels_N), *images_BHWI.shape[1:]),
                        }
                        npy.write_array_header_1_0(file, header)
                    file.write(images_BHWI.tobytes())
                    written += len(images_BHWI)
            with archive.open(zipfile.ZipInfo(LABELS, _EPOCH), "w") as file:
                npy.write_array(file, labels_N.numpy())
        if written != len(labels_N):
            raise ValueError(f"{path}: {written} images for {len(labels_N)} labels")


def open_samples(path: Path) -> Samples:
    """The file's labels and shape; the images are read when they are asked for.

    Raises:
        CheckpointError: not such a file, or cut short.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            with archive.open(IMAGES) as file:
                shape = _read_header(file)
            labels_N: NDArray[np.int64] = np.full(shape[0], UNKNOWN)
            if LABELS in archive.namelist():
                with archive.open(LABELS) as file:
                    labels_N = npy.read_array(file, allow_pickle=False)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: not a file of samples ({error}); run the stage sample again") from error
    return Samples(path, shape, torch.from_numpy(labels_N))


def pick(samples: Samples, classes: Iterable[int], per_class: int, batch_size: int) -> Tensor:
    """The first images of some classes, for a grid with a column a class: (per_class * classes, I, H, W), row by row.
    Where a class has fewer images, the column ends in white."""
    wanted = [torch.nonzero(samples.labels_N == label).flatten()[:per_class].tolist() for label in classes]
    places = {index: (row, column) for column, found in enumerate(wanted) for row, index in enumerate(found)}
    channels, height, width = samples.shape[3], samples.shape[1], samples.shape[2]
    picked = torch.full((per_class, len(wanted), channels, height, width), 255, dtype=torch.uint8)
    first, last = 0, max(places, default=-1)
    for images_BIHW in samples.batches(batch_size):
        for index in [index for index in places if first <= index < first + len(images_BIHW)]:
            picked[places[index]] = images_BIHW[index - first]
        first += len(images_BIHW)
        if first > last:
            break
    return picked.flatten(0, 1)


def _read_header(file: object) -> tuple[int, int, int, int]:
    npy.read_magic(file)  # type: ignore[arg-type]
    shape, fortran, dtype = npy.read_array_header_1_0(file)  # type: ignore[arg-type]
    if len(shape) != 4 or fortran or dtype != np.uint8:
        raise ValueError(f"{IMAGES} is {shape} of {dtype}, expected uint8 images (N, H, W, I)")
    return (shape[0], shape[1], shape[2], shape[3])
