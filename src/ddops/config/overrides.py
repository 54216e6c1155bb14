"""Overrides as people and callers from outside write them: read, quoted where they must be, kept to plain values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ddops.config.base import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


def plain_override(text: str) -> Override:
    """One ``key=value`` of Hydra's. A value that Hydra's grammar has no place for (``~/w``, brackets, ``=``, commas,
    letters of other scripts) is taken as it stands, as if in quotes.

    Raises:
        ConfigError: it is no override; or it asks for more than a value: ``${...}``, which might read the environment,
            or Hydra's own settings, which might read any file.
    """
    override = _parsed(text)
    if override is None or override.is_sweep_override():
        key, equals, value = text.partition("=")
        form = f"{key}={quoted(value)}" if equals else f"{key}=VALUE"
        override = _parsed(form) if equals else None
        if override is None:
            raise ConfigError(f"{text}: not an override; write section.key=value, here {form}")
    for name in (override.key_or_group, override.package or ""):
        if re.match(r"hydra\b", name):
            raise ConfigError(f"{text}: Hydra's own settings are not to be overridden; name keys of the configuration")
    if "${" in repr((override.key_or_group, override.package, override.value())):
        raise ConfigError(f"{text}: nothing is interpolated in overrides; write the value itself in place of ${{...}}")
    return override


def quoted(value: str) -> str:
    """``value`` in Hydra's single quotes: quotes are escaped, and so are the backslashes just before one."""
    inner = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"'{inner}'"


def interpolated(value: Any, key: str = "") -> Iterator[str]:
    """The dotted keys of all values, in nested mappings and lists, that something would be put into."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from interpolated(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from interpolated(inner, key)
    elif isinstance(value, str) and "${" in value:
        yield key


def _parsed(text: str) -> Override | None:
    # Hydra is loaded where it is used, see ddops.config.load.
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None
