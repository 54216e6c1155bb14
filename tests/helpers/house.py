"""What the tests of the project's own structure read: the package's files and the pipeline's stages."""

import ast
import importlib
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


def run_stage_call(name):
    """What the module of a stage hands to ``run_stage``: the stage, and the section whose trainings it runs."""
    module = importlib.import_module(f"ddops.stages.{name}")
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "run_stage":
            options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
            return getattr(module, node.args[0].id), options.get("trains")
    raise AssertionError(f"{name} does not call run_stage")
