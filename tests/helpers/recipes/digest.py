"""What a stage computed, in few numbers; and whether two such digests are of the same computation.

Another processor rounds otherwise: numbers agree to a tolerance, tokens and pixels for the most part, the rest exactly.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

Digest = dict[str, Any]

TOLERANCES: Final = {
    **{"losses": 1e-4, "weights": 1e-4, "figures": 5e-4},
    **{"alternating": 5e-3, "generator": 1e-3, "drawn": 0.02},
}
"""Relative, by the digest's key; losses to five digits. ``alternating`` and ``generator`` are DD2's losses and weights:
rounding turns one code into another while it trains; ``drawn`` figures of few samples, where it does so too."""
DEFAULT: Final = 1e-3
NEAR_ZERO: Final = 1e-6
"""What rounding leaves of a number that is none."""
COUNTED: Final = {"precision": 0.03, "recall": 0.03, "accuracy": 0.03}
"""Shares of things counted: rounding moves one over the border now and then, so these agree absolutely."""
HALF: Final = 0.1
"""Where products are in half precision: processors differ in how they add those up."""
AGREEMENT: Final = {"ids": 0.99, "pixels": 0.95}
"""Least share of equal tokens; of pixels that differ by at most :data:`LEVELS`."""
LEVELS: Final = 4
SHOWN: Final = 32
"""Images whose pixels are kept."""
UNSTABLE: Final = ("sha256", "versions", "files", "throughput", "samples_per_second", "share")
"""In keys of JSON: what other bytes or another machine change."""


def weights(file: Path) -> Digest:
    """Names and shapes, and the norm and mean of every matrix. (Of a bias whose gradient is but rounding, AdamW makes
    steps as large as any: those are left out.)"""
    state = load_file(file)
    matrices = {name: value.double() for name, value in sorted(state.items()) if value.ndim > 1}
    return {
        "shapes": _checksum({name: list(value.shape) for name, value in state.items()}),
        "norms": [float(value.norm()) for value in matrices.values()],
        "spread": [float(value.abs().mean()) for value in matrices.values()],
    }


def curves(directory: Path) -> Digest:
    """Every curve that a training wrote, by name."""
    files = sorted(directory.rglob("*.tsv"))
    assert files, directory
    return {file.stem: [float(line.split("\t")[-1]) for line in file.read_text().splitlines()[1:]] for file in files}


def tokens(ids: NDArray[Any]) -> str:
    """All ids, compressed."""
    return _pack(ids.astype(np.uint8))


def images(images_NIHW: torch.Tensor) -> Digest:
    """Of uint8 images: mean and spread, and some, in squares of two pixels."""
    values = images_NIHW.double()
    squares = torch.nn.functional.avg_pool2d(values[:SHOWN], max(2, images_NIHW.shape[-1] // 4))
    return {"mean": float(values.mean()), "std": float(values.std()), "pixels": _pack(squares.round().byte().numpy())}


def plain(value: Any) -> Any:
    """JSON without what is unstable in it."""
    if isinstance(value, dict):
        kept = {key: each for key, each in value.items() if not any(word in key for word in UNSTABLE)}
        return {key: plain(each) for key, each in kept.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def rounded(value: Any) -> Any:
    """As the golden file keeps it."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.7g}") if isinstance(value, float) and math.isfinite(value) else value


def moved(golden: Any, found: Any, *, half: bool = False, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Where two digests are not of the same computation, a line each."""
    where = ".".join(path)
    if isinstance(golden, dict) and isinstance(found, dict):
        for key in sorted(golden.keys() | found.keys()):
            if key not in found or key not in golden:
                yield f"{where}.{key}: {'gone' if key not in found else 'new'}"
            else:
                yield from moved(golden[key], found[key], half=half, path=(*path, key))
    elif isinstance(golden, list) and isinstance(found, list):
        if len(golden) != len(found):
            yield f"{where}: {len(golden)} values, now {len(found)}"
            return
        for number, (was, now) in enumerate(zip(golden, found, strict=True)):
            yield from moved(was, now, half=half, path=(*path, str(number)))
    elif path and path[-1] in AGREEMENT and isinstance(golden, str) and isinstance(found, str):
        least = AGREEMENT[path[-1]] - (0.05 if half else 0.0)
        if (share := _agreement(golden, found, path[-1])) < least:
            yield f"{where}: {share:.1%} agree, at least {least:.0%} must"
    elif _is_number(golden) and _is_number(found) and float in (type(golden), type(found)):
        tolerance = HALF if half else TOLERANCES.get(path[0] if path else "", DEFAULT)
        least = max((COUNTED.get(key.removesuffix("_spread"), NEAR_ZERO) for key in path), default=NEAR_ZERO)
        if not math.isclose(golden, found, rel_tol=tolerance, abs_tol=least):
            yield f"{where}: {golden:.7g}, now {found:.7g}"
    elif golden != found:
        yield f"{where}: {golden!r}, now {found!r}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _checksum(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _pack(values: NDArray[np.uint8]) -> str:
    return base64.b85encode(zlib.compress(values.tobytes(), 9)).decode()


def _unpack(text: str) -> NDArray[np.int16]:
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8).astype(np.int16)


def _agreement(one: str, other: str, kind: str) -> float:
    first, second = _unpack(one), _unpack(other)
    if first.shape != second.shape:
        return 0.0
    return float((np.abs(first - second) <= (LEVELS if kind == "pixels" else 0)).mean())
