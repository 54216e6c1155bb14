"""The map of the house: who may import whom, and that dvc.yaml says what the stages do."""

import json
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

from ddops.stages import paths
from ddops.stages.common import sections
from helpers.house import DVC, PACKAGE, STAGES, imported_names, run_stage_call

ROOT = Path(__file__).parents[2]
FILES = sorted(PACKAGE.rglob("*.py"))

MAY_IMPORT = {
    "files": set(),
    "extras": set(),
    "git": set(),
    "lock": set(),
    "production": {"files"},
    "reports": {"files"},
    "torchvision_compat": set(),
    "class_names": {"torchvision_compat"},
    "data": set(),
    "params": set(),
    "config": set(),
    "workspace": {"config", "files"},
    "flow": {"config"},
    "models": {"config", "files", "flow"},
    "hub": {"config", "files", "lock", "models"},
    "captions": {"workspace", "config", "extras", "files", "data", "models", "torchvision_compat"},
    "sampling": {"config", "models", "flow"},
    "losses": {"config", "models", "torchvision_compat"},
    "training": {"config", "files", "sampling"},
    "trajectories": {"workspace", "config", "extras", "files", "models", "captions", "flow", "sampling"},
    "pretrain": {"config", "data", "models", "training"},
    "distill": {"config", "models", "flow", "sampling", "losses", "training", "trajectories"},
    "costs": {"config", "models", "flow", "sampling", "losses", "training", "trajectories", "pretrain", "distill"},
    "evaluation": {
        *("config", "files", "git", "data", "models", "captions", "flow", "sampling", "trajectories"),
        *("workspace", "reports", "torchvision_compat"),
    },
    "export": {"class_names", "config", "extras", "files", "reports", "git", "models", "captions", "sampling"},
    "inference": {"class_names", "config", "extras", "files", "models", "captions", "sampling", "export"},
    "serving": {"class_names", "config", "files", "production", "export", "inference"},
    "stages": {
        *("config", "files", "data", "models", "hub", "captions", "sampling", "losses", "training", "trajectories"),
        *("workspace", "extras", "production", "reports", "pretrain", "distill", "evaluation", "export"),
    },
    "commands": {
        *("class_names", "config", "extras", "files", "models", "hub", "captions", "sampling", "losses"),
        *("trajectories", "workspace", "lock", "production", "costs", "evaluation", "export", "inference", "serving"),
        *("reports", "stages"),
    },
    "flows": {"config", "extras", "files", "git", "lock", "production", "reports", "evaluation", "stages"},
    "cli": {
        *(
            "workspace",
            "config",
            "extras",
            "lock",
            "models",
            "production",
            "reports",
            "evaluation",
            "export",
            "commands",
            "stages",
        ),
    },
}
"""The whole rule. A line imports from lines above it and from nothing else; a new part of ddops needs a line."""

