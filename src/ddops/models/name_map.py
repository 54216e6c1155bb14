"""Published checkpoints into ddops modules: an explicit name map, strictly checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from ddops.models.errors import CheckpointError


def map_state(
    reference: Mapping[str, Tensor],
    name_map: Mapping[str, str],
    expected: Mapping[str, Tensor],
    ignored: Collection[str] = (),
) -> dict[str, Tensor]:
    """Rename a published state dict, ready for a strict ``load_state_dict``.

    ``name_map`` maps each published key to ours, ``expected`` is our module's ``state_dict()`` (one on the meta
    device will do), ``ignored`` lists published keys that may be there and are dropped. Values take the expected
    dtype.

    Raises:
        CheckpointError: a published key is missing, unexpected or of another shape than ours.
        ValueError: ``name_map`` does not name each of our keys exactly once.
    """
    if sorted(name_map.values()) != sorted(expected):
        wrong = set(name_map.values()) ^ set(expected) or "duplicates"
        raise ValueError(f"the name map and the module disagree on {wrong}")
    _refuse(
        "lacks",
        [f"{key} (expected {_shape(expected[ours])})" for key, ours in name_map.items() if key not in reference],
    )
    known = name_map.keys() | set(ignored)
    _refuse("has unexpected", [f"{key} {_shape(value)}" for key, value in reference.items() if key not in known])
    _refuse(
        "has misshapen",
        [
            f"{key} {_shape(reference[key])}, expected {_shape(expected[ours])}"
            for key, ours in name_map.items()
            if reference[key].shape != expected[ours].shape
        ],
    )
    return {ours: reference[key].to(expected[ours].dtype) for key, ours in name_map.items()}


def _shape(value: Tensor) -> str:
    return str(tuple(value.shape))


def _refuse(what: str, faults: Sequence[str], shown: int = 5) -> None:
    if faults:
        rest = f" and {len(faults) - shown} more" if len(faults) > shown else ""
        raise CheckpointError(f"the checkpoint {what} {'; '.join(faults[:shown])}{rest}")
