"""What comes with `pip install ddops` alone and with which extra, and that a missing one is named."""

import re
import tomllib
from pathlib import Path

import pytest

from ddops.extras import EXTRA_OF
from helpers.without import python_without

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow", "prometheus_client": "prometheus-client"}
BROUGHT_BY = {"gto": "dvc", "starlette": "fastapi", "tokenizers": "transformers"}
EVERY_MODULE = """
import importlib, pkgutil, sys
import ddops
needing = {f"ddops.serving.{name}" for name in ("app", "context", "metrics", "models", "server")}
needing |= {"ddops.export.triton_model"}  # runs in Triton
modules = {each.name for each in pkgutil.walk_packages(ddops.__path__, "ddops.") if ".flows" not in each.name}
for name in sorted(modules - needing):
    importlib.import_module(name)
assert needing < modules, needing - modules
print(ddops.OneStepPipeline.from_pretrained(sys.argv[1])([3], seed=1).images[0].size)
"""


def requirements(extra):
    """Names of the distributions that an extra brings, those of the extras in it included."""
    names = set()
    for each in PROJECT["optional-dependencies"][extra]:
        if inner := re.match(r"ddops\[(.*)\]", each):
            names.update(*(requirements(name) for name in inner[1].split(",")))
        else:
            names.add(re.match(r"[\w-]+", each)[0].lower().replace("_", "-"))
    return names


@pytest.mark.parametrize("module", EXTRA_OF)
def test_the_extra_that_is_named_brings_the_module(module):
    wanted = BROUGHT_BY.get(module) or DISTRIBUTIONS.get(module) or module.replace("_", "-")
    assert wanted in requirements(EXTRA_OF[module])


def test_who_serves_installs_nothing_that_trains():
    base = {re.match(r"[\w-]+", each)[0] for each in PROJECT["dependencies"]}
    assert base == {"numpy", "pydantic", "pyyaml", "hydra-core", "omegaconf"}
    assert requirements("serve") == {"onnxruntime", "pillow", "fastapi", "uvicorn", "prometheus-client"}


@pytest.mark.slow
def test_with_the_training_extra_every_module_imports_and_images_are_drawn(bundle, tmp_path):
    """All but the server and the flows, whose extras are their own."""
    absent = ["fastapi", "starlette", "uvicorn", "prometheus_client"]
    absent += [module for module, extra in EXTRA_OF.items() if extra not in ("train", "serve")]
    absent.remove("psutil")  # DVCLive brings it too
    done = python_without(tmp_path, absent, "-c", EVERY_MODULE, bundle)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(8, 8)\n"


def test_without_any_extra_configurations_are_composed_and_checked(tmp_path):
    (tmp_path / "params").symlink_to(Path(__file__).parents[2] / "params")
    for command in (("compose", "preset=smoke"), ("check",)):
        done = python_without(tmp_path, EXTRA_OF, "-m", "ddops.cli", *command)
        assert done.returncode == 0, done.stderr
        assert "preset smoke" in done.stdout


def test_without_any_extra_a_pipeline_names_the_one_it_needs(tmp_path):
    done = python_without(tmp_path, EXTRA_OF, "-c", "from ddops import OneStepPipeline")
    assert done.stderr.splitlines()[-1].endswith("pip install 'ddops[serve]'")
    unknown = python_without(tmp_path, [], "-c", "import ddops; ddops.TwoStepPipeline")
    assert "AttributeError: module 'ddops' has no attribute 'TwoStepPipeline'" in unknown.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("fastapi", ("serve", "BUNDLE"), "serve"),
        ("uvicorn", ("serve", "BUNDLE"), "serve"),
        ("prometheus_client", ("serve", "BUNDLE"), "serve"),
        ("tensorrt_rtx", ("engine", "BUNDLE", "--target", "89"), "rtx"),
        ("tensorrt", ("engine", "BUNDLE", "--flavour", "tensorrt", "--target", "current"), "gpu"),
        ("prefect", ("run", "smoke"), "prefect"),
    ],
)
def test_a_missing_extra_is_named(bundle, tmp_path, package, arguments, extra):
    (tmp_path / "dvc.yaml").touch()
    given = (bundle if argument == "BUNDLE" else argument for argument in arguments)
    done = python_without(tmp_path, [package], "-m", "ddops.cli", *given)
    assert done.returncode == 1
    assert f"pip install 'ddops[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
