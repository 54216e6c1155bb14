"""What serves needs nothing that trains: the packages of `ddops[serve]` alone, pretended here, and really installed."""

import hashlib
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ddops import OneStepPipeline
from ddops.extras import EXTRA_OF
from helpers.tiny import ROOT
from helpers.tiny_bundle import serving
from helpers.wheel import PIP, build_wheel
from helpers.without import environment_without, python_without

pytestmark = pytest.mark.slow

ABSENT = [package for package, extra in EXTRA_OF.items() if extra != "serve"]
"""Of every other extra."""
DRAW = """
import hashlib, sys
import ddops
assert "numpy" not in sys.modules, "import ddops is instant"
images = ddops.OneStepPipeline.from_pretrained(sys.argv[1])(class_labels=[3, 7], seed=0).images
print(*(hashlib.sha256(image.tobytes()).hexdigest() for image in images))
print(sorted({name.partition(".")[0] for name in sys.modules} & {"fastapi", "hydra", "omegaconf"}))
"""
LARGEST = 400
"""Megabytes of the environment that serves; 2.7 GB where training comes along."""


def test_the_same_bytes_are_drawn(bundle, tmp_path):
    images = OneStepPipeline.from_pretrained(bundle)(class_labels=[3, 7], seed=0).images
    done = python_without(tmp_path, ABSENT, "-c", DRAW, bundle)
    assert done.returncode == 0, done.stderr
    drawn, others = done.stdout.splitlines()
    assert drawn.split() == [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    assert others == "[]"


def test_an_image_is_served(bundle, tmp_path):
    without = environment_without(tmp_path / "without", ABSENT)
    with serving(bundle, tmp_path / "log", **without) as server, server.client() as client:
        answer = client.post("/v1/images", json={"class": 3, "seed": 0})
    assert answer.status_code == 200
    (image,) = OneStepPipeline(bundle)([3], seed=0).images
    drawn = np.asarray(Image.open(io.BytesIO(answer.content))).astype(int)
    assert np.abs(drawn - np.asarray(image).astype(int)).max() <= 1


def test_help_needs_none_of_it(tmp_path):
    done = python_without(tmp_path, EXTRA_OF, "-m", "ddops.cli", "--help")
    assert done.returncode == 0, done.stderr
    assert {"serve", "plan", "compose"} <= set(done.stdout.replace(",", " ").split())


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("ddops.cli", "plan", "var_d16"), "train"),
        (("ddops.cli", "fetch", "var_d16"), "train"),
        (("ddops.cli", "sample", "var_d16", "--classes", "1", "--grid", "grid.png"), "train"),
        (("ddops.cli", "run", "smoke"), "prefect"),
        (("ddops.stages.teacher",), "train"),
        (("ddops.stages.build_engine",), "train"),
        (("ddops.flows.setup",), "prefect"),
    ],
    ids=lambda given: " ".join(given[:2]) if isinstance(given, tuple) else given,
)
def test_what_needs_more_ends_with_one_line_that_names_the_extra(tmp_path, arguments, extra):
    (tmp_path / "dvc.yaml").touch()
    done = python_without(tmp_path, ABSENT, "-m", *arguments)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith(f"pip install 'ddops[{extra}]'\n")
    assert not done.stdout


PIPELINE = "from ddops import OneStepPipeline\nOneStepPipeline.from_pretrained"
PROMPTS = "from ddops.inference.prompts import PromptEncoder\nPromptEncoder"
SESSION = "from ddops.export.session import open_session\nopen_session"


@pytest.mark.parametrize(
    ("call", "extra"),
    [
        (f"{PIPELINE}(bundle, backend='torch')", "train"),
        (f"{PIPELINE}(bundle, backend='tensorrt')", "gpu"),
        (f"{PIPELINE}('owner/name')", "hub"),
        (f"{PROMPTS}(bundle, facts=None)", "t2i"),
        (f"{SESSION}(bundle / 'model.onnx', precision='bfloat16')", "train"),
    ],
    ids=["torch", "tensorrt", "hub", "prompts", "bfloat16"],
)
def test_what_serving_can_do_with_more_names_the_extra(bundle, tmp_path, call, extra):
    code = f"import sys\nfrom pathlib import Path\nbundle = Path(sys.argv[1])\n{call}"
    last = python_without(tmp_path, ABSENT, "-c", code, bundle).stderr.splitlines()[-1]
    assert last.startswith("ddops.extras.MissingExtra: ")
    assert last.endswith(f"pip install 'ddops[{extra}]'")


@pytest.mark.rare
def test_the_installed_wheel_serves(bundle, tmp_path, record_property):
    """`pip install 'WHEEL[serve]'` in an empty environment: no training stack comes along, and an image is drawn."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python, clean = str(tmp_path / "venv/bin/python"), {**os.environ, "PYTHONPATH": ""}
    install = ["--constraint", str(ROOT / "constraints.txt"), f"{build_wheel(tmp_path)}[serve]"]
    subprocess.run([python, *PIP, "install", *install], env=clean, check=True)

    code = "import importlib.metadata as m; print(*{each.name.lower() for each in m.distributions()})"
    listed = subprocess.run([python, "-c", code], env=clean, check=True, capture_output=True, text=True)
    names = {*listed.stdout.split()} - {"pip", "setuptools"}
    assert not names & {"torch", "torchvision", "dvc", "prefect", "onnx", "scikit-learn", "matplotlib", "safetensors"}
    size = sum(path.stat().st_size for path in (tmp_path / "venv").rglob("*") if path.is_file()) / 1e6
    record_property("megabytes", size)
    record_property("packages", len(names))
    print(f"{size:.0f} MB, {len(names)} packages: {', '.join(sorted(names))}")
    assert size < LARGEST
    with serving(bundle, tmp_path / "log", python=python, PYTHONPATH="") as server, server.client() as client:
        answer = client.post("/v1/images", json={"class": 3, "seed": 0})
    (image,) = OneStepPipeline(bundle)([3], seed=0).images
    assert Image.open(io.BytesIO(answer.content)).size == image.size
