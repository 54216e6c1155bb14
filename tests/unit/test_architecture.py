"""The map of the house: who may import whom, and that dvc.yaml says what the stages do."""

import ast
import importlib
import subprocess
import sys
from functools import cache
from itertools import takewhile
from pathlib import Path

import pytest
import yaml

from ddops.stages import paths
from ddops.stages.common import sections

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src"
PACKAGE = SRC / "ddops"
FILES = sorted(PACKAGE.rglob("*.py"))
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = DVC["stages"]

MAY_IMPORT = {
    "files": set(),
    "lock": set(),
    "production": {"files"},
    "torchvision_compat": set(),
    "class_names": {"torchvision_compat"},
    "data": set(),
    "params": set(),
    "config": set(),
    "workspace": {"config", "files"},
    "flow": {"config"},
    "models": {"config", "files", "flow"},
    "hub": {"config", "files", "models"},
    "captions": {"workspace", "config", "files", "data", "models", "torchvision_compat"},
    "sampling": {"config", "models", "flow"},
    "losses": {"config", "models", "torchvision_compat"},
    "training": {"config", "files", "sampling"},
    "trajectories": {"workspace", "config", "files", "models", "captions", "flow", "sampling"},
    "pretrain": {"config", "data", "models", "training"},
    "distill": {"config", "models", "flow", "sampling", "losses", "training", "trajectories"},
    "costs": {"config", "models", "flow", "sampling", "losses", "training", "trajectories", "pretrain", "distill"},
    "evaluation": {
        *(
            "workspace",
            "config",
            "files",
            "data",
            "models",
            "captions",
            "flow",
            "sampling",
            "trajectories",
            "torchvision_compat",
        ),
    },
    "export": {"class_names", "config", "files", "models", "captions", "sampling"},
    "inference": {"class_names", "config", "files", "models", "captions", "sampling", "export"},
    "serving": {"class_names", "config", "files", "production", "export", "inference"},
    "stages": {
        *("config", "files", "data", "models", "hub", "captions", "sampling", "losses", "training", "trajectories"),
        *("workspace", "production", "pretrain", "distill", "evaluation", "export"),
    },
    "commands": {
        *("class_names", "config", "files", "models", "hub", "captions", "sampling", "losses", "trajectories"),
        *("workspace", "lock", "production", "costs", "evaluation", "export", "inference", "serving", "stages"),
    },
    "flows": {"config", "lock", "evaluation", "stages"},
    "cli": {"workspace", "config", "lock", "models", "production", "evaluation", "export", "commands", "stages"},
}
"""The whole rule. A line imports from lines above it and from nothing else; a new part of ddops needs a line."""

ONLY_HERE = {
    "dvclive": {"training/curves.py"},
    "hydra": {"config/load.py"},
    "torch_fidelity": {"evaluation/inception.py", "evaluation/metrics.py"},
    "lpips": {"losses/perceptual.py"},
    "torchvision": {"class_names.py"},
    "distributed": {"trajectories/mappers.py"},
    "dvc": set(),
    "prefect": {f"flows/{file.name}" for file in (PACKAGE / "flows").glob("*.py")},
    "transformers": {"captions/pretrained.py"},
    "tokenizers": {"captions/pretrained.py"},
    "pyarrow": {"captions/prompts.py"},
}
"""Outside packages that only these files may import (none: the pipeline's tools are not ddops' business)."""

MAX_LINES = 400

HELPERS = ("common", "checkpoints", "launch", "paths", "statistics", "dd2_watch", "fid_curve")
"""Modules among the stages that are none."""


