"""Published checkpoints into ddops modules: an explicit name map, strictly checked."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from torch import Tensor

from ddops.models.errors import CheckpointError

log = logging.getLogger(__name__)

WRAPPERS: Final = frozenset(
    {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)
"""Parts of a key that PyTorch's wrappers of modules put there: DataParallel, compile, Fabric, FSDP, checkpointing."""
_AVERAGED: Final = "n_averaged"
"""What PyTorch's AveragedModel keeps beside the weights."""


def map_state(
    reference: Mapping[str, Tensor],
    name_map: Mapping[str, str],
    expected: Mapping[str, Tensor],
    ignored: Collection[str] = (),
) -> dict[str, Tensor]:
    """Rename a published state dict, ready for a strict ``load_state_dict``.

    ``name_map`` maps each published key to ours, ``expected`` is our module's ``state_dict()`` (one on the meta
    device will do), ``ignored`` lists published keys that may be there and are dropped. Values take the expected
    dtype. Keys may be those of a wrapped module, see :func:`unwrapped`.

    Raises:
        CheckpointError: a published key is missing, unexpected or of another shape than ours.
        ValueError: ``name_map`` does not name each of our keys exactly once.
    """
    if sorted(name_map.values()) != sorted(expected):
        wrong = set(name_map.values()) ^ set(expected) or "duplicates"
        raise ValueError(f"the name map and the module disagree on {wrong}")
    known = name_map.keys() | set(ignored)
    reference = unwrapped(reference, known)
    _refuse(
        "lacks",
        [f"{key} (expected {_shape(expected[ours])})" for key, ours in name_map.items() if key not in reference],
        "" if reference.keys() & known else f". It holds {', '.join(sorted(reference)[:3])}: another model's?",
    )
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


def unwrapped(reference: Mapping[str, Tensor], known: Collection[str]) -> Mapping[str, Tensor]:
    """The state dict under the keys it has without what trainers wrap modules in: ``module.``, ``_orig_mod.`` and the
    like anywhere in a key, and whatever else all keys begin with. Keys that are ``known`` are left alone, and so are
    all of them where two would become one."""
    bare = {key: key if key in known else _without_wrappers(key) for key in reference if key != _AVERAGED}
    while bare and len(first := {key.partition(".")[0] for key in bare.values()}) == 1:
        prefix = f"{first.pop()}."
        if any(key.startswith(prefix) for key in known) or not all(key.startswith(prefix) for key in bare.values()):
            break
        bare = {key: name.removeprefix(prefix) for key, name in bare.items()}
    if all(key == name for key, name in bare.items()) or len(set(bare.values())) < len(bare):
        return reference
    key, name = next((key, name) for key, name in bare.items() if key != name)
    log.info("the checkpoint's keys are those of a wrapped module: %s is read as %s, and so on", key, name)
    return {name: reference[key] for key, name in bare.items()}


def _without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def _shape(value: Tensor) -> str:
    return str(tuple(value.shape))


def _refuse(what: str, faults: Sequence[str], hint: str = "", shown: int = 5) -> None:
    if faults:
        rest = f" and {len(faults) - shown} more" if len(faults) > shown else ""
        raise CheckpointError(f"the checkpoint {what} {'; '.join(faults[:shown])}{rest}{hint}")
