"""The stage `export_onnx` judges the graph by the preset's protocol, beside PyTorch's samples of the same noise."""

import json
import re
import shutil

import pytest
import torch

from ddops.captions.conditions import Conditions
from ddops.config.load import compose, load_config, validate, write_params
from ddops.data import digits
from ddops.evaluation.drawing import Request, draw_batches, from_noise
from ddops.evaluation.gate import Decision, comparable
from ddops.evaluation.images import to_uint8
from ddops.evaluation.judge import new_classifier, save_classifier
from ddops.evaluation.protocols import open_protocol
from ddops.evaluation.samples import open_samples, write_samples
from ddops.export.graph import load_graph
from ddops.export.parity import Parity
from ddops.files import sha256_file, write_json
from ddops.stages import export_onnx, paths
from ddops.stages.export_onnx import judge_exported
from helpers.few_digits import FEW, few_digits
from helpers.here import run_stage_here
from helpers.tiny import FAMILIES, PARAMS, write_recipes


@pytest.fixture(scope="module", autouse=True)
def few():
    with few_digits():
        yield


@pytest.fixture
def judged(few, bundle, tmp_path, monkeypatch):
    """A workspace up to the export: a student, a judge, and the samples that PyTorch drew of the protocol's seed."""
    monkeypatch.chdir(tmp_path)
    evaluate = ["evaluate.samples_per_image=1", "evaluate.seeds=[3]", "evaluate.kid.subset_size=100"]
    export = ["export.student=dd1", "export.parity_count=4"]
    values = compose(PARAMS, [*FAMILIES["llamagen"], *evaluate, *export])
    config = validate(values, "judged")
    write_params(values, tmp_path / "params.yaml")
    write_recipes(tmp_path)
    for source, place in (("student", paths.DD1_STUDENT), ("tokenizer", paths.TOKENIZER)):
        place.parent.mkdir(parents=True)
        shutil.copy(bundle.parent / "bundle-weights" / f"{source}.safetensors", place)
    torch.manual_seed(0)
    save_classifier(paths.CLASSIFIER, new_classifier(config.features).eval(), config.features)
    decision = Decision((), (), sha256_file(paths.DD1_STUDENT), None)
    write_json(paths.GATE_DECISION, decision.plain())
    write_json(paths.METRICS, {"protocol": {"name": "digits"}, "dd1_1step": {"fid": 7.5}})
    graph = load_graph(paths.DD1_STUDENT, paths.TOKENIZER, config.dd1.start_positions[:1], config.dd1.logit_prefix)
    labels_N = open_protocol(config.evaluate).labels(3, Conditions(10))
    draw = from_noise(graph, graph.student, graph.codebook_VC.shape[1])
    request = Request(labels_N, config.evaluate.batch_size)
    write_samples(paths.SAMPLES / "dd1_1step/seed3.npz", draw_batches(draw, request, 3, "pytorch"), labels_N)
    return tmp_path


@pytest.mark.slow
def test_the_exported_graph_is_judged_by_the_protocol(judged):
    exported = run_stage_here(judged, "export_onnx")
    assert exported.returncode == 0, exported.stderr
    report = json.loads((judged / paths.EXPORT_METRICS).read_text())
    assert report["sha256"] == {"model.onnx": sha256_file(paths.ONNX_BUNDLE / "model.onnx")}
    # Of the same noise: what is left is a pixel here and there that rounds to another level.
    assert report["fid_loss"] == report["exported"]["fid"] - report["pytorch"]["fid"]
    assert abs(report["fid_loss"]) < 1e-3 * report["pytorch"]["fid"]
    assert (report["protocol"]["name"], report["protocol"]["seeds"], report["samples"]) == ("digits", [3], FEW)
    assert report["exported"].keys() == report["pytorch"].keys() >= {"fid", "recall", "inception_score"}

    shutil.rmtree(paths.SAMPLES)
    config = load_config(paths.PARAMS)
    again = judge_exported(config.evaluate, config.export)
    assert (again["exported"], again["pytorch"]) == (report["exported"], None)
    assert comparable(again["protocol"], report["protocol"]) == []


@pytest.mark.slow
def test_a_graph_whose_fid_is_worse_is_no_export(judged, bundle, monkeypatch):
    """PyTorch's samples replaced by the real images: nothing drawn comes near their FID."""

    def at_hand(directory, *_):
        shutil.copytree(bundle, directory, dirs_exist_ok=True)
        return Parity(images=8, largest=1e-6, mean=1e-7, psnr=100.0, equal_tokens=1.0)

    monkeypatch.setattr(export_onnx, "write_bundle", at_hand)
    file = judged / paths.SAMPLES / "dd1_1step/seed3.npz"
    write_samples(file, [to_uint8(digits.load().images_NIHW)], open_samples(file).labels_N)
    refused = run_stage_here(judged, "export_onnx")
    assert refused.returncode == 1
    assert re.search(r"FID .*, PyTorch .* export\.max_fid_loss .*2\.0%", refused.stderr)
    assert not (judged / paths.ONNX_BUNDLE / "manifest.json").exists()
    assert not (judged / paths.EXPORT_METRICS).exists()
