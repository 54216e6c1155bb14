"""Bundles and the pipeline on them: the same images from every backend, and nothing that is damaged is used."""

import dataclasses
import json
import shutil
import subprocess

import numpy as np
import onnx
import pytest
import torch

from ddops import OneStepPipeline
from ddops.cli import main
from ddops.config.load import compose, write_params
from ddops.config.models import HeadConfig
from ddops.evaluation.gate import Decision, Verdict
from ddops.export.bundle import Sources, write_bundle
from ddops.export.errors import BundleError, ExportError
from ddops.export.manifest import read_manifest, write_manifest
from ddops.export.provenance import dvc_md5, judged, provenance
from ddops.extras import MissingExtra
from ddops.files import sha256_file, write_json
from ddops.inference import backends
from ddops.inference.seeds import to_pixels
from ddops.models.ar_diffusion import ARDiffusionGenerator, new_ar_diffusion
from ddops.models.weights_dd2 import as_backbone, save_generator
from ddops.sampling.few_step import sample_student
from ddops.sampling.noise import Stream, normals
from helpers.here import run_stage_here
from helpers.tiny import FAMILIES, PARAMS, tiny, untrained, write_recipes
from helpers.tiny_bundle import FACTS, make_bundle, pixels, save_sources


@pytest.fixture(scope="module")
def pipe(bundle):
    return OneStepPipeline.from_pretrained(bundle)


@pytest.fixture
def copy(bundle, tmp_path):
    """The bundle, to be spoilt. No links: spoiling must not reach the original."""
    return shutil.copytree(bundle, tmp_path / "copy")


# images


def expected(labels, seed, starts):
    """Straight from the definition: noise of (seed, index), the student's steps, the decoder, rounding."""
    teacher, student = untrained("llamagen")
    noise = normals(seed, Stream.SAMPLE_NOISE, np.arange(len(labels)), (16, 8))
    with torch.inference_mode():
        q = sample_student(student, teacher.codebook_VC, noise, torch.tensor(labels), starts, 8)
        return to_pixels(teacher.decode(q).clamp(-1, 1).numpy())[..., 0].astype(int)


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_the_images_are_those_of_the_definition(bundle, backend):
    """To one level of 255, which is what rounding can make of the export's tolerance."""
    pipe = OneStepPipeline.from_pretrained(bundle, backend=backend)
    wanted = expected([3, 7, 0], 11, (0,))
    assert np.abs(pixels(pipe, [3, 7, 0], seed=11) - wanted).max() <= 1
    assert wanted.std() > 20
    image = pipe([3]).images[0]
    assert (image.size, image.mode) == ((8, 8), "L")


def test_more_steps_in_pytorch_and_a_refusal_where_the_graph_has_one(bundle, pipe):
    two = OneStepPipeline.from_pretrained(bundle, backend="torch")
    assert np.abs(pixels(two, [3, 7], seed=2, steps=2) - expected([3, 7], 2, (0, 2))).max() <= 1
    with pytest.raises(BundleError, match=r"2 steps: .* takes 1; .* backend torch"):
        pipe([3], steps=2)
    for steps in (0, 3):
        with pytest.raises(BundleError, match=f"{steps} steps: this student takes 1 to 2"):
            two([3], steps=steps)


def test_in_bfloat16_the_images_stay_what_they_are_but_for_rounding(bundle):
    """Most pixels are within a few levels; where rounding decides a token otherwise, some are not."""
    pipe = OneStepPipeline.from_pretrained(bundle, backend="torch", precision="bfloat16")
    labels = list(range(10)) * 2
    difference = np.abs(pixels(pipe, labels, seed=2) - expected(labels, 2, (0,)))
    assert 0 < difference.mean() < 2
    assert np.quantile(difference, 0.95) <= 4


def test_bfloat16_is_refused_where_it_changes_the_images(bundle, monkeypatch):
    monkeypatch.setattr(backends, "BFLOAT16_BOUNDS", (80.0, 0.97))
    with pytest.raises(BundleError, match=r"PSNR [\d.]+ dB.* 80 dB and 97%"):
        OneStepPipeline.from_pretrained(bundle, backend="torch", precision="bfloat16")
    with pytest.raises(BundleError, match=r"precision bfloat16 .* torch.* onnx"):
        OneStepPipeline.from_pretrained(bundle, precision="bfloat16")
    with pytest.raises(BundleError, match="no precision 'float8'; valid: float32, bfloat16"):
        OneStepPipeline.from_pretrained(bundle, backend="torch", precision="float8")


