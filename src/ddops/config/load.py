"""Reading and composing configurations, with errors that name the file, the key and the way out.

Hydra and OmegaConf are loaded where they are used: most that imports this only catches its error.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ddops.config.base import ConfigError as ConfigError
from ddops.config.overrides import interpolated, plain_override
from ddops.config.stages import Config

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

PARAMS: Final = Path(__file__).parents[1] / "params"
"""The groups that ddops brings."""
WORKSPACE_PARAMS: Final = Path(__file__).parents[1] / "workspace" / "template" / "params"
"""What a workspace starts with: those groups, and none of its own."""


def load_config(path: Path | str = "params.yaml") -> Config:
    """Read and validate a composed configuration.

    Raises:
        ConfigError: the file is missing or not YAML, or a key is unknown, missing, of a wrong type or impossible.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(path)
    try:
        # Nothing is put into it: DVC reads it as it stands, and whoever wrote it may have come from outside.
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Write it with: ddops compose preset=digits") from None
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(values).__name__}")
    return validate(typing.cast("dict[str, Any]", values), str(path))


def validate(values: Mapping[str, Any], source: str) -> Config:
    """A :class:`Config` from plain values; ``source`` names them in errors.

    Raises:
        ConfigError: with every problem found, one a line.
    """
    if found := list(interpolated(values)):
        raise ConfigError("\n".join(f"{source}: {key}: holds ${{...}}; write the value itself" for key in found))
    try:
        # Through JSON, because pydantic's strict mode then takes a list for a tuple but still no "3" for a 3.
        return TypeAdapter(Config).validate_json(json.dumps(values))
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors()]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error


