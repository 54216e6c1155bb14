"""What the tests of the project's own structure read: the package's files and the pipeline's stages."""

import ast
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


PACKAGE = ROOT / "src" / "ddops"
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = DVC["stages"]


@cache
def imported_names(file):
    """Dotted names of everything a file imports, wherever in the file; ``from a import b`` gives a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import hides what it imports"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names