def test_an_image_depends_on_its_seed_place_and_label_alone(pipe):
    labels = [1, 2, 3, 4, 5]
    together = pixels(pipe, labels, seed=5)
    assert np.abs(pixels(pipe, labels, seed=5, batch_size=2) - together).max() <= 1
    assert np.abs(pixels(pipe, [9, 9, 3], seed=5)[2] - together[2]).max() <= 1
    assert np.abs(pixels(pipe, [1, 1], seed=[5, 6])[0] - together[0]).max() <= 1
    assert np.abs(pixels(pipe, [1, 2], seed=6)[1] - together[1]).max() > 20
    assert np.array_equal(pixels(pipe, np.array(labels), seed=np.uint64(5)), together)


def test_a_device_that_is_not_there_leaves_the_pipeline_where_it_was(bundle):
    pipe = OneStepPipeline.from_pretrained(bundle, backend="torch")
    before = pixels(pipe, [1])
    with pytest.raises(BundleError, match="PyTorch cannot use device 'cuda' here"):
        pipe.to("cuda")
    assert np.array_equal(pixels(pipe, [1]), before)
    assert pipe.to("cpu") is pipe
    assert np.array_equal(pixels(pipe, [1]), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [10]}, "no class 10; there are 10, 0 to 9"),
        ({"class_labels": ["otter"]}, "these classes have no names"),
        ({"class_labels": [1], "seed": -1}, "a seed is an integer in"),
        ({"class_labels": [1], "seed": 2**64}, "a seed is an integer in"),
        ({"class_labels": [1, 2], "seed": [1]}, "1 seeds for 2 images"),
        ({"class_labels": "37"}, "a list"),
    ],
)
def test_a_wrong_request_is_explained(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorflow"}, "no backend 'tensorflow'; valid: torch, onnx, tensorrt"),
        ({"device": "tpu"}, "no device 'tpu' for ONNX Runtime; valid: cpu, cuda"),
        ({"device": "cuda"}, r"pip install 'ddops\[gpu\]'"),
        ({"backend": "torch", "device": "cuda"}, "PyTorch cannot use device 'cuda' here"),
        ({"backend": "torch", "device": "tpu"}, "PyTorch cannot use device 'tpu' here"),
    ],
)
def test_a_wrong_backend_or_device_is_explained(bundle, options, message):
    with pytest.raises((BundleError, MissingExtra), match=message):
        OneStepPipeline.from_pretrained(bundle, **options)


# the bundle


def test_the_manifest_and_the_models_metadata_say_where_it_comes_from(bundle):
    manifest = read_manifest(bundle)
    assert manifest.facts == FACTS
    model = onnx.load(bundle / "model.onnx")
    assert {entry.key: entry.value for entry in model.metadata_props} == FACTS
    assert (manifest.model.length, manifest.model.code_dim, manifest.model.image_size) == (16, 8, 8)
    assert (manifest.model.steps, manifest.model.start_positions) == (1, (0, 2))


def test_figures_of_another_student_are_not_named(tmp_path):
    export, metrics = tiny("llamagen").export, tmp_path / "metrics.json"
    assert judged(metrics, export, "ab") == {}
    metrics.write_text(json.dumps({"protocol": {"name": "digits"}, "models": {"dd2": "ab"}, "dd2_1step": {"fid": 2}}))
    export = dataclasses.replace(export, student="dd2")
    assert judged(metrics, export, "ab") == {"ddops.protocol": "digits", "ddops.fid": "2.0000"}
    assert judged(metrics, export, "cd") == {}
    assert judged(metrics, dataclasses.replace(export, steps=2), "ab") == {}


def test_provenance_names_preset_commit_weights_and_licence(tmp_path):
    export = tiny("llamagen").export
    (tmp_path / "dd1").mkdir()
    student = tmp_path / "dd1" / "student.safetensors"
    student.write_bytes(b"weights")
    lock = tmp_path / "dvc.lock"
    lock.write_text(json.dumps({"stages": {"distill_dd1": {"outs": [{"path": "dd1", "md5": "abc.dir"}]}}}))
    facts = provenance("digits", export, student, lock)
    assert "ddops.git_commit" not in facts
    assert facts["ddops.git_commit_missing"] == "not in a Git repository"
    assert facts["ddops.dvc_md5"] == "abc.dir"
    assert (facts["ddops.preset"], facts["ddops.license"]) == ("digits", "MIT")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.invalid", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert provenance("digits", export, student, lock)["ddops.git_commit"] == head
    assert dvc_md5(tmp_path / "elsewhere", lock) is None