def compose(params_dir: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values that Hydra composes from the groups of ddops and those in ``params_dir``, e.g. with
    ``["preset=digits_var"]``. Where there is no such directory, from those of ddops alone.

    Raises:
        ConfigError: no such preset, group option or key; or the result is not a valid configuration.
    """
    directory = _primary(Path(params_dir))
    parsed = [plain_override(override) for override in overrides]
    for override in parsed:
        _check_group_choice(directory, override)
    source = " ".join([str(params_dir), *(str(override.input_line) for override in parsed)])
    try:
        values = _hydra_values(directory, [str(override.input_line) for override in parsed])
    except ValueError as error:
        _explain_unknown_keys(directory, parsed, source)
        raise ConfigError(f"{source}: {error}") from error
    validate(values, source)
    return values


def group_files(params_dir: Path | str, group: str) -> dict[str, Path]:
    """The options of a group by name, each with its file: those in ``params_dir`` before those of ddops.

    Raises:
        ConfigError: two names differ in case alone, which many disks take for one.
    """
    places = (PARAMS / group, Path(params_dir) / group)
    files = {file.stem: file for place in places for file in sorted(place.glob("*.yaml"))}
    alike: dict[str, Path] = {}
    for name, file in files.items():
        if (other := alike.setdefault(name.lower(), file)) != file:
            raise ConfigError(
                f"{file}: differs from {other} in case alone, and many disks take them for one; rename it"
            )
    return files


def _primary(params_dir: Path) -> Path:
    """The directory that Hydra starts from. Raises ConfigError where it is not a workspace's."""
    if not params_dir.exists() and params_dir.name == "params":
        return WORKSPACE_PARAMS
    directory = params_dir.resolve()
    if not (directory / "config.yaml").is_file():
        raise ConfigError(f"{directory}: holds no config.yaml; ddops init writes one, and --params DIR means another")
    return directory


def write_params(values: Mapping[str, Any], path: Path) -> None:
    """Write composed values the way ``params.yaml`` is committed."""
    header = "# Composed by `ddops compose`: what `dvc repro` reads. Compose again to change it.\n"
    text = header + yaml.safe_dump(dict(values), sort_keys=False, width=100)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _hydra_values(directory: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Raises ValueError with Hydra's words."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(directory), version_base=None):
            composed = compose("config", overrides=list(overrides))
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(str(error)) from error
    return typing.cast("dict[str, Any]", values)


def _explain_unknown_keys(directory: Path, overrides: Sequence[Override], source: str) -> None:
    """Hydra refuses to set a key that is not there yet, and says no more. Set it all the same ("++"), and validation
    says which keys there are, or else that "++" was missing; returns where Hydra's own words will have to do."""
    forced = [
        line if override.is_delete() or _is_group(directory, override) else f"++{line.lstrip('+')}"
        for override in overrides
        for line in [str(override.input_line)]
    ]
    try:
        values = _hydra_values(directory, forced)
    except ValueError:
        return
    validate(values, source)
    raise ConfigError(f"{source}: sets keys that these options do not have; put ++ before the override to add them")


def _is_group(directory: Path, override: Override) -> bool:
    return any((place / override.key_or_group).is_dir() for place in (PARAMS, directory))


def _check_group_choice(directory: Path, override: Override) -> None:
    """Options are names: a path would lead Hydra to any file."""
    group = override.key_or_group
    if not _is_group(directory, override) or override.is_delete():
        return
    known, value = sorted(group_files(directory, group)), override.value()
    for choice in value if isinstance(value, list) else [value]:
        if choice not in known:
            raise ConfigError(f"{directory.name}/{group}: no {group} named {choice!r}; {_suggest(str(choice), known)}")


def _explain(detail: ErrorDetails) -> str:
    """One of pydantic's errors as ``section.key: what is wrong; what would be right``."""
    keys, here = _locate(detail["loc"])
    where = ".".join(keys)
    kind = detail["type"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{where}: unknown key; {_suggest(keys[-1], _fields(_locate(detail['loc'][:-1])[1]))}"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{where}: missing"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return _explain_tag(where, here, detail["input"])
    message = detail["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        # Our own checks start with the key they are about, relative to the dataclass that holds it.
        key, _, _ = message.partition(" ")
        joint = "." if key.split(".")[0].rstrip(":") in _fields(here) else ": "
        return f"{where}{joint}{message}" if where else message
    shown = repr(detail["input"])
    return f"{where}: {message}" if len(shown) > 80 else f"{where}: {message}, got {shown}"


def _explain_tag(where: str, union: Any, given: Any) -> str:
    """What is wrong with the key that chooses between a tagged union's members, such as ``family`` or ``source``."""
    tag, members = _tagged(union)
    if tag not in given:
        return f"{where}.{tag}: missing; valid: {', '.join(sorted(members))}"
    return f"{where}.{tag}: no {tag} named {given[tag]!r}; {_suggest(str(given[tag]), sorted(members))}"


def _locate(loc: Sequence[int | str]) -> tuple[list[str], Any]:
    """The keys of an error's location, and the annotation of what is there, as far as there is one."""
    keys: list[str] = []
    here: Any = Config
    for part in loc:
        # Where a tagged union is, pydantic names the tag next, which is no key.
        if part in (members := _tagged(here)[1]):
            here = members[str(part)]
            continue
        keys.append(str(part))
        if typing.get_origin(here) is dict:
            here = typing.get_args(here)[1]
        elif dataclasses.is_dataclass(here):
            here = typing.get_type_hints(here, include_extras=True).get(str(part))
        else:
            here = None
    return keys, here


def _tagged(annotation: Any) -> tuple[str, dict[str, Any]]:
    """The key that chooses between a tagged union's members, and each tag's member; none for other annotations."""
    union, *metadata = typing.get_args(annotation) or (None,)
    tags = [field.discriminator for field in metadata if isinstance(field, FieldInfo)]
    if not tags or not isinstance(tags[0], str):
        return "", {}
    members = typing.get_args(union)
    return tags[0], {typing.get_args(typing.get_type_hints(member)[tags[0]])[0]: member for member in members}


def _fields(annotation: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(annotation)] if dataclasses.is_dataclass(annotation) else []


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(known)}"
