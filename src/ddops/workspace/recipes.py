"""The recipes: what each stage computes, as a number that is raised when that changes (docs/RECIPES.md).

The numbers that this ddops computes by come with its code. A workspace's ``recipes.yaml`` says by which its outputs are
made; ``dvc.yaml`` reads it as a parameter, so a raised number runs the stage again, and an edited comment does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from ddops.workspace.files import TEMPLATE

RECIPES: Final = Path("recipes.yaml")
"""In a workspace, and in what ddops writes there."""


class RecipeError(ValueError):
    """A workspace whose recipes are not those of this ddops. The message says what to do."""


@cache
def known_recipes() -> Mapping[str, int]:
    """By stage: the recipe that this ddops computes by."""
    return read_recipes(TEMPLATE / RECIPES)


def recipe(stage: str) -> int:
    """The recipe that this ddops computes a stage by: part of the fingerprint of all that a stage goes on with.

    Raises:
        KeyError: there is no such stage.
    """
    return known_recipes()[stage]


def read_recipes(path: Path = RECIPES) -> dict[str, int]:
    """By stage: the recipe that a file gives it.

    Raises:
        RecipeError: the file is missing, is no mapping in YAML, or a value is no positive whole number.
    """
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: missing; a workspace of an earlier ddops gets it by: ddops migrate") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not readable as YAML: {error}. {_restore(path)}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected a number for every stage, found {type(values).__name__}. {_restore(path)}")
    for stage, value in values.items():
        if type(value) is not int or value < 1:
            raise RecipeError(f"{path}: {stage}: expected a whole number from 1 on, got {value!r}. {_restore(path)}")
    return values


def require_recipe(stage: str, path: Path = RECIPES) -> None:
    """See to it that a workspace asks for what this ddops computes.

    Raises:
        RecipeError: as :func:`read_recipes`; or the file lacks the stage, names one that this ddops does not have, or
            has another number for it than this ddops.
    """
    found, known = read_recipes(path), known_recipes()
    if strangers := sorted(map(str, found.keys() - known.keys())):
        raise RecipeError(
            f"{path}: {strangers[0]}: no stage of this ddops. Where a newer one wrote the file, update ddops; else "
            f"remove the line. Stages: {', '.join(known)}"
        )
    if stage not in found:
        raise RecipeError(f"{path}: has no recipe for {stage}; ddops migrate writes it")
    if found[stage] < known[stage]:
        raise RecipeError(
            f"{path}: {stage} is {found[stage]}, this ddops computes by recipe {known[stage]}: ddops migrate writes "
            "that number, and dvc repro then makes the stage's output anew"
        )
    if found[stage] > known[stage]:
        raise RecipeError(
            f"{path}: {stage} is {found[stage]}, of a newer ddops than this, which computes by recipe {known[stage]}: "
            f"update ddops. If nobody meant to change the file: git checkout -- {path}"
        )


def require_recipes(path: Path = RECIPES) -> None:
    """The same of every stage; raises RecipeError."""
    for stage in known_recipes():
        require_recipe(stage, path)


def _restore(path: Path) -> str:
    return f"Restore it: git checkout -- {path}, or ddops migrate"