ONLY_HERE = {
    "dvclive": {"training/curves.py"},
    "hydra": {"config/load.py", "config/overrides.py"},
    "torch_fidelity": {"evaluation/fidelity.py", "evaluation/inception.py"},
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


def test_the_table_is_a_ladder():
    """No cycle can be written into it."""
    order = list(MAY_IMPORT)
    for part, allowed in MAY_IMPORT.items():
        assert allowed <= set(takewhile(lambda above, part=part: above != part, order)), part


def test_imports_run_one_way():
    """Every file at once: what fails is the list of those that import what they must not."""
    wrong = {}
    for file in FILES:
        if file.parent == PACKAGE and file.name in ("__init__.py", "__main__.py"):
            continue
        part = part_of(file)
        assert part in MAY_IMPORT, f"{part} is new: give it a line in MAY_IMPORT"
        used = {name.split(".")[1] for name in imported_names(file) if name.startswith("ddops.")}
        if strangers := used - MAY_IMPORT[part] - {part, "__version__"}:
            wrong[str(file.relative_to(PACKAGE))] = strangers
    assert not wrong


def test_outside_tools_are_kept_to_their_place():
    wrong = {}
    for package, allowed in ONLY_HERE.items():
        users = {
            str(file.relative_to(PACKAGE))
            for file in FILES
            if any(name == package or name.startswith(f"{package}.") for name in imported_names(file))
        }
        if strangers := users - allowed:
            wrong[package] = strangers
    assert not wrong


def test_no_test_file_imports_another():
    """What they share is in tests/helpers."""
    files = [*(ROOT / "tests").rglob("*.py")]
    tests = {file.stem for file in files if file.name.startswith("test_")}
    wrong = {
        str(file.relative_to(ROOT)): found
        for file in files
        if (found := {name for name in imported_names(file) if tests & set(name.split("."))})
    }
    assert not wrong


def test_what_computes_nothing_does_not_load_torch():
    """A configuration error or a verdict shows in a moment, not after the seconds that torch takes to load."""
    code = (
        "import importlib, json, sys\n"
        "heavy, seen = {'torch', 'dvc', 'prefect', 'sklearn'}, {}\n"
        "for module in sys.argv[1:]:\n"
        "    importlib.import_module(module)\n"
        "    seen[module] = sorted(heavy & set(sys.modules))\n"
        "print(json.dumps(seen))\n"
    )
    modules = ["ddops.config.load", "ddops.cli", "ddops.stages.gate", "ddops.stages.report"]
    result = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == {module: [] for module in modules}


def test_what_serves_and_the_command_line_load_nothing_that_trains():
    """Nor what composes a configuration: `ddops serve` and `ddops --help` start at once, in an environment of their
    own."""
    modules = ["cli", "serving.server", "inference.pipeline", "export.session", "export.manifest"]
    heavy = {"torch", "torchvision", "onnx", "dvc", "prefect", "sklearn", "safetensors", "matplotlib", "hydra"}
    imports = "\n".join(f"import ddops.{module}" for module in modules)
    code = f"import sys\n{imports}\nprint(sorted({heavy} & set(sys.modules)))"
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


def test_every_stage_module_is_a_stage_and_the_other_way_round():
    modules = {file.stem for file in (PACKAGE / "stages").glob("*.py")} - {"__init__", *HELPERS}
    assert modules == set(STAGES)
    assert all(stage["cmd"] == f"sh stage.sh {name}" for name, stage in STAGES.items())


def test_a_stage_declares_the_parameters_it_reads():
    """A section read and not declared would not re-run the stage; declared and not read, it would do so for nothing."""
    declared = {name: (sorted(stage["params"][:-1]), stage["params"][-1]) for name, stage in STAGES.items()}
    read = {name: (sorted(sections(run_stage_call(name)[0])), {"recipes.yaml": [name]}) for name in STAGES}
    assert declared == read


def test_every_path_in_the_code_is_the_output_of_one_stage():
    owners = {name: [path for path in ALL_OUTPUTS if covers(path, constant)] for name, constant in CONSTANTS.items()}
    assert not {name: found for name, found in owners.items() if len(found) != 1}


def test_every_output_is_a_path_in_the_code():
    known = [*CONSTANTS.values(), paths.CURVES, *map(paths.code_record, STAGES)]
    strangers = [path for path in ALL_OUTPUTS if not any(covers(path, k) or covers(k, path) for k in known)]
    assert not strangers


def test_a_stage_declares_its_code_record_and_nothing_depends_on_it():
    """In Git and not in DVC's cache, as the decision of the gate is; for information, so nothing follows from it."""
    for name, stage in STAGES.items():
        # In DVC's cache: an output of Git's would keep DVC from remembering the stage's runs.
        assert str(paths.code_record(name)) in stage["outs"]
        assert not any(covers(paths.CODE, Path(path)) for path in stage.get("deps", []))


def test_running_state_is_outside_the_outputs():
    """DVC deletes a stage's outputs before it runs, which would take the checkpoints with them."""
    assert not any(covers(path, paths.STATE) or covers(paths.STATE, path) for path in ALL_OUTPUTS)
    persistent = [plain(out) for stage in STAGES.values() for out in stage.get("outs", []) if isinstance(out, dict)]
    assert [path for path in persistent if path.parts[0] == "data"] == [paths.CAPTIONS, paths.TRAJECTORIES]


def test_what_a_stage_depends_on_is_another_stages_output():
    for name, stage in STAGES.items():
        for dependency in map(Path, stage.get("deps", [])):
            assert dependency in (*ALL_OUTPUTS, paths.PRODUCTION), name
            assert dependency not in outputs(stage), name


def test_the_plotted_curves_are_outputs():
    curves = [Path(file) for plot in DVC["plots"] for options in plot.values() for file in options["y"]]
    assert curves
    assert all(any(covers(path, curve) for path in ALL_OUTPUTS) for curve in curves)