@pytest.mark.parametrize("name", ["model.onnx", "student.safetensors"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_file_is_named_and_not_used(copy, name, how):
    path = copy / name
    content = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(content[:-1])
    backend = "torch" if name.startswith("student") else "onnx"
    with pytest.raises(BundleError, match=rf"{name}: (damaged or changed|missing)"):
        OneStepPipeline.from_pretrained(copy, backend=backend)


@pytest.mark.parametrize("content", ["", "{}", '{"format": 2}', "[1]"])
def test_a_manifest_that_is_none_is_refused(copy, content):
    (copy / "manifest.json").write_text(content)
    with pytest.raises(BundleError, match=r"manifest\.json: not a bundle's manifest"):
        read_manifest(copy)


@pytest.mark.slow
def test_an_export_that_fails_leaves_no_manifest(copy):
    """So that what was there before cannot be taken for what the weights are now."""
    with pytest.raises(ExportError, match=r"export\.tolerance allows 1e-12"):
        make_bundle(copy, tolerance=1e-12)
    with pytest.raises(BundleError, match="ddops export"):
        read_manifest(copy)


def test_noise_of_another_construction_is_refused(copy):
    """It would draw other images of the same seeds, and nobody would notice."""
    manifest = read_manifest(copy)
    write_manifest(copy, dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, noise="mt19937")))
    with pytest.raises(BundleError, match="the bundle's images are of noise 'mt19937'"):
        OneStepPipeline.from_pretrained(copy)


def test_saved_and_loaded_it_draws_the_same_and_has_a_card(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    assert np.array_equal(pixels(OneStepPipeline.from_pretrained(tmp_path / "saved"), [1, 2]), pixels(pipe, [1, 2]))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "FID 12.3456 by the protocol `digits`" in card
    assert "license: mit" in card
    assert "Steps start at [0, 2]" in card


def test_what_is_neither_a_directory_nor_a_hub_id_is_refused(tmp_path):
    with pytest.raises(BundleError, match="owner/name"):
        OneStepPipeline.from_pretrained(tmp_path / "nowhere" / "at all")


STUDENTS = {"dd1": "dd1/student", "dd2": "dd2/generator"}


@pytest.mark.slow
@pytest.mark.parametrize("student", ["dd1", pytest.param("dd2", marks=pytest.mark.rare)])
def test_the_command_exports_a_workspace(bundle, tmp_path, capsys, student):
    """One command from a student, whichever the preset names, to a bundle, as a user with trained weights runs it."""
    workspace = tmp_path / "workspace"
    sources = bundle.parent / "bundle-weights"
    for source, place in (("student", STUDENTS[student]), ("tokenizer", "teacher/tokenizer")):
        target = workspace / "artifacts" / f"{place}.safetensors"
        target.parent.mkdir(parents=True)
        shutil.copy(sources / f"{source}.safetensors", target)
    (workspace / "artifacts/teacher/transformer.safetensors").write_bytes(b"not needed")
    overrides = [
        *FAMILIES["llamagen"],
        "export.parity_count=4",
        f"export.student={student}",
        "export.max_fid_loss=null",
    ]
    write_params(compose(PARAMS, overrides), workspace / "params.yaml")
    write_recipes(workspace)
    weights = workspace / "artifacts" / f"{STUDENTS[student]}.safetensors"
    figures = {"protocol": {"name": "digits"}, "models": {student: sha256_file(weights)}}
    (workspace / "reports").mkdir()
    (workspace / "reports/metrics.json").write_text(json.dumps({**figures, f"{student}_2step": {"fid": 7.5}}))
    arguments = ["export", str(workspace), "--output", str(tmp_path / "out"), "--steps", "2", "--precision", "float16"]
    assert main([*arguments, "--target", "89"]) == 0
    said = capsys.readouterr().out
    assert "digits, 2 steps, float16; against PyTorch" in said
    assert "engine for 89" in said
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.model.steps, manifest.onnx.precision, manifest.engines[0].precision) == (2, "float16", "float16")
    assert manifest.facts["ddops.student"] == student
    assert (manifest.facts["ddops.protocol"], manifest.facts["ddops.fid"]) == ("digits", "7.5000")
    for wrong, message in (
        (["--steps", "9"], "--steps 9: dd1.start_positions (0, 2) allow 1 to 2"),
        (["--target", "90"], "builds for portable, current"),
        (["--max-batch", "0"], "--max-batch 0: at least 1"),
    ):
        assert main([*arguments[:4], *wrong]) == 1
        assert message in capsys.readouterr().err
    copy = ["engine", str(tmp_path / "out"), "--output", str(tmp_path / "copy"), "--target", "120"]
    assert main([*copy, "--max-batch", "2"]) == 0
    assert [engine.target for engine in read_manifest(tmp_path / "copy").engines] == ["89", "120"]
    assert read_manifest(tmp_path / "out") == manifest, "it stays as it was"


