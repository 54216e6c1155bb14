"""What comes with `pip install ddops` alone, and what each missing extra is called by the command that needs it."""

import os
import subprocess
import sys

import pytest

BLOCK = "import sys; sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(',')))\n"
COMMAND = BLOCK + "from ddops.cli import main; raise SystemExit(main(sys.argv[1:]))"
EXTRAS = (
    *("prefect", "prefect_dask", "distributed", "dask", "dvc_s3", "tensorrt", "tensorrt_rtx", "transformers"),
    *("tokenizers", "pyarrow", "fastapi", "starlette", "uvicorn", "prometheus_client"),
)
DEFAULT = (
    BLOCK
    + """
import importlib, pkgutil
import ddops
from ddops.inference import OneStepPipeline
serving = "ddops.serving."
needing = {serving + name for name in ("app", "context", "metrics", "models", "server")} | {"ddops.export.triton_model"}
modules = {each.name for each in pkgutil.walk_packages(ddops.__path__, "ddops.")}
needing |= {name for name in modules if name.startswith("ddops.flows.")}
for name in sorted(modules - needing):
    importlib.import_module(name)
assert needing < modules, needing - modules
print(len(modules), OneStepPipeline.from_pretrained(sys.argv[1])([3], seed=1).images[0].size)
"""
)


def run(code, blocked, *arguments):
    command = [sys.executable, "-c", code, ",".join(blocked), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_without_any_extra_every_module_imports_and_images_are_drawn(bundle):
    done = run(DEFAULT, EXTRAS, bundle)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("(8, 8)\n")


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
def test_a_missing_extra_is_named(bundle, package, arguments, extra):
    done = run(COMMAND, [package], *(bundle if argument == "BUNDLE" else argument for argument in arguments))
    assert done.returncode == 1
    assert f"pip install 'ddops[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
