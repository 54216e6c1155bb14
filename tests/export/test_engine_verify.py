"""The engine of a bundle against PyTorch; and the engine of the digits student, built as the benchmark builds it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ddops.cli import main
from ddops.export.manifest import read_manifest
from ddops.inference import backends
from ddops.inference.compare import compare_with_torch

ROOT = Path(__file__).parents[2]


def test_a_backend_is_compared_with_pytorch(bundle):
    """ONNX Runtime stands in for an engine, in batches as an engine takes them; none is left out."""
    manifest = read_manifest(bundle)
    other = backends.load_backend(bundle, manifest, "onnx")
    whole = compare_with_torch(bundle, manifest, other, images=7)
    other.max_batch = 3
    parity = compare_with_torch(bundle, manifest, other, images=7)
    assert parity.images == 7
    assert 0 < parity.largest < 1e-4
    assert parity.largest == pytest.approx(whole.largest, abs=2e-6)


@pytest.fixture
def engine_of_noise(monkeypatch):
    """In place of an engine: ONNX Runtime's images with noise of a given size."""

    def install(size):
        class Engine(backends.OnnxBackend):
            max_batch = 5

            def __init__(self, directory, manifest, device):
                super().__init__(directory, manifest, "cpu", 1)
                self.random = np.random.default_rng(0)

            def draw(self, noise_BLC, *condition):
                images = super().draw(noise_BLC, *condition)
                return images + size * self.random.standard_normal(images.shape).astype(np.float32)

        monkeypatch.setattr(backends, "TensorRTBackend", Engine)

    return install


def test_an_engine_that_draws_pytorchs_images_is_told_so(bundle, capsys, engine_of_noise):
    engine_of_noise(1e-3)
    assert main(["engine", str(bundle), "--verify"]) == 0
    assert "the engine against PyTorch, 16 images: largest difference 0.00" in capsys.readouterr().out


def test_an_engine_that_draws_others_is_refused(bundle, capsys, engine_of_noise):
    """Noise of a tenth of a pixel's unit: 10 log10(4 / 0.01) is 26 dB."""
    engine_of_noise(0.1)
    assert main(["engine", str(bundle), "--verify"]) == 1
    said = capsys.readouterr().err
    assert "PSNR 26." in said
    assert "30 dB are asked for in float32; build it again" in said


def test_without_a_gpu_or_a_task_the_command_says_so(bundle, capsys):
    assert main(["engine", str(bundle), "--verify"]) == 1
    assert "no GPU is visible here" in capsys.readouterr().err
    assert main(["engine", str(bundle)]) == 1
    assert "give a --target to build for, or --verify" in capsys.readouterr().err


@pytest.mark.rare
def test_the_engine_of_the_digits_student_is_built(tmp_path):
    """As recorded in benchmarks/results/engines_digits.json, in float16 and without a GPU. A second call keeps it."""
    output = tmp_path / "engines.json"
    command = [sys.executable, ROOT / "benchmarks/engines.py", "--preset", "digits", "--targets", "89"]
    command += ["--params", ROOT / "params", "--work", tmp_path, "--output", output]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads(output.read_text())
    assert result["build"]["89"]["bytes"] > 1_000_000
    assert result["build"]["89"]["peak_rss_bytes"] > result["build"]["89"]["bytes"]
    (engine,) = read_manifest(tmp_path / "bundle").engines
    assert (engine.target, engine.precision, engine.profile.max) == ("89", "float16", 64)
    assert (tmp_path / "bundle" / engine.file).stat().st_size == result["build"]["89"]["bytes"]
    subprocess.run(command, check=True, capture_output=True)
    assert json.loads(output.read_text())["build"] == result["build"]
