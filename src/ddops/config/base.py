"""The one way ddops declares a configuration: frozen, keyword-only, strictly typed dataclasses.

Validation is pydantic's; :mod:`ddops.config.load` turns its errors into messages that name the
file, the key and the valid choices.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass as pydantic_dataclass

T = TypeVar("T")

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names the file, the key and what would be valid."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[T]) -> type[T]:
    """Class decorator: a frozen, keyword-only dataclass that refuses unknown keys, wrong types, NaN and infinity."""
    make = pydantic_dataclass(
        frozen=True,
        kw_only=True,
        config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False),
    )
    return make(cls)  # type: ignore[return-value]


def plain(value: Any) -> Any:
    """A configuration as plain values, for fingerprints; anything else as it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return TypeAdapter(type(value)).dump_python(value, mode="json")
    return value
