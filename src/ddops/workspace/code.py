"""Which code a stage ran, file by file: for information, beside the recipe, which decides (docs/RECIPES.md).

A stage notes the files of ddops that its module reaches by imports, each with two hashes: of its text, and of what is
left of it without comments, docstrings and layout. Nothing depends on the note.
"""

from __future__ import annotations

import ast
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, Final

from ddops.workspace.recipes import RecipeError, recipe

PACKAGE: Final = Path(__file__).parents[1]
"""ddops itself."""
CODE, COMMENTS, NEW, GONE = "code", "comments only", "new", "gone"
"""How a file can differ from what it was."""


def record(stage: str, version: str) -> dict[str, Any]:
    """What a stage notes as it starts: the same whenever and wherever the same code runs."""
    files = sorted(reached(PACKAGE / "stages" / f"{stage}.py"))
    hashes = {
        str(file.relative_to(PACKAGE)): {"text": _text_sha256(file), "code": _code_sha256(file)} for file in files
    }
    return {"ddops": version, "recipe": recipe(stage), "files": hashes}


def accepted(stage: str) -> dict[str, Any]:
    """The note on an output that was made before there were notes, and accepted as made by the recipe of now."""
    return {"ddops": "an earlier version", "recipe": recipe(stage), "files": {}}


def changes(recorded: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """By file: how it differs between two records; a file that does not is left out."""
    before, after = recorded["files"], now["files"]
    found = {name: GONE for name in before.keys() - after.keys()} | {name: NEW for name in after.keys() - before.keys()}
    for name in before.keys() & after.keys():
        if before[name]["code"] != after[name]["code"]:
            found[name] = CODE
        elif before[name]["text"] != after[name]["text"]:
            found[name] = COMMENTS
    return dict(sorted(found.items()))


def read_record(path: Path) -> dict[str, Any] | None:
    """A stage's note; None where there is none.

    Raises:
        RecipeError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found["recipe"], int):
            raise TypeError("recipe")
        for hashes in found["files"].values():
            hashes["text"], hashes["code"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{path}: damaged ({error!r}); restore it from Git, or run the stage again") from None
    return dict(found)


def reached(file: Path) -> set[Path]:
    """The files of ddops that a module's result may depend on: what it imports, at any depth and wherever in the file,
    and templates: what lies beside one of those and is named in one."""
    seen: set[Path] = set()
    todo = [file]
    while todo:
        if (file := todo.pop()) not in seen:
            seen.add(file)
            todo += _imported(file)
    beside = {other for folder in {file.parent for file in seen} for other in folder.iterdir() if other.is_file()}
    sources = [_source(file) for file in seen]
    return seen | {other for other in beside if not _is_code(other) and any(other.name in text for text in sources)}


@cache
def _source(file: Path) -> str:
    return file.read_text(encoding="utf-8")


@cache
def _imported(file: Path) -> frozenset[Path]:
    names: list[str] = []
    for node in ast.walk(ast.parse(_source(file))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return frozenset(filter(None, map(_module_file, names)))


def _module_file(name: str) -> Path | None:
    """The file of a dotted name within ddops; None where it is no module of it, or its room's, which holds nothing."""
    top, *parts = name.split(".")
    path = PACKAGE.joinpath(*parts).with_suffix(".py")
    return path if top == PACKAGE.name and parts and path.is_file() else None


def _is_code(file: Path) -> bool:
    return file.suffix in (".py", ".pyc")


def _text_sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _code_sha256(file: Path) -> str:
    return code_sha256(_source(file)) if file.suffix == ".py" else _text_sha256(file)


@cache
def code_sha256(source: str) -> str:
    """Hash of what Python source does: without comments, docstrings and layout."""
    tree = _Undocumented().visit(ast.parse(source))
    return hashlib.sha256(ast.unparse(ast.fix_missing_locations(tree)).encode()).hexdigest()


class _Undocumented(ast.NodeTransformer):
    """Drops strings that stand alone: docstrings, of attributes too."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.body:
            node.body = [ast.Pass()]
        return node