def test_from_the_hub(bundle, tmp_path, monkeypatch):
    """What the client asks of a real server. A hub that has nothing of that name is an explained error."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BundleError, match="me/model: "):
        OneStepPipeline.from_pretrained("me/model")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, revision: str(bundle))
    assert len(OneStepPipeline.from_pretrained("me/model")([1]).images) == 1
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, revision: str(tmp_path))
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        OneStepPipeline.from_pretrained("me/model")


# the stages


@pytest.mark.slow
@pytest.mark.parametrize("student", ["dd2", pytest.param("dd1", marks=pytest.mark.rare)])
def test_the_stages_export_what_the_gate_accepted_and_build_the_bundle(bundle, tmp_path, student):
    sources = bundle.parent / "bundle-weights"
    for source, place in (("student", STUDENTS[student]), ("tokenizer", "teacher/tokenizer")):
        target = tmp_path / "artifacts" / f"{place}.safetensors"
        target.parent.mkdir(parents=True)
        shutil.copy(sources / f"{source}.safetensors", target)
    overrides = [
        *FAMILIES["llamagen"],
        "export.parity_count=4",
        f"export.student={student}",
        "export.max_fid_loss=null",
    ]
    write_params(compose(PARAMS, overrides), tmp_path / "params.yaml")
    write_recipes(tmp_path)
    (tmp_path / "reports").mkdir()
    gate, metrics = tmp_path / "reports/gate.json", tmp_path / "reports/metrics.json"
    metrics.write_text(json.dumps({"protocol": {"name": "digits"}, f"{student}_1step": {"fid": 7.5}}))

    sha256 = sha256_file(tmp_path / "artifacts" / f"{STUDENTS[student]}.safetensors")
    missed = Verdict("near", f"{student}_1step.fid", 7.5, "at most 2", passed=False)
    write_json(gate, Decision((), (missed,), sha256, None).plain())
    refused = run_stage_here(tmp_path, "export_onnx")
    assert refused.returncode != 0
    assert "the gate refused this model" in refused.stderr
    assert not (tmp_path / "artifacts/onnx").exists()

    write_json(gate, Decision((), (), "0" * 64, None).plain())
    another = run_stage_here(tmp_path, "export_onnx")
    assert another.returncode == 1
    assert f"gate.json: judged {'0' * 12}, " in another.stderr, "a model that the gate did not judge is not exported"
    write_json(gate, Decision((), (), sha256, None).plain())
    exported = run_stage_here(tmp_path, "export_onnx")
    assert exported.returncode == 0, exported.stderr
    facts = read_manifest(tmp_path / "artifacts/onnx").facts
    assert (facts["ddops.fid"], facts["ddops.protocol"], facts["ddops.preset"]) == ("7.5000", "digits", "digits")
    report = json.loads((tmp_path / "reports/export.json").read_text())
    assert report["parity"]["equal_tokens"] == 1
    assert report["parity"]["psnr"] > 80

    built = run_stage_here(tmp_path, "build_engine")
    assert built.returncode == 0, built.stderr
    assert json.loads((tmp_path / "reports/engines.json").read_text()) == {"flavour": "tensorrt_rtx", "engines": []}
    assert read_manifest(tmp_path / "artifacts/bundle").engines == ()
    assert len(OneStepPipeline.from_pretrained(tmp_path / "artifacts/bundle")([1]).images) == 1


@pytest.mark.slow
def test_a_dd2_generator_exports_as_a_dd1_student_does(tmp_path):
    """The AR-diffusion model as a generator: the same graph's inputs and outputs, the same parity."""
    config = tiny("llamagen")
    teacher = as_backbone(untrained("llamagen")[0])
    torch.manual_seed(1)
    model = new_ar_diffusion(teacher, HeadConfig(width=32, blocks=1, predicts="embedding"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    generator = ARDiffusionGenerator(model)
    sources = save_sources(tmp_path / "weights")
    save_generator(tmp_path / "generator.safetensors", generator.state_dict(), config.teacher.model, model.head.config)
    sources = Sources(tmp_path / "generator.safetensors", sources.tokenizer, (0,), 0)
    export = dataclasses.replace(config.export, parity_count=4)
    parity = write_bundle(tmp_path / "bundle", sources, export, FACTS)
    assert parity.largest < 1e-4
    torch_pipe = OneStepPipeline.from_pretrained(tmp_path / "bundle", backend="torch")
    onnx_pipe = OneStepPipeline.from_pretrained(tmp_path / "bundle")
    assert np.abs(pixels(torch_pipe, [1, 2]) - pixels(onnx_pipe, [1, 2])).max() <= 1
