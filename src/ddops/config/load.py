"""Reading and composing configurations, with errors that name the file, the key and the way out."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from ddops.config.models import LlamaGenConfig, VARConfig
from ddops.config.stages import Config


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names the file, the key and what would be valid."""


def load_config(path: Path | str = "params.yaml") -> Config:
    """Read and validate a composed configuration.

    Raises:
        ConfigError: the file is missing or not YAML, or a key is unknown, missing, of a wrong type or impossible.
    """
    path = Path(path)
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Write it with: ddops compose preset=digits") from None
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(values).__name__}")
    return validate(typing.cast("dict[str, Any]", values), str(path))


def validate(values: Mapping[str, Any], source: str) -> Config:
    """A :class:`Config` from plain values; ``source`` names them in errors.

    Raises:
        ConfigError: with every problem found, one a line.
    """
    try:
        # Through JSON, because pydantic's strict mode then takes a list for a tuple but still no "3" for a 3.
        return TypeAdapter(Config).validate_json(json.dumps(values))
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors()]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error


def compose(params_dir: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values that Hydra composes from the groups in ``params_dir``, e.g. with ``["preset=digits_var"]``.

    Raises:
        ConfigError: no such preset, group option or key; or the result is not a valid configuration.
    """
    directory = Path(params_dir).resolve()
    if not (directory / "config.yaml").is_file():
        raise ConfigError(f"{directory}: holds no config.yaml; run from the project's root or pass --params DIR")
    for override in overrides:
        _check_group_choice(directory, override)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(directory), version_base=None):
            composed = hydra_compose("config", overrides=list(overrides))
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{params_dir}: {' '.join(overrides) or 'defaults'}: {error}") from error
    result = typing.cast("dict[str, Any]", values)
    validate(result, " ".join([str(params_dir), *overrides]))
    return result


def write_params(values: Mapping[str, Any], path: Path) -> None:
    """Write composed values the way ``params.yaml`` is committed."""
    header = "# Composed from params/ by `ddops compose`: what `dvc repro` reads. Edit params/, then compose again.\n"
    text = header + yaml.safe_dump(dict(values), sort_keys=False, width=100)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _check_group_choice(directory: Path, override: str) -> None:
    group, _, choice = override.partition("=")
    if not (directory / group).is_dir():
        return
    known = sorted(file.stem for file in (directory / group).glob("*.yaml"))
    if choice not in known:
        raise ConfigError(f"{directory.name}/{group}: no {group} named {choice!r}; {_suggest(choice, known)}")


def _explain(detail: ErrorDetails) -> str:
    """One of pydantic's errors as ``section.key: what is wrong; what would be right``."""
    keys = [str(part) for part in detail["loc"] if part not in ("var", "llamagen")]
    where = ".".join(keys) or "configuration"
    if detail["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{where}: unknown key; {_suggest(keys[-1], _fields_at(keys[:-1], detail['loc']))}"
    if detail["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{where}: missing"
    message = detail["msg"].removeprefix("Value error, ")
    shown = repr(detail["input"])
    if detail["type"] == "value_error" or len(shown) > 80:
        return f"{where}: {message}"
    return f"{where}: {message}, got {shown}"


def _fields_at(path: Sequence[str], loc: tuple[int | str, ...]) -> list[str]:
    """Names of the keys that exist at a dotted path, following the dataclasses' annotations."""
    here: Any = Config
    for name in path:
        if not dataclasses.is_dataclass(here):
            break
        here = typing.get_type_hints(here).get(name)
        if name == "model":
            here = VARConfig if "var" in loc else LlamaGenConfig
    return [field.name for field in dataclasses.fields(here)] if dataclasses.is_dataclass(here) else []


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(known)}"
