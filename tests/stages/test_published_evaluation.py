"""From a released student straight to a verdict and an exported graph: the stages with Inception's architecture, random
weights and few samples, through the protocols dd_50k and adm_50k."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ddops.captions.conditions import Conditions
from ddops.cli import main
from ddops.config.evaluation import InceptionFeaturesConfig
from ddops.config.load import compose, load_config, validate, write_params
from ddops.config.stages import Config
from ddops.evaluation.inception import Inception, InceptionJudge
from ddops.evaluation.metrics import look
from ddops.evaluation.protocols import open_protocol
from ddops.evaluation.samples import open_samples
from ddops.files import sha256_file, write_json
from ddops.hub.records import DownloadError
from ddops.stages import (
    distill_dd1,
    evaluate,
    export_onnx,
    features,
    gate,
    paths,
    report,
    sample,
    teacher,
    trajectories,
)
from ddops.stages.common import sections
from helpers.hub_server import serve
from helpers.published_world import World, build
from helpers.tiny import PARAMS

COUNT = 70
"""Samples a row: more than the features of Inception's first layer, whose covariance must have full rank."""


@pytest.fixture(scope="module")
def inception() -> Inception:
    torch.manual_seed(0)
    return Inception().eval()


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inception on a ninth of the pixels; test_inception.py has all of them."""
    monkeypatch.setattr("ddops.evaluation.inception.SIDE", 107)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    hub, server = serve()
    yield build(tmp_path, hub, monkeypatch)
    server.shutdown()
    server.server_close()


def pictures(count: int) -> torch.Tensor:
    """Smooth colour pictures, unlike noise."""
    small = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    return torch.nn.functional.interpolate(small, size=(64, 64), mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)


def write_inputs(inception: Inception, resize: str, keys: tuple[str, str], *, images: bool) -> None:
    """Weights and statistics, as a user without a network would put them there."""
    torch.save(inception.state_dict(), "inception.pth")
    real_NIHW = pictures(COUNT)
    found = look(InceptionJudge(inception, 64, resize), real_NIHW.split(16)).statistics
    extra = {"arr_0": real_NIHW.permute(0, 2, 3, 1).numpy()} if images else {}
    np.savez("statistics.npz", **{keys[0]: found.mean_F, keys[1]: found.covariance_FF}, **extra)


def configure(*overrides: str) -> Config:
    local = ["features.weights.path=inception.pth", "evaluate.statistics.path=statistics.npz", "features.layer=64"]
    common = ["gate=smoke", "evaluate.batch_size=16", "export.parity_count=2", *local]
    write_params(compose("params", [*overrides, *common]), paths.PARAMS)
    return load_config()


def run_sample(config: Config) -> None:
    sample.sample(config.sampling, config.trajectories, config.dd1, config.ar_diffusion, config.dd2, config.evaluate)


def run_to_metrics(config: Config) -> dict:
    features.features(config.seed, config.features)
    teacher.teacher(config.seed, config.teacher)
    trajectories.trajectories(config.seed, config.teacher, config.trajectories)
    distill_dd1.distill_dd1(config.seed, config.features, config.dd1)
    run_sample(config)
    evaluate.evaluate(config.evaluate)
    return json.loads(paths.METRICS.read_text())


@pytest.mark.slow
def test_dd_50k_from_the_released_student_to_the_exported_graph(world: World, inception: Inception) -> None:
    write_inputs(inception, "pytorch_fid", ("m", "s"), images=False)
    rows = "evaluate.rows=[dd1_1step,teacher_involved_2_3]"
    config = configure("preset=tiny_var", f"evaluate.samples={COUNT}", rows)
    metrics = run_to_metrics(config)
    for row in ("dd1_1step", "teacher_involved_2_3"):
        assert metrics[row]["fid"] > 0
        assert metrics[row]["samples"] == COUNT
        assert "precision" not in metrics[row], "the statistics hold no real images"
    assert (metrics["dd1_1step"]["passes"], metrics["teacher_involved_2_3"]["passes"]) == (1, 3)
    protocol = metrics["protocol"]
    assert (protocol["name"], protocol["resize"], protocol["labels"]) == ("dd_50k", "pytorch_fid", "drawn at random")
    assert protocol["reference_sha256"] == sha256_file(Path("statistics.npz"))
    assert metrics["models"]["dd1"] == sha256_file(paths.DD1_STUDENT)

    samples = open_samples(paths.SAMPLES / "dd1_1step" / "seed0.npz")
    assert samples.shape == (COUNT, 64, 64, 3)
    assert torch.equal(samples.labels_N, open_protocol(config.evaluate).labels(0, Conditions(10)))
    assert len(samples.labels_N.unique()) == 10

    command = ["table", "--rows", "dd1_1step,skip_1"]
    assert main([*command, "--timing-batch", "2", "--timing-rounds", "1", "--ppl-samples", "0"]) == 0
    known = json.loads(paths.METRICS.with_name("table.json").read_text())["rows"]
    assert set(known) == {"dd1_1step", "skip_1"}
    assert known["dd1_1step"]["fid"] == metrics["dd1_1step"]["fid"], "taken over from the pipeline"
    assert known["skip_1"]["fid"] > 0

    gate.gate(**{name: getattr(config, name) for name in sections(gate.gate)})
    export_onnx.export(config.preset, config.dd1, config.dd2, config.evaluate, config.export)
    report.report(config.preset, config.seed, config.export)
    assert json.loads(paths.EXPORT_METRICS.read_text())["parity"]["images"] == 2
    page = paths.REPORT.read_text()
    assert "dd_50k" in page
    assert f"{metrics['dd1_1step']['fid']:.2f}" in page


@pytest.mark.slow
def test_adm_50k_with_the_reference_batchs_images(world: World, inception: Inception) -> None:
    write_inputs(inception, "tensorflow1", ("mu", "sigma"), images=True)
    overrides = ["evaluate=adm_50k", "evaluate.samples_per_class=7", "evaluate.kid.subset_size=50"]
    config = configure("preset=tiny_llamagen", *overrides, "evaluate.rows=[dd1_1step]", "evaluate.image_size=32")
    metrics = run_to_metrics(config)
    row = metrics["dd1_1step"]
    assert set(row) >= {"fid", "kid", "precision", "recall"}
    assert row["samples"] == 70
    samples = open_samples(paths.SAMPLES / "dd1_1step" / "seed0.npz")
    assert samples.labels_N.bincount().tolist() == [7] * 10
    assert samples.shape == (70, 32, 32, 3)
    assert metrics["protocol"]["labels"] == "as many of every class"


@pytest.mark.slow
def test_real_images_judged_against_themselves_are_perfect(world: World, inception: Inception) -> None:
    """The whole ruler of adm_50k at once: what it calls best must be the reference itself."""
    from ddops.evaluation.inception import convert_inception
    from ddops.evaluation.ruler import open_ruler

    write_inputs(inception, "tensorflow1", ("mu", "sigma"), images=True)
    config = configure("preset=tiny_var", "evaluate=adm_50k", "evaluate.kid.subset_size=70")
    convert_inception(Path("inception.pth"), paths.CLASSIFIER, 64)
    ruler = open_ruler(config.evaluate, paths.CLASSIFIER, Path("statistics.npz"))
    figures = ruler.figures(pictures(COUNT).split(16), torch.zeros(COUNT))
    assert figures["fid"] == pytest.approx(0, abs=1e-4)
    assert (figures["precision"], figures["recall"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("stage", "file", "key"),
    [("features", "weights-inception-2015-12-05-6726825d.pth", "features.weights.path=FILE"),
     ("sample", "ImageNet-256_FID_Statistic/statistic.pth", "evaluate.statistics.path=FILE")],
)  # fmt: skip
def test_without_a_network_it_is_said_what_to_put_where(
    world: World, monkeypatch: pytest.MonkeyPatch, stage: str, file: str, key: str
) -> None:
    for kind in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(kind, "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(world.root / "home"))
    config = validate(compose("params", ["preset=tiny_var"]), "here")
    run = {
        "features": lambda: features.features(config.seed, config.features),
        "sample": lambda: run_sample(config),
    }[stage]
    with pytest.raises(DownloadError) as error:
        run()
    assert re.search(rf"{re.escape(file)} .* set {re.escape(key)}", str(error.value))
    assert "the connection failed" in str(error.value)


def test_a_local_copy_must_be_the_published_file(world: World, inception: Inception) -> None:
    """A figure by other weights would stand beside the papers' as if it were one of theirs."""
    write_inputs(inception, "pytorch_fid", ("m", "s"), images=False)
    config = configure("preset=tiny_var")
    assert isinstance(config.features, InceptionFeaturesConfig)
    directory, _, name = config.features.weights.url.rpartition("/")
    for sha256 in (sha256_file(Path("inception.pth")), "00" * 32):
        write_json(world.root / "manifest.json", {directory: {"files": {name: {"sha256": sha256}}}})
        if sha256 != "00" * 32:
            features.features(config.seed, config.features)
            assert paths.CLASSIFIER.exists()
            continue
        with pytest.raises(DownloadError, match=rf"inception\.pth: .* sha256 .* {name} has {sha256}"):
            features.features(config.seed, config.features)


@pytest.mark.slow
def test_plan_says_what_is_fetched(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "released_dd1_var_d16", "--params", str(PARAMS)]) == 0
    text = capsys.readouterr().out
    assert "fetch weights-inception-2015-12-05-6726825d.pth: Inception, layer 2048" in text
    assert "50,000 images x 1 seeds x 3 rows" in text
    assert "protocol dd_50k, fetch statistic.pth" in text
