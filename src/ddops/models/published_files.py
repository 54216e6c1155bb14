"""Reading the files that weights are published in, without running code in them."""

from __future__ import annotations

import argparse
import codecs
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct, scalar
from torch import Tensor

from ddops.files import mistaken_for
from ddops.models.errors import CheckpointError

NUMPY: Final[list[Any]] = [
    *(
        (made, f"numpy.{core}.multiarray.{made.__name__}")
        for made in (_reconstruct, scalar)
        for core in ("core", "_core")
    ),
    *(np.ndarray, np.dtype, codecs.encode),
    *{type(np.dtype(code)) for code in "?bhilqBHILQefdgFDSU"},
]
"""What NumPy's arrays and scalars in a pickle are made of, in NumPy 1's files too. They hold values and run nothing."""


def read_published(path: Path, layout: str) -> dict[str, Tensor]:
    """The state dict in a ``.pt`` or ``.pth`` file; ``layout`` is ``flat`` or the keys that lead to it, dotted.

    Raises:
        CheckpointError: not such a file, cut short, asking to run code, or without that entry.
    """
    entry: Any = _load(path)
    whole = entry
    for key in [] if layout == "flat" else layout.split("."):
        if not isinstance(entry, Mapping) or key not in entry:
            found = ", ".join(map(str, list(entry)[:8])) if isinstance(entry, Mapping) else type(entry).__name__
            raise CheckpointError(f"{path}: holds no entry {key!r} (layout {layout}); found {found}{_hint(whole)}")
        entry = entry[key]
    if not isinstance(entry, Mapping) or not entry:
        raise CheckpointError(
            f"{path}: layout {layout} leads to no state dict but to a {type(entry).__name__}{_hint(whole)}"
        )
    if foreign := [str(key) for key, value in entry.items() if not isinstance(value, Tensor)]:
        names = ", ".join(foreign[:5])
        raise CheckpointError(f"{path}: no tensors at {names}; is the layout {layout} the right one?{_hint(whole)}")
    return dict(entry)


def _hint(whole: Any) -> str:
    """Which layouts would lead to a state dict."""
    found = [name or "flat" for name in _layouts(whole)]
    return f". State dicts are at {', '.join(found[:8])}: set the file's layout to that which is meant" if found else ""


def _layouts(entry: Any, prefix: str = "", depth: int = 4) -> Iterator[str]:
    if not isinstance(entry, Mapping) or not entry or not depth:
        return
    if all(isinstance(value, Tensor) for value in entry.values()):
        yield prefix
        return
    for key, value in entry.items():
        if isinstance(key, str):
            yield from _layouts(value, f"{prefix}.{key}" if prefix else key, depth - 1)


def _load(path: Path) -> Any:
    is_zip = zipfile.is_zipfile(path)
    try:
        # Training scripts keep their command line and figures beside the weights: a Namespace holds values alone.
        with torch.serialization.safe_globals([argparse.Namespace, *NUMPY]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_why_not(path, error)}") from error
    except (RuntimeError, EOFError, ValueError, LookupError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable PyTorch file, or cut short ({error}). Fetch it again") from error


def _why_not(path: Path, error: Exception) -> str:
    if found := mistaken_for(path):
        return f"this is {found}, not a checkpoint; delete it and download the file itself"
    # What torch wraps this in advises to load the file all the same.
    reason = (str(error.__context__ or error).splitlines() or [type(error).__name__])[0]
    if "global" in reason.lower():
        return f"refused: the file asks for more than tensors, which could run code. Nothing of it was run ({reason})"
    return f"not a readable PyTorch file, or cut short ({reason}). Fetch it again"