def part_of(file):
    """The line of the table that a file belongs to: its folder, or itself at the top."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


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


def test_the_table_is_a_ladder():
    """No cycle can be written into it."""
    order = list(MAY_IMPORT)
    for part, allowed in MAY_IMPORT.items():
        assert allowed <= set(takewhile(lambda above, part=part: above != part, order)), part


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_one_way(file):
    if file.parent == PACKAGE and file.name in ("__init__.py", "__main__.py"):
        return
    part = part_of(file)
    assert part in MAY_IMPORT, f"{part} is new: give it a line in MAY_IMPORT"
    used = {name.split(".")[1] for name in imported_names(file) if name.startswith("ddops.")} - {part, "__version__"}
    assert used <= MAY_IMPORT[part], f"{part} must not import {used - MAY_IMPORT[part]}"


@pytest.mark.parametrize("package", ONLY_HERE)
def test_outside_tools_are_kept_to_their_place(package):
    users = {
        str(file.relative_to(PACKAGE))
        for file in FILES
        if any(name == package or name.startswith(f"{package}.") for name in imported_names(file))
    }
    assert users <= ONLY_HERE[package]


@pytest.mark.parametrize("module", ["ddops.config.load", "ddops.cli", "ddops.stages.gate", "ddops.stages.report"])
def test_what_computes_nothing_does_not_load_torch(module):
    """A configuration error or a verdict shows in a moment, not after the seconds that torch takes to load."""
    code = f"import sys, {module}; print(sorted({{'torch', 'dvc', 'prefect', 'sklearn'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_no_file_is_too_long_to_read():
    files = [*FILES, *PACKAGE.rglob("*.html")]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


# dvc.yaml


def plain(entry):
    """The path of an entry of outs, metrics or plots, which may be a mapping from it to options."""
    return Path(next(iter(entry)) if isinstance(entry, dict) else entry)


def outputs(stage):
    return [plain(entry) for key in ("outs", "metrics", "plots") for entry in stage.get(key, [])]


def covers(above, path):
    return path == above or above in path.parents


ALL_OUTPUTS = [path for stage in STAGES.values() for path in outputs(stage)]
CONSTANTS = {
    name: value
    for name, value in vars(paths).items()
    if isinstance(value, Path)
    and name not in ("PARAMS", "STATE", "REPORTS", "CURVES", "CODE", "PRODUCTION", "TRAJECTORIES_THROUGHPUT")
}


def stage_function(name):
    """What the stage's module hands to ``run_stage``."""
    module = importlib.import_module(f"ddops.stages.{name}")
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "run_stage":
            return getattr(module, node.args[0].id)
    raise AssertionError(f"{name} does not call run_stage")


def test_every_stage_module_is_a_stage_and_the_other_way_round():
    modules = {file.stem for file in (PACKAGE / "stages").glob("*.py")} - {"__init__", *HELPERS}
    assert modules == set(STAGES)
    assert all(stage["cmd"] == f"sh stage.sh {name}" for name, stage in STAGES.items())


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_declares_the_parameters_it_reads(name):
    """A section read and not declared would not re-run the stage; declared and not read, it would do so for nothing."""
    *read, recipe = STAGES[name]["params"]
    assert sorted(read) == sorted(sections(stage_function(name)))
    assert recipe == {"recipes.yaml": [name]}


@pytest.mark.parametrize("constant", CONSTANTS)
def test_every_path_in_the_code_is_the_output_of_one_stage(constant):
    owners = [path for path in ALL_OUTPUTS if covers(path, CONSTANTS[constant])]
    assert len(owners) == 1


def test_every_output_is_a_path_in_the_code():
    known = [*CONSTANTS.values(), paths.CURVES, *map(paths.code_record, STAGES)]
    strangers = [path for path in ALL_OUTPUTS if not any(covers(path, k) or covers(k, path) for k in known)]
    assert not strangers


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_declares_its_code_record_and_nothing_depends_on_it(name):
    """In Git and not in DVC's cache, as the decision of the gate is; for information, so nothing follows from it."""
    assert {str(paths.code_record(name)): {"cache": False}} in STAGES[name]["outs"]
    assert not any(covers(paths.CODE, Path(path)) for path in STAGES[name].get("deps", []))


def test_running_state_is_outside_the_outputs():
    """DVC deletes a stage's outputs before it runs, which would take the checkpoints with them."""
    assert not any(covers(path, paths.STATE) or covers(paths.STATE, path) for path in ALL_OUTPUTS)
    persistent = [plain(out) for stage in STAGES.values() for out in stage.get("outs", []) if isinstance(out, dict)]
    assert [path for path in persistent if path.parts[0] == "data"] == [paths.CAPTIONS, paths.TRAJECTORIES]


@pytest.mark.parametrize("name", STAGES)
def test_what_a_stage_depends_on_is_another_stages_output(name):
    for dependency in map(Path, STAGES[name].get("deps", [])):
        assert dependency in (*ALL_OUTPUTS, paths.PRODUCTION)
        assert dependency not in outputs(STAGES[name])


def test_the_plotted_curves_are_outputs():
    curves = [Path(file) for plot in DVC["plots"] for options in plot.values() for file in options["y"]]
    assert curves
    assert all(any(covers(path, curve) for path in ALL_OUTPUTS) for curve in curves)
